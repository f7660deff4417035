"""One video file -> the pictures of its clips, and what could not be decoded.

Every packet is listed first, which is cheap and right where headers are wrong. Then only what the clips'
frames need is decoded, once, however many clips the file is cut into: a seek where a keyframe lies
between here and the next target, and packets that are not targets are skipped as far as other frames do
not need them (`frames.PacketIndex`). The pictures equal those of a full decode; where a target does not
arrive and nothing is damaged, the times were wrong, and a full decode tells the true ones.

Runs inside the killable child of `sandbox.py`, so it imports only what decoding needs, and it may
crash, hang or grow without harm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raypipe.containers import DecodeError, Reason, content_digest, open_regular
from raypipe.frames import (
    FrameReader,
    FullDecode,
    PacketIndex,
    Pictures,
    TimesAreWrong,
    VideoFacts,
    libav_messages,
)
from raypipe.sampling import FramePlan, Policy, Window, plan_frames, plan_windows

MOTION_GAIN = 1.5
"""Motion pictures are 127 + gain * (later - earlier); measured on real fights, flat from 1 to 4."""
MOTION_SHADES = np.clip(np.rint(127 + MOTION_GAIN * np.arange(-255, 256)), 0, 255).astype(np.uint8)
"""What each difference from -255 to 255 is shown as: looking it up takes a third of computing it."""


@dataclass(frozen=True)
class ClipRequest:
    """What to make of a file: clips of `frames` moments of `size` x `size` pixels, as `view` shows them."""

    frames: int
    size: int
    view: Literal["rgb", "motion", "both"]
    motion_gap_s: float
    min_frames: int
    max_pixels: int
    max_packets: int
    max_duration_s: float
    window_s: float | None = None
    """Seconds a clip; without, the whole video is one."""
    stride_s: float | None = None
    """Seconds from one clip's start to the next one's; without, `window_s`."""
    policy: Policy = "uniform"
    sample_fps: float | None = None
    """Frames a second, for the policy fps."""

    @property
    def pictures_shape(self) -> tuple[int, int, int, int]:
        """[V*T, H, W, 3]: with `both` the T frames, then the T motion pictures."""
        return (self.frames * (2 if self.view == "both" else 1), self.size, self.size, 3)


@dataclass(frozen=True)
class ClipSpan:
    """Which clip of its video, from 0, and its seconds from the first frame."""

    index: int
    is_last: bool
    start_s: float
    end_s: float


@dataclass(frozen=True)
class DecodedClip:
    """The pictures [V*T, H, W, 3] uint8 RGB of one clip, and where they are from."""

    span: ClipSpan
    pictures: Pictures
    frame_pts_s: list[float]
    """[T] seconds from the video's first frame."""
    frame_ok: list[bool]
    """[T] False where the last good frame stands in for one that could not be decoded."""
    facts: VideoFacts
    content_digest: str
    """Of the file's size, first and last bytes: equal for copies under other names."""
    message: str | None
    """The decoder's complaints, where it had any."""


@dataclass(frozen=True)
class FailedClip:
    """A clip that gives nothing, in a video with several."""

    span: ClipSpan
    reason: Reason
    message: str


def decode_clips(
    path: str, request: ClipRequest, *, first: int = 0, out: Pictures | None = None
) -> Iterator[DecodedClip | FailedClip]:
    """The clips of the file at `path` (a local path or a URI), from clip number `first` on.

    With `out`, of `request.pictures_shape`, each clip's pictures take the place of the last one's.
    Raises DecodeError where the file gives none at all.
    """
    with open_regular(path) as file, libav_messages() as messages:
        digest = content_digest(file)
        reader = FrameReader(
            file,
            path,
            messages,
            size=request.size,
            max_pixels=request.max_pixels,
            max_packets=request.max_packets,
        )
        try:
            yield from _decode(reader, request, digest, first, out)
        except MemoryError as error:
            raise DecodeError("out_of_memory", str(error) or "out of memory") from None
        finally:
            reader.container.close()


def _decode(
    reader: FrameReader, request: ClipRequest, digest: str, first: int, out: Pictures | None
) -> Iterator[DecodedClip | FailedClip]:
    packets = reader.scan_packets()
    source = PacketIndex(reader, packets) if reader.has_times(packets) else FullDecode(reader)
    timeline = Timeline(reader, source, request)
    # The spans stay these, even where other times turn out to be the true ones later.
    windows = timeline.windows
    for index, window in enumerate(windows[first:], start=first):
        span = ClipSpan(index, index + 1 == len(windows), window.start_s, window.end_s)
        try:
            try:
                plan, pictures = timeline.read(span.start_s)
            except TimesAreWrong:
                timeline = Timeline(reader, FullDecode(reader), request)
                plan, pictures = timeline.read(span.start_s)
            yield _decoded_clip(reader, request, span, plan, pictures, timeline.times_s, digest, out)
        except DecodeError as error:
            if len(windows) == 1:
                raise
            yield FailedClip(span, error.reason, str(error))


def _decoded_clip(
    reader: FrameReader,
    request: ClipRequest,
    span: ClipSpan,
    plan: FramePlan,
    pictures: dict[int, Pictures],
    times_s: NDArray[np.float64],
    digest: str,
    out: Pictures | None,
) -> DecodedClip:
    """The clip, damage repaired. Raises DecodeError where too little of it is real."""
    message = reader.take_message()
    if not reader.frames_out:
        raise DecodeError("no_frames", message or "no frame could be decoded")
    real = np.isin(plan.frames, list(pictures))
    frame_ok = real if plan.partners is None else real & np.isin(plan.partners, list(pictures))
    needed = min(request.min_frames, len(np.unique(plan.frames)))
    if frame_ok.sum() < max(1, needed):
        found = f"{int(frame_ok.sum())} of {request.frames} frames could be decoded"
        raise DecodeError("damaged", f"{found}; {message}" if message else found)
    return DecodedClip(
        span=span,
        pictures=assemble(
            pictures,
            plan,
            frame_ok,
            request.view,
            out=np.empty(request.pictures_shape, np.uint8) if out is None else out,
        ),
        frame_pts_s=times_s[plan.frames].tolist(),
        frame_ok=frame_ok.tolist(),
        facts=reader.facts(times_s),
        content_digest=digest,
        message=message,
    )


def assemble(
    pictures: dict[int, Pictures], plan: FramePlan, frame_ok: NDArray[np.bool_], view: str, out: Pictures
) -> Pictures:
    """The clip's pictures in `out`, in order; bad steps repeat the last good one, or the first."""
    steps = np.arange(len(frame_ok))
    first_good = int(frame_ok.argmax())
    source = np.maximum(np.maximum.accumulate(np.where(frame_ok, steps, -1)), first_good)
    frames = [pictures[int(position)] for position in plan.frames[source]]
    if view != "motion":
        np.stack(frames, out=out[: len(frames)])
    if plan.partners is not None:
        later = [pictures[int(position)] for position in plan.partners[source]]
        for frame, partner, place in zip(frames, later, out[-len(frames) :], strict=True):
            motion_picture(frame, partner, out=place)
    return out


def motion_picture(earlier: Pictures, later: Pictures, *, out: Pictures | None = None) -> Pictures:
    """The signed difference of two frames as a picture: 127 where nothing moved."""
    difference = np.subtract(later, earlier, dtype=np.int16)
    difference += 255
    return np.take(MOTION_SHADES, difference, out=out, mode="clip")


class Timeline:
    """The times of a video's frames, the clips they make, and the pictures that neighbouring clips share.

    A frame is named by its position [0, N) in time.
    """

    def __init__(self, reader: FrameReader, source: PacketIndex | FullDecode, request: ClipRequest) -> None:
        self.times_s = reader.seconds(source.pts)
        duration_s = reader.duration_s(self.times_s)
        if duration_s > request.max_duration_s:
            limit = f"--max-duration-s {request.max_duration_s:g}"
            raise DecodeError("too_large", f"its frames span {duration_s:.1f} s, more than {limit}")
        self.windows = plan_windows(
            self.times_s, duration_s, window_s=request.window_s, stride_s=request.stride_s
        )
        self._keyframes = source.keyframes if request.policy == "keyframes" else None
        self._plans = {window.start_s: self._plan(window, request) for window in self.windows}
        self._kept_from = {window.start_s: after.first for window, after in pairwise(self.windows)}
        self._pictures: dict[int, Pictures] = {}
        self._source = source
        self._has_begun = False

    def _plan(self, window: Window, request: ClipRequest) -> FramePlan:
        gap_s = None if request.view == "rgb" else request.motion_gap_s
        keyframes = self._keyframes
        if keyframes is not None:
            inside = (window.first <= keyframes) & (keyframes < window.stop)
            keyframes = keyframes[inside] - window.first
        plan = plan_frames(
            self.times_s[window.first : window.stop],
            count=request.frames,
            motion_gap_s=gap_s,
            policy=request.policy,
            fps=request.sample_fps,
            keyframes=keyframes,
        )
        return plan.shifted(window.first)

    def read(self, start_s: float) -> tuple[FramePlan, dict[int, Pictures]]:
        """The clip that starts there: its frames, and the pictures of those that are real.

        Clips are read in their order. Raises TimesAreWrong.
        """
        plan = self._plans.get(start_s)
        if plan is None:
            raise DecodeError("no_frames", "no frame could be decoded there")
        if not self._has_begun:  # perhaps in the midst of the file: pictures of clips before are not made
            later = [plan.wanted for begin_s, plan in self._plans.items() if begin_s >= start_s]
            self._source.want(np.unique(np.concatenate(later)).tolist())
            self._has_begun = True
        wanted = plan.wanted.tolist()
        self._pictures |= self._source.read([p for p in wanted if p not in self._pictures])
        pictures = {p: self._pictures[p] for p in wanted if p in self._pictures}
        kept_from = self._kept_from.get(start_s, len(self.times_s))
        self._pictures = {p: picture for p, picture in self._pictures.items() if p >= kept_from}
        return plan, pictures
