"""How good a set of predictions is: one `Evaluation`, computed from probabilities, with intervals.

Everything here is plain numpy in, plain numbers out; nothing knows about models or folds. Intervals are 95 %
and come from drawing whole groups anew (`bootstrap`): clips of one source are alike, and count less than as
many strangers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))
Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: half-width of a 95 % interval."""


@dataclass(frozen=True)
class ClassResult:
    """One row of the per-class table."""

    name: str
    clips: int
    precision: float
    recall: float
    recall_interval: Interval
    f1: float
    precision_interval: Interval = UNKNOWN
    f1_interval: Interval = UNKNOWN


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of predictions. Shares are 0 to 1; intervals are 95 %, NaN where not asked for."""

    clips: int
    accuracy: float
    accuracy_interval: Interval
    balanced_accuracy: float
    macro_f1: float
    auc: float
    """Area under the ROC curve; for more than two classes the mean of one-against-rest."""
    loss: float
    """Mean cross-entropy in nats."""
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    """confusion[true][predicted], in the order of `classes`."""
    groups: int = 0
    """How many groups the clips are of; 0 where intervals were not asked for."""
    balanced_accuracy_interval: Interval = UNKNOWN
    macro_f1_interval: Interval = UNKNOWN
    auc_interval: Interval = UNKNOWN
    loss_interval: Interval = UNKNOWN


def wilson_interval(hits: float, total: float) -> Interval:
    """95 % interval of a share (Wilson 1927): stays within 0..1 and is honest for few clips."""
    if total == 0:
        return (0.0, 1.0)
    share = hits / total
    denominator = 1 + Z_95**2 / total
    centre = (share + Z_95**2 / (2 * total)) / denominator
    half = Z_95 * np.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2)) / denominator
    return (max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def evaluate(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    class_names: Sequence[str],
    *,
    predicted: NDArray[np.integer] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Scores for `labels` [N] (class numbers) and `probabilities` [N, C] that sum to 1 per row.

    The answer to a clip is `predicted` [N], else its most probable class. With `groups` [N] there are
    intervals. Every class must occur in `labels` for the AUC to exist; where one does not, it is NaN.
    """
    n_classes = len(class_names)
    numbers = np.arange(n_classes)
    answers = probabilities.argmax(axis=1) if predicted is None else predicted
    hits = int((answers == labels).sum())
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, answers, labels=numbers, zero_division=0.0
    )
    confusion = sk.confusion_matrix(labels, answers, labels=numbers)
    present = support > 0
    intervals: dict[str, Interval] = {}
    if groups is not None:
        intervals = score_intervals(labels, probabilities, groups, predicted=answers, seed=seed)
    rows = tuple(
        ClassResult(
            name=class_names[c],
            clips=int(support[c]),
            precision=float(precision[c]),
            recall=float(recall[c]),
            f1=float(f1[c]),
            recall_interval=intervals.get(f"recall_of_{c}", UNKNOWN),
            precision_interval=intervals.get(f"precision_of_{c}", UNKNOWN),
            f1_interval=intervals.get(f"f1_of_{c}", UNKNOWN),
        )
        for c in range(n_classes)
    )
    return Evaluation(
        clips=len(labels),
        groups=len(set(groups)) if groups is not None else 0,
        accuracy=hits / len(labels),
        accuracy_interval=intervals.get("accuracy", UNKNOWN),
        balanced_accuracy=float(recall[present].mean()),
        balanced_accuracy_interval=intervals.get("recall", UNKNOWN),
        macro_f1=float(f1[present].mean()),
        macro_f1_interval=intervals.get("f1", UNKNOWN),
        auc=_auc(labels, probabilities) if present.all() else float("nan"),
        auc_interval=intervals.get("auc", UNKNOWN),
        loss=float(cross_entropies(labels, probabilities).mean()),
        loss_interval=intervals.get("loss", UNKNOWN),
        classes=rows,
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
    )


def cross_entropies(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of each clip, in nats; a probability of zero counts as 1e-7."""
    losses: NDArray[np.floating] = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1.0))
    return losses


def _auc(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> float:
    if probabilities.shape[1] == 2:
        return float(sk.roc_auc_score(labels, probabilities[:, 1]))
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])
    return float(sk.roc_auc_score(one_hot, probabilities, average="macro"))


# --- scores of resampled clips -----------------------------------------------------------------------

RESAMPLES = 1000
WEIGHTS_AT_ONCE = 1 << 22
"""Of resamples times clips, so many are held at the same time."""


@dataclass(frozen=True)
class Difference:
    """How much better one set of predictions is than another on the same clips, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Whether it is above zero by more than chance explains."""
        return self.low > 0


def score_intervals(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    groups: Sequence[str],
    *,
    predicted: NDArray[np.integer] | None = None,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals by the names of `weighted_scores`, from the percentiles of resampled groups.

    Where a share is 0 or 1 every resample says the same; then Wilson's interval, with the groups as the
    number of draws, says what so few can show. Of one group nothing is known but that.
    """
    values = bootstrap(labels, probabilities, groups, predicted=predicted, seed=seed)
    answers = probabilities.argmax(axis=1) if predicted is None else predicted
    found = {name: middle_95(values[name]) for name in values}

    _, group_numbers = np.unique(np.asarray(groups), return_inverse=True)

    def draws(part: NDArray[np.bool_]) -> int:
        return len(np.unique(group_numbers[part]))

    everything = np.ones(len(labels), bool)
    parts = dict.fromkeys(found, everything)
    shares = {"accuracy": everything}
    for number in range(probabilities.shape[1]):
        parts[f"f1_of_{number}"] = labels == number
        shares |= {f"recall_of_{number}": labels == number, f"precision_of_{number}": answers == number}
    # Means over the classes are as sure as the class with the fewest groups lets them be.
    of_class = {number: draws(labels == number) for number in np.unique(labels).tolist()}
    counts = dict.fromkeys(("recall", "f1", "precision", "auc"), min(of_class.values()))
    counts |= {f"f1_of_{number}": count for number, count in of_class.items()}
    for name, part in (parts | shares).items():
        if draws(part) < 2:
            found[name] = UNKNOWN
    for name, part in shares.items():
        right = answers[part] == labels[part]
        if len(right) and (right.all() or not right.any()):
            found[name] = wilson_interval(draws(part) * right.mean(), draws(part))
    for name, count in counts.items():
        if found[name] in ((0.0, 0.0), (1.0, 1.0)):
            found[name] = wilson_interval(count * found[name][0], count)
    return found


def paired_differences(
    labels: NDArray[np.integer],
    one: tuple[NDArray[np.floating], NDArray[np.integer]],
    other: tuple[NDArray[np.floating], NDArray[np.integer]],
    groups: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Difference]:
    """`one` less `other`, each (probabilities [N, C], predicted [N]) of the same clips in the same order, by
    the names of `weighted_scores`: both are scored on the same resamples, so what they share cancels."""
    ones = np.ones((1, len(labels)), np.int64)
    found = {}
    left, right = (bootstrap(labels, p, groups, predicted=q, seed=seed) for p, q in (one, other))
    exact = [weighted_scores(labels, p, ones, predicted=q) for p, q in (one, other)]
    for name in left:
        low, high = middle_95(left[name] - right[name]) if len(set(groups)) > 1 else UNKNOWN
        found[name] = Difference(float(exact[0][name][0] - exact[1][name][0]), low, high)
    return found


def bootstrap(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    groups: Sequence[str],
    *,
    predicted: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, NDArray[np.float64]]:
    """`weighted_scores` of so many resamples of whole groups: the same resamples for the same groups and
    seed, whatever the predictions."""
    at_once = max(1, min(resamples, WEIGHTS_AT_ONCE // max(1, len(labels))))
    parts = []
    for number, start in enumerate(range(0, resamples, at_once)):
        weights = group_weights(groups, min(at_once, resamples - start), seed=seed + number)
        parts.append(weighted_scores(labels, probabilities, weights, predicted=predicted))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def middle_95(values: NDArray[np.float64]) -> Interval:
    """The middle 95 % of the resamples that have a value."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return UNKNOWN
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def weighted_scores(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    weights: NDArray[np.integer],
    *,
    predicted: NDArray[np.integer] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Scores [B] for each row of `weights` [B, N], how often each clip counts: those of `evaluate` for ones.

    `accuracy`, `precision`, `recall` and `f1` (means over the classes), `auc`, `loss`, and `recall_of_C`,
    `precision_of_C`, `f1_of_C` of each class number C. NaN where a resample lacks a class.
    """
    counts = np.asarray(weights, np.float64)
    answers = probabilities.argmax(axis=1) if predicted is None else predicted
    numbers = range(probabilities.shape[1])
    right = counts * (answers == labels)
    total = counts.sum(axis=1)
    by_class: dict[str, NDArray[np.float64]] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        aucs = []
        for number in numbers:
            hits = right[:, labels == number].sum(axis=1)
            have = counts[:, labels == number].sum(axis=1)
            taken = counts[:, answers == number].sum(axis=1)
            by_class[f"recall_of_{number}"] = hits / have
            by_class[f"precision_of_{number}"] = np.where(taken > 0, hits / taken, 0.0)
            by_class[f"f1_of_{number}"] = np.where(have > 0, 2 * hits / (have + taken), np.nan)
            aucs.append(_weighted_auc(labels == number, probabilities[:, number], counts))
        scores = {
            "accuracy": right.sum(axis=1) / total,
            "precision": np.mean([by_class[f"precision_of_{c}"] for c in numbers], axis=0),
            "recall": np.mean([by_class[f"recall_of_{c}"] for c in numbers], axis=0),
            "f1": np.mean([by_class[f"f1_of_{c}"] for c in numbers], axis=0),
            "auc": np.mean(aucs, axis=0),
            "loss": counts @ cross_entropies(labels, probabilities) / total,
        }
    return scores | by_class


def _weighted_auc(
    positive: NDArray[np.bool_], scores: NDArray[np.floating], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The share of pairs of a positive and a negative clip that are in order, ties counting half [B]."""
    _, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    ups = np.add.reduceat((weights * positive)[:, order], starts, axis=1)  # [B, distinct scores]
    downs = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    below = np.cumsum(downs, axis=1) - downs
    total = (ups * (below + 0.5 * downs)).sum(axis=1)
    share: NDArray[np.float64] = total / (ups.sum(axis=1) * downs.sum(axis=1))
    return share


def group_weights(groups: Sequence[str], resamples: int, *, seed: int) -> NDArray[np.int64]:
    """How often each clip counts in each resample [B, N]: groups are drawn with replacement, whole.

    A clip's group decides, as clips of one source are alike (cluster bootstrap; Field and Welsh 2007).
    """
    names, of_clip = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counted: NDArray[np.int64] = drawn[:, of_clip]
    return counted
