"""Which frames a clip is made of: arithmetic on the times of a video's frames.

Pure functions over arrays; nothing here opens a file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class FramePlan:
    """The frames to decode for one clip, as positions in presentation order.

    `frames` [T] are the sampled moments. `partners` [T], where motion is wanted, are the frames a
    fixed time away from them: the motion picture at step t shows `later[t] - earlier[t]`.
    """

    frames: Indices
    partners: Indices | None = None

    @property
    def wanted(self) -> Indices:
        """Every position that has to be decoded, ascending, each once."""
        parts = [self.frames] if self.partners is None else [self.frames, self.partners]
        return np.unique(np.concatenate(parts))

    @property
    def earlier(self) -> Indices:
        assert self.partners is not None
        return np.minimum(self.frames, self.partners)

    @property
    def later(self) -> Indices:
        assert self.partners is not None
        return np.maximum(self.frames, self.partners)


def plan_frames(times_s: NDArray[np.float64], *, count: int, motion_gap_s: float | None) -> FramePlan:
    """`count` frames spread evenly over a video whose frames stand at `times_s` [N], ascending.

    With a `motion_gap_s`, also each frame's partner. Raises ValueError for an empty video.
    """
    if len(times_s) == 0:
        raise ValueError("times_s: a video without frames has nothing to sample")
    frames = uniform_positions(len(times_s), count)
    partners = None if motion_gap_s is None else motion_partners(times_s, frames, motion_gap_s)
    return FramePlan(frames, partners)


def uniform_positions(total: int, count: int) -> Indices:
    """The middles of `count` equal parts of `total` frames; a short video repeats frames.

    >>> uniform_positions(8, 4).tolist()
    [1, 3, 5, 7]
    >>> uniform_positions(2, 4).tolist()
    [0, 0, 1, 1]
    """
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def motion_partners(times_s: NDArray[np.float64], frames: Indices, gap_s: float) -> Indices:
    """For each frame the one nearest to `gap_s` later; at the end of the video, `gap_s` earlier.

    A partner is another frame wherever there is one, so a slow frame rate still shows motion.
    """
    last = len(times_s) - 1
    later = _nearest(times_s, times_s[frames] + gap_s)
    later = np.minimum(np.maximum(later, frames + 1), last)
    # Past the end the nearest frame would be too close: look back instead.
    runs_out = times_s[frames] + gap_s > times_s[last] + gap_s / 4
    earlier = np.maximum(np.minimum(_nearest(times_s, times_s[frames] - gap_s), frames - 1), 0)
    return np.where(runs_out, earlier, later)


def _nearest(sorted_values: NDArray[np.float64], targets: NDArray[np.float64]) -> Indices:
    right = np.clip(np.searchsorted(sorted_values, targets), 1, max(1, len(sorted_values) - 1))
    left = right - 1
    right = np.minimum(right, len(sorted_values) - 1)
    closer_right = np.abs(sorted_values[right] - targets) <= np.abs(targets - sorted_values[left])
    return np.where(closer_right, right, left).astype(np.int64)
