"""What a trial is given and what it yields: clips in, epochs out, and the arithmetic over them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.calibration import Calibration, best_temperature
from raypipe.config import TrialConfig
from raypipe.errors import UserError
from raypipe.feature_map import FeatureSource
from raypipe.metrics import cross_entropies
from raypipe.splits import Splits
from raypipe.telemetry import GpuFigures

# --- clips ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSet:
    """The clips of a feature store that can be trained on."""

    video_ids: list[str]
    features: NDArray[np.float16]
    """[N, T, D], perhaps memory-mapped."""
    labels: NDArray[np.int64]
    """[N] class numbers."""
    class_names: list[str]
    view: str = "rgb"
    """What the features are of: rgb, motion, or both side by side."""
    fingerprint: str = ""
    """Of the kind of features."""
    source: FeatureSource | None = None
    """Where `features` are mapped from. Such clips are sent without them: who receives them maps its own."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({"features": None} if self.source else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = state["source"]
        vars(self).update(state | ({"features": source.open()} if source else {}))

    def seen_as(self, view: str) -> "ClipSet":
        """The clips with the features of one view, or all. Raises UserError where they have no such view."""
        if view in ("all", self.view):
            return self
        if self.view != "both":
            raise UserError(
                f"--view {view}: the features are of view {self.view}; "
                f"extract them with --view both or --view {view}"
            )
        return replace(self, features=view_of(self.features, self.view, view), view=view, source=None)


def view_of(features: NDArray[np.float16], has: str, view: str) -> NDArray[np.float16]:
    """Of features [N, T, D] with the views `has`, those of `view`: all, or the half that is rgb or motion."""
    if view in ("all", has):
        return features
    half = features.shape[-1] // 2
    return features[..., :half] if view == "rgb" else features[..., half:]


def class_weights(
    labels: NDArray[np.int64], positions: NDArray[np.int64], classes: int, config: TrialConfig
) -> NDArray[np.float32]:
    """[C], mean 1 over the clips: with `class_weights` all classes weigh the same in total."""
    counts = np.bincount(labels[positions], minlength=classes)
    if not config.class_weights:
        return np.ones(classes, np.float32)
    weights: NDArray[np.float32] = (counts.sum() / (classes * np.maximum(counts, 1))).astype(np.float32)
    return weights


def epoch_order(
    positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    config: TrialConfig,
    *,
    seed: Sequence[int],
) -> NDArray[np.int64]:
    """The clips shuffled, rare classes oversampled if so configured; the last batch is filled with clips
    from the start of the order.

    So every batch is full and divides between the replicas, and every clip is seen each epoch.
    """
    rng = np.random.default_rng(list(seed))
    if config.oversample:
        positions = oversampled(positions, labels, rng)
    shuffled = rng.permutation(positions)
    return np.resize(shuffled, -(-len(shuffled) // config.batch_size) * config.batch_size)


def oversampled(
    positions: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """The clips of each class as often as the commonest class has clips: all of them as many times as they
    fit, then a random part of them."""
    _, of_clip, counts = np.unique(labels[positions], return_inverse=True, return_counts=True)
    parts = []
    for number, count in enumerate(counts):
        own = positions[of_clip == number]
        times, rest = divmod(int(counts.max()), int(count))
        parts += [*[own] * times, rng.choice(own, rest, replace=False)]
    return np.concatenate(parts)


# --- settings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The settings of a training, which may change between two epochs."""

    config: TrialConfig
    """Of its last epochs."""
    earlier: tuple[tuple[int, TrialConfig], ...] = ()
    """Of those before, in order: the last epoch of each, and its settings."""

    def at(self, epoch: int) -> TrialConfig:
        """The settings by which this epoch is trained."""
        return next((config for last, config in self.earlier if epoch <= last), self.config)

    def until(self, epoch: int) -> "Course":
        """As it was when this epoch had ended."""
        return Course(self.at(epoch), tuple(leg for leg in self.earlier if leg[0] < epoch))


# --- epochs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """One epoch of a trial, over all folds. `probabilities` [N, C] are out of fold, NaN elsewhere."""

    number: int
    train_loss: float
    fold_losses: tuple[float, ...]
    """`validation_loss` of each fold."""
    probabilities: NDArray[np.float32]
    learning_rate: float
    """Of the last step."""
    wall_s: float
    data_s: float
    """Seconds in which steps waited for clips."""
    gpu: GpuFigures

    @property
    def loss(self) -> float:
        """Mean validation loss over the folds, in nats."""
        return float(np.mean(self.fold_losses))

    @property
    def data_share(self) -> float:
        """Share of the epoch in which steps waited for clips."""
        return self.data_s / self.wall_s


def validation_loss(labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
    """Mean cross-entropy of a fold's clips in nats, at the temperature that suits them best.

    On few clips a model grows too sure long before it stops to tell the classes apart better; its answers get
    their temperature later, so that must not end the training nor choose the epoch.
    """
    calibration = Calibration(best_temperature(labels, probabilities))
    return float(cross_entropies(labels, calibration.probabilities(probabilities)).mean())


def best_epoch(epochs: Sequence[Epoch]) -> int:
    """The number of the epoch with the lowest mean validation loss."""
    return min(epochs, key=lambda epoch: epoch.loss).number


def stopped(epochs: Sequence[Epoch], patience: int) -> bool:
    """True when the last `patience` epochs brought no lower mean validation loss."""
    return bool(epochs) and len(epochs) - best_epoch(epochs) >= patience


def out_of_fold(epochs: Sequence[Epoch], splits: Splits) -> NDArray[np.float32]:
    """Probabilities [N, C] for the training side, NaN elsewhere: each fold at the epoch that is best on
    the *other* folds, so that no fold chooses the epoch it is judged on. One fold judges its own."""
    chosen = np.full_like(epochs[0].probabilities, np.nan)
    for fold in range(splits.folds):
        others = [i for i in range(splits.folds) if i != fold] or [fold]
        epoch = min(epochs, key=lambda e: sum(e.fold_losses[i] for i in others))
        _, validation = splits.fold(fold)
        chosen[validation] = epoch.probabilities[validation]
    return chosen
