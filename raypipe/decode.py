"""One video file -> the pictures of one clip, and the outcome (PyAV).

Every packet is listed first (`scan_packets`), which is cheap and right where headers are wrong. Then
only what the sampled frames need is decoded: a seek where a keyframe lies between here and the next
target, and packets that are not targets are skipped as far as other frames do not need them. The
pictures equal those of a full decode; where a target does not arrive, a full decode replaces the plan.

Runs inside the killable child of `sandbox.py`, so it imports only what decoding needs, and it may
crash, hang or grow without harm.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, Literal, cast

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from raypipe.containers import (
    DecodeError,
    content_digest,
    open_container,
    open_regular,
    video_stream,
    words,
)
from raypipe.sampling import FramePlan, plan_frames

Pictures = NDArray[np.uint8]

# Decoders that drop a frame nobody refers to and nothing else. dav1d drops shown frames with it.
SKIPPABLE_CODECS = frozenset({"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"})

MOTION_GAIN = 1.5
"""Motion pictures are 127 + gain * (later - earlier); measured on real fights, flat from 1 to 4."""


@dataclass(frozen=True)
class ClipRequest:
    """What to make of a file: `frames` moments of `size` x `size` pixels, as `view` shows them."""

    frames: int
    size: int
    view: Literal["rgb", "motion", "both"]
    motion_gap_s: float
    min_frames: int
    max_pixels: int
    max_packets: int

    @property
    def pictures_shape(self) -> tuple[int, int, int, int]:
        """[V*T, H, W, 3]: with `both` the T frames, then the T motion pictures."""
        return (self.frames * (2 if self.view == "both" else 1), self.size, self.size, 3)


@dataclass(frozen=True)
class VideoFacts:
    """What the decoder saw, not what the header claims. Sizes are as displayed, after rotation."""

    width: int
    height: int
    rotation: int
    fps: float
    frame_count: int
    duration_s: float
    codec: str
    container: str


@dataclass(frozen=True)
class DecodedClip:
    """The pictures [V*T, H, W, 3] uint8 RGB of one clip, and where they are from."""

    pictures: Pictures
    frame_pts_s: list[float]
    """[T] seconds from the first frame."""
    frame_ok: list[bool]
    """[T] False where the last good frame stands in for one that could not be decoded."""
    facts: VideoFacts
    content_digest: str
    """Of the file's size, first and last bytes: equal for copies under other names."""
    message: str | None
    """The decoder's complaints, where it had any."""


def decode_clip(path: str, request: ClipRequest) -> DecodedClip:
    """Decodes one clip of the file at `path` (a local path or a URI). Raises DecodeError."""
    with open_regular(path) as file:
        digest = content_digest(file)
        reader = FrameReader(file, path, request)
        try:
            return _decode(reader, request, digest)
        except MemoryError as error:
            raise DecodeError("out_of_memory", str(error) or "out of memory") from None
        finally:
            reader.container.close()


def _decode(reader: "FrameReader", request: ClipRequest, digest: str) -> DecodedClip:
    gap_s = None if request.view == "rgb" else request.motion_gap_s
    packets = reader.scan_packets()
    pts = np.unique([p.pts for p in packets if p.pts is not None]).astype(np.int64)
    exact = reader.is_timed and len(packets) > 0 and all(p.pts is not None for p in packets)

    pictures: dict[int, Pictures] = {}
    plan = None
    if exact:
        plan = plan_frames(reader.seconds(pts), count=request.frames, motion_gap_s=gap_s)
        pictures = reader.read_planned(packets, [int(v) for v in pts[plan.wanted]])
    if plan is None or len(pictures) < len(plan.wanted):
        # No times, packets that show nothing, or damage: decode all of it, and see what there is.
        shown = reader.read_all_times()
        if not shown:
            raise DecodeError("no_frames", reader.message or "no frame could be decoded")
        if plan is None or reader.numbered or not reader.complaints:
            pts = np.asarray(shown, np.int64)
            plan = plan_frames(reader.seconds(pts), count=request.frames, motion_gap_s=gap_s)
        pictures |= reader.read_by_time([int(v) for v in pts[plan.wanted]])

    good = np.isin(np.arange(len(pts)), [i for i in plan.wanted if int(pts[i]) in pictures])
    frame_ok = good[plan.frames] if plan.partners is None else good[plan.frames] & good[plan.partners]
    needed = min(request.min_frames, len(np.unique(plan.frames)))
    if frame_ok.sum() < max(1, needed):
        message = f"{int(frame_ok.sum())} of {request.frames} frames could be decoded"
        raise DecodeError("damaged", f"{message}; {reader.message}" if reader.message else message)
    times_s = reader.seconds(pts)
    return DecodedClip(
        pictures=assemble(pictures, plan, [int(v) for v in pts], frame_ok, request.view),
        frame_pts_s=times_s[plan.frames].tolist(),
        frame_ok=frame_ok.tolist(),
        facts=reader.facts(times_s),
        content_digest=digest,
        message=reader.message,
    )


def assemble(
    pictures: dict[int, Pictures],
    plan: FramePlan,
    pts: list[int],
    frame_ok: NDArray[np.bool_],
    view: str,
) -> Pictures:
    """The clip's pictures in order; a step that is not ok repeats the last good one, or the first."""
    steps = np.arange(len(frame_ok))
    first_good = int(frame_ok.argmax())
    source = np.maximum(np.maximum.accumulate(np.where(frame_ok, steps, -1)), first_good)
    parts = []
    if view != "motion":
        parts += [pictures[pts[plan.frames[t]]] for t in source]
    if view != "rgb":
        assert plan.partners is not None
        pairs = [(pictures[pts[plan.frames[t]]], pictures[pts[plan.partners[t]]]) for t in source]
        parts += [motion_picture(earlier, later) for earlier, later in pairs]
    return np.stack(parts)


def motion_picture(earlier: Pictures, later: Pictures) -> Pictures:
    """The signed difference of two frames as a picture: 127 where nothing moved."""
    difference = later.astype(np.float32) - earlier.astype(np.float32)
    picture: Pictures = np.clip(np.rint(127 + MOTION_GAIN * difference), 0, 255).astype(np.uint8)
    return picture


# --- packets and frames -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PacketEntry:
    """One packet in file order."""

    pts: int | None
    is_keyframe: bool


class FrameReader:
    """Reads one video stream: its packets, then chosen frames as `size` x `size` RGB."""

    def __init__(self, file: BinaryIO, path: str, request: ClipRequest) -> None:
        self._file, self._path, self._request = file, path, request
        self.complaints: list[str] = []
        """What the demuxer and the decoder said was wrong."""
        self.shown: VideoFrame | None = None
        """The first frame that was decoded."""
        self.numbered = False
        """True once the stream has shown frames without usable times: `pts` then means their number."""
        self._open()

    def _open(self) -> None:
        self._file.seek(0)
        self.container = open_container(self._file, self._path)
        self.stream = video_stream(self.container, self._request.max_pixels)

    @property
    def message(self) -> str | None:
        unique = list(dict.fromkeys(self.complaints))
        return "; ".join(unique[:3]) or None

    @property
    def is_timed(self) -> bool:
        """False where packets bear wrong times: AVI has none, and for these codecs file order is given."""
        codec = self.stream.codec_context.codec.canonical_name
        return self.container.format.name != "avi" or codec not in ("h264", "hevc")

    def seconds(self, pts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds from the first frame. A raw stream has no clock, only a frame rate."""
        rate = self.stream.average_rate or Fraction(25)
        tick_s = 1 / rate if self.numbered else self.stream.time_base or 1 / rate
        times_s: NDArray[np.float64] = (pts - pts[0]).astype(np.float64) * float(tick_s)
        return times_s

    def scan_packets(self) -> list[PacketEntry]:
        """The packets in file order, without those that are never shown. Decodes nothing."""
        entries: list[PacketEntry] = []
        for packet in self._packets():
            if packet.is_discard:
                continue
            entries.append(PacketEntry(packet.pts, packet.is_keyframe))
            if len(entries) > self._request.max_packets:
                raise DecodeError("too_large", f"more than --max-packets {self._request.max_packets} frames")
        return entries

    def _packets(self) -> Iterator[Any]:
        """Packets with content, from here to the end or to where the file breaks off."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield packet
        except (av.error.FFmpegError, ValueError) as error:
            self.complaints.append(words(error))

    def read_planned(self, packets: list[PacketEntry], targets: list[int]) -> dict[int, Pictures]:
        """The frames shown at `targets` (ascending pts), by way of as few packets as possible."""
        order = {packet.pts: i for i, packet in enumerate(packets)}
        wanted, pictures = set(targets), cast(dict[int, Pictures], {})
        position = len(packets)  # the next packet to read: the scan left the file at its end
        shown_pts = targets[-1]  # the last frame that came out
        for target in targets:
            keyframe = keyframe_before(packets, order[target], target)
            if keyframe is None:
                break
            if target in pictures:
                continue
            if shown_pts >= target or keyframe > position:
                self._seek(cast(int, packets[keyframe].pts))
                position, shown_pts = keyframe, target - 1
            # else: its packet lies ahead, or was read and its frame waits inside the decoder
            for packet, frames in self._decode_stream(skip_all_but=wanted):
                position = order.get(packet.pts, position) + 1 if packet else len(packets)
                for frame in frames:
                    shown_pts = cast(int, frame.pts)
                    if shown_pts in wanted:
                        pictures.setdefault(shown_pts, self.picture(frame))
                if shown_pts >= target:
                    break
            if target not in pictures:
                break
        return pictures

    def read_all_times(self) -> list[int]:
        """The time of every frame that can be decoded, in order; its number where it has no time."""
        self._restart()
        pts = [frame.pts for _, frames in self._decode_stream() for frame in frames]
        self.numbered = not self.is_timed or any(p is None for p in pts) or len(set(pts)) < len(pts)
        return list(range(len(pts))) if self.numbered else sorted(cast(list[int], pts))

    def read_by_time(self, targets: list[int]) -> dict[int, Pictures]:
        """The frames at `targets` (as `read_all_times` names them) by decoding from the start."""
        self._restart()
        wanted, pictures, number = set(targets), {}, 0
        for _, frames in self._decode_stream():
            for frame in frames:
                name = number if self.numbered else cast(int, frame.pts)
                number += 1
                if name in wanted:
                    pictures[name] = self.picture(frame)
            if len(pictures) == len(wanted):
                break
        return pictures

    def _decode_stream(self, skip_all_but: set[int] | None = None) -> Iterator[tuple[Any, list[VideoFrame]]]:
        """From the current position on: each packet, and the good frames that came out with it."""
        context = self.stream.codec_context
        may_skip = skip_all_but is not None and context.codec.canonical_name in SKIPPABLE_CODECS
        context.skip_frame = "DEFAULT"
        for packet in self._packets():
            if may_skip and skip_all_but is not None:
                context.skip_frame = "DEFAULT" if packet.pts in skip_all_but else "NONREF"
            yield packet, self._good(self._decode_packet(packet))
        yield None, self._good(self._decode_packet(None))  # what still waits inside the decoder

    def _decode_packet(self, packet: Any) -> list[VideoFrame]:
        try:
            return self.stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except (av.error.FFmpegError, ValueError) as error:
            self.complaints.append(words(error))
            return []

    def _good(self, frames: Iterable[VideoFrame]) -> list[VideoFrame]:
        good = []
        for frame in frames:
            if frame.is_corrupt:
                self.complaints.append("corrupt frame")
                continue
            self.shown = self.shown or frame
            good.append(frame)
        return good

    def _seek(self, keyframe_pts: int) -> None:
        try:
            self.container.seek(keyframe_pts, stream=self.stream, backward=True)
        except (av.error.FFmpegError, ValueError) as error:
            self.complaints.append(f"seek: {words(error)}")
            self._restart()

    def _restart(self) -> None:
        """To the first packet. Raw streams cannot seek, so the file is opened again."""
        self.container.close()
        self._open()

    def picture(self, frame: VideoFrame) -> Pictures:
        """The frame upright, `size` x `size`, straight from its own pixel format."""
        size = self._request.size
        small = frame.reformat(size, size, "rgb24", interpolation="AREA", threads=1)
        return np.ascontiguousarray(np.rot90(small.to_ndarray(), quarter_turns(frame.rotation)))

    def facts(self, times_s: NDArray[np.float64]) -> VideoFacts:
        """The stream as decoded; `times_s` are the times of all its frames."""
        frame = self.shown
        assert frame is not None
        sideways = quarter_turns(frame.rotation) % 2 == 1
        span_s = float(times_s[-1] - times_s[0])
        claimed = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        fps = (len(times_s) - 1) / span_s if span_s > 0 else claimed
        return VideoFacts(
            width=frame.height if sideways else frame.width,
            height=frame.width if sideways else frame.height,
            rotation=int(frame.rotation),
            fps=fps,
            frame_count=len(times_s),
            duration_s=span_s + (1 / fps if fps > 0 else 0.0),
            codec=self.stream.codec_context.codec.canonical_name,
            container=self.container.format.name,
        )


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns that show a frame of this display rotation upright."""
    return round(rotation / 90) % 4


def keyframe_before(packets: list[PacketEntry], target: int, target_pts: int) -> int | None:
    """The last keyframe at or before packet `target` from which its frame decodes exactly.

    A frame shown before the keyframe but stored after it may need the group before (open GOP), so
    the keyframe must also be shown no later than the target.
    """
    for i in range(target, -1, -1):
        pts = packets[i].pts
        if packets[i].is_keyframe and pts is not None and pts <= target_pts:
            return i
    return None
