import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.errors import UserError
from raypipe.metrics import cross_entropies
from raypipe.splits import TEST, Splits
from raypipe.telemetry import GpuFigures
from raypipe.trial import (
    ClipSet,
    Epoch,
    best_epoch,
    class_weights,
    epoch_order,
    out_of_fold,
    stopped,
    validation_loss,
)


def epoch(number: int, *fold_losses: float) -> Epoch:
    """An epoch of two folds with two clips each; its probabilities tell which epoch they are from."""
    probabilities = np.full((5, 2), number / 10, np.float32)
    return Epoch(number, 0.0, fold_losses, probabilities, 0.1, 2.0, 0.5, GpuFigures())


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


def test_the_data_share_is_of_the_epoch():
    assert epoch(1, 0.5).data_share == 0.25


LABELS = np.array([0] * 20 + [1] * 5)


def test_an_epoch_has_full_batches_and_every_clip():
    config = TrialConfig(batch_size=8)
    order = epoch_order(np.arange(10, 23), LABELS, config, seed=(0, 1, 2))
    assert len(order) == 16
    assert set(order.tolist()) == set(range(10, 23))
    assert order.tolist() == epoch_order(np.arange(10, 23), LABELS, config, seed=(0, 1, 2)).tolist()
    assert order.tolist() != epoch_order(np.arange(10, 23), LABELS, config, seed=(0, 1, 3)).tolist()


def test_fewer_clips_than_a_batch_fill_one():
    order = epoch_order(np.array([4, 5]), LABELS, TrialConfig(batch_size=4), seed=(0,))
    assert sorted(order.tolist()) == [4, 4, 5, 5]


def test_oversampling_repeats_the_rare_class_until_it_is_as_large():
    config = TrialConfig(batch_size=1, class_weights=False, oversample=True)
    order = epoch_order(np.arange(8, 25), LABELS, config, seed=(0,))  # twelve common clips, five rare ones
    times = np.bincount(order, minlength=25)
    assert times[8:20].tolist() == [1] * 12
    assert times[20:].sum() == 12 and set(times[20:].tolist()) == {2, 3}


@pytest.mark.parametrize(("weighted", "weights"), [(True, [8 / 12, 8 / 4]), (False, [1.0, 1.0])])
def test_class_weights_make_classes_weigh_the_same(weighted, weights):
    config = TrialConfig(class_weights=weighted)
    given = class_weights(np.array([0] * 6 + [1] * 2), np.arange(8), 2, config)
    assert given.tolist() == pytest.approx(weights)


def test_a_fold_that_is_too_sure_of_its_answers_loses_nothing():
    labels, right = np.array([0, 0, 0, 1, 1, 1]), np.array([0.6, 0.7, 0.2, 0.55, 0.8, 0.3])
    probabilities = np.where(labels[:, None] == [0, 1], right[:, None], 1 - right[:, None])
    surer = probabilities**5 / (probabilities**5).sum(axis=1, keepdims=True)
    assert cross_entropies(labels, surer).mean() > cross_entropies(labels, probabilities).mean() + 0.05
    assert validation_loss(labels, surer) == pytest.approx(validation_loss(labels, probabilities), abs=1e-4)


def clip_set(view: str) -> ClipSet:
    features = np.arange(12, dtype=np.float16).reshape(1, 2, 6)
    return ClipSet(["a.mp4"], features, np.array([0]), ["calm"], view)


@pytest.mark.parametrize(
    ("stored", "wanted", "first_step"),
    [
        ("both", "all", [0, 1, 2, 3, 4, 5]),
        ("both", "rgb", [0, 1, 2]),
        ("both", "motion", [3, 4, 5]),
        ("rgb", "rgb", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_model_sees_the_view_it_is_given(stored, wanted, first_step):
    assert clip_set(stored).seen_as(wanted).features[0, 0].tolist() == first_step


def test_a_view_that_was_not_extracted_is_refused():
    with pytest.raises(UserError, match=r"--view motion: the features are of view rgb; extract them with"):
        clip_set("rgb").seen_as("motion")
