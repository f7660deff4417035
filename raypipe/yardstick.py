"""What a simple model gives on the same folds: a logistic regression over the mean and spread of the steps.

It takes seconds and has nothing to tune, so a search that is not better by more than chance has not earned
its cost, and says so.
"""

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import UserError
from raypipe.outcomes import few
from raypipe.splits import Splits
from raypipe.trial import ClipSet

INVERSE_PENALTY = 1.0
"""scikit-learn's C, and its default: nothing is chosen on the folds it is judged by, and a stronger penalty
makes an easier mark (docs/decisions/0023)."""
MOST_CLIPS = 20_000
"""Of more clips, so many drawn by the seed are learned from; a line needs no more."""
CLIPS_AT_ONCE = 1024


def yardstick_view(clips: ClipSet) -> str:
    """The motion half where the features have one: nothing else in them is worth as much to a line."""
    return "motion" if clips.view == "both" else clips.view


def yardstick_name(clips: ClipSet) -> str:
    return f"logistic regression over the mean and spread of the {yardstick_view(clips)} features"


def pooled(clips: ClipSet) -> NDArray[np.float32]:
    """[N, 2 D]: mean and standard deviation of each feature over the steps of a clip."""
    features = clips.seen_as(yardstick_view(clips)).features
    count, _, dim = features.shape
    found = np.empty((count, 2 * dim), np.float32)
    for start in range(0, count, CLIPS_AT_ONCE):
        part = np.asarray(features[start : start + CLIPS_AT_ONCE], np.float32)
        found[start : start + CLIPS_AT_ONCE] = np.concatenate([part.mean(axis=1), part.std(axis=1)], axis=1)
    return found


def refuse_not_finite(clips: ClipSet) -> None:
    """Raises UserError where features are not finite: no model can learn from them."""
    broken = np.flatnonzero(~np.isfinite(pooled(clips)).all(axis=1))
    if len(broken):
        names = few([clips.video_ids[position] for position in broken])
        raise UserError(
            f"the features of {names} are not finite: the backbone gives numbers beyond float16's range; "
            "leave them out, or extract with a backbone whose numbers are smaller"
        )


def predict_folds(clips: ClipSet, splits: Splits, *, seed: int) -> NDArray[np.float32]:
    """Probabilities [N, C] out of fold, NaN elsewhere. The test side is not read."""
    x, classes = pooled(clips), len(clips.class_names)
    out_of_fold = np.full((len(x), classes), np.nan, np.float32)
    for fold in range(splits.folds):
        train, validation = splits.fold(fold)
        out_of_fold[validation] = _fit_predict(x, clips.labels, train, validation, classes, seed=seed)
    return out_of_fold


def predict_test(clips: ClipSet, splits: Splits, *, seed: int) -> NDArray[np.float32]:
    """Probabilities [N, C] of the test side by a model of the whole training side, NaN elsewhere."""
    x, classes = pooled(clips), len(clips.class_names)
    test = np.full((len(x), classes), np.nan, np.float32)
    if len(splits.test):
        test[splits.test] = _fit_predict(x, clips.labels, splits.training, splits.test, classes, seed=seed)
    return test


def _fit_predict(
    x: NDArray[np.float32],
    labels: NDArray[np.int64],
    train: NDArray[np.int64],
    asked: NDArray[np.int64],
    classes: int,
    *,
    seed: int,
) -> NDArray[np.float32]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(train) > MOST_CLIPS:
        train = np.sort(np.random.default_rng(seed).choice(train, MOST_CLIPS, replace=False))
    scaler = StandardScaler().fit(x[train])
    known, wanted = scaler.transform(x[train]), scaler.transform(x[asked])
    if len(train) < x.shape[1]:
        # The line lies in the space of the clips that train: to turn into it changes the time it takes only.
        _, _, axes = np.linalg.svd(known, full_matrices=False)
        known, wanted = known @ axes.T, wanted @ axes.T
    line = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000)
    line.fit(known, labels[train])
    probabilities = np.zeros((len(asked), classes), np.float32)
    probabilities[:, line.classes_] = line.predict_proba(wanted)
    return probabilities
