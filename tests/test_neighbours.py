import numpy as np
import pytest

from raypipe import neighbours
from raypipe.neighbours import near_duplicates
from raypipe.trial import ClipSet


def clip_set(features: np.ndarray, view: str = "rgb") -> ClipSet:
    ids = [f"{i}.mp4" for i in range(len(features))]
    return ClipSet(ids, features, np.zeros(len(features), np.int64), ["a"], view=view)


def scenes(count: int, *, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Features [count, 3, dim] of clips that have much in common, and nothing else of each other."""
    rng = np.random.default_rng(seed)
    own = 5.0 + rng.normal(size=(count, 1, dim))
    return (own + 0.1 * rng.normal(size=(count, 3, dim))).astype(np.float16)


def test_a_copy_on_another_side_is_found_and_one_on_the_same_side_is_not() -> None:
    features = scenes(30)
    features[17], features[18] = features[3] + 0.05, features[4] + 0.05
    sides = np.zeros(30, int)
    sides[17] = 1
    found = near_duplicates(clip_set(features), sides, seed=0)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(3, 17)]
    assert found.pairs[0].cosine > 0.95
    assert (found.view, found.cut_off, found.compared) == ("rgb", 0.7, 30)


def test_of_both_views_the_frames_are_compared() -> None:
    frames, motion = scenes(20), scenes(20, seed=1)
    motion[5] = motion[6]
    sides = np.arange(20) % 2
    both = clip_set(np.concatenate([frames, motion], axis=2), "both")
    assert near_duplicates(both, sides, seed=0).pairs == ()
    alone = near_duplicates(clip_set(motion, "motion"), sides, seed=0)
    assert [(pair.first, pair.second) for pair in alone.pairs] == [(5, 6)]


def test_chunks_and_drawn_clips_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = scenes(50)
    features[40] = features[7]
    sides = np.arange(50) % 3
    whole = near_duplicates(clip_set(features), sides, seed=0)
    monkeypatch.setattr(neighbours, "CLIPS_AT_ONCE", 8)
    assert near_duplicates(clip_set(features), sides, seed=0).pairs == pytest.approx(whole.pairs)
    monkeypatch.setattr(neighbours, "MOST_CLIPS", 20)
    drawn = near_duplicates(clip_set(features), sides, seed=0)
    assert drawn.compared == 20
    assert {pair.first for pair in drawn.pairs} <= {pair.first for pair in whole.pairs}


def test_clips_that_take_part_as_zeros_are_no_copies() -> None:
    features = scenes(60)
    features[::6] = 0
    found = near_duplicates(clip_set(features), np.arange(60) % 5, seed=0)
    assert (found.compared, found.pairs) == (50, ())
