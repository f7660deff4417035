import numpy as np
import pytest

from raypipe.history import csv_text, epoch_row, hard_examples
from raypipe.telemetry import GpuFigures
from raypipe.trial import ClipSet, Epoch

CLIPS = ClipSet(list("abcde"), np.zeros((5, 1, 1), np.float16), np.array([0, 0, 1, 1, 0]), ["calm", "fight"])
NAN = float("nan")


def epoch(*fight: float, gpu: GpuFigures = GpuFigures()) -> Epoch:  # noqa: B008 - frozen
    probabilities = np.array([[1 - p, p] for p in fight], np.float32)
    return Epoch(2, 0.5, (0.25, 0.75), probabilities, 1e-3, 2.0, 0.1, gpu)


def test_a_row_has_the_scores_of_the_clips_that_were_predicted():
    row = epoch_row(CLIPS, epoch(0.1, 0.6, 0.9, 0.8, NAN))
    assert (row["epoch"], row["loss"], row["accuracy"]) == (2, 0.5, 0.75)
    assert (row["recall_calm"], row["recall_fight"], row["recall"]) == (0.5, 1.0, 0.75)
    assert row["precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert (row["auc"], row["learning_rate"]) == (1.0, 1e-3)
    assert row["data_share"] == 0.05


def test_what_was_not_measured_is_empty():
    text = csv_text([epoch_row(CLIPS, epoch(0.1, 0.6, 0.9, 0.8, NAN))])
    assert text.splitlines()[0].endswith("gpu_use,gpu_memory_mb,energy_j")
    assert text.splitlines()[1].endswith(",0.05,,,")
    measured = GpuFigures(use=0.5, memory_mb=900.0, energy_j=12.5)
    text = csv_text([epoch_row(CLIPS, epoch(0.1, 0.6, 0.9, 0.8, NAN, gpu=measured))])
    assert text.splitlines()[1].endswith(",0.5,900.0,12.5")


def test_a_class_without_clips_has_no_recall():
    row = epoch_row(CLIPS, epoch(0.1, 0.2, NAN, NAN, NAN))
    assert (row["recall_fight"], row["auc"], row["recall"]) == (None, None, 1.0)


def test_hard_examples_are_those_with_the_highest_loss():
    epochs = [epoch(0.5, 0.5, 0.5, 0.5, NAN), epoch(0.1, 0.6, 0.9, 0.2, NAN)]
    hard = hard_examples(CLIPS, epochs[-1].probabilities, epochs)
    assert [row["video_id"] for row in hard] == ["d", "b", "a", "c"]
    assert (hard[0]["label"], hard[0]["predicted"]) == ("fight", "calm")
    assert hard[0]["loss"] == pytest.approx(-np.log(0.2))
    assert hard[0]["mean_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
