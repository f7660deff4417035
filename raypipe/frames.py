"""One video stream -> chosen frames as pictures, and which of them are real (PyAV).

`FrameReader` lists the packets, seeks, decodes and says which frames can be trusted. Two ways lead to a
frame by its time: `PacketIndex` decodes only what is needed, `FullDecode` everything, where packets bear
no times or wrong ones.

A decoder conceals what it cannot read and goes on; it only says so. So it is listened to: from a damaged
packet to the next whole keyframe no frame counts as real.
"""

import bisect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any, BinaryIO, cast

import av
import av.error
import av.logging
import numpy as np
from av.codec.context import Flags
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from raypipe.containers import DecodeError, open_container, video_stream, words
from raypipe.remote_file import skimming

Pictures = NDArray[np.uint8]

# Decoders that drop a frame nobody refers to and nothing else. dav1d drops shown frames with it.
SKIPPABLE_CODECS = frozenset({"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"})

# Within a NAL unit three zero bytes never follow each other (H.264 7.4.1, H.265 7.4.2), so a hole that some
# disk or download left is recognised even where the decoder makes something of it. Zeros at its end may be
# padding, and there may be millions; so may those before the start code of the next one. A run of zeros is
# looked at once, from its first: from each of its zeros, the time would grow with the square of their number.
HOLE_IN_UNIT = re.compile(rb"\0{3}[^\0]")
HOLE_BETWEEN_START_CODES = re.compile(rb"(?<!\0)\0{3,}+[^\0\1]")
NAL_CODECS = frozenset({"h264", "hevc"})

# Decoding that began in the middle is told to forget frames it has never seen, which harms nothing.
FORGETTING = "h264: mmco: unref short failure"

# Containers without an index, such as MPEG-TS, may land after the keyframe that was meant.
SEEK_BACK_S = (0, 2, 10)

CONCEALED = "concealing"
"""How libav begins to say, as mere information, that it made up a part of a frame."""

NOT_ALLOWED = "Format not on whitelist"  # and a list of all formats that are
NAMES_OTHER_FILES = "a script or playlist, which names other files instead of holding a video"

MESSAGE_LENGTH = 200
MESSAGES_KEPT = 3
"""Different complaints of the decoder that a row's message quotes."""


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
class PacketEntry:
    """One packet in file order."""

    pts: int | None
    is_keyframe: bool
    dts: int | None = None
    """When it is decoded; in file order these ascend."""


Messages = list[Any]
"""What libav has said: tuples of level, component and text; grows while it is listened to."""


@contextmanager
def libav_messages() -> Iterator[Messages]:
    """libav's words while the context lasts. They go nowhere else."""
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)  # a second packet with the same fault must be heard too
    with av.logging.Capture() as messages:
        yield messages


class Trust:
    """Which frames are what was filmed: those with no damage between their keyframe and themselves.

    Told of packets in file order, by number, as they are decoded. Decoding may begin in the middle, at a
    keyframe; what is stored after it but shown before it then lacks what it refers to.
    """

    def __init__(self, begins_at_pts: int | None = None) -> None:
        self._begins_at_pts = begins_at_pts
        self.begins_in_the_middle = begins_at_pts is not None
        self._keyframes: list[tuple[int, int]] = []
        self._damaged: list[int] = []

    def is_leading(self, pts: int | None) -> bool:
        """Whether a packet is shown before the keyframe at which decoding began."""
        return self._begins_at_pts is not None and pts is not None and pts < self._begins_at_pts

    def add_keyframe(self, number: int, pts: int | None) -> None:
        """A keyframe was decoded, damaged or not. Without times, packets are shown as they are stored."""
        self._keyframes.append((number, number if pts is None else pts))

    def add_damage(self, number: int) -> None:
        """The packet is not whole, or its frame is not; the latter may come out some packets later."""
        bisect.insort(self._damaged, number)

    def covers(self, number: int, pts: int | None) -> bool:
        """Whether the frame of packet `number`, shown at `pts`, is what was filmed."""
        if self.is_leading(pts):
            return False
        start = keyframe_before(self._keyframes, number, number if pts is None else pts)[0]
        first = bisect.bisect_left(self._damaged, start)
        return first == len(self._damaged) or self._damaged[first] > number


class FrameReader:
    """Reads one video stream: its packets, then chosen frames as `size` x `size` RGB.

    Packets are numbered in file order, from 0; those that are never shown do not count.
    """

    def __init__(
        self,
        file: BinaryIO,
        path: str,
        messages: Messages,
        *,
        size: int,
        max_pixels: int,
        max_packets: int,
    ) -> None:
        self._file, self._path, self._messages = file, path, messages
        self._size, self._max_pixels, self._max_packets = size, max_pixels, max_packets
        self._too_large = f"a frame of more than --max-pixels {max_pixels}"
        self._scaler = VideoReformatter()  # a frame's own would be set up anew for each: half a millisecond
        self._complaints: dict[str, None] = {}
        self.is_damaged = False
        """True once the demuxer or the decoder has said that something is wrong."""
        self.next_packet = 0
        """The number of the packet that is read next."""
        self.frames_out = 0
        """Frames that the decoder gave so far, good or not."""
        self.shown: VideoFrame | None = None
        """The first frame that could be trusted."""
        self.numbered = False
        """True once the stream has shown frames without usable times: `pts` then means their number."""
        self._trust = Trust()
        self._open()

    def _open(self) -> None:
        self._file.seek(0)
        self._messages.clear()
        try:
            self.container = open_container(self._file, self._path)
            self.stream = video_stream(self.container, self._max_pixels)
        except DecodeError as error:
            said = dict.fromkeys([str(error), *self._heard()])
            raise DecodeError(error.reason, "; ".join(list(said)[:MESSAGES_KEPT])) from None
        self.stream.codec_context.flags |= Flags.copy_opaque  # a frame bears its packet's number
        self._has_hole = holes(self.stream)
        self._begin(0, None)

    # --- what is known of the stream ----------------------------------------------------------------

    @property
    def is_timed(self) -> bool:
        """False where packets bear wrong times: AVI has none, and for these codecs file order is given."""
        codec = self.stream.codec_context.codec.canonical_name
        return self.container.format.name != "avi" or codec not in ("h264", "hevc")

    def seconds(self, pts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds from the first frame. A raw stream has no clock, only a frame rate."""
        rate = self.stream.guessed_rate or self.stream.average_rate or Fraction(25)
        tick_s = 1 / rate if self.numbered else self.stream.time_base or 1 / rate
        times_s: NDArray[np.float64] = (pts - pts[0]).astype(np.float64) * float(tick_s)
        return times_s

    def facts(self, times_s: NDArray[np.float64]) -> VideoFacts:
        """The stream as decoded; `times_s` are the times of all its frames."""
        frame = self.shown
        assert frame is not None
        a, b, _, _ = display_matrix(frame)
        sideways = abs(b) > abs(a)
        fps = self._fps(times_s)
        return VideoFacts(
            width=frame.height if sideways else frame.width,
            height=frame.width if sideways else frame.height,
            rotation=int(frame.rotation),
            fps=fps,
            frame_count=len(times_s),
            duration_s=self.duration_s(times_s),
            codec=self.stream.codec_context.codec.canonical_name,
            container=self.container.format.name,
        )

    def duration_s(self, times_s: NDArray[np.float64]) -> float:
        """To the end of the last frame, which lasts as long as frames do on average."""
        fps = self._fps(times_s)
        return float(times_s[-1] - times_s[0]) + (1 / fps if fps > 0 else 0.0)

    def _fps(self, times_s: NDArray[np.float64]) -> float:
        span_s = float(times_s[-1] - times_s[0])
        claimed = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        return (len(times_s) - 1) / span_s if span_s > 0 else claimed

    def has_times(self, packets: Sequence[PacketEntry]) -> bool:
        """Whether every packet bears a time of its own, by a clock that never starts again.

        It does in files joined with cat.
        """
        pts = [packet.pts for packet in packets]
        dts = [packet.dts for packet in packets if packet.dts is not None]
        known = len(pts) > 0 and None not in pts and len(set(pts)) == len(pts)
        return self.is_timed and known and is_ascending(dts)

    # --- packets ------------------------------------------------------------------------------------

    def scan_packets(self) -> list[PacketEntry]:
        """The packets in file order, without those that are never shown. Decodes nothing."""
        entries = self._skimmed() or self._list(self._packets())
        self.next_packet = len(entries)
        return entries

    def _skimmed(self) -> list[PacketEntry]:
        """The packets as the index of a remote file tells them, which spares to download the file; none
        where that is no gain, or where the index does not know them all."""
        with skimming(self._file) as skipped:
            if not skipped:
                return []
            entries = self._list(self._packets())
            # What is not there could not be parsed, so only the index knows which are keyframes.
            keyframes: dict[int | None, bool] = {
                entry.timestamp: entry.is_keyframe for entry in self.stream.index_entries
            }
        self.container.close()  # libav keeps what it has read
        self._open()
        if not all(entry.dts in keyframes for entry in entries):
            return []
        return [replace(entry, is_keyframe=keyframes[entry.dts]) for entry in entries]

    def _list(self, packets: Iterator[Any]) -> list[PacketEntry]:
        entries: list[PacketEntry] = []
        for packet in packets:
            if packet.is_discard:
                continue
            entries.append(PacketEntry(packet.pts, packet.is_keyframe, packet.dts))
            if len(entries) > self._max_packets:
                raise DecodeError("too_large", f"more than --max-packets {self._max_packets} frames")
        return entries

    def _packets(self) -> Iterator[Any]:
        """Packets with content, from here to the end or to where the file breaks off."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield packet
        except IndexError:
            pass  # at the very end PyAV looks for streams that have shown up since the file was opened
        except (av.error.FFmpegError, OSError, ValueError) as error:
            self._complain(words(error))

    def _packets_from(self, keyframe: int, pts: int, numbers: Mapping[int, int]) -> Iterator[Any]:
        """Packets from number `keyframe` on, which is shown at `pts`."""
        for back_s in SEEK_BACK_S:
            try:
                target = pts - round(back_s / (self.stream.time_base or 1))
                self.container.seek(target, stream=self.stream, backward=True)
            except (av.error.FFmpegError, OSError, ValueError):
                break  # raw streams cannot seek
            packets = self._packets()
            for packet in packets:
                number = numbers.get(packet.pts, -1)
                if number == keyframe:
                    self._begin(keyframe, pts)
                    return chain([packet], packets)
                if number > keyframe:
                    break
        packets, skipped = self._restarted(), 0
        while skipped < keyframe and (packet := next(packets, None)):
            skipped += not packet.is_discard
        self._begin(keyframe, pts if keyframe else None)
        return packets

    def _begin(self, number: int, pts: int | None) -> None:
        """Packet `number` is the first to be decoded; what was said of those before means nothing."""
        self._messages.clear()
        self.next_packet, self._trust = number, Trust(begins_at_pts=pts)

    def _restarted(self) -> Iterator[Any]:
        """Packets from the first; the file is opened again, since raw streams cannot seek."""
        self.container.close()
        self._open()
        return self._packets()

    # --- frames -------------------------------------------------------------------------------------

    def frames(self) -> Iterator[VideoFrame]:
        """Every frame of the stream, from its start."""
        yield from self._decode(self._restarted(), needed=None)

    def frames_from(
        self, keyframe: int, pts: int, numbers: Mapping[int, int], *, needed: Set[int]
    ) -> Iterator[VideoFrame]:
        """Frames from packet `keyframe` on, shown at `pts`: surely those at the pts `needed`, maybe others.

        `numbers` are those of all packets, by pts.
        """
        yield from self._decode(self._packets_from(keyframe, pts, numbers), needed=needed)

    def _decode(self, packets: Iterable[Any], *, needed: Set[int] | None) -> Iterator[VideoFrame]:
        context = self.stream.codec_context
        skippable = needed is not None and context.codec.canonical_name in SKIPPABLE_CODECS
        context.skip_frame = "DEFAULT"
        for packet in packets:
            if skippable and needed is not None:
                context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            packet.opaque = [self.next_packet]  # an object of its own: PyAV keeps them by their identity
            frames = self._decode_packet(packet)
            self._judge(packet)
            yield from frames
        yield from self._decode_packet(None)  # what still waits inside the decoder

    def _judge(self, packet: Any) -> None:
        """Tells `Trust` of a packet, and of what was said about it."""
        said = self._heard()
        if self._trust.begins_in_the_middle:
            said = [text for text in said if text != FORGETTING]
        if packet.is_corrupt:
            said.append("corrupt packet")
        if self._has_hole(bytes(packet)):
            said.append("bytes that the codec forbids")
        if packet.is_keyframe:
            self._trust.add_keyframe(self.next_packet, packet.pts)
        if said and not self._trust.is_leading(packet.pts):
            self._trust.add_damage(self.next_packet)
            self._complain(*said)
        if not packet.is_discard:
            self.next_packet += 1

    def _decode_packet(self, packet: Any) -> list[VideoFrame]:
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except (av.error.FFmpegError, OSError, ValueError) as error:
            context = self.stream.codec_context
            pixels = context.width * context.height
            # HEVC says "out of memory" when it refuses a size, and forgets the size.
            if pixels > self._max_pixels or (not pixels and isinstance(error, MemoryError)):
                text = self._too_large
            else:
                text = words(error)
            self._messages.insert(0, (av.logging.ERROR, "decoder", text))
            return []
        self.frames_out += len(frames)
        return frames

    def trusts(self, frame: VideoFrame) -> bool:
        """Whether the frame is what was filmed, as far as the decoder can tell."""
        number = cast(list[int], frame.opaque)[0] if frame.opaque else self.next_packet - 1
        if frame.is_corrupt and not self._trust.is_leading(frame.pts):
            self._trust.add_damage(number)
            self._complain("corrupt frame")
        if frame.width * frame.height > self._max_pixels:
            self._trust.add_damage(number)
            self._complain(self._too_large)
        if frame.is_corrupt or not self._trust.covers(number, frame.pts):
            return False
        self.shown = self.shown or frame
        return True

    def picture(self, frame: VideoFrame) -> Pictures:
        """The frame upright, `size` x `size`, straight from its own pixel format."""
        small = self._scaler.reformat(frame, self._size, self._size, "rgb24", interpolation="AREA", threads=1)
        pixels = cast(Pictures, small.to_ndarray())
        return np.ascontiguousarray(upright(pixels, display_matrix(frame)))

    # --- complaints ---------------------------------------------------------------------------------

    def _heard(self) -> list[str]:
        """What libav has complained about since this was asked last."""
        said = [
            f"{component}: {NAMES_OTHER_FILES if NOT_ALLOWED in text else text.strip()[:MESSAGE_LENGTH]}"
            for level, component, text in self._messages
            if level <= av.logging.ERROR or text.startswith(CONCEALED)
        ]
        self._messages.clear()
        return said

    def _complain(self, *texts: str) -> None:
        self.is_damaged = True
        self._complaints |= dict.fromkeys(texts)

    def take_message(self) -> str | None:
        """What was wrong since this was asked last, in the words of demuxer and decoder."""
        texts = list(self._complaints)[:MESSAGES_KEPT]
        self._complaints.clear()
        return "; ".join(texts) or None


def holes(stream: VideoStream) -> Callable[[bytes], bool]:
    """Tells whether a packet of this stream holds zeros that its codec forbids."""
    context = stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata or b""
    if codec not in NAL_CODECS:
        return lambda packet: False
    if extradata[:1] != b"\1":
        return lambda packet: HOLE_BETWEEN_START_CODES.search(packet) is not None
    # Units with their lengths (ISO/IEC 14496-15): how long these are is said in two bits.
    place = 4 if codec == "h264" else 21
    length_size = (extradata[place] & 3) + 1 if len(extradata) > place else 4
    return lambda packet: any(HOLE_IN_UNIT.search(unit) for unit in units(packet, length_size))


def units(packet: bytes, length_size: int) -> Iterator[bytes]:
    """The NAL units of a packet, each preceded by its length; up to where these make sense.

    >>> list(units(b"\\0\\2ab\\0\\1c", 2))
    [b'ab', b'c']
    """
    start = length_size
    while (length := int.from_bytes(packet[start - length_size : start], "big")) > 0:
        yield packet[start : start + length]
        start += length + length_size


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the pixel (x, y) is to be shown at (a x + c y, b x + d y)."""
    data: Any = frame.side_data.get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-overload]
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    return (a, b, c, d)


def upright(picture: Pictures, matrix: tuple[int, int, int, int]) -> Pictures:
    """The picture [H, W, 3] turned and mirrored as its display matrix says, by whole quarter turns."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# --- from times to frames ---------------------------------------------------------------------------


def is_ascending(times: Sequence[int | None]) -> bool:
    """Whether all are known and each is later than the one before: a clock that never starts again."""
    return None not in times and all(a < b for a, b in pairwise(cast(Sequence[int], times)))


class TimesAreWrong(Exception):
    """A packet showed no frame at its time although nothing is damaged."""


class PacketIndex:
    """Frames found by way of the packets that bear their times: only what is needed is decoded.

    A frame is named by its position [0, N) in time.
    """

    def __init__(self, reader: FrameReader, packets: list[PacketEntry]) -> None:
        self._reader = reader
        self._numbers = {cast(int, packet.pts): number for number, packet in enumerate(packets)}
        self._keyframes = [
            (number, cast(int, packet.pts)) for number, packet in enumerate(packets) if packet.is_keyframe
        ]
        self.pts = np.array(sorted(self._numbers), np.int64)
        """[N] times of the frames in the stream's time base, ascending."""
        self.keyframes = np.searchsorted(self.pts, sorted(pts for _, pts in self._keyframes))
        """Positions of the keyframes, ascending."""
        self._wanted: dict[int, int] = {}  # pts -> position
        self._frames: Iterator[VideoFrame] = iter(())
        self._shown_pts: int | None = None  # of the last frame that came out

    def want(self, positions: Iterable[int]) -> None:
        """Names every frame that will be read, since a file is decoded once."""
        self._wanted = {int(self.pts[position]): position for position in positions}

    def read(self, targets: Sequence[int]) -> dict[int, Pictures]:
        """The pictures at the positions `targets`, ascending, and at all wanted ones up to there.

        Those that are damaged are left out. Raises TimesAreWrong.
        """
        pictures: dict[int, Pictures] = {}
        for target in targets:
            pts = int(self.pts[target])
            if self._shown_pts is None or self._shown_pts < pts:
                self._advance(pts, pictures)
        if not self._reader.is_damaged and not pictures.keys() >= set(targets):
            raise TimesAreWrong
        return pictures

    def _advance(self, pts: int, pictures: dict[int, Pictures]) -> None:
        """Decodes until the frame at `pts` has come out; adds the wanted ones to `pictures`."""
        number, keyframe_pts = keyframe_before(self._keyframes, self._numbers[pts], pts)
        if self._shown_pts is None or number > self._reader.next_packet:
            self._frames = self._reader.frames_from(
                number, keyframe_pts, self._numbers, needed=self._wanted.keys()
            )
        # else: its packet lies ahead, or was read and its frame waits inside the decoder
        for frame in self._frames:
            self._shown_pts = cast(int, frame.pts)
            if self._reader.trusts(frame) and self._shown_pts in self._wanted:
                pictures[self._wanted[self._shown_pts]] = self._reader.picture(frame)
            if self._shown_pts >= pts:
                return


def keyframe_before(keyframes: list[tuple[int, int]], number: int, pts: int) -> tuple[int, int]:
    """The last of `keyframes` (packet number, pts) from which packet `number`, shown at `pts`, decodes.

    A frame shown before the keyframe but stored after it may need the group before (open GOP), so
    the keyframe must also be shown no later than the frame. Without one, decoding starts with the file.
    """
    last = bisect.bisect_right(keyframes, number, key=lambda keyframe: keyframe[0])
    return next((k for k in reversed(keyframes[:last]) if k[1] <= pts), (0, pts))


class FullDecode:
    """Frames found by decoding everything, where packets bear no times or wrong ones."""

    def __init__(self, reader: FrameReader) -> None:
        shown = [(frame.pts, frame.key_frame) for frame in reader.frames()]
        pts = [time for time, _ in shown]
        if not pts:
            raise DecodeError("no_frames", reader.take_message() or "no frame could be decoded")
        reader.numbered = not reader.is_timed or not is_ascending(pts)
        names = range(len(pts)) if reader.numbered else cast(list[int], pts)
        self.pts = np.array(sorted(names), np.int64)
        """[N] times of the frames in the stream's time base, or their numbers, ascending."""
        self._reader = reader
        places = np.searchsorted(self.pts, list(names)).tolist()
        are_keys = [is_keyframe for _, is_keyframe in shown]
        self.keyframes = np.sort(np.array(places, np.int64)[are_keys])
        """Positions of the keyframes, ascending."""
        self._frames = zip(places, reader.frames(), strict=False)
        self._wanted: Set[int] = frozenset()
        self._seen: set[int] = set()

    def want(self, positions: Iterable[int]) -> None:
        """Names every frame that will be read, since a file is decoded once more only."""
        self._wanted = frozenset(positions)

    def read(self, targets: Sequence[int]) -> dict[int, Pictures]:
        """The pictures at the positions `targets`, and at all wanted ones up to there."""
        pictures: dict[int, Pictures] = {}
        missing = set(targets) - self._seen
        while missing and (found := next(self._frames, None)):
            position, frame = found
            self._seen.add(position)
            missing.discard(position)
            if self._reader.trusts(frame) and position in self._wanted:
                pictures[position] = self._reader.picture(frame)
        return pictures
