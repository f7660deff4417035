"""What a person sees: log lines, one live line of progress, and how a command ends."""

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from raypipe.errors import UserError
from raypipe.storage import RemotePath

LOG = logging.getLogger("raypipe")


def setup_logging() -> None:
    """Log lines to standard error: time, level where it matters, message."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"{record.levelname.lower()}: {line}" if record.levelno >= logging.WARNING else line


class LiveLine:
    """Text that is rewritten in place on a terminal; elsewhere a log line every `plain_s` seconds."""

    def __init__(self, *, plain_s: float = 10.0) -> None:
        self._plain_s = plain_s
        self._terminal = sys.stderr.isatty()
        self._last_s = time.monotonic()
        self._shown: list[str] = []

    def show(self, text: str, *, plain: str = "") -> None:
        """Puts the text in the place of what was shown, cut to the terminal's width and height. Elsewhere it
        is the one line `plain`, where that is given."""
        if self._terminal:
            columns, rows = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in text.splitlines()[: rows - 1]]
            sys.stderr.write(self._erasing(columns) + "\n".join(lines))
            sys.stderr.flush()
            self._shown = lines
        elif time.monotonic() - self._last_s >= self._plain_s:
            self._last_s = time.monotonic()
            LOG.info(plain or text)

    def close(self) -> None:
        """Clears what is shown; what follows starts on a clean line."""
        if self._shown:
            sys.stderr.write(self._erasing(shutil.get_terminal_size().columns))
            sys.stderr.flush()
            self._shown = []

    def _erasing(self, columns: int) -> str:
        """To the first line shown, and all from there is cleared. A terminal that has become narrower has
        broken lines in several."""
        rows = sum(max(1, -(-len(line) // columns)) for line in self._shown)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"


def duration(seconds: float) -> str:
    """
    >>> duration(20), duration(3725)
    ('0:20', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def shown_path(path: Path | RemotePath) -> str:
    """A path as a person would type it: relative where it lies in the working folder."""
    if isinstance(path, RemotePath):
        return str(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def resume_command(folder: Path | RemotePath) -> str:
    """What to type for a search to go on; an address may hold what a shell takes for its own."""
    return f"python -m raypipe.tune --resume {shlex.quote(shown_path(folder))}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(text_table([["a", "b"], ["long", "1"]]))
    a     b
    long  1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


TENSORFLOW_GREETINGS = (b"absl::", b"port.cc", b"cpu_feature_guard", b"To enable the following instructions")
"""What TensorFlow prints when it is loaded, whatever its log level is."""


@contextmanager
def without_lines(*marks: bytes) -> Iterator[None]:
    """Holds standard error back, also what libraries in C write there, and then lets all of it through but
    the lines with one of these marks."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb") as screen:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen.fileno(), 2)
            held.seek(0)
            screen.writelines(line for line in held if not any(mark in line for mark in marks))


GO_ON = "what was finished is kept, run the same command to go on"


def run_command(main: Callable[[], object], *, when_stopped: str = GO_ON) -> None:
    """Runs a command and exits: 0 done, 1 failed, 2 wrong use. A person's mistake has no traceback."""
    setup_logging()
    stopped_by = "Ctrl-C"

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by  # the exception itself may not arrive: Ray raises one of its own for it
        stopped_by = signal.Signals(number).name
        raise KeyboardInterrupt(stopped_by)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\nstopped by {str(stop) or stopped_by}; {when_stopped}\n")
        sys.exit(1)
