"""Odd but valid videos: many containers, codecs, sizes, times and names, each shown as a user would expect.

Every file holds numbered frames of `clips.draw_frame`, so that a picture tells which frame it is.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.codec import Codec
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from clips import draw_frame
from numpy.typing import NDArray

from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, DecodedClip, decode_clips
from raypipe.sampling import uniform_positions

SIZE = 64
FPS = 30
SMALL, LARGE = (128, 96), (192, 144)
REQUEST = ClipRequest(
    frames=8,
    size=SIZE,
    view="rgb",
    motion_gap_s=0.1,
    min_frames=2,
    max_pixels=1 << 24,
    max_packets=10_000,
    max_duration_s=3600,
)


def decode(path: Path | str, request: ClipRequest = REQUEST) -> DecodedClip:
    """The one clip of a whole file."""
    (clip,) = decode_clips(os.fspath(path), request)
    assert isinstance(clip, DecodedClip)
    return clip


# --- files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """A video stream: which frames it shows, when, and how they are encoded."""

    codec: str = "libx264"
    numbers: Iterable[int] = range(30)
    ticks: Iterable[int] | None = None
    """Presentation times in 1/30 s; without them one frame after another from 0."""
    size: tuple[int, int] = SMALL
    pix_fmt: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)
    matrix: tuple[int, int, int, int] | None = None
    """The display matrix (a, b, c, d): the pixel (x, y) is shown at (a x + c y, b x + d y)."""
    color_range: ColorRange = ColorRange.MPEG
    colorspace: Colorspace = Colorspace.ITU601
    disposition: Disposition | None = None
    title: str = ""


H264 = Track(options={"bf": "3", "g": "12"})


def write(
    path: Path,
    *tracks: Track,
    format: str | None = None,
    title: str = "",
    cover: bool = False,
    **options: str,
) -> Path:
    """A file of these tracks, in the container that its suffix or `format` names; a cover is attached."""
    with av.open(str(path), "w", format=format, options=options) as container:
        container.metadata["title"] = title
        streams = [add_stream(container, track) for track in tracks]
        if cover:
            container.add_attachment("cover.jpg", "image/jpeg", jpeg(LARGE))
        for stream, track in zip(streams, tracks, strict=True):
            numbers = list(track.numbers)
            for number, tick in zip(numbers, track.ticks or range(len(numbers)), strict=True):
                frame = av.VideoFrame.from_ndarray(draw_frame(number, *track.size), "rgb24").reformat(
                    format=track.pix_fmt, dst_colorspace=track.colorspace, dst_color_range=track.color_range
                )
                frame.pts, frame.time_base = tick, Fraction(1, FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def add_stream(container: av.container.OutputContainer, track: Track) -> Any:
    lossy = {"b": "8000k"} if track.codec in LOSSY else {}
    stream = container.add_stream(track.codec, rate=FPS, options={**lossy, **track.options})
    stream.width, stream.height = track.size
    stream.pix_fmt = track.pix_fmt
    stream.codec_context.color_range = track.color_range
    if track.pix_fmt.startswith("yuv"):
        stream.codec_context.colorspace = AVCOL_SPC[track.colorspace]
    stream.metadata["title"] = track.title
    if track.matrix is not None:
        a, b, c, d = (value << 16 for value in track.matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
    if track.disposition is not None:
        stream.disposition = track.disposition
    return stream


LOSSY = {"mpeg4", "mpeg1video", "mpeg2video", "flv", "h263", "wmv2", "mjpeg"}
AVCOL_SPC = {Colorspace.ITU601: 6, Colorspace.ITU709: 1}
"""The numbers a file names its colours by, which are not swscale's."""


def jpeg(size: tuple[int, int]) -> bytes:
    return bytes(cv2.imencode(".jpg", draw_frame(99, *size))[1])


def join(path: Path, parts: Iterable[Path]) -> Path:
    """The parts' bytes one after another, as `cat` joins them."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def remux(raw: Path, path: Path) -> Path:
    """The packets of a raw stream in another container, one every 1/30 s, as ffmpeg -c copy moves them."""
    with av.open(str(raw)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, FPS), stream
            container.mux(packet)
    return path


def write_two_sizes(path: Path, second: tuple[int, int] = LARGE, codec: str = "libx264") -> Path:
    """60 frames whose size changes after 30; in any container, since a suffix names it."""
    options = {"x265-params": "log-level=none:bframes=0"} if codec == "libx265" else {"bf": "0"}
    is_ts = path.suffix == ".ts"
    tracks = [
        Track(codec, options=options),
        Track(codec, range(30, 60), ticks=range(30, 60) if is_ts else None, size=second, options=options),
    ]
    suffix = ".ts" if is_ts else ".h265" if codec == "libx265" else ".h264"
    parts = [write(path.parent / f"{i}{suffix}", track) for i, track in enumerate(tracks)]
    joined = join(path.parent / f"joined{suffix}", parts)
    return joined.rename(path) if path.suffix == suffix else remux(joined, path)


# --- what is shown ----------------------------------------------------------------------------------


def same(picture: NDArray[Any]) -> NDArray[Any]:
    return picture


def drawing(number: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """The frame as it was drawn, scaled by another library."""
    return cv2.resize(draw_frame(number, *size), (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(float)


def assert_shows(
    clip: DecodedClip,
    numbers: Iterable[int],
    *,
    size_of: Callable[[int], tuple[int, int]] = lambda number: SMALL,
    look: Callable[[NDArray[Any]], NDArray[Any]] = same,
    off: float = 6.0,
) -> None:
    """Each picture is of this frame rather than of any other, and at most `off` of 255 from the drawing."""
    numbers = [int(number) for number in numbers]
    candidates = np.stack([look(drawing(n, size_of(n))) for n in range(max(numbers) + 3)])
    distances = [np.abs(candidates - picture).mean((1, 2, 3)) for picture in clip.pictures]
    assert [int(d.argmin()) for d in distances] == numbers
    assert max(d.min() for d in distances) < off


def spread(numbers: Iterable[int]) -> list[int]:
    """The ones that a clip of a video with these frames shows."""
    numbers = list(numbers)
    return [numbers[i] for i in uniform_positions(len(numbers), REQUEST.frames)]


def seconds(ticks: Iterable[int]) -> list[float]:
    first, *_ = ticks = list(ticks)
    return [(tick - first) / FPS for tick in ticks]


# --- containers and codecs --------------------------------------------------------------------------

FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}
QUIET = {"x265-params": "log-level=none"}
INTERLACED = {"flags": "+ilme+ildct", "x264-params": "interlaced=1"}

FORMATS = [
    ("raw.h264", H264, "h264"),
    ("raw.h265", Track("libx265", options=QUIET), "hevc"),
    ("raw.m4v", Track("mpeg4", options={"g": "12"}), "mpeg4"),
    ("raw.m2v", Track("mpeg2video", options={"bf": "2"}), "mpeg2video"),
    ("program.mpeg", Track("mpeg1video", options={"bf": "2"}), "mpeg1video"),
    ("disc.vob", Track("mpeg2video", options={"bf": "2"}), "mpeg2video"),
    ("mpeg4-b.avi", Track("mpeg4", options={"bf": "2", "g": "12"}), "mpeg4"),
    ("h264-b.avi", H264, "h264"),
    ("motion.avi", Track("mjpeg", pix_fmt="yuvj420p", color_range=ColorRange.JPEG), "mjpeg"),
    ("h264.ts", H264, "h264"),
    ("hevc.ts", Track("libx265", options=QUIET), "hevc"),
    ("h264.m2ts", H264, "h264"),
    ("h264.flv", H264, "h264"),
    ("sorenson.flv", Track("flv"), "flv1"),
    ("h263.3gp", Track("h263", size=(176, 144)), "h263"),
    ("windows.wmv", Track("wmv2"), "wmv2"),
    ("prores.mov", Track("prores", pix_fmt="yuv422p10le"), "prores"),
    ("lossless.mkv", Track("ffv1", pix_fmt="bgr0"), "ffv1"),
    ("picture.gif", Track("gif", pix_fmt="rgb8"), "gif"),
    ("picture.apng", Track("apng", pix_fmt="rgba"), "apng"),
    ("alpha.webm", Track("libvpx-vp9", pix_fmt="yuva420p", options=FAST_VP9), "vp9"),
    ("alpha.mov", Track("prores_ks", pix_fmt="yuva444p10le"), "prores"),
    ("av1.mp4", Track("libsvtav1", options={"preset": "12", "crf": "20"}), "av1"),
    ("av1.ivf", Track("libsvtav1", options={"preset": "12", "crf": "20"}), "av1"),
    ("interlaced.mp4", Track(options=INTERLACED), "h264"),
    ("interlaced.ts", Track(options=INTERLACED), "h264"),
    ("interlaced.mpg", Track("mpeg2video", options={"flags": "+ilme+ildct", "bf": "2"}), "mpeg2video"),
]
RAW_FORMATS = {"raw.m4v": "m4v"}  # PyAV would write an MP4 of this name


@pytest.mark.parametrize(("name", "track", "codec"), FORMATS, ids=[name for name, _, _ in FORMATS])
def test_a_format_shows_its_frames(name: str, track: Track, codec: str, tmp_path: Path) -> None:
    try:
        Codec(track.codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {track.codec}")
    clip = decode(write(tmp_path / name, track, format=RAW_FORMATS.get(name)))
    assert_shows(clip, spread(range(30)), size_of=lambda number: track.size)
    facts = clip.facts
    assert (facts.codec, facts.frame_count, facts.width, facts.height) == (codec, 30, *track.size)
    assert (clip.frame_ok, clip.message) == ([True] * REQUEST.frames, None)
    if name not in ("raw.h264", "raw.h265"):  # see the next test
        assert clip.frame_pts_s == pytest.approx(seconds(spread(range(30))), abs=0.01)
        assert facts.fps == pytest.approx(FPS, rel=0.01)


@pytest.mark.parametrize(
    ("name", "track"),
    [("raw.h264", H264), ("raw.h265", Track("libx265", options=QUIET))],
    ids=["h264", "hevc"],
)
def test_a_raw_stream_runs_as_fast_as_it_says(name: str, track: Track, tmp_path: Path) -> None:
    clip = decode(write(tmp_path / name, track))
    assert clip.facts.fps == pytest.approx(FPS, rel=0.01)
    assert clip.frame_pts_s == pytest.approx(seconds(spread(range(30))), abs=0.01)


@pytest.mark.parametrize("name", ["interlaced.mp4", "interlaced.ts", "interlaced.mpg"])
def test_the_interlaced_files_are(name: str, tmp_path: Path) -> None:
    track = next(track for other, track, _ in FORMATS if other == name)
    with av.open(str(write(tmp_path / name, track))) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 30 and all(frame.interlaced_frame for frame in frames)


# --- samples and colours ----------------------------------------------------------------------------

FULL, HD = ColorRange.JPEG, Colorspace.ITU709
COLOURS = {
    "10 bits": Track(pix_fmt="yuv420p10le"),
    "10 bits HEVC": Track("libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none:qp=8"}),
    "full range": Track(color_range=FULL),
    "full range 10 bits": Track(pix_fmt="yuv420p10le", color_range=FULL),
    "yuvj": Track(pix_fmt="yuvj420p", color_range=FULL),
    "4:2:2": Track(pix_fmt="yuv422p"),
    "4:4:4": Track(pix_fmt="yuv444p"),
    "4:4:4 full range": Track(pix_fmt="yuv444p", color_range=FULL),
    "RGB": Track("libx264rgb", pix_fmt="rgb24", color_range=FULL),
    "BT.709": Track(colorspace=HD),
    "BT.709 full range": Track(colorspace=HD, color_range=FULL),
}


@pytest.mark.parametrize("name", COLOURS)
def test_other_samples_look_like_8_bits(name: str, tmp_path: Path) -> None:
    fine = {"qp": "8"}
    track = COLOURS[name]
    plain = decode(write(tmp_path / "plain.mp4", Track(options=fine)))
    clip = decode(write(tmp_path / "other.mp4", replace(track, options=track.options or fine)))
    assert np.abs(clip.pictures.astype(float) - plain.pictures).mean() < 3.5
    assert_shows(clip, spread(range(30)), off=4)


def test_the_colours_would_differ_if_they_were_taken_for_others(tmp_path: Path) -> None:
    """A file that says another range or matrix than its samples have is off by more than any above."""
    plain = decode(write(tmp_path / "plain.mp4", Track(options={"qp": "8"}))).pictures.astype(float)
    for name, params in {"range": "fullrange=on", "matrix": "colormatrix=bt709"}.items():
        track = Track(options={"qp": "8", "x264-params": params})
        assert np.abs(decode(write(tmp_path / f"{name}.mp4", track)).pictures - plain).mean() > 5, name


def test_a_gray_video_is_gray(tmp_path: Path) -> None:
    def gray(picture: NDArray[Any]) -> NDArray[Any]:
        return np.repeat((picture @ [0.299, 0.587, 0.114])[..., None], 3, axis=-1)

    clip = decode(write(tmp_path / "gray.mp4", Track(pix_fmt="gray", color_range=FULL)))
    assert_shows(clip, spread(range(30)), look=gray)
    assert (clip.pictures == clip.pictures[..., :1]).all()


# --- a size that changes ----------------------------------------------------------------------------


def size_of_two(number: int) -> tuple[int, int]:
    return SMALL if number < 30 else LARGE


TWO_SIZES = [
    ("two.h264", "libx264"),
    ("two.ts", "libx264"),
    ("two.mkv", "libx264"),
    ("two.mp4", "libx264"),
    ("two.h265", "libx265"),
    ("hevc.mkv", "libx265"),
]


@pytest.mark.parametrize(("name", "codec"), TWO_SIZES)
def test_a_size_that_changes_midway(name: str, codec: str, tmp_path: Path) -> None:
    clip = decode(write_two_sizes(tmp_path / name, codec=codec))
    assert_shows(clip, spread(range(60)), size_of=size_of_two)
    assert (clip.facts.frame_count, clip.frame_ok) == (60, [True] * REQUEST.frames)
    assert (clip.facts.width, clip.facts.height, clip.message) == (*SMALL, None)


@pytest.mark.parametrize(("name", "codec"), TWO_SIZES)
def test_a_size_that_grows_beyond_the_limit(name: str, codec: str, tmp_path: Path) -> None:
    """What is small enough is shown, or nothing; and the reason is said."""
    path = write_two_sizes(tmp_path / name, second=(320, 240), codec=codec)
    request = replace(REQUEST, max_pixels=SMALL[0] * SMALL[1])
    try:
        clip = decode(path, request)
    except DecodeError as error:
        assert error.reason == "too_large" and re.search("max.pixel", str(error))
    else:
        assert re.search("max.pixel", clip.message or "")
        assert clip.facts.frame_count == 30 or not all(clip.frame_ok)
        distances = [[np.abs(drawing(n, SMALL) - p).mean() for n in range(30)] for p in clip.pictures]
        assert np.min(distances, axis=1).max() < 6


def test_a_size_within_the_limit_is_no_reason(tmp_path: Path) -> None:
    path = write_two_sizes(tmp_path / "two.mkv")
    assert decode(path, replace(REQUEST, max_pixels=LARGE[0] * LARGE[1])).message is None


# --- turned and mirrored ----------------------------------------------------------------------------

TURNS = [
    ("clockwise", (0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    ("half", (-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    ("counter-clockwise", (0, -1, 1, 0), lambda p: np.rot90(p)),
    ("left and right", (-1, 0, 0, 1), lambda p: p[:, ::-1]),
    ("top and bottom", (1, 0, 0, -1), lambda p: p[::-1]),
    ("diagonal", (0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    ("other diagonal", (0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
]


@pytest.mark.parametrize("size", [SMALL, (96, 128)], ids=["landscape", "portrait"])
@pytest.mark.parametrize(
    ("matrix", "look"),
    [pytest.param(matrix, look, id=name) for name, matrix, look in TURNS],
)
def test_a_display_matrix(
    matrix: tuple[int, int, int, int],
    look: Callable[[NDArray[Any]], NDArray[Any]],
    size: tuple[int, int],
    tmp_path: Path,
) -> None:
    """Shown as the ffmpeg program shows it."""
    clip = decode(write(tmp_path / "clip.mp4", Track(matrix=matrix, size=size)))
    assert (clip.facts.width, clip.facts.height) == (size if matrix[0] else size[::-1])
    assert_shows(clip, spread(range(30)), size_of=lambda number: size, look=look)


def test_a_portrait_video(tmp_path: Path) -> None:
    clip = decode(write(tmp_path / "clip.mp4", Track(size=(96, 128))))
    assert (clip.facts.width, clip.facts.height, clip.facts.rotation) == (96, 128, 0)
    assert_shows(clip, spread(range(30)), size_of=lambda number: (96, 128))


# --- covers and several streams ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "attached"),
    [("sound.mp3", "libmp3lame", False), ("sound.flac", "flac", False), ("sound.mka", "flac", True)],
)
def test_a_cover_makes_no_video_of_a_sound(name: str, codec: str, attached: bool, tmp_path: Path) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        sound = container.add_stream(codec, rate=44100)
        if attached:
            container.add_attachment("cover.jpg", "image/jpeg", jpeg(SMALL))
        else:
            cover = container.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = *SMALL, "rgb24"
            cover.disposition = Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(draw_frame(0, *SMALL), "rgb24")
            container.mux([*cover.encode(picture), *cover.encode(None)])
        samples = "s16p" if codec == "libmp3lame" else "s16"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), samples, "mono")
        silence.rate, silence.pts = 44100, 0
        container.mux([*sound.encode(silence), *sound.encode(None)])
    with pytest.raises(DecodeError, match="its only picture is cover art") as caught:
        decode(tmp_path / name)
    assert caught.value.reason == "not_video"


COVER = Track("mjpeg", numbers=[99], size=LARGE, pix_fmt="yuvj420p", color_range=FULL)
ATTACHED = replace(COVER, disposition=Disposition.attached_pic)


@pytest.mark.parametrize(
    ("name", "tracks", "cover"),
    [
        ("after.mp4", [H264, ATTACHED], False),
        ("before.mp4", [ATTACHED, H264], False),
        ("attached.mkv", [H264], True),
        ("track before.mkv", [COVER, H264], False),
    ],
)
def test_a_video_with_a_cover_is_the_video(
    name: str, tracks: list[Track], cover: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / name, *tracks, cover=cover)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    clip = decode(path)
    assert_shows(clip, spread(range(30)))
    assert (clip.facts.frame_count, clip.facts.codec) == (30, "h264")


FIRST, SECOND = Track(size=SMALL), Track(size=LARGE, numbers=range(30, 60))
DEFAULT, NO_DEFAULT = Disposition.default, Disposition.forced


@pytest.mark.parametrize("swap", [False, True], ids=["small first", "large first"])
@pytest.mark.parametrize(
    ("name", "flags", "chosen"),
    [
        ("plain.ts", (None, None), 0),  # libav takes the first where nothing tells them apart
        ("plain.mkv", (None, None), 0),
        ("plain.mp4", (None, None), 0),
        ("first.mkv", (DEFAULT, NO_DEFAULT), 0),
        ("second.mkv", (NO_DEFAULT, DEFAULT), 1),  # and the default one where a file names one
        ("second.mp4", (NO_DEFAULT, DEFAULT), 1),
    ],
)
def test_of_several_videos_the_default_or_the_first(
    name: str, flags: tuple[Disposition | None, ...], chosen: int, swap: bool, tmp_path: Path
) -> None:
    tracks = [SECOND, FIRST] if swap else [FIRST, SECOND]
    tracks = [replace(track, disposition=flag) for track, flag in zip(tracks, flags, strict=True)]
    clip = decode(write(tmp_path / name, *tracks))
    assert (clip.facts.width, clip.facts.height) == tracks[chosen].size
    assert_shows(clip, spread(tracks[chosen].numbers), size_of=lambda number: tracks[chosen].size)


# --- texts and names --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.flv", "a.ts", "a.wmv"])
def test_a_title_that_is_no_text(name: str, tmp_path: Path) -> None:
    track = Track("wmv2") if name == "a.wmv" else replace(H264, title="KLMNOPQRST")
    path = write(tmp_path / name, track, title="KLMNOPQRST")
    content = path.read_bytes()
    title = "KLMNOPQRST".encode("utf-16-le" if name == "a.wmv" else "ascii")
    assert title in content
    broken = b"\x00\xd8" * 10 if name == "a.wmv" else b"\xff\xfe\xc3(\x80\xed\xa0\x80\xf5\xff"
    path.write_bytes(content.replace(title, broken))
    assert_shows(decode(path), spread(range(30)))


NAMES = [
    b"-i.mp4",
    b"--help",
    b"%d.mp4",
    b"%03d%s%n.mp4",
    b"file:clip.mp4",
    b"pipe:0",
    b"http:clip.mp4",
    b"concat:a.mp4|b.mp4",
    b"data:video,a.mp4",
    b"a\nb\r\t.mp4",
    b"clip.mp4\n",
    b" .mp4 ",
    b"*?[a].mp4",
    b"a;b|c&d$(e)`f`'\"\\.mp4",
    b"a?b=c#d%20e.mp4",
    b"clip.m3u8",
    b"clip.h264",
    b"clip.m\xff4",
    b"\xff\xfe\xc3(.mp4",
    "видео 戦い 🥊.mp4".encode(),
    b"x" * 251 + b".mp4",
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[2:30] for name in NAMES])
def test_names(name: bytes, tmp_path: Path, clip_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / os.fsdecode(name)
    shutil.copy(clip_path, path)
    monkeypatch.chdir(tmp_path)
    expected = decode(clip_path).pictures
    for given in (str(path), path.name, path.as_uri()):
        np.testing.assert_array_equal(decode(given).pictures, expected)


# --- times ------------------------------------------------------------------------------------------

PLAIN = {"avoid_negative_ts": "disabled"}
WRAP = {"output_ts_offset": str((2**33 - 45_000) / 90_000)}
UNEVEN = [0, 1, 2, 3, 10, 20, 21, 40, 41, 60]

TIMES = [
    ("late.mp4", range(100, 130), {}, 0),
    ("late.mkv", range(100, 130), {}, 0),
    ("late.ts", range(100, 130), {}, 0),
    ("late.flv", range(100, 130), {}, 0),
    ("clock-wraps.ts", range(30), WRAP, 0),  # MPEG-TS counts to 2^33 and starts again
    ("no-edit-list.mp4", range(30), {"use_editlist": "0"}, 0),
    ("negative-offsets.mp4", range(30), {"movflags": "+negative_cts_offsets"}, 0),
    ("fragments.mp4", range(30), {"movflags": "+frag_keyframe+empty_moov"}, 0),
    ("edited.mp4", range(-10, 20), PLAIN, 10),  # its edit list leaves out what comes before 0
    ("uneven.mp4", UNEVEN, {}, 0),
    ("uneven.mkv", UNEVEN, {}, 0),
    ("uneven.ts", UNEVEN, {}, 0),
    ("one.mp4", [0], {}, 0),
    ("one.mkv", [7], {}, 0),
    ("one.ts", [0], {}, 0),
    ("one.avi", [0], {}, 0),
    ("one.h264", [0], {}, 0),
    ("two.mp4", [0, 9], {}, 0),
    ("two.mkv", [3, 4], {}, 0),
    ("two.ts", [0, 1], {}, 0),
]


@pytest.mark.parametrize(("name", "ticks", "options", "hidden"), TIMES, ids=[name for name, *_ in TIMES])
def test_times(name: str, ticks: list[int], options: dict[str, str], hidden: int, tmp_path: Path) -> None:
    numbers, shown = range(len(ticks)), list(ticks)[hidden:]
    track = Track(numbers=numbers, ticks=ticks, options={"bf": "3", "g": "12", "qp": "8"})
    clip = decode(write(tmp_path / name, track, **options))
    assert_shows(clip, spread(numbers[hidden:]))
    assert clip.frame_pts_s == pytest.approx(seconds([shown[0], *spread(shown)])[1:], abs=1e-3)
    span_s = seconds(shown)[-1]
    gap_s = span_s / (len(shown) - 1) if len(shown) > 1 else None
    assert (clip.facts.frame_count, clip.frame_ok) == (len(shown), [True] * REQUEST.frames)
    if gap_s is not None:
        assert clip.facts.duration_s == pytest.approx(span_s + gap_s, abs=2e-3)
        assert clip.facts.fps == pytest.approx(1 / gap_s, rel=2e-2)


@pytest.mark.parametrize("name", ["one.gif", "one.apng"])
def test_a_single_picture(name: str, tmp_path: Path) -> None:
    codec, pix_fmt = ("gif", "rgb8") if name == "one.gif" else ("apng", "rgba")
    clip = decode(write(tmp_path / name, Track(codec, numbers=[5], pix_fmt=pix_fmt)))
    assert_shows(clip, [5] * REQUEST.frames)
    assert clip.facts.frame_count == 1 and clip.frame_pts_s == [0.0] * REQUEST.frames


def test_times_below_zero_in_a_container_without_edit_lists(tmp_path: Path) -> None:
    """libav gives such packets no time: the frames are then counted."""
    clip = decode(write(tmp_path / "a.mkv", replace(H264, ticks=range(-10, 20)), **PLAIN))
    assert_shows(clip, spread(range(30)))
    assert clip.frame_pts_s == pytest.approx(seconds(spread(range(30))), abs=1e-3)


@pytest.mark.parametrize("offset_s", ["0", "0.55"], ids=["equal times", "times in between"])
def test_recordings_joined_with_cat(offset_s: str, tmp_path: Path) -> None:
    """`cat a.ts b.ts` is a valid way to join them, but the clock starts again in between."""
    later = replace(H264, numbers=range(30, 60))
    parts = [write(tmp_path / "a.ts", H264), write(tmp_path / "b.ts", later, output_ts_offset=offset_s)]
    clip = decode(join(tmp_path / "joined.ts", parts))
    assert clip.facts.frame_count == 60
    assert_shows(clip, spread(range(60)))
    assert clip.facts.duration_s == pytest.approx(2.0, abs=0.1)
    assert (np.diff(clip.frame_pts_s) > 0).all()


def test_wrong_times_do_not_change_the_order(wild: Path) -> None:
    """An AVI of MPEG-4 with packed B-frames: only the order in which frames come out is right."""
    path = wild / "mmaction2__test.avi"
    with av.open(str(path)) as container:
        frames = [f.reformat(SIZE, SIZE, "rgb24", interpolation="AREA") for f in container.decode(video=0)]
    expected = [frame.to_ndarray() for frame in spread(frames)]
    np.testing.assert_array_equal(decode(path).pictures, expected)
