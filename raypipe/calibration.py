"""From a model's raw probabilities to answers: one temperature and one threshold, learned out of fold.

A temperature makes probabilities mean what they say (Guo et al. 2017, arXiv:1706.04599); within a
fold it moves no clip past another. A threshold turns the probability of the second of two classes into an
answer. Both are chosen on predictions of clips that the model had not seen, and stored with it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

TEMPERATURES = (0.05, 20.0)
LEAST = 1e-7
"""Probabilities below count as this much."""


@dataclass(frozen=True)
class Calibration:
    """`temperature` divides the logits; `threshold` is the least calibrated probability of class 1 at which
    it is the answer. None for more than two classes, where the most probable one is."""

    temperature: float = 1.0
    threshold: float | None = None

    def probabilities(self, raw: NDArray[np.floating]) -> NDArray[np.float32]:
        """Calibrated [N, C] from the model's own [N, C], its softmax; NaN stays."""
        powered = np.log(np.maximum(np.asarray(raw, np.float64), LEAST)) / self.temperature
        powered = np.exp(powered - powered.max(axis=1, keepdims=True))
        calibrated: NDArray[np.float32] = (powered / powered.sum(axis=1, keepdims=True)).astype(np.float32)
        return calibrated

    def answers(self, calibrated: NDArray[np.floating]) -> NDArray[np.int64]:
        """The class number of each clip [N], by its calibrated probabilities."""
        if self.threshold is None:
            return np.asarray(calibrated.argmax(axis=1), np.int64)
        return np.asarray(calibrated[:, 1] >= self.threshold, np.int64)


def fit_calibration(labels: NDArray[np.integer], raw: NDArray[np.floating]) -> Calibration:
    """The calibration that suits these out-of-fold probabilities [N, C] best."""
    temperature = cautious_temperature(labels, raw)
    if raw.shape[1] != 2:
        return Calibration(temperature)
    return Calibration(temperature, best_threshold(labels, Calibration(temperature).probabilities(raw)[:, 1]))


def cross_fitted(
    labels: NDArray[np.integer], raw: NDArray[np.floating], folds: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Calibrated probabilities [N, C] and answers [N], each fold's by the calibration of the *other* folds,
    so that no clip helps to choose what it is judged by. One fold judges its own. No NaN in `raw`."""
    probabilities = np.empty(raw.shape, np.float32)
    answers = np.empty(len(labels), np.int64)
    for fold in np.unique(folds):
        own = folds == fold
        rest = ~own if (~own).any() else own
        calibration = fit_calibration(labels[rest], raw[rest])
        probabilities[own] = calibration.probabilities(raw[own])
        answers[own] = calibration.answers(probabilities[own])
    return probabilities, answers


def best_temperature(labels: NDArray[np.integer], raw: NDArray[np.floating]) -> float:
    """The temperature with the lowest cross-entropy."""
    return _temperature(np.eye(raw.shape[1])[labels], raw)


def cautious_temperature(labels: NDArray[np.integer], raw: NDArray[np.floating]) -> float:
    """The same, but a clip of a class with n clips counts as one of it by (n + 1) / (n + C) only, and as each
    other class by 1 / (n + C): clips that are all answered right, however many, do not show that none ever
    would be wrong (the targets of Platt 1999, for C classes)."""
    classes = raw.shape[1]
    counts = np.bincount(labels, minlength=classes)[labels][:, None]
    return _temperature((1 + counts * np.eye(classes)[labels]) / (counts + classes), raw)


def _temperature(targets: NDArray[np.floating], raw: NDArray[np.floating]) -> float:
    """The temperature with the lowest cross-entropy to `targets` [N, C]."""
    logits = np.log(np.maximum(np.asarray(raw, np.float64), LEAST))
    meant = (targets * logits).sum(axis=1)

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float((np.logaddexp.reduce(logits * scale, axis=1) - meant * scale).mean())

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def best_threshold(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> float:
    """The threshold on the probability of class 1 [N], by balanced accuracy, which does not depend on how
    common the classes happen to be here.

    Of all that are within one standard error of the best it is the nearest to 0.5, what a calibrated model of
    balanced classes would say: a few hundred clips cannot tell those apart (the rule of Breiman et al. 1984).
    """
    positive = labels == 1
    if positive.all() or not positive.any():
        return 0.5
    values, place = np.unique(np.asarray(probabilities, np.float64), return_inverse=True)
    ups = np.bincount(place[positive], minlength=len(values))
    downs = np.bincount(place[~positive], minlength=len(values))
    # A threshold between values[i] and values[i + 1] takes those up to i for class 0, the others for class 1.
    balanced = (1 - np.cumsum(ups) / ups.sum() + np.cumsum(downs) / downs.sum())[:-1]
    if len(balanced) == 0:
        return 0.5
    top = int(balanced.argmax())
    up, down = ups[top + 1 :].sum() / ups.sum(), downs[: top + 1].sum() / downs.sum()
    error = np.sqrt(up * (1 - up) / ups.sum() + down * (1 - down) / downs.sum())
    best = np.flatnonzero(balanced >= balanced[top] - error - 1e-12)
    low, high = values[best], values[best + 1]
    nearest = np.where((low < 0.5) & (high >= 0.5), 0.5, (low + high) / 2)
    return float(nearest[np.abs(nearest - 0.5).argmin()])
