"""Clips that look alike although they stand on two sides of a split: likely leaks of one source into both.

Clips are compared by the mean of their features over the steps, less the mean over all clips: the cosine of
the angle between two. Where there are features of the frames, those alone: motion is alike in many places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.trial import ClipSet, view_of

CUT_OFF = {"rgb": 0.7, "motion": 0.9}
"""From this cosine on two clips count as alike: above what different sources reach (0.58 and 0.89 among
242 fights), below what most changed copies reach (docs/decisions/0018)."""
MOST_CLIPS = 20_000
"""Of more clips, so many drawn by the seed are compared: the time grows with their square."""
CLIPS_AT_ONCE = 1024


@dataclass(frozen=True)
class Pair:
    """Two clips (rows of a ClipSet) on different sides, and the cosine of their features."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class Neighbours:
    """What was compared, and the pairs above the cut-off, the most alike first."""

    view: str
    cut_off: float
    compared: int
    pairs: tuple[Pair, ...]


def near_duplicates(clips: ClipSet, sides: NDArray[np.integer], *, seed: int) -> Neighbours:
    """Pairs of clips that are alike and on different sides, of `clips` and the side [N] of each. Clips that
    failed and take part as zeros are alike without being copies: they are left out."""
    view = "motion" if clips.view == "motion" else "rgb"
    rows = np.arange(len(sides))
    if len(rows) > MOST_CLIPS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_CLIPS, replace=False))
    vectors = pooled(view_of(clips.features, clips.view, view), rows)
    there = vectors.any(axis=1)
    rows, vectors = rows[there], vectors[there]
    directions = centred_directions(vectors)
    found = alike(directions, sides[rows], CUT_OFF[view])
    pairs = [Pair(int(rows[i]), int(rows[j]), cosine) for i, j, cosine in found]
    return Neighbours(view, CUT_OFF[view], len(rows), tuple(sorted(pairs, key=lambda pair: -pair.cosine)))


def pooled(features: NDArray[np.float16], rows: NDArray[np.integer]) -> NDArray[np.float32]:
    """[n, D]: the mean over the steps of features [N, T, D], which may be memory-mapped, at `rows`."""
    found = np.empty((len(rows), features.shape[-1]), np.float32)
    for start in range(0, len(rows), CLIPS_AT_ONCE):
        part = rows[start : start + CLIPS_AT_ONCE]
        found[start : start + len(part)] = np.asarray(features[part], np.float32).mean(axis=1)
    return found


def centred_directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1, seen from their mean: what all clips share makes no two of them alike."""
    centred = vectors - vectors.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    directions: NDArray[np.float32] = centred / np.maximum(lengths, 1e-12)
    return directions


def alike(
    directions: NDArray[np.float32], sides: Sequence[int] | NDArray[np.integer], cut_off: float
) -> list[tuple[int, int, float]]:
    """Pairs i < j on different sides whose cosine is at least `cut_off`.

    >>> directions = np.array([[1, 0], [0.8, 0.6], [0, 1], [1, 0]], np.float32)
    >>> [(i, j, round(cosine, 1)) for i, j, cosine in alike(directions, [0, 1, 1, 0], 0.7)]
    [(0, 1, 0.8), (1, 3, 0.8)]
    """
    sides, found = np.asarray(sides), []
    for start in range(0, len(directions), CLIPS_AT_ONCE):
        cosines = directions[start : start + CLIPS_AT_ONCE] @ directions.T
        mine = np.arange(start, start + len(cosines))
        others = (sides[mine][:, None] != sides[None, :]) & (np.arange(len(sides))[None, :] > mine[:, None])
        for i, j in zip(*np.nonzero(others & (cosines >= cut_off)), strict=True):
            found.append((int(mine[i]), int(j), float(cosines[i, j])))
    return found
