import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.sampling import (
    FramePlan,
    middle_positions,
    motion_partners,
    plan_frames,
    plan_windows,
    uniform_positions,
)

AT_10_FPS = np.arange(20) / 10


@pytest.mark.parametrize(
    ("total", "count", "positions"),
    [
        (10, 4, [0, 3, 6, 9]),
        (11, 3, [0, 5, 10]),
        (100, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 5, [0, 0, 1, 2, 2]),
        (1, 3, [0, 0, 0]),
        (10**12 + 1, 3, [0, 5 * 10**11, 10**12]),
    ],
)
def test_positions_run_from_the_first_frame_to_the_last(total: int, count: int, positions: list[int]) -> None:
    assert uniform_positions(total, count).tolist() == positions


@pytest.mark.parametrize(
    ("times_s", "frames", "gap_s", "partners"),
    [
        (AT_10_FPS, [0, 5, 10], 0.2, [2, 7, 12]),
        (AT_10_FPS, [0, 5, 10], 0.24, [2, 7, 12]),
        (AT_10_FPS, [0, 5, 10], 0.26, [3, 8, 13]),
        (AT_10_FPS, [0, 5, 10], 0.01, [1, 6, 11]),  # slower than the gap: still another frame
        (AT_10_FPS, [0, 5], 60.0, [19, 19]),  # longer than the video
        ([0.0], [0, 0], 0.2, [0, 0]),
        ([0.0, 5.0], [0], 0.2, [1]),
        ([0.0, 0.1, 3.0, 3.1, 3.2], [0, 1, 2], 0.2, [1, 2, 4]),  # a hole in the times
    ],
)
def test_partners(times_s: list[float], frames: list[int], gap_s: float, partners: list[int]) -> None:
    assert motion_partners(np.array(times_s), np.array(frames), gap_s).tolist() == partners


@pytest.mark.parametrize(
    ("gap_s", "frames", "partners"),
    [
        (0.58, [0, 6, 13], [6, 12, 19]),  # the last frame is the last partner
        (0.05, [0, 9, 18], [1, 10, 19]),
        (5.0, [0, 0, 0], [19, 19, 19]),
    ],
)
def test_frames_stand_where_the_video_goes_on_for_the_gap(
    gap_s: float, frames: list[int], partners: list[int]
) -> None:
    plan = plan_frames(AT_10_FPS, count=3, motion_gap_s=gap_s)
    assert plan.partners is not None
    assert (plan.frames.tolist(), plan.partners.tolist()) == (frames, partners)
    assert plan.wanted.tolist() == sorted({*frames, *partners})


def test_without_motion_no_partners() -> None:
    plan = plan_frames(AT_10_FPS, count=4, motion_gap_s=None)
    assert plan.partners is None
    assert plan.wanted.tolist() == plan.frames.tolist()


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="a video without frames has nothing to sample"):
        plan_frames(np.array([]), count=4, motion_gap_s=None)


intervals_s = st.floats(0.001, 10)


@given(
    st.lists(intervals_s, max_size=60).map(lambda gaps: np.cumsum([0.0, *gaps])),
    st.integers(1, 40),
    st.floats(0.001, 100),
)
def test_any_plan(times_s: np.ndarray, count: int, gap_s: float) -> None:
    plan = plan_frames(times_s, count=count, motion_gap_s=gap_s)
    assert plan.partners is not None
    frames, partners, total = plan.frames, plan.partners, len(times_s)

    assert len(frames) == len(partners) == count
    assert plan.wanted.min() == 0 and plan.wanted.max() < total
    steps = np.diff(frames)
    assert (steps >= 0).all() and len(set(steps.tolist())) <= 2
    for frame, partner in zip(frames, partners, strict=True):
        off_s = np.abs(times_s[frame + 1 :] - times_s[frame] - gap_s)
        if len(off_s):
            assert partner > frame
            assert abs(times_s[partner] - times_s[frame] - gap_s) == pytest.approx(off_s.min(), abs=1e-9)
        else:
            assert total == 1


# --- windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window_s", "stride_s", "spans"),
    [
        (None, None, [(0, 2, 0, 20)]),
        (1.0, None, [(0, 1, 0, 10), (1, 2, 10, 20)]),
        (1.0, 0.5, [(0, 1, 0, 10), (0.5, 1.5, 5, 15), (1, 2, 10, 20), (1.5, 2, 15, 20)]),
        (0.5, 1.0, [(0, 0.5, 0, 5), (1, 1.5, 10, 15)]),  # with gaps
        (1.5, None, [(0, 1.5, 0, 15)]),  # less than half a window is left
        (1.3, None, [(0, 1.3, 0, 13), (1.3, 2, 13, 20)]),
        (60.0, None, [(0, 2, 0, 20)]),
    ],
)
def test_windows(
    window_s: float | None, stride_s: float | None, spans: list[tuple[float, float, int, int]]
) -> None:
    windows = plan_windows(AT_10_FPS, 2.0, window_s=window_s, stride_s=stride_s)
    assert [(w.start_s, w.end_s, w.first, w.stop) for w in windows] == [pytest.approx(span) for span in spans]


def test_a_window_without_frames_is_no_clip() -> None:
    times_s = np.array([0.0, 0.1, 5.0, 5.1])
    windows = plan_windows(times_s, 5.2, window_s=1.0, stride_s=None)
    assert [(w.start_s, w.first, w.stop) for w in windows] == [(0.0, 0, 2)]  # too little is left at 5 s
    assert len(plan_windows(times_s, 5.6, window_s=1.0, stride_s=None)) == 2


def test_an_absurd_time_makes_no_billion_windows() -> None:
    windows = plan_windows(np.array([0.0, 0.5, 1e12]), 1e12 + 0.5, window_s=1.0, stride_s=None)
    assert [w.first for w in windows] == [0, 2]


@given(
    gaps=st.lists(st.floats(0.001, 3), max_size=60),
    window_s=st.floats(0.01, 20),
    stride_share=st.floats(0.1, 3),
)
def test_every_window_holds_its_frames(gaps: list[float], window_s: float, stride_share: float) -> None:
    times_s = np.concatenate([[0.0], np.cumsum(gaps)])
    duration_s = float(times_s[-1]) + 0.04
    windows = plan_windows(times_s, duration_s, window_s=window_s, stride_s=window_s * stride_share)
    assert windows and windows[0].first == 0
    for w in windows:
        inside = times_s[w.first : w.stop]
        assert len(inside) > 0 and w.start_s - 1e-6 <= inside[0] and inside[-1] <= w.end_s + 1e-6
        assert w.end_s <= duration_s + 1e-9
    assert [w.start_s for w in windows] == sorted({w.start_s for w in windows})


def test_a_plan_moves_to_where_its_clip_begins() -> None:
    plan = FramePlan(np.array([0, 2]), np.array([1, 3])).shifted(10)
    assert (plan.frames.tolist(), plan.partners.tolist()) == ([10, 12], [11, 13])
    assert FramePlan(np.array([0])).shifted(3).partners is None


KEYFRAMES = np.array([0, 4, 12, 19])


@pytest.mark.parametrize(
    ("policy", "gap_s", "frames", "partners"),
    [
        ({"policy": "uniform"}, None, [0, 6, 13, 19], None),
        ({"policy": "middle"}, None, [2, 7, 12, 17], None),
        ({"policy": "middle"}, 0.4, [1, 5, 9, 13], [5, 9, 13, 17]),
        ({"policy": "fps", "fps": 2.0}, None, [0, 5, 10, 15], None),
        ({"policy": "fps", "fps": 1.0}, None, [0, 10, 19, 19], None),  # over earlier: the last one repeats
        ({"policy": "fps", "fps": 100.0}, None, [0, 0, 0, 0], None),
        ({"policy": "fps", "fps": 2.0}, 0.6, [0, 5, 10, 13], [6, 11, 16, 19]),
        ({"policy": "keyframes", "keyframes": KEYFRAMES}, None, [0, 4, 12, 19], None),
        ({"policy": "keyframes", "keyframes": KEYFRAMES}, 0.2, [0, 4, 12, 12], [2, 6, 14, 14]),
        ({"policy": "keyframes", "keyframes": KEYFRAMES[:1]}, None, [0, 0, 0, 0], None),
        ({"policy": "keyframes", "keyframes": KEYFRAMES[:0]}, None, [0, 6, 13, 19], None),  # has none
    ],
)
def test_policies(policy: dict, gap_s: float | None, frames: list[int], partners: list[int] | None) -> None:
    plan = plan_frames(AT_10_FPS, count=4, motion_gap_s=gap_s, **policy)
    assert plan.frames.tolist() == frames
    assert (None if plan.partners is None else plan.partners.tolist()) == partners


def test_a_rate_is_needed() -> None:
    with pytest.raises(ValueError, match="fps: the policy fps needs a rate"):
        plan_frames(AT_10_FPS, count=4, motion_gap_s=None, policy="fps")


@given(st.integers(1, 200), st.integers(1, 40))
def test_the_middle_frames_lie_in_their_parts(total: int, count: int) -> None:
    positions = middle_positions(total, count)
    parts = np.arange(count + 1) * total // count
    assert ((parts[:-1] <= positions) & (positions <= parts[1:])).all()
    assert (total - 1 - positions[::-1] - positions).max() in (0, 1)  # as far from the end as from the start
