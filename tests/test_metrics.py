import math

import numpy as np
import pytest

from raypipe.metrics import evaluate, wilson_interval


def test_a_table_by_hand():
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    result = evaluate(labels, probabilities, ["calm", "fight"])
    assert result.accuracy == 0.75
    assert result.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.confusion == ((2, 1), (0, 1))
    assert result.auc == 1.0
    assert result.loss == pytest.approx(-np.mean(np.log([0.9, 0.6, 0.3, 0.8])))
    fight = result.classes[1]
    assert (fight.name, fight.clips, fight.precision, fight.recall) == ("fight", 1, 0.5, 1.0)


def test_a_class_without_clips_leaves_the_auc_unmeasured():
    result = evaluate(np.array([0, 0]), np.array([[0.9, 0.1], [0.4, 0.6]]), ["a", "b"])
    assert math.isnan(result.auc)
    assert result.balanced_accuracy == 0.5


def test_three_classes_use_one_against_rest():
    labels = np.array([0, 1, 2, 0, 1, 2])
    result = evaluate(labels, np.eye(3)[labels] * 0.8 + 0.1, ["a", "b", "c"])
    assert (result.accuracy, result.auc, result.macro_f1) == (1.0, 1.0, 1.0)


def test_probability_zero_gives_a_finite_loss():
    assert math.isfinite(evaluate(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]]), ["a", "b"]).loss)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Values of the formula in Wilson 1927, as statsmodels' proportion_confint(method="wilson") gives them.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (78, 100, 0.6893, 0.8500)],
)
def test_wilson_interval(hits, total, low, high):
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=1e-4)
