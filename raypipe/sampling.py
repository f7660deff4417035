"""Which clips a video is made of, and which frames a clip: arithmetic on the times of a video's frames.

Pure functions over arrays; nothing here opens a file.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Policy = Literal["uniform", "middle", "fps", "keyframes"]

TIME_NOISE_S = 1e-6
"""More than the rounding of sums and differences of times, less than any frame lasts."""


@dataclass(frozen=True)
class FramePlan:
    """The frames to decode for one clip, as positions in presentation order.

    `frames` [T] are the sampled moments. `partners` [T], where motion is wanted, are the frames a
    fixed time after them: the motion picture at step t is the difference of the two.
    """

    frames: Indices
    partners: Indices | None = None

    @property
    def wanted(self) -> Indices:
        """Every position that has to be decoded, ascending, each once."""
        parts = [self.frames] if self.partners is None else [self.frames, self.partners]
        return np.unique(np.concatenate(parts))

    def shifted(self, by: int) -> "FramePlan":
        """The same plan for a clip whose first frame is the video's frame `by`."""
        return FramePlan(self.frames + by, None if self.partners is None else self.partners + by)


@dataclass(frozen=True)
class Window:
    """One clip of a video: its span in seconds from the first frame, and its frames [first, stop)."""

    start_s: float
    end_s: float
    first: int
    stop: int


def plan_windows(
    times_s: NDArray[np.float64], duration_s: float, *, window_s: float | None, stride_s: float | None
) -> list[Window]:
    """The clips of a video whose frames stand at `times_s` [N], ascending from 0: without `window_s` one.

    A window begins every `stride_s` (default: `window_s`) as long as at least half of it is left, and
    ends with the video at the latest. One that holds no frame is no clip. There is always a first one.

    >>> [(w.start_s, w.end_s) for w in plan_windows(np.arange(50) / 10, 5.0, window_s=2, stride_s=None)]
    [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0)]
    """
    if window_s is None:
        return [Window(0.0, duration_s, 0, len(times_s))]
    stride_s = stride_s or window_s
    # Only windows with a frame in them: one absurd time must not make a billion empty ones.
    last = np.floor((times_s + TIME_NOISE_S) / stride_s).astype(np.int64)
    reach = int(np.ceil(window_s / stride_s))
    numbers = np.unique(np.concatenate([last - back for back in range(reach)]))
    windows = []
    for number in numbers[numbers >= 0]:
        start_s = float(number * stride_s)
        if number > 0 and duration_s - start_s < window_s / 2 - TIME_NOISE_S:
            break
        span_s = np.array([start_s, start_s + window_s])
        first, stop = np.searchsorted(times_s, span_s - TIME_NOISE_S)
        if first < stop:
            windows.append(Window(start_s, min(start_s + window_s, duration_s), int(first), int(stop)))
    return windows


def plan_frames(
    times_s: NDArray[np.float64],
    *,
    count: int,
    motion_gap_s: float | None,
    policy: Policy = "uniform",
    fps: float | None = None,
    keyframes: Indices | None = None,
) -> FramePlan:
    """`count` frames of a video whose frames stand at `times_s` [N], ascending, chosen by the policy.

    `fps` is the policy fps's rate; `keyframes` are the positions of those, ascending, for keyframes. With a
    `motion_gap_s`, frames are taken where the video goes on for so long, and each has a partner. Raises
    ValueError for an empty video.
    """
    if len(times_s) == 0:
        raise ValueError("times_s: a video without frames has nothing to sample")
    total = len(times_s)
    if motion_gap_s is not None:
        last_s = times_s[-1] - motion_gap_s + TIME_NOISE_S
        total = max(1, int(np.searchsorted(times_s, last_s, side="right")))
    if policy == "middle":
        frames = middle_positions(total, count)
    elif policy == "fps":
        if fps is None:
            raise ValueError("fps: the policy fps needs a rate")
        frames = paced_positions(times_s[:total], count, fps)
    else:
        frames = uniform_positions(total, count)
        if policy == "keyframes" and keyframes is not None and len(within := keyframes[keyframes < total]):
            frames = within[_nearest(within.astype(np.float64), frames.astype(np.float64))]
    if motion_gap_s is None:
        return FramePlan(frames)
    return FramePlan(frames, motion_partners(times_s, frames, motion_gap_s))


def uniform_positions(total: int, count: int) -> Indices:
    """`count` positions from the first of `total` frames to the last; a short video repeats frames.

    >>> uniform_positions(7, 4).tolist()
    [0, 2, 4, 6]
    >>> uniform_positions(2, 4).tolist()
    [0, 0, 1, 1]
    """
    return np.rint(np.linspace(0, total - 1, count)).astype(np.int64)


def middle_positions(total: int, count: int) -> Indices:
    """The middle frame of each of `count` equal parts of `total` frames; a short video repeats frames.

    >>> middle_positions(12, 4).tolist()
    [1, 4, 7, 10]
    >>> middle_positions(2, 4).tolist()
    [0, 0, 1, 1]
    """
    return ((2 * np.arange(count, dtype=np.int64) + 1) * total - 1) // (2 * count)


def paced_positions(times_s: NDArray[np.float64], count: int, fps: float) -> Indices:
    """The frames nearest to 0, 1, 2, ... `count - 1` steps of 1/`fps` seconds; the last one repeats.

    >>> paced_positions(np.arange(9) / 10, 4, 5.0).tolist()
    [0, 2, 4, 6]
    """
    return _nearest(times_s, times_s[0] + np.arange(count) / fps)


def motion_partners(times_s: NDArray[np.float64], frames: Indices, gap_s: float) -> Indices:
    """For each frame the one nearest to `gap_s` later, which is another one wherever there is one.

    So a frame rate slower than the gap still shows motion.
    """
    later = _nearest(times_s, times_s[frames] + gap_s)
    return np.minimum(np.maximum(later, frames + 1), len(times_s) - 1)


def _nearest(sorted_values: NDArray[np.float64], targets: NDArray[np.float64]) -> Indices:
    right = np.clip(np.searchsorted(sorted_values, targets), 1, max(1, len(sorted_values) - 1))
    left = right - 1
    right = np.minimum(right, len(sorted_values) - 1)
    closer_right = np.abs(sorted_values[right] - targets) <= np.abs(targets - sorted_values[left])
    return np.where(closer_right, right, left).astype(np.int64)
