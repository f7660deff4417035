"""How good a set of predictions is: one `Evaluation`, computed from probabilities.

Everything here is plain numpy in, plain numbers out; nothing knows about models or folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: half-width of a 95 % interval."""


@dataclass(frozen=True)
class ClassResult:
    """One row of the per-class table."""

    name: str
    clips: int
    precision: float
    recall: float
    recall_interval: tuple[float, float]
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of predictions. Shares are 0 to 1, intervals are 95 %."""

    clips: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    auc: float
    """Area under the ROC curve; for more than two classes the mean of one-against-rest."""
    loss: float
    """Mean cross-entropy in nats."""
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    """confusion[true][predicted], in the order of `classes`."""


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): stays within 0..1 and is honest for few clips."""
    if total == 0:
        return (0.0, 1.0)
    share = hits / total
    denominator = 1 + Z_95**2 / total
    centre = (share + Z_95**2 / (2 * total)) / denominator
    half = Z_95 * np.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2)) / denominator
    return (max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def evaluate(
    labels: NDArray[np.integer], probabilities: NDArray[np.floating], class_names: Sequence[str]
) -> Evaluation:
    """Scores for `labels` [N] (class numbers) and `probabilities` [N, C] that sum to 1 per row.

    Every class must occur in `labels` for the AUC to exist; where one does not, it is NaN.
    """
    n_classes = len(class_names)
    numbers = np.arange(n_classes)
    predicted = probabilities.argmax(axis=1)
    hits = int((predicted == labels).sum())
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=0.0
    )
    confusion = sk.confusion_matrix(labels, predicted, labels=numbers)
    present = support > 0
    rows = tuple(
        ClassResult(
            name=class_names[c],
            clips=int(support[c]),
            precision=float(precision[c]),
            recall=float(recall[c]),
            recall_interval=wilson_interval(int(confusion[c, c]), int(support[c])),
            f1=float(f1[c]),
        )
        for c in range(n_classes)
    )
    return Evaluation(
        clips=len(labels),
        accuracy=hits / len(labels),
        accuracy_interval=wilson_interval(hits, len(labels)),
        balanced_accuracy=float(recall[present].mean()),
        macro_f1=float(f1[present].mean()),
        auc=_auc(labels, probabilities) if present.all() else float("nan"),
        loss=float(-np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1.0)).mean()),
        classes=rows,
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
    )


def _auc(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> float:
    if probabilities.shape[1] == 2:
        return float(sk.roc_auc_score(labels, probabilities[:, 1]))
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])
    return float(sk.roc_auc_score(one_hot, probabilities, average="macro"))
