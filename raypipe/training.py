"""One trial: a configuration, trained on every fold side by side, epoch after epoch.

All folds advance one epoch at a time, so each epoch gives a prediction for every clip of the training
side by a model that has not seen its group. This makes the curve of a trial comparable with another's at
every epoch, and the epoch itself can be chosen without the fold it is judged on.

After each epoch the trial is written down whole: killed at any moment, it goes on from its last epoch.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raypipe.checkpoints import TrialState, save_models
from raypipe.config import Backend, TrialConfig
from raypipe.engines import Engine, State, TrainingData, open_engine
from raypipe.errors import Diverged
from raypipe.splits import Splits
from raypipe.telemetry import GpuMeter
from raypipe.trial import (
    ClipSet,
    Course,
    Epoch,
    best_epoch,
    class_weights,
    epoch_order,
    stopped,
    validation_loss,
)

if TYPE_CHECKING:
    import keras

PROFILED_EPOCH = 2
"""The first one compiles."""


@dataclass(frozen=True)
class Part:
    """The part of a trial that is trained now, where it is not all of it (scheduler pbt)."""

    until: int
    """Its last epoch."""
    begun: int = 0
    """Epochs before it."""
    source: Path | None = None
    """The folder that it goes on from, unless its own holds something already."""
    earlier: tuple[tuple[int, TrialConfig], ...] = ()
    """As in `Course`: the settings of epochs before those of the trial's own."""


def train_trial(
    clips: ClipSet,
    splits: Splits,
    config: TrialConfig,
    *,
    gpus: int,
    replicas: int,
    seed: int,
    folder: Path,
    on_epoch: Callable[[list[Epoch]], bool | None],
    backend: Backend = "tensorflow",
    part: Part | None = None,
) -> list[Epoch]:
    """Trains every fold until the mean validation loss stops falling; calls `on_epoch` after each epoch,
    which ends the trial where it returns False. Raises Diverged where a fold's answers are no numbers.

    Its files are in `folder`. A trial that was killed goes on there: `on_epoch` hears of its epochs again,
    but not of those that its `part` began with.
    """
    from raypipe.history import History

    part = part or Part(until=config.epochs)
    course = Course(config, part.earlier)
    clips = clips.seen_as(config.view)
    folds = [splits.fold(number) for number in range(splits.folds)]
    opening = functools.partial(
        _open, clips, [train for train, _ in folds], gpus=gpus, replicas=replicas, seed=seed, backend=backend
    )
    settles = functools.partial(_settles, clips, splits, seed=seed, backend=backend)
    kept = TrialState(folder, settles(course))
    kept.take_over()
    if part.source:
        kept.begin_from(TrialState(part.source, settles(course.until(part.begun))))
    states, epochs = kept.load()
    config = course.at(len(epochs) + 1)
    engine = opening(config)
    if not epochs:
        initial = engine.state()
        states = [_standardized(initial, engine, clips, train, config) for train, _ in folds]
    told = [on_epoch(epochs[:count]) for count in range(part.begun + 1, len(epochs) + 1)]
    if told and told[-1] is False:
        return epochs
    meter = GpuMeter(gpus)
    with History(folder, clips, splits, epochs) as history:
        while len(epochs) < part.until and not stopped(epochs, config.patience):
            if course.at(len(epochs) + 1) != config:
                config = course.at(len(epochs) + 1)
                engine = opening(config)
            profiled = config.profile and len(epochs) + 1 == PROFILED_EPOCH
            with engine.profile(folder) if profiled else contextlib.nullcontext():
                epoch, states = _train_epoch(
                    engine, clips, folds, config, states, epochs, seed=seed, meter=meter
                )
            kept.check_owned()
            epochs.append(epoch)
            history.add(epochs, _weights(engine, states) if config.histograms else {})
            _save_models(engine, folder, config, states, epochs)
            kept.save(states, epochs)
            if on_epoch(epochs) is False:
                break
    return epochs


def refit(
    clips: ClipSet,
    positions: NDArray[np.int64],
    config: TrialConfig,
    *,
    losses: Sequence[float],
    gpus: int,
    replicas: int,
    seed: int,
    save_to: str,
    backend: Backend = "tensorflow",
    earlier: tuple[tuple[int, TrialConfig], ...] = (),
) -> NDArray[np.float32]:
    """Trains on the clips at `positions` as a trial did for as many epochs as there are `losses`, its mean
    validation losses; saves the model and returns its probabilities of all clips. Raises Diverged."""
    course = Course(config, earlier)
    clips = clips.seen_as(config.view)
    opening = functools.partial(
        _open, clips, [positions], gpus=gpus, replicas=replicas, seed=seed, backend=backend
    )
    config = course.at(1)
    engine = opening(config)
    engine.restore(_standardized(engine.state(), engine, clips, positions, config))
    weights = class_weights(clips.labels, positions, len(clips.class_names), config)
    for number in range(1, len(losses) + 1):
        if course.at(number) != config:
            state, config = engine.state(), course.at(number)
            engine = opening(config)
            engine.restore(state)
        if number > 1:
            engine.schedule.observe(losses[number - 2])
        order = epoch_order(positions, clips.labels, config, seed=(seed, 0, number))
        engine.train_epoch(order, weights)
    probabilities = engine.predict(np.arange(len(clips.labels)))
    refuse_diverged(probabilities, clips, what="the model of all training clips", epoch=len(losses))
    engine.model.save(save_to)
    return probabilities


# --- one epoch --------------------------------------------------------------------------------------


def _train_epoch(
    engine: Engine,
    clips: ClipSet,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    config: TrialConfig,
    states: Sequence[State],
    epochs: Sequence[Epoch],
    *,
    seed: int,
    meter: GpuMeter,
) -> tuple[Epoch, list[State]]:
    """The epoch after `epochs` of every fold, and the folds' states after it."""
    import keras

    started_s, number = time.monotonic(), len(epochs) + 1
    meter.begin()
    classes = len(clips.class_names)
    probabilities = np.full((len(clips.labels), classes), np.nan, np.float32)
    train_losses, after, data_s = [], [], 0.0
    for fold, (train, validation) in enumerate(folds):
        engine.restore(states[fold])
        if epochs:
            engine.schedule.observe(epochs[-1].loss)
        weights = class_weights(clips.labels, train, classes, config)
        ordered_s = time.monotonic()
        order = epoch_order(train, clips.labels, config, seed=(seed, fold, number))
        data_s += time.monotonic() - ordered_s
        figures = engine.train_epoch(order, weights)
        data_s += figures.data_s
        train_losses.append(figures.loss)
        probabilities[validation] = engine.predict(validation)
        # A NaN means "not on this side" elsewhere: the fold would drop out of the scores without a word.
        refuse_diverged(probabilities[validation], clips, what=f"fold {fold + 1}", epoch=number)
        after.append(engine.state())
    rate = engine.schedule(engine.optimizer.iterations - 1)
    epoch = Epoch(
        number,
        train_loss=float(np.mean(train_losses)),
        fold_losses=tuple(validation_loss(clips.labels[v], probabilities[v]) for _, v in folds),
        probabilities=probabilities,
        learning_rate=float(keras.ops.convert_to_numpy(rate)),
        wall_s=time.monotonic() - started_s,
        data_s=data_s,
        gpu=meter.end(),
    )
    return epoch, after


def refuse_diverged(probabilities: NDArray[np.float32], clips: ClipSet, *, what: str, epoch: int) -> None:
    """Raises Diverged where an answer is not finite; `what` gave it after this epoch."""
    if np.isfinite(probabilities).all():
        return
    broken = next((i for i, one in enumerate(clips.features) if not np.isfinite(one).all()), None)
    if broken is not None:
        why = f"the features of {clips.video_ids[broken]} are not finite; extract it again, or leave it out"
    else:
        why = "a lower learning_rate, a clip_norm, or precision float32 may keep it finite"
    raise Diverged(f"{what} diverged in epoch {epoch}: {why}")


def _save_models(
    engine: Engine, folder: Path, config: TrialConfig, states: Sequence[State], epochs: Sequence[Epoch]
) -> None:
    """The folds' models, if this epoch is the best so far, or one to keep."""

    def save(fold: int, path: str) -> None:
        engine.restore(states[fold])
        engine.model.save(path)

    number = len(epochs)
    if best_epoch(epochs) == number:
        save_models(folder, "best", len(states), save)
    if config.checkpoint_every and number % config.checkpoint_every == 0:
        save_models(folder, f"epoch-{number:04}", len(states), save)


def _weights(engine: Engine, states: Sequence[State]) -> dict[str, NDArray[np.floating]]:
    """Every fold's trainable weights by name; a state begins with the model's variables."""
    return {
        f"fold-{fold + 1}/{variable.path}": value
        for fold, state in enumerate(states)
        for variable, value in zip(engine.model.variables, state, strict=False)
        if variable.trainable
    }


# --- before the first epoch ---------------------------------------------------------------------------


def _open(
    clips: ClipSet,
    parts: Sequence[NDArray[np.int64]],
    config: TrialConfig,
    *,
    gpus: int,
    replicas: int,
    seed: int,
    backend: Backend,
) -> Engine:
    """The engine to train on each of `parts`, positions of clips."""
    steps, dim = clips.features.shape[1:]
    classes = len(clips.class_names)

    def build() -> "keras.Model":
        from raypipe.models import build_model

        return build_model(config, steps=steps, dim=dim, classes=classes)

    data = TrainingData(
        features=clips.features,
        labels=clips.labels,
        class_counts=np.bincount(clips.labels[functools.reduce(np.union1d, parts)], minlength=classes),
        steps_per_epoch=max(len(epoch_order(part, clips.labels, config, seed=(0,))) for part in parts)
        // config.batch_size,
    )
    return open_engine(backend, build, config, data, gpus=gpus, replicas=replicas, seed=seed)


def _standardized(
    initial: State, engine: Engine, clips: ClipSet, positions: NDArray[np.int64], config: TrialConfig
) -> State:
    """The initial state with the features' statistics over the clips that train, and no others."""
    from raypipe.models import POOLED, feature_statistics, pooled_statistics

    mean, variance = feature_statistics(clips.features, positions)
    values = {"standardize/moving_mean": mean, "standardize/moving_variance": variance}
    if config.model in POOLED:
        mean, variance = pooled_statistics(
            clips.features, positions, config.inputs, mean=mean, variance=variance
        )
        values |= {"standardize_pooled/moving_mean": mean, "standardize_pooled/moving_variance": variance}
    paths = [variable.path for variable in engine.model.variables]
    return [
        next((value for end, value in values.items() if path.endswith(end)), weight)
        for path, weight in zip(paths, initial, strict=False)
    ] + list(initial[len(paths) :])


def _settles(clips: ClipSet, splits: Splits, course: Course, *, seed: int, backend: Backend) -> object:
    """All that a trial's results depend on."""
    content = hashlib.sha256(splits.sides.tobytes() + clips.labels.tobytes())
    content.update("\0".join(clips.video_ids).encode(errors="surrogateescape"))
    legs = [(last, config.model_dump(mode="json")) for last, config in course.earlier]
    settings = [*legs, course.config.model_dump(mode="json")]
    return [settings, content.hexdigest(), clips.fingerprint, clips.view, seed, backend]
