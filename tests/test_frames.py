from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_video

from raypipe.frames import (
    HOLE_BETWEEN_START_CODES,
    HOLE_IN_UNIT,
    FrameReader,
    FullDecode,
    PacketEntry,
    PacketIndex,
    Trust,
    is_ascending,
    keyframe_before,
    libav_messages,
    units,
    upright,
)


@pytest.mark.parametrize(
    ("keyframes", "times", "number", "found"),
    [
        ([0, 3], [0, 1, 2, 3, 4, 5], 5, 3),
        ([0, 3], [0, 1, 2, 3, 4, 5], 3, 3),
        ([0, 3], [0, 1, 2, 3, 4, 5], 2, 0),
        ([0, 2], [0, 1, 4, 2, 3, 5], 3, 0),  # open GOP: shown before the keyframe, stored after it
        ([0, 2], [0, 1, 4, 2, 3, 5], 5, 2),
        ([2], [0, 1, 2, 3], 1, 0),  # none before it: from the start
        ([], [0, 1], 1, 0),
    ],
)
def test_keyframe_before(keyframes: list[int], times: list[int], number: int, found: int) -> None:
    pairs = [(keyframe, times[keyframe]) for keyframe in keyframes]
    assert keyframe_before(pairs, number, times[number])[0] == found


@pytest.mark.parametrize(
    ("times", "ascending"),
    [([], True), ([1], True), ([1, 2, 5], True), ([1, 1], False), ([2, 1], False), ([1, None], False)],
)
def test_is_ascending(times: list[int | None], ascending: bool) -> None:
    assert is_ascending(times) == ascending


# --- which frames are real --------------------------------------------------------------------------


def trusted(
    keyframes: list[int], damaged: list[int], *, times: list[int] | None = None, begins_at: int | None = None
) -> str:
    """Six packets in file order: which of their frames are real."""
    times = times or list(range(6))
    trust = Trust(begins_at)
    for number, pts in enumerate(times):
        if number in keyframes:
            trust.add_keyframe(number, pts)
        if number in damaged:
            trust.add_damage(number)
    return "".join("+" if trust.covers(number, pts) else "-" for number, pts in enumerate(times))


@pytest.mark.parametrize(
    ("keyframes", "damaged", "real"),
    [
        ([0], [], "++++++"),
        ([0], [0], "------"),
        ([0], [2], "++----"),
        ([0, 3], [1], "+--+++"),
        ([0, 3], [3], "+++---"),  # the keyframe itself
        ([0, 2, 4], [2, 5], "++--+-"),
        ([], [2], "++----"),
        ([3], [1], "+--+++"),
    ],
)
def test_no_frame_is_real_from_damage_to_the_next_keyframe(
    keyframes: list[int], damaged: list[int], real: str
) -> None:
    assert trusted(keyframes, damaged) == real


def test_what_is_shown_before_a_keyframe_may_refer_to_what_lies_before_it() -> None:
    times = [0, 1, 4, 2, 3, 5]  # keyframe 2 is shown after 3 and 4
    assert trusted([0, 2], [1], times=times) == "+-+--+"
    assert trusted([0, 2], [1], times=times, begins_at=4) == "--+--+"  # begun at the keyframe


def test_damage_that_is_noticed_late_counts_from_where_it_is() -> None:
    trust = Trust()
    for number in range(6):
        if number in (0, 4):
            trust.add_keyframe(number, number)
    trust.add_damage(2)  # its frame came out, corrupt, after the next keyframe was read
    assert [trust.covers(number, number) for number in range(6)] == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("content", "is_hole"),
    [
        (b"\0\0\0\5\x65\1\2\3\4", False),  # a unit of five bytes
        (b"\0\0\1\0\x65" + b"\1\0\0\3\1" * 51, False),
        (b"\0\0\0\7\x65\1\0\0\0\0\1", True),
        (b"\0\0\0\7\x65\1\0\0\0\0\0", False),  # padding at its end
        (b"\0\0\0\4\x65\0\0\0\0\0\0\2\x41\1", False),  # padding, and another unit
        (b"\0\0\0\3\x65\1\1\0\0\0\6\x41\0\0\0\5\1", True),
        (b"\0\0\0\0\x65\0\0\0\0\1", False),  # no length: the decoder will say so
    ],
)
def test_zeros_that_no_unit_can_hold(content: bytes, is_hole: bool) -> None:
    assert any(HOLE_IN_UNIT.search(unit) for unit in units(content, 4)) == is_hole


@pytest.mark.parametrize(
    ("content", "is_hole"),
    [
        (b"\0\0\0\1\x65\1\2\0\0\0\0\0\1\x65", False),  # zeros that lead to a unit
        (b"\0\0\1\x65\1\2\0\0\0", False),  # zeros that end the last one
        (b"\0\0\1\x65\1\0\0\0\0\x33", True),
        (b"\0\0\1\x65\1" + bytes(10_000_000), False),  # would take for ever if each zero began a search
    ],
)
def test_zeros_that_cannot_stand_between_start_codes(content: bytes, is_hole: bool) -> None:
    assert bool(HOLE_BETWEEN_START_CODES.search(content)) == is_hole


def test_fights_that_their_camera_padded_are_whole(fights: Path) -> None:
    for name in ("fi071.mp4", "fi072.mp4"):
        with open(fights / "fight" / name, "rb") as file, libav_messages() as messages:
            reader = read(file, fights / name, messages)
            assert all(reader.trusts(frame) for frame in reader.frames())
            assert reader.take_message() is None


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.mp4"), ("libx264", "a.ts"), ("libx265", "a.mkv")])
def test_whole_files_hold_no_such_zeros(codec: str, name: str, tmp_path: Path) -> None:
    """A picture of one colour compresses to next to nothing, units of a few bytes."""
    path = write_video(
        tmp_path / name, codec=codec, frames=50, draw=lambda *_: np.zeros((96, 128, 3), np.uint8)
    )
    with open(path, "rb") as file, libav_messages() as messages:
        reader = read(file, path, messages)
        assert len([frame for frame in reader.frames() if reader.trusts(frame)]) == 50
        assert reader.take_message() is None


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), [[1, 2], [3, 4]]),
        ((0, 1, -1, 0), [[3, 1], [4, 2]]),
        ((-1, 0, 0, -1), [[4, 3], [2, 1]]),
        ((0, -1, 1, 0), [[2, 4], [1, 3]]),
        ((-1, 0, 0, 1), [[2, 1], [4, 3]]),
        ((1, 0, 0, -1), [[3, 4], [1, 2]]),
    ],
)
def test_upright(matrix: tuple[int, int, int, int], shown: list[list[int]]) -> None:
    picture = np.array([[[1], [2]], [[3], [4]]], np.uint8)
    assert upright(picture, matrix)[..., 0].tolist() == shown


# --- from times to frames ---------------------------------------------------------------------------


def read(file: object, path: Path, messages: list[object]) -> FrameReader:
    return FrameReader(
        file,  # type: ignore[arg-type]
        str(path),
        messages,
        size=64,
        max_pixels=1 << 24,
        max_packets=10_000,
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.avi"])
@pytest.mark.parametrize("by_index", [True, False])
def test_pictures_by_position(name: str, by_index: bool, tmp_path: Path) -> None:
    """Wanted frames up to the last target come with it, others do not, and none is decoded twice."""
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_video(tmp_path / name, codec=codec, options={"g": "12"}, frames=100)
    with av.open(str(path)) as container:
        whole = [frame.reformat(64, 64, "rgb24", interpolation="AREA") for frame in container.decode(video=0)]
    with open(path, "rb") as file, libav_messages() as messages:
        reader = read(file, path, messages)
        packets = reader.scan_packets()
        source = PacketIndex(reader, packets) if by_index else FullDecode(reader)
        assert len(source.pts) == 100
        source.want([3, 5, 40, 41, 99])
        assert source.read([5]).keys() == {3, 5}
        found = source.read([41, 99])
        assert reader.frames_out <= (2 if by_index else 3) * 100
        assert found.keys() == {40, 41, 99}
        for position, picture in found.items():
            np.testing.assert_array_equal(picture, whole[position].to_ndarray())


def test_packets_need_times_of_their_own() -> None:
    def entries(*times: tuple[int | None, int | None]) -> list[PacketEntry]:
        return [PacketEntry(pts, True, dts) for pts, dts in times]

    class Timed(FrameReader):
        is_timed = True

        def __init__(self) -> None:
            pass

    has_times = Timed().has_times
    assert has_times(entries((0, 0), (2, 1), (1, 2)))
    assert has_times(entries((0, None), (1, None)))
    assert not has_times([])
    assert not has_times(entries((0, 0), (None, 1)))
    assert not has_times(entries((0, 0), (0, 1)))
    assert not has_times(entries((0, 0), (1, 1), (2, 0)))  # files joined with cat
