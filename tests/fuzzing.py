"""Hostile files through the sandbox, and what may never happen then.

For test_fuzz.py and benchmarks/fuzz.py.
"""

import contextlib
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import av
import numpy as np
from clips import write_video
from mutations import Source

from raypipe.containers import DecodeError, Reason
from raypipe.decode import ClipRequest, DecodedClip, FailedClip
from raypipe.sandbox import Limits, Sandbox

REQUEST = ClipRequest(
    frames=4,
    size=64,
    view="rgb",
    motion_gap_s=0.1,
    min_frames=2,
    max_pixels=1 << 24,
    max_packets=100_000,
    max_duration_s=172800.0,
)
LIMITS = Limits(timeout_s=10, max_memory_mb=1024)
MARGIN_S = 10.0
"""What a clip may take beyond its time limit, to start two children on a busy machine."""
MESSAGE_CHARACTERS = 500

GROUPS = {"g": "12", "bf": "2"}
# x264's assembler for this processor looks ahead a little differently now and then.
H264 = GROUPS | {"x264-params": "cpu-independent=1"}
FAST = {"deadline": "good", "cpu-used": "5"}  # "realtime" encodes by the clock
GENERATED = (
    ("h264.mp4", "libx264", H264),
    ("h264-index-first.mp4", "libx264", H264),
    ("h264.mkv", "libx264", H264),
    ("h264.ts", "libx264", H264),
    ("h264.flv", "libx264", H264 | {"bf": "0"}),
    ("h264.avi", "libx264", H264),
    ("raw.h264", "libx264", H264),
    ("hevc.mp4", "libx265", {"x265-params": "log-level=none:keyint=12"}),
    ("mpeg4.avi", "mpeg4", GROUPS),
    ("vp8.webm", "libvpx", FAST),
    ("vp9.webm", "libvpx-vp9", FAST),
    ("vp8.ogg", "libvpx", FAST),
    ("mpeg2.mpg", "mpeg2video", {"g": "12"}),
    ("mpeg2.mxf", "mpeg2video", {"g": "12"}),
    ("wmv2.wmv", "wmv2", {"g": "12"}),
    ("flv1.flv", "flv", {"g": "12"}),
    ("ffv1.nut", "ffv1", {}),
)
"""Name, codec and its options."""


RANDOM_CONTAINERS = (".mkv", ".webm", ".ogg", ".mxf")
"""They name themselves at random unless told not to."""


def write_sources(folder: Path) -> list[Path]:
    """Small whole videos in many containers and codecs, the same bytes each time."""
    return [write_source(folder / name, codec=codec, options=options) for name, codec, options in GENERATED]


def write_source(path: Path, *, codec: str, options: Mapping[str, str]) -> Path:
    is_random = path.suffix in RANDOM_CONTAINERS
    written = write_video(
        path.with_suffix(".nut") if is_random else path,
        codec=codec,
        options=options,
        frames=30,
        size=(96, 64),
        index_first="first" in path.name,
    )
    if is_random:
        remux(written, path, fflags="+bitexact")
        written.unlink()
    return path


def remux(source: Path, target: Path, **options: str) -> Path:
    """The video stream of a file in another container, its packets as they are."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def read_sources(paths: list[Path]) -> list[Source]:
    return [Source(path.name, path.read_bytes()) for path in paths]


class WatchedSandbox(Sandbox):
    """Remembers its children, how each was lost, and how much memory they took."""

    def __init__(
        self,
        request: ClipRequest = REQUEST,
        limits: Limits = LIMITS,
        *,
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(request, limits)
        self.pids: list[int] = []
        self.lost: list[str] = []
        self._on_start = on_start
        self._peak_mb = 0.0

    def peak_mb(self) -> float:
        """The most resident memory that a child has had since this was asked last."""
        self._note_peak()
        if self._child:
            with contextlib.suppress(OSError):
                # The kernel's way to forget a peak (proc(5), clear_refs).
                Path(f"/proc/{self._child.pid}/clear_refs").write_text("5")
        peak_mb, self._peak_mb = self._peak_mb, 0.0
        return peak_mb

    def _note_peak(self) -> None:
        if self._child:
            with contextlib.suppress(OSError):  # it has died
                status = Path(f"/proc/{self._child.pid}/status").read_text()
                found = re.search(r"VmHWM:\s+(\d+) kB", status)
                self._peak_mb = max(self._peak_mb, int(found[1]) / 1024 if found else 0.0)

    def _start(self) -> "subprocess.Popen[bytes]":
        child = super()._start()
        self.pids.append(child.pid)
        if self._on_start:
            self._on_start(child.pid)
        return child

    def _lost(self, reason: Reason):  # type: ignore[no-untyped-def]
        lost = super()._lost(reason)
        self.lost.append(f"{lost.reason}: {lost.message}")
        return lost

    def _kill(self) -> None:
        self._note_peak()
        super()._kill()


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    reason: str
    """`ok`, `partial` (some frames or clips are missing), or why it gave nothing."""
    message: str
    clips: int
    wall_s: float
    cpu_s: float
    """Of the children that answered; a killed one cannot be asked."""
    slowest_clip_s: float
    peak_mb: float
    lost: tuple[str, ...]
    """How each child that did not survive the file ended."""
    defects: tuple[str, ...]
    """What may never happen and did."""


def run_case(
    sandbox: WatchedSandbox, path: str, *, request: ClipRequest = REQUEST, limits: Limits = LIMITS
) -> Outcome:
    """Decodes one file to its end and looks at all that comes back."""
    lost_before, defects, clips = len(sandbox.lost), [], []
    started_s, spent_s = time.monotonic(), sandbox.cpu_s()
    waits_s: list[float] = []
    reason, message = "", ""
    try:
        for clip, wait_s in timed(sandbox.decode(path)):
            clips.append(clip)
            waits_s.append(wait_s)
    except DecodeError as error:
        reason, message = error.reason, str(error)
        waits_s.append(time.monotonic() - started_s)
        defects += reason_defects(reason, message)
        if clips:
            defects.append(f"an error after {len(clips)} clips")
    except Exception as error:  # what else could come out is a defect, and the next file's turn comes
        reason, message = type(error).__name__, str(error)
        defects.append(f"{reason} came out of the sandbox: {message}")
    else:
        defects += clip_defects(clips, request)
        whole = all(isinstance(clip, DecodedClip) and all(clip.frame_ok) for clip in clips)
        reason = "ok" if whole else "partial"
        message = "; ".join(clip.message for clip in clips if clip.message)
    if waits_s and max(waits_s) > 2 * limits.timeout_s + MARGIN_S:
        defects.append(f"{max(waits_s):.1f} s for one clip")
    return Outcome(
        reason=reason,
        message=message,
        clips=len(clips),
        wall_s=time.monotonic() - started_s,
        cpu_s=sandbox.cpu_s() - spent_s,
        slowest_clip_s=max(waits_s, default=0.0),
        peak_mb=sandbox.peak_mb(),
        lost=tuple(sandbox.lost[lost_before:]),
        defects=tuple(dict.fromkeys(defects)),
    )


def timed(clips: Iterator[DecodedClip | FailedClip]) -> Iterator[tuple[DecodedClip | FailedClip, float]]:
    """Each clip with the seconds it was waited for."""
    since_s = time.monotonic()
    for clip in clips:
        yield clip, time.monotonic() - since_s
        since_s = time.monotonic()


def reason_defects(reason: str, message: str) -> list[str]:
    """What is wrong with the way in which a failure is told."""
    found = [] if reason in get_args(Reason) else [f"unknown reason {reason}"]
    return found + message_defects(message)


def message_defects(message: str) -> list[str]:
    """A message is one line that a person can read: no exception's name, no traceback, no novel."""
    rules = (
        (not message.strip(), "an empty message"),
        (not message.isprintable(), "a message with control characters"),
        (len(message) > MESSAGE_CHARACTERS, f"a message of more than {MESSAGE_CHARACTERS} characters"),
        (re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", message), "a message that names an exception"),
        (re.search(r"Traceback|File \"", message), "a message with a traceback"),
    )
    return [f"{text}: {message[:200]!r}" for broken, text in rules if broken]


def clip_defects(clips: list[DecodedClip | FailedClip], request: ClipRequest) -> list[str]:
    """What is wrong with the clips of one file."""
    defects: list[str] = []
    expected = [(index, index + 1 == len(clips)) for index in range(len(clips))]
    if not clips or [(clip.span.index, clip.span.is_last) for clip in clips] != expected:
        defects.append("clips that are not numbered from 0 to a last one")
    if [clip.span.start_s for clip in clips] != sorted(clip.span.start_s for clip in clips):
        defects.append("clips that are not in order")
    for clip in clips:
        if not (math.isfinite(clip.span.end_s) and 0 <= clip.span.start_s <= clip.span.end_s):
            defects.append(f"a clip from {clip.span.start_s} s to {clip.span.end_s} s")
        if isinstance(clip, FailedClip):
            defects += reason_defects(clip.reason, clip.message)
        else:
            defects += decoded_defects(clip, request)
    return defects


def decoded_defects(clip: DecodedClip, request: ClipRequest) -> list[str]:
    facts, times_s = clip.facts, np.array(clip.frame_pts_s)
    rules = (
        (clip.pictures.shape == request.pictures_shape and clip.pictures.dtype == np.uint8, "pictures"),
        (len(clip.frame_ok) == len(times_s) == request.frames, "frames"),
        (any(clip.frame_ok), "no frame that is real"),
        (np.isfinite(times_s).all() and (times_s >= 0).all(), f"times {times_s}"),
        ((np.diff(times_s) >= 0).all(), f"times that do not ascend: {times_s}"),
        ((times_s <= clip.span.end_s + 1e-6).all(), f"times {times_s} after {clip.span.end_s} s"),
        (0 < facts.width * facts.height <= request.max_pixels, f"{facts.width}x{facts.height} pixels"),
        (math.isfinite(facts.fps) and facts.fps >= 0, f"{facts.fps} frames a second"),
        (0 < facts.frame_count <= request.max_packets, f"{facts.frame_count} frames"),
        (0 <= facts.duration_s <= request.max_duration_s, f"a duration of {facts.duration_s} s"),
        (bool(facts.codec and facts.container), "no name of codec or container"),
        (re.fullmatch("[0-9a-f]{16}", clip.content_digest), "no digest"),
    )
    wrong = [f"a clip with wrong {text}" for right, text in rules if not right]
    return wrong + ([] if clip.message is None else message_defects(clip.message))


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_files(pid: int) -> set[str]:
    """What a process has open right now."""
    try:
        links = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        return {os.readlink(link) for link in links if os.path.lexists(link)}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()


def own_descriptors() -> set[str]:
    """The pipes and files that this process has open: what a sandbox opens. Threads of libraries that other
    tests have loaded come and go with sockets and the like, and with files below /proc and /sys."""
    elsewhere = ("/proc", "/sys", "/dev/null", "/dev/urandom")
    found = open_files(os.getpid())
    return {name for name in found if name.startswith(("/", "pipe:")) and not name.startswith(elsewhere)}
