"""One trial: a configuration, trained on every fold side by side, epoch after epoch.

All folds advance one epoch at a time, so each epoch gives a prediction for every clip of the training
side by a model that has not seen its group. This makes the curve of a trial comparable with another's at
every epoch, and the epoch itself can be chosen without the fold it is judged on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raypipe.config import TrialConfig
from raypipe.splits import Splits

if TYPE_CHECKING:
    from raypipe.replicas import Replicas, State


@dataclass(frozen=True)
class ClipSet:
    """The clips of a feature store that can be trained on."""

    video_ids: list[str]
    features: NDArray[np.float16]
    """[N, T, D]"""
    labels: NDArray[np.int64]
    """[N] class numbers."""
    class_names: list[str]


@dataclass(frozen=True)
class Epoch:
    """One epoch of a trial, over all folds. `probabilities` [N, C] are out of fold, NaN elsewhere."""

    number: int
    train_loss: float
    fold_losses: tuple[float, ...]
    probabilities: NDArray[np.float32]
    wall_s: float

    @property
    def loss(self) -> float:
        """Mean validation cross-entropy over the folds, in nats."""
        return float(np.mean(self.fold_losses))


def train_trial(
    clips: ClipSet,
    splits: Splits,
    config: TrialConfig,
    *,
    gpus: int,
    replicas: int,
    seed: int,
    on_epoch: Callable[[list[Epoch]], None],
) -> list[Epoch]:
    """Trains every fold until the mean validation loss stops falling; calls `on_epoch` after each epoch."""
    engine, initial = _prepare(clips, config, gpus=gpus, replicas=replicas, seed=seed)
    folds = [splits.fold(number) for number in range(splits.folds)]
    states = [_standardized(initial, engine, clips, train) for train, _ in folds]
    epochs: list[Epoch] = []
    while len(epochs) < config.epochs and not stopped(epochs, config.patience):
        started_s, number = time.monotonic(), len(epochs) + 1
        probabilities = np.full((len(clips.labels), len(clips.class_names)), np.nan, np.float32)
        train_losses = []
        for fold, (train, validation) in enumerate(folds):
            engine.restore(states[fold])
            weights = class_weights(clips, train, config)
            order = epoch_order(train, config.batch_size, seed=(seed, fold, number))
            train_losses.append(engine.train_epoch(order, weights))
            probabilities[validation] = engine.predict(validation)
            states[fold] = engine.state()
        epochs.append(
            Epoch(
                number,
                train_loss=float(np.mean(train_losses)),
                fold_losses=tuple(cross_entropy(clips.labels[v], probabilities[v]) for _, v in folds),
                probabilities=probabilities,
                wall_s=time.monotonic() - started_s,
            )
        )
        on_epoch(epochs)
    return epochs


def refit(
    clips: ClipSet,
    positions: NDArray[np.int64],
    config: TrialConfig,
    *,
    epochs: int,
    gpus: int,
    replicas: int,
    seed: int,
    save_to: str,
) -> NDArray[np.float32]:
    """Trains on the clips at `positions` for so many epochs, saves the model; probabilities of all clips."""
    engine, initial = _prepare(clips, config, gpus=gpus, replicas=replicas, seed=seed)
    engine.restore(_standardized(initial, engine, clips, positions))
    weights = class_weights(clips, positions, config)
    for number in range(1, epochs + 1):
        engine.train_epoch(epoch_order(positions, config.batch_size, seed=(seed, 0, number)), weights)
    engine.model.save(save_to)
    return engine.predict(np.arange(len(clips.labels)))


def _prepare(
    clips: ClipSet, config: TrialConfig, *, gpus: int, replicas: int, seed: int
) -> tuple["Replicas", "State"]:
    import keras

    from raypipe.models import build_model
    from raypipe.replicas import Replicas, find_devices

    keras.utils.set_random_seed(seed)
    devices = find_devices(gpus, replicas)
    steps, dim = clips.features.shape[1:]

    def build() -> keras.Model:
        return build_model(config, steps=steps, dim=dim, classes=len(clips.class_names))

    engine = Replicas(devices, config, build, clips.features, clips.labels)
    return engine, engine.state()


def _standardized(
    initial: "State", engine: "Replicas", clips: ClipSet, positions: NDArray[np.int64]
) -> "State":
    """The initial state with the features' statistics over the clips that train, and no others."""
    from raypipe.models import feature_statistics

    mean, variance = feature_statistics(clips.features[positions])
    values = {"standardize/moving_mean": mean, "standardize/moving_variance": variance}
    paths = [variable.path for variable in engine.model.variables]
    return [
        next((value for end, value in values.items() if path.endswith(end)), weight)
        for path, weight in zip(paths, initial, strict=False)
    ] + list(initial[len(paths) :])


# --- arithmetic of a trial -------------------------------------------------------------------------


def epoch_order(positions: NDArray[np.int64], batch: int, *, seed: Sequence[int]) -> NDArray[np.int64]:
    """The clips shuffled; the last batch is filled with clips from the start of the order.

    So every batch is full and divides between the replicas, and every clip is seen each epoch.
    """
    shuffled = np.random.default_rng(list(seed)).permutation(positions)
    return np.resize(shuffled, -(-len(shuffled) // batch) * batch)


def class_weights(clips: ClipSet, positions: NDArray[np.int64], config: TrialConfig) -> NDArray[np.float32]:
    """[C], mean 1 over the clips: with `class_weights` all classes weigh the same in total."""
    counts = np.bincount(clips.labels[positions], minlength=len(clips.class_names))
    if not config.class_weights:
        return np.ones(len(counts), np.float32)
    weights: NDArray[np.float32] = (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)
    return weights


def cross_entropy(labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
    """Mean cross-entropy in nats; a probability of zero counts as 1e-7."""
    right = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(right, 1e-7)).mean())


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
