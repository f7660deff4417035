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
    fixed time after them: the motion picture at step t is the difference of the two.
    """

    frames: Indices
    partners: Indices | None = None

    @property
    def wanted(self) -> Indices:
        """Every position that has to be decoded, ascending, each once."""
        parts = [self.frames] if self.partners is None else [self.frames, self.partners]
        return np.unique(np.concatenate(parts))


def plan_frames(times_s: NDArray[np.float64], *, count: int, motion_gap_s: float | None) -> FramePlan:
    """`count` frames spread evenly over a video whose frames stand at `times_s` [N], ascending.

    With a `motion_gap_s`, frames are taken where the video goes on for so long, and each has a partner.
    Raises ValueError for an empty video.
    """
    if len(times_s) == 0:
        raise ValueError("times_s: a video without frames has nothing to sample")
    if motion_gap_s is None:
        return FramePlan(uniform_positions(len(times_s), count))
    with_partner = int(np.searchsorted(times_s, times_s[-1] - motion_gap_s, side="right"))
    frames = uniform_positions(max(1, with_partner), count)
    return FramePlan(frames, motion_partners(times_s, frames, motion_gap_s))


def uniform_positions(total: int, count: int) -> Indices:
    """`count` positions from the first of `total` frames to the last; a short video repeats frames.

    >>> uniform_positions(7, 4).tolist()
    [0, 2, 4, 6]
    >>> uniform_positions(2, 4).tolist()
    [0, 0, 1, 1]
    """
    return np.rint(np.linspace(0, total - 1, count)).astype(np.int64)


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
