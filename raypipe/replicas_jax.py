"""JAX's engine: `replicas` with another backend, and the only module that touches JAX.

The batch is divided over the devices and everything else is on all of them (`keras.distribution`); XLA
compiles the step as if there were one device, so clipping and loss scaling see the gradient of the whole
batch by themselves.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from raypipe.cluster import gpus_are_fake
from raypipe.config import TrialConfig
from raypipe.engines import (
    Devices,
    EpochFigures,
    State,
    TrainingData,
    choose_feeding,
    choose_precision,
    refuse_uneven,
    whole_batches,
)
from raypipe.feeding import Prefetched
from raypipe.losses import build_loss
from raypipe.schedules import build_schedule

Values = list[Any]


def find_devices(precision: str, *, gpus: int, replicas: int) -> Devices:
    """The `gpus` GPUs that Ray gave this process, or `replicas` virtual CPU devices where it gave none.

    Must run before any JAX operation. Raises RuntimeError where JAX sees other GPUs.
    """
    if gpus and not gpus_are_fake():
        # Memory grows as in TensorFlow; and a trial that goes on after a kill must come to the same digits.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        cards = [device for device in jax.devices() if device.platform == "gpu"]
        if len(cards) != gpus:
            raise RuntimeError(
                f"Ray gave this trial {gpus} GPUs but JAX sees {len(cards)}; "
                "install jax[cuda12] on every node, with a driver that its CUDA supports"
            )
        oldest = min(tuple(map(int, str(card.compute_capability).split("."))) for card in cards)
        names = tuple(f"gpu:{i}" for i in range(gpus))
        return Devices(names, choose_precision(precision, (oldest[0], oldest[1])))
    configure: Any = jax.config.update  # untyped
    configure("jax_platforms", "cpu")
    configure("jax_num_cpu_devices", gpus or replicas)
    return Devices(tuple(f"cpu:{i}" for i in range(gpus or replicas)), choose_precision(precision, None))


class Scheduled:
    """For a Keras optimizer: counts its schedule's variables among its own, so that a compiled step takes
    them as they are and not as they were."""

    schedule: Any

    @property
    def variables(self) -> list[Any]:
        return [*super().variables, *self.schedule.variables]  # type: ignore[misc]


class ScheduledAdam(Scheduled, keras.optimizers.Adam):
    pass


class ScheduledAdamW(Scheduled, keras.optimizers.AdamW):
    pass


class Replicas:
    """One model on several devices: JAX's `engines.Engine`."""

    def __init__(
        self, devices: Devices, config: TrialConfig, build: Callable[[], keras.Model], data: TrainingData
    ) -> None:
        refuse_uneven(config.batch_size, devices)
        if config.feeding == "fit":
            raise ValueError("feeding fit is there to compare with the classic way in TensorFlow only")
        keras.mixed_precision.set_global_policy(devices.precision)
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=list(devices.names), auto_shard_dataset=False)
        )
        spec: Any = PartitionSpec  # untyped
        mesh = Mesh(np.array(jax.devices()[: len(devices.names)]), ("batch",))
        self._everywhere = NamedSharding(mesh, spec())
        self._divided = NamedSharding(mesh, spec("batch"))
        self._batch, self._data = config.batch_size, data
        self._loss = build_loss(config, data.class_counts)
        self.model = build()
        self.schedule = build_schedule(config, steps_per_epoch=data.steps_per_epoch)
        kind, options = ScheduledAdam, {}
        if config.optimizer == "adamw":
            kind, options = ScheduledAdamW, {"weight_decay": config.weight_decay}
        self.optimizer: keras.optimizers.Optimizer = kind(
            learning_rate=self.schedule, global_clipnorm=config.clip_norm, **options
        )
        self.optimizer.schedule = self.schedule
        if devices.precision == "mixed_float16":
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        scales = [i for i, v in enumerate(self.optimizer.variables) if v.name == "dynamic_scale"]
        self._scale = scales[0] if scales else None
        self._parts = [
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
        ]
        self._variables = [*self.model.variables, *self.optimizer.variables]
        self._train, self._predict = jax.jit(self._train_step), jax.jit(self._predict_step)
        self._stored: tuple[Any, Any] | None = None
        """Features and labels of all clips on every device, if they fit."""
        if choose_feeding(config, data.features) == "device":
            clips = (np.asarray(data.features), data.labels.astype(np.int32))
            self._stored = jax.device_put(clips, self._everywhere)

    # --- what a trial calls ---------------------------------------------------------------------------

    def train_epoch(self, order: NDArray[np.integer], class_weights: NDArray[np.floating]) -> EpochFigures:
        """One pass over the clips at `order` (positions, each batch full)."""
        started_s = time.monotonic()
        weights = jax.device_put(class_weights.astype(np.float32), self._everywhere)
        values = [[variable.value for variable in part] for part in self._parts]
        losses = []
        batches = Prefetched(self._load, whole_batches(order, self._batch))
        for batch in batches:
            loss, values = self._train(values, self._stored, batch, weights)
            losses.append(loss)
        for part, new in zip(self._parts, values, strict=True):
            for variable, value in zip(part, new, strict=True):
                variable.assign(value)
        mean = float(jnp.mean(jnp.stack(losses)))
        return EpochFigures(mean, batches.waited_s, time.monotonic() - started_s)

    def predict(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Class probabilities [n, classes] of the clips at `positions`."""
        values = [[variable.value for variable in part] for part in self._parts[:2]]
        batches = Prefetched(self._load, whole_batches(positions, self._batch))
        parts = [self._predict(values, self._stored, batch) for batch in batches]
        return np.concatenate([np.asarray(part) for part in parts])[: len(positions)]

    def state(self) -> State:
        """Every number that training changes."""
        return [np.array(variable.value) for variable in self._variables]

    def restore(self, state: State) -> None:
        for variable, value in zip(self._variables, state, strict=True):
            variable.assign(value)

    def profile(self, folder: Path) -> AbstractContextManager[object]:
        profile: AbstractContextManager[object] = jax.profiler.trace(str(folder))
        return profile

    def _load(self, positions: NDArray[np.int32]) -> Any:
        """A batch divided over the devices: its positions if the clips lie there, else the clips."""
        if self._stored is not None:
            return jax.device_put(positions, self._divided)
        labels = self._data.labels[positions].astype(np.int32)
        return jax.device_put((self._data.features[positions], labels), self._divided)

    # --- compiled -------------------------------------------------------------------------------------

    def _train_step(
        self, values: list[Values], stored: Any, batch: Any, class_weights: Any
    ) -> tuple[Any, list[Values]]:
        trainable, others, of_optimizer = values
        features, labels = _clips_of(stored, batch)

        def loss_of(trainable: Values) -> tuple[Any, tuple[Any, Values]]:
            logits, others_after = self.model.stateless_call(
                trainable, others, features.astype(jnp.float32), training=True
            )
            loss = jnp.sum(self._loss(labels, logits) * class_weights[labels]) / self._batch
            scaled = loss if self._scale is None else loss * of_optimizer[self._scale]
            return scaled, (loss, others_after)

        gradients, (loss, others) = jax.grad(loss_of, has_aux=True)(trainable)
        trainable, of_optimizer = self.optimizer.stateless_apply(of_optimizer, gradients, trainable)
        return loss, [trainable, others, of_optimizer]

    def _predict_step(self, values: list[Values], stored: Any, batch: Any) -> Any:
        features, _ = _clips_of(stored, batch)
        logits, _ = self.model.stateless_call(*values, features.astype(jnp.float32), training=False)
        return jax.nn.softmax(logits)


def _clips_of(stored: tuple[Any, Any] | None, batch: Any) -> tuple[Any, Any]:
    """Features and labels of a batch as `_load` gives it."""
    features, labels = batch if stored is None else (stored[0][batch], stored[1][batch])
    return features, labels
