"""TensorBoard's event files, written so that what was flushed is on disk: a trial may be killed any moment.

Uses TensorBoard's own parts; none of them imports TensorFlow.
"""

import os
import struct
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.summary.writer.record_writer import RecordWriter

PREFIX = "events.out.tfevents."


class EventFile:
    """The events of the steps after `done`, in a file of their own. What a killed process wrote of those
    steps is cut off its file."""

    def __init__(self, folder: Path, done: int) -> None:
        for file in folder.glob(f"{PREFIX}*"):
            os.truncate(file, bytes_until(file.read_bytes(), done))
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = open(folder / f"{PREFIX}{done:06}", "wb")  # noqa: SIM115 - closed in __exit__
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def histogram(self, tag: str, values: NDArray[np.floating], step: int) -> None:
        self._add(histogram_pb(tag, values), step)

    def flush(self) -> None:
        """Everything so far is on disk after it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _add(self, summary: Summary, step: int) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


def bytes_until(content: bytes, step: int) -> int:
    """How many bytes of an event file hold whole events up to `step`.

    A record is its length (uint64), a checksum (uint32), an event, and a checksum of that.
    """
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content) or Event.FromString(content[start + 12 : end - 4]).step > step:
            break
        start = end
    return start
