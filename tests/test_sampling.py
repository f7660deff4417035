import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.sampling import motion_partners, plan_frames, uniform_positions

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


@settings(deadline=None)
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
