import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.splits import TEST, Splits
from raypipe.training import (
    ClipSet,
    Epoch,
    best_epoch,
    class_weights,
    cross_entropy,
    epoch_order,
    out_of_fold,
    stopped,
)


def epoch(number: int, *fold_losses: float) -> Epoch:
    """An epoch of two folds with two clips each; its probabilities tell which epoch they are from."""
    probabilities = np.full((5, 2), number / 10, np.float32)
    return Epoch(number, 0.0, fold_losses, probabilities, 0.0)


SPLITS = Splits(np.array([0, 0, 1, 1, TEST]), folds=2)


def test_each_fold_is_judged_at_the_epoch_that_is_best_for_the_others():
    epochs = [epoch(1, 0.1, 0.9), epoch(2, 0.5, 0.5), epoch(3, 0.9, 0.1)]
    chosen = out_of_fold(epochs, SPLITS)[:, 0]
    # Fold 0's own best is epoch 1, but fold 1's is epoch 3, so fold 0 is judged there; and the other way.
    assert chosen[:4].tolist() == pytest.approx([0.3, 0.3, 0.1, 0.1])
    assert np.isnan(chosen[4]), "the test side has no prediction"


def test_stopping_counts_epochs_since_the_best():
    epochs = [epoch(1, 0.5, 0.5), epoch(2, 0.2, 0.4), epoch(3, 0.4, 0.4), epoch(4, 0.5, 0.5)]
    assert best_epoch(epochs) == 2
    assert [stopped(epochs, patience) for patience in (1, 2, 3)] == [True, True, False]
    assert not stopped([], 1)


def test_an_epoch_has_full_batches_and_every_clip():
    order = epoch_order(np.arange(10, 23), 8, seed=(0, 1, 2))
    assert len(order) == 16
    assert set(order.tolist()) == set(range(10, 23))
    assert order.tolist() == epoch_order(np.arange(10, 23), 8, seed=(0, 1, 2)).tolist()
    assert order.tolist() != epoch_order(np.arange(10, 23), 8, seed=(0, 1, 3)).tolist()


def test_fewer_clips_than_a_batch_fill_one():
    assert sorted(epoch_order(np.array([4, 5]), 4, seed=(0,)).tolist()) == [4, 4, 5, 5]


def test_class_weights_make_classes_weigh_the_same():
    clips = ClipSet([], np.zeros((8, 1, 1), np.float16), np.array([0] * 6 + [1] * 2), ["common", "rare"])
    weights = class_weights(clips, np.arange(8), TrialConfig(class_weights=True))
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    assert class_weights(clips, np.arange(8), TrialConfig(class_weights=False)).tolist() == [1.0, 1.0]


def test_cross_entropy_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0]], np.float32)
    assert cross_entropy(np.array([0, 1]), probabilities) == pytest.approx(np.log(2) / 2)
    assert cross_entropy(np.array([0, 0]), probabilities) == pytest.approx((np.log(2) - np.log(1e-7)) / 2)
