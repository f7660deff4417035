import csv
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clips import turn_video, write_video
from numpy.typing import NDArray

from raypipe.containers import DecodeError
from raypipe.decode import ClipRequest, DecodedClip, FailedClip, decode_clips, motion_picture
from raypipe.frames import FrameReader
from raypipe.sampling import plan_frames, uniform_positions

SIZE = 64
REQUEST = ClipRequest(
    frames=6,
    size=SIZE,
    view="both",
    motion_gap_s=0.1,
    min_frames=2,
    max_pixels=1 << 24,
    max_packets=10_000,
    max_duration_s=1000.0,
)
RGB = replace(REQUEST, view="rgb")


def decode(path: Path | str, request: ClipRequest = REQUEST) -> DecodedClip:
    (clip,) = decode_clips(str(path), request)
    assert isinstance(clip, DecodedClip)
    return clip


def failure(path: Path | str, request: ClipRequest = REQUEST) -> tuple[str, str]:
    """The reason and the message with which a file is given up."""
    with pytest.raises(DecodeError) as caught:
        list(decode_clips(str(path), request))
    return caught.value.reason, str(caught.value)


def opencv_frames(path: Path) -> NDArray[np.uint8]:
    """Every frame in RGB [N, H, W, 3], as another decoder gives them."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def every_frame(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Every frame scaled to SIZE [N, SIZE, SIZE, 3], and its time, by decoding all of the file."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    small = [f.reformat(SIZE, SIZE, "rgb24", interpolation="AREA").to_ndarray() for f in frames]
    if frames[0].time is None:  # a raw stream
        return np.stack(small), np.arange(len(frames)) / 30
    return np.stack(small), np.array([frame.time - frames[0].time for frame in frames])


# --- the pictures -----------------------------------------------------------------------------------

CODECS = [
    ("h264-12.mp4", "libx264", {"g": "12", "bf": "3"}),
    ("h264-250.mp4", "libx264", {"g": "250", "bf": "3"}),
    ("open-gop.mkv", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    ("h264.ts", "libx264", {"g": "12"}),
    ("mpeg4.avi", "mpeg4", {"g": "12", "bf": "2"}),
    ("h264.avi", "libx264", {"bf": "3"}),  # AVI has no times for frames that are stored out of order
    ("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    ("hevc.mp4", "libx265", {"x265-params": "log-level=none:keyint=12"}),
    ("mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    ("raw.h264", "libx264", {"g": "12"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CODECS, ids=[name for name, _, _ in CODECS])
def test_pictures_equal_those_of_another_decoder(
    name: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, codec=codec, options=options, frames=100, size=(SIZE, SIZE))
    reference = opencv_frames(path)
    assert len(reference) == 100
    clip = decode(path, RGB)
    np.testing.assert_array_equal(clip.pictures, reference[uniform_positions(100, 6)])
    assert (clip.facts.frame_count, clip.message, clip.frame_ok) == (100, None, [True] * 6)


@pytest.mark.parametrize(("name", "codec", "options"), [CODECS[i] for i in (0, 2, 4, 6, 7)], ids=str)
def test_no_more_is_decoded_than_the_pictures_need(
    name: str, codec: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a keyframe every 12, 6 pictures need at most 6 times 12 packets and a few for reordering."""
    decoded = []
    decode_packet = FrameReader._decode_packet

    def count(reader: FrameReader, packet: object) -> list[av.VideoFrame]:
        decoded.append(packet)
        return decode_packet(reader, packet)

    path = write_video(tmp_path / name, codec=codec, options=options, frames=300)
    monkeypatch.setattr(FrameReader, "_decode_packet", count)
    assert decode(path, RGB).frame_ok == [True] * 6
    assert len(decoded) < 120


@pytest.mark.parametrize("keyframes", [12, 250])
@pytest.mark.parametrize("steps", [1, 6, 16, 64])
def test_pictures_equal_those_of_a_full_decode(keyframes: int, steps: int, tmp_path: Path) -> None:
    options = {"g": str(keyframes), "bf": "3"}
    path = write_video(tmp_path / "clip.mp4", options=options, frames=300, size=(160, 96))
    pictures, times_s = every_frame(path)
    plan = plan_frames(times_s, count=steps, motion_gap_s=0.1)
    clip = decode(path, replace(REQUEST, frames=steps))
    np.testing.assert_array_equal(clip.pictures[:steps], pictures[plan.frames])
    pairs = zip(pictures[plan.frames], pictures[plan.partners], strict=True)
    np.testing.assert_array_equal(clip.pictures[steps:], [motion_picture(*pair) for pair in pairs])
    assert clip.frame_pts_s == pytest.approx(times_s[plan.frames])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "raw.h264"])
@pytest.mark.parametrize("policy", ["middle", "fps", "keyframes"])
def test_every_policy_gives_the_frames_that_it_names(policy: str, name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, options={"g": "12", "bf": "3"}, frames=100)
    pictures, times_s = every_frame(path)
    fps = 8.0 if policy == "fps" else None
    with av.open(str(path)) as container:
        keyframes = np.flatnonzero([frame.key_frame for frame in container.decode(video=0)])
    plan = plan_frames(times_s, count=6, motion_gap_s=0.1, policy=policy, fps=fps, keyframes=keyframes)
    clip = decode(path, replace(REQUEST, policy=policy, sample_fps=fps))
    np.testing.assert_array_equal(clip.pictures[:6], pictures[plan.frames])
    assert clip.frame_pts_s == pytest.approx(times_s[plan.frames])


def test_a_window_without_a_keyframe_is_sampled_evenly(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", options={"g": "250"}, frames=100)
    clips = list(decode_clips(str(path), replace(RGB, policy="keyframes", window_s=1.0)))
    assert [len(set(clip.frame_pts_s)) for clip in clips if isinstance(clip, DecodedClip)] == [1, 6, 6]


def test_views(clip_path: Path) -> None:
    both, rgb, motion = (decode(clip_path, replace(REQUEST, view=view)) for view in ("both", "rgb", "motion"))
    assert [view.pictures.shape for view in (both, rgb, motion)] == [
        (12, SIZE, SIZE, 3),
        (6, SIZE, SIZE, 3),
        (6, SIZE, SIZE, 3),
    ]
    assert both.pictures.shape == REQUEST.pictures_shape
    np.testing.assert_array_equal(both.pictures[6:], motion.pictures)
    np.testing.assert_array_equal(both.pictures[0], rgb.pictures[0])


@pytest.mark.parametrize(
    ("earlier", "later", "shown"),
    [
        (100, 100, 127),
        (100, 110, 142),
        (110, 100, 112),
        (100, 101, 128),  # 128.5 to the even number
        (0, 255, 255),
        (255, 0, 0),
        (0, 85, 254),
        (0, 86, 255),
    ],
)
def test_a_motion_picture_is_grey_where_nothing_moved(earlier: int, later: int, shown: int) -> None:
    before, after = (np.full((1, 1, 3), value, np.uint8) for value in (earlier, later))
    assert motion_picture(before, after).tolist() == [[[shown] * 3]]


def test_a_short_video_repeats_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "two.mp4", frames=2)
    pictures, _ = every_frame(path)
    clip = decode(path, replace(RGB, min_frames=4))
    np.testing.assert_array_equal(clip.pictures, pictures[[0, 0, 0, 1, 1, 1]])
    assert clip.frame_ok == [True] * 6
    assert clip.facts.duration_s == pytest.approx(2 / 30)


def test_a_single_frame_shows_no_motion(tmp_path: Path) -> None:
    clip = decode(write_video(tmp_path / "one.mp4", frames=1))
    assert (clip.pictures[6:] == 127).all()
    assert clip.facts.frame_count == 1 and clip.frame_pts_s == [0.0] * 6


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", size=(SIZE, SIZE))
    lying = decode(path, RGB).pictures
    clip = decode(turn_video(path), RGB)
    np.testing.assert_array_equal(clip.pictures, np.rot90(lying, -1, axes=(1, 2)))
    np.testing.assert_array_equal(clip.pictures, opencv_frames(path)[uniform_positions(60, 6)])
    facts = decode(turn_video(write_video(tmp_path / "b.mp4", size=(128, 96)))).facts
    assert (facts.width, facts.height, facts.rotation) == (96, 128, -90)


def test_facts(clip_path: Path) -> None:
    facts = decode(clip_path).facts
    assert (facts.width, facts.height, facts.rotation, facts.frame_count) == (128, 96, 0, 100)
    assert (facts.codec, facts.container.split(",")[0]) == ("h264", "mov")
    assert (facts.fps, facts.duration_s) == pytest.approx((30, 100 / 30))


# --- several clips a file ---------------------------------------------------------------------------


WINDOWS = replace(REQUEST, window_s=1.0, min_frames=1)


@pytest.mark.parametrize("name", ["a.mp4", "raw.h264"])
@pytest.mark.parametrize("stride_s", [1.0, 0.4])
def test_windows_equal_clips_of_their_own(name: str, stride_s: float, tmp_path: Path) -> None:
    """Each window has the pictures of a full decode, and overlapping ones cost no second decode."""
    path = write_video(tmp_path / name, frames=100, options={"g": "30"})
    pictures, times_s = every_frame(path)
    clips = list(decode_clips(str(path), replace(WINDOWS, stride_s=stride_s)))
    assert [clip.span.index for clip in clips] == list(range(len(clips)))
    assert [clip.span.is_last for clip in clips] == [False] * (len(clips) - 1) + [True]
    assert [clip.span.start_s for clip in clips] == pytest.approx(np.arange(len(clips)) * stride_s)
    assert len(clips) == (3 if stride_s == 1 else 8)
    for clip in clips:
        assert isinstance(clip, DecodedClip)
        inside = np.flatnonzero((times_s > clip.span.start_s - 0.01) & (times_s < clip.span.end_s - 0.01))
        plan = plan_frames(times_s[inside], count=6, motion_gap_s=0.1)
        np.testing.assert_array_equal(clip.pictures[:6], pictures[inside][plan.frames])
        pairs = zip(pictures[inside][plan.frames], pictures[inside][plan.partners], strict=True)
        np.testing.assert_array_equal(clip.pictures[6:], [motion_picture(*pair) for pair in pairs])
        assert clip.frame_pts_s == pytest.approx(times_s[inside][plan.frames])
        assert clip.facts.frame_count == 100


def test_overlapping_windows_are_decoded_once(clip_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode_packet = FrameReader._decode_packet

    def count(reader: FrameReader, packet: object) -> list[av.VideoFrame]:
        decoded.append(packet)
        return decode_packet(reader, packet)

    monkeypatch.setattr(FrameReader, "_decode_packet", count)
    clips = list(decode_clips(str(clip_path), replace(WINDOWS, stride_s=0.1, frames=16)))
    assert len(clips) > 25
    assert len(decoded) <= 101  # every packet, and the end


def test_going_on_from_a_clip(clip_path: Path) -> None:
    whole = list(decode_clips(str(clip_path), WINDOWS))
    rest = list(decode_clips(str(clip_path), WINDOWS, first=2))
    assert [clip.span for clip in rest] == [clip.span for clip in whole[2:]]
    np.testing.assert_array_equal(rest[0].pictures, whole[2].pictures)


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_going_on_makes_no_picture_of_clips_before(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a long file's would be held at once, and take more memory than a child may have."""
    path = write_video(tmp_path / f"clip{suffix}", frames=100, options={"g": "1000"})
    whole = list(decode_clips(str(path), WINDOWS))
    made: list[object] = []
    picture = FrameReader.picture

    def count(reader: FrameReader, frame: av.VideoFrame) -> NDArray[np.uint8]:
        made.append(frame.pts)
        return picture(reader, frame)

    monkeypatch.setattr(FrameReader, "picture", count)
    for by_index in (True, False):
        made.clear()
        with monkeypatch.context() as patched:
            patched.setattr(FrameReader, "has_times", lambda reader, packets, found=by_index: found)
            (last,) = decode_clips(str(path), WINDOWS, first=len(whole) - 1)
        np.testing.assert_array_equal(last.pictures, whole[-1].pictures)
        assert 0 < len(made) <= 2 * WINDOWS.frames


def test_damage_stays_where_it_is(tmp_path: Path) -> None:
    """A hole in the third of five seconds: the others are whole."""
    path = write_video(tmp_path / "clip.mp4", frames=150, options={"g": "30", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        positions = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, end = positions[61][0], sum(positions[89])
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    clips = list(decode_clips(str(path), replace(WINDOWS, min_frames=3)))
    assert [isinstance(clip, FailedClip) for clip in clips] == [False, False, True, False, False]
    assert clips[2].reason == "damaged" and clips[2].message.startswith("0 of 6 frames could be decoded; ")
    assert [clip.frame_ok for clip in clips if isinstance(clip, DecodedClip)] == [[True] * 6] * 4
    (only,) = decode_clips(str(path), replace(RGB, frames=150))
    assert [not 61 <= number < 90 for number in range(150)] == only.frame_ok


# --- damage -----------------------------------------------------------------------------------------


def test_a_file_cut_in_its_index_is_no_video(clip_path: Path, tmp_path: Path) -> None:
    reason, message = failure(cut(clip_path, tmp_path, 0.5))
    assert reason == "not_video" and message.endswith("moov atom not found")


@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv", "clip.avi", "fast.mp4"])
def test_a_cut_file_gives_what_is_there(name: str, tmp_path: Path) -> None:
    """The frames that are there are the whole file's; the last ones may be missing."""
    path = write_video(tmp_path / name, frames=100, options={"g": "12"}, index_first=True)
    whole, _ = every_frame(path)
    clip = decode(cut(path, tmp_path, 0.5), replace(RGB, frames=16))
    assert 30 < clip.facts.frame_count < 70
    assert clip.frame_ok[:14] == [True] * 14
    positions = uniform_positions(clip.facts.frame_count, 16)
    np.testing.assert_array_equal(clip.pictures[:14], whole[positions[:14]])
    assert_repeats(clip)


@pytest.mark.parametrize("keyframes", [12, 250])
def test_a_hole_in_the_middle_is_filled_with_the_last_good_frame(keyframes: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=100, options={"g": str(keyframes)})
    whole, _ = every_frame(path)
    content = bytearray(path.read_bytes())
    start, end = (content.index(b"mdat") + len(content) * share // 100 for share in (30, 50))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    clip = decode(path, replace(RGB, frames=50))
    assert clip.facts.frame_count == 100
    assert not all(clip.frame_ok) and clip.message
    before = clip.frame_ok.index(False)
    np.testing.assert_array_equal(clip.pictures[:before], whole[uniform_positions(100, 50)[:before]])
    if keyframes == 12:
        np.testing.assert_array_equal(clip.pictures[-1], whole[-1])
    assert_repeats(clip)


def test_too_little_is_left(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=100)
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.rindex(b"moov") - 4
    middle = start + (end - start) // 2
    content[middle:end] = bytes(end - middle)
    path.write_bytes(content)
    good = sum(decode(path, replace(RGB, frames=50, min_frames=1)).frame_ok)
    assert 0 < good < 50
    reason, message = failure(path, replace(RGB, frames=50, min_frames=good + 1))
    assert reason == "damaged" and message.startswith(f"{good} of 50 frames could be decoded; ")
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    assert failure(path)[0] == "no_frames"


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_never_raise_anything_else(seed: int, clip_path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    content = np.frombuffer(clip_path.read_bytes(), np.uint8).copy()
    content[rng.integers(len(content), size=200)] ^= 0xFF
    (tmp_path / "clip.mp4").write_bytes(content.tobytes())
    try:
        clip = decode(tmp_path / "clip.mp4")
    except DecodeError as error:
        assert error.reason in ("not_video", "no_frames", "damaged", "too_large")
    else:
        assert clip.pictures.shape == REQUEST.pictures_shape


def cut(path: Path, folder: Path, share: float) -> Path:
    content = path.read_bytes()
    shorter = folder / f"cut{path.suffix}"
    shorter.write_bytes(content[: int(len(content) * share)])
    return shorter


def assert_repeats(clip: DecodedClip) -> None:
    """Each step that is not ok shows the last good one, or the first good one."""
    shown = clip.frame_ok.index(True)
    for step, ok in enumerate(clip.frame_ok):
        shown = step if ok else shown
        np.testing.assert_array_equal(clip.pictures[step], clip.pictures[shown])


# --- real files -------------------------------------------------------------------------------------


def test_wild_files_are_what_ffprobe_says(wild: Path) -> None:
    with open(wild / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("frames", "width", "height", "rotation")
    expected = {row["name"]: (row["codec"], *(int(row[column]) for column in columns)) for row in rows}
    # Packets that show nothing are noticed where one was to be a sampled frame, so many are sampled.
    facts = {name: decode(wild / name, replace(RGB, frames=64)).facts for name in expected}
    assert len(expected) == 41
    assert {n: (f.codec, f.frame_count, f.width, f.height, f.rotation) for n, f in facts.items()} == expected


@pytest.mark.parametrize(
    "name", ["decord__video_180.mov", "decord__video_270.mov", "mei__with-gps.mov", "ExoPlayer__video_1.mp4"]
)
def test_wild_turned_files_stand_as_opencv_shows_them(name: str, wild: Path) -> None:
    reference = opencv_frames(wild / name)
    picture = decode(wild / name, replace(RGB, frames=1)).pictures[0].astype(float)
    upright = cv2.resize(reference[0], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    off = [np.abs(picture - np.rot90(upright, turns)).mean() for turns in range(4)]
    assert off[0] < min(off[1:]) / 8


@pytest.mark.parametrize("name", ["fight/fi001.mp4", "fight/fi050.mp4", "noFight/nofi001.mp4"])
def test_fights_equal_a_full_decode(name: str, fights: Path) -> None:
    pictures, times_s = every_frame(fights / name)
    plan = plan_frames(times_s, count=16, motion_gap_s=0.1)
    clip = decode(fights / name, replace(REQUEST, frames=16))
    np.testing.assert_array_equal(clip.pictures[:16], pictures[plan.frames])
    assert clip.facts.frame_count == len(pictures)
