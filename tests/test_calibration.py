"""Temperature and threshold, on made-up predictions whose right answer is known."""

import numpy as np
import pytest

from raypipe.calibration import Calibration, best_temperature, best_threshold, cross_fitted, fit_calibration


def predictions(clips: int, *, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn by true probabilities, and what a model says that is too sure (temperature > 1)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(clips, 2)) * 2
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(clips) < true[:, 1]).astype(int)
    said = np.exp(logits * temperature)
    return labels, said / said.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_a_model_too_sure_is_found(temperature):
    labels, raw = predictions(20_000, temperature=temperature)
    assert best_temperature(labels, raw) == pytest.approx(temperature, rel=0.1)


def test_temperature_one_and_no_threshold_change_nothing():
    raw = np.array([[0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    np.testing.assert_allclose(Calibration().probabilities(raw), raw, rtol=1e-6)
    assert Calibration().answers(raw).tolist() == [1, 0, 1]
    assert Calibration(threshold=0.85).answers(raw).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "probabilities", "threshold"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7], 0.5),  # anything from 0.2 to 0.6 is right: the middle of all
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 0.25),  # a model that never says 1
        ([0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.6, 0.55], 0.5),  # classes count the same, however rare
        ([0] * 9 + [1] * 9, [0.1] * 8 + [0.55] + [0.52] + [0.9] * 8, 0.5),  # 0.51 is no surer
        ([1, 1], [0.1, 0.2], 0.5),  # nothing to choose by
        ([0, 1], [0.5, 0.5], 0.5),
    ],
)
def test_the_threshold_has_the_best_balanced_accuracy(labels, probabilities, threshold):
    assert best_threshold(np.array(labels), np.array(probabilities)) == pytest.approx(threshold)


def test_no_fold_helps_to_choose_what_it_is_judged_by():
    labels, raw = predictions(300, temperature=3.0)
    folds = np.arange(300) % 3
    probabilities, answers = cross_fitted(labels, raw, folds)
    rest = folds != 1
    calibration = fit_calibration(labels[rest], raw[rest])
    np.testing.assert_array_equal(probabilities[~rest], calibration.probabilities(raw[~rest]))
    np.testing.assert_array_equal(answers[~rest], calibration.answers(probabilities[~rest]))


def test_more_than_two_classes_have_a_temperature_only():
    rng = np.random.default_rng(0)
    raw = rng.dirichlet(np.ones(3), 50)
    calibration = fit_calibration(rng.integers(0, 3, 50), raw)
    assert calibration.threshold is None
    assert calibration.probabilities(raw).sum(axis=1) == pytest.approx(1)


def test_answers_that_are_all_right_do_not_make_a_model_sure_of_everything():
    labels = np.arange(40) % 2
    sure = np.linspace(0.60, 0.95, 40)
    raw = np.where(labels[:, None] == [0, 1], sure[:, None], 1 - sure[:, None])
    calibrated = fit_calibration(labels, raw).probabilities(np.array([[0.4, 0.6]]))
    assert 0.6 < calibrated[0, 1] < 0.95
