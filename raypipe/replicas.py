"""Training one model on several devices at once: without dropout N replicas give exactly what one gives.

The only module that touches TensorFlow. `tf.distribute.MirroredStrategy` keeps the replicas equal; what
Keras gets wrong under it is put right here: gradients are clipped after they are summed over the
replicas, an overflow on any replica skips the step, and every batch divides evenly, so that no replica is
empty and no example counts double. With dropout the replicas draw the same mask, each for its own part of
the batch (decision 5).

One strategy per process: TensorFlow cannot tear one down and start another.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
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
    choose_xla,
    refuse_uneven,
    whole_batches,
)
from raypipe.feeding import Prefetched
from raypipe.losses import build_loss
from raypipe.schedules import build_schedule


def find_devices(precision: str, *, gpus: int, replicas: int) -> Devices:
    """The `gpus` GPUs that Ray gave this process, or `replicas` logical CPU devices where it gave none.

    Must run before any TensorFlow operation. Raises RuntimeError where TensorFlow sees other GPUs.
    """
    if gpus and not gpus_are_fake():
        names, capability = _find_gpus(gpus)
        return Devices(names, choose_precision(precision, capability))
    return Devices(_make_cpu_devices(gpus or replicas), choose_precision(precision, None))


@functools.cache  # devices are made once per process, whatever it trains on them
def _find_gpus(gpus: int) -> tuple[tuple[str, ...], tuple[int, int]]:
    tf.config.experimental.enable_op_determinism()
    cards = tf.config.list_physical_devices("GPU")
    if len(cards) != gpus:
        raise RuntimeError(
            f"Ray gave this trial {gpus} GPUs but TensorFlow sees {len(cards)}; "
            "install raypipe[gpu] on every node, with a driver that its CUDA supports"
        )
    for card in cards:
        tf.config.experimental.set_memory_growth(card, True)
    details = [tf.config.experimental.get_device_details(card) for card in cards]
    capability = min(d.get("compute_capability", (0, 0)) for d in details)
    return tuple(f"GPU:{i}" for i in range(gpus)), capability


@functools.cache
def _make_cpu_devices(count: int) -> tuple[str, ...]:
    # A trial that goes on after a kill must come to the same digits, so no kernel may add in any order.
    tf.config.experimental.enable_op_determinism()
    tf.config.set_visible_devices([], "GPU")
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    return tuple(f"CPU:{i}" for i in range(count))


@functools.cache
def strategy_over(names: tuple[str, ...]) -> tf.distribute.Strategy:
    """The process' one strategy: a second object fails at the first sum of another shape."""
    return tf.distribute.MirroredStrategy(list(names))


class ClipAfterSum:
    """For a Keras optimizer: clips the gradient of the whole batch, not each replica's part of it."""

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        return grads  # too early: each replica has only its own part here

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        summed = super()._all_reduce_sum_gradients(grads_and_vars)  # type: ignore[misc]
        clipped = super()._clip_gradients([grad for grad, _ in summed])  # type: ignore[misc]
        return [(grad, variable) for grad, (_, variable) in zip(clipped, summed, strict=True)]


@keras.saving.register_keras_serializable("raypipe")
class ReplicaAdam(ClipAfterSum, keras.optimizers.Adam):
    """Adam that clips after the sum."""


@keras.saving.register_keras_serializable("raypipe")
class ReplicaAdamW(ClipAfterSum, keras.optimizers.AdamW):
    """AdamW that clips after the sum."""


@keras.saving.register_keras_serializable("raypipe")
class ReplicaLossScale(keras.optimizers.LossScaleOptimizer):
    """Loss scaling that skips a step when the gradients of any replica overflow, not the first's only."""

    def check_finite(self, grads: list[Any]) -> Any:
        finite = tf.cast(super().check_finite(grads), tf.float32)
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, finite) >= context.num_replicas_in_sync


class Replicas:
    """One model on several devices: TensorFlow's `engines.Engine`."""

    def __init__(
        self, devices: Devices, config: TrialConfig, build: Callable[[], keras.Model], data: TrainingData
    ) -> None:
        refuse_uneven(config.batch_size, devices)
        xla = choose_xla(config, devices)
        keras.mixed_precision.set_global_policy(devices.precision)
        self._devices, self._data = devices, data
        self._strategy = strategy_over(devices.names)
        self._batch = config.batch_size
        self._loss = build_loss(config, data.class_counts)
        with self._strategy.scope():
            self.model = build()
            self.schedule = build_schedule(config, steps_per_epoch=data.steps_per_epoch)
            kind, options = ReplicaAdam, {}
            if config.optimizer == "adamw":
                kind, options = ReplicaAdamW, {"weight_decay": config.weight_decay}
            self.optimizer: keras.optimizers.Optimizer = kind(
                learning_rate=self.schedule, global_clipnorm=config.clip_norm, **options
            )
            if devices.precision == "mixed_float16":
                self.optimizer = ReplicaLossScale(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
        changing = [*self.model.variables, *self.optimizer.variables, *self.schedule.variables]
        self._variables = [variable.value for variable in changing]
        self._assign = tf.function(self._assign_all)
        self._predict_share = tf.function(self._predict_step)
        self._feeding = choose_feeding(config, data.features)
        if self._feeding == "device":
            self._features = self._on_each_device(lambda _: np.asarray(data.features))
            self._labels = self._on_each_device(lambda _: data.labels.astype(np.int32))
            positions = tf.TensorSpec([None, self._batch], tf.int32)
            weights = tf.TensorSpec([None], tf.float32)
            clips = [tf.type_spec_from_value(held) for held in (self._features, self._labels)]
            # The clips are arguments: what a function only refers to stays on the devices as long as the
            # process, through every trial that it trains.
            self._train = tf.function(
                self._train_positions, [*clips, positions, weights], jit_compile=xla or None
            )
            self._predict_at = tf.function(self._predict_positions)
        elif self._feeding == "memmap":
            self._train = tf.function(self._train_shares, jit_compile=xla or None)
        else:
            self._compile_for_fit()

    # --- what a trial calls ---------------------------------------------------------------------------

    def train_epoch(self, order: NDArray[np.integer], class_weights: NDArray[np.floating]) -> EpochFigures:
        """One pass over the clips at `order` (positions, each batch full)."""
        ways = {"device": self._train_from_device, "memmap": self._train_from_map, "fit": self._train_by_fit}
        return ways[self._feeding](order, class_weights)

    def predict(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Class probabilities [n, classes] of the clips at `positions`."""
        batches = whole_batches(positions, self._batch)
        if self._feeding == "device":
            parts = [self._predict_at(self._features, tf.constant(batch)) for batch in batches]
        else:
            parts = [self._predict_share(x) for x, _ in Prefetched(self._load, batches)]
        return np.concatenate([part.numpy() for part in parts])[: len(positions)]

    def state(self) -> State:
        """Every number that training changes."""
        return [np.array(v.numpy()) for v in self._variables]

    def restore(self, state: State) -> None:
        self._assign([tf.convert_to_tensor(value) for value in state])

    def profile(self, folder: Path) -> AbstractContextManager[object]:
        profile: AbstractContextManager[object] = tf.profiler.experimental.Profile(str(folder))
        return profile

    # --- three ways of feeding ------------------------------------------------------------------------

    def _train_from_device(
        self, order: NDArray[np.integer], class_weights: NDArray[np.floating]
    ) -> EpochFigures:
        """All clips lie on every device; only their positions travel, and an epoch is one call."""
        started_s = time.monotonic()
        batches = tf.constant(whole_batches(order, self._batch))
        weights = tf.constant(class_weights, tf.float32)
        data_s = time.monotonic() - started_s
        loss = float(self._train(self._features, self._labels, batches, weights))
        return EpochFigures(loss, data_s, time.monotonic() - started_s)

    def _train_from_map(
        self, order: NDArray[np.integer], class_weights: NDArray[np.floating]
    ) -> EpochFigures:
        """Batches are gathered from the memory map, ahead of the step that takes them."""
        started_s = time.monotonic()
        weights = tf.constant(class_weights, tf.float32)
        batches = Prefetched(self._load, whole_batches(order, self._batch))
        losses = [self._train(x, labels, weights) for x, labels in batches]
        loss = float(tf.add_n(losses)) / len(losses)
        return EpochFigures(loss, batches.waited_s, time.monotonic() - started_s)

    def _train_by_fit(self, order: NDArray[np.integer], class_weights: NDArray[np.floating]) -> EpochFigures:
        """The classic way: the clips as plain arrays into Keras' `fit`."""
        started_s = time.monotonic()
        x = np.asarray(self._data.features[order], np.float32)
        self._waited_s = time.monotonic() - started_s
        history = self.model.fit(
            x,
            self._data.labels[order],
            batch_size=self._batch,
            shuffle=False,  # the order is shuffled
            class_weight=dict(enumerate(class_weights.tolist())),
            verbose=0,
        )
        return EpochFigures(history.history["loss"][0], self._waited_s, time.monotonic() - started_s)

    def _compile_for_fit(self) -> None:
        """Keras' own training step, with the time measured that it waits for each batch."""
        self.model.compile(self.optimizer, self._loss, jit_compile=False, auto_scale_loss=False)

        def step(batch: Any) -> Any:
            logs = self._strategy.run(self.model.train_step, args=(batch,))
            return {name: self._strategy.experimental_local_results(v)[0] for name, v in logs.items()}

        compiled = tf.function(step)

        def train_function(iterator: Any) -> Any:
            started_s = time.monotonic()
            batch = next(iterator)
            self._waited_s += time.monotonic() - started_s
            return compiled(batch)

        self.model.train_function = train_function

    def _load(self, positions: NDArray[np.int32]) -> tuple[Any, Any]:
        """A batch from the map: its features and labels, each replica's share on its device."""
        shares = positions.reshape(len(self._devices.names), -1)
        return (
            self._on_each_device(lambda replica: self._data.features[shares[replica]]),
            self._on_each_device(lambda replica: self._data.labels[shares[replica]].astype(np.int32)),
        )

    def _on_each_device(self, value: Callable[[int], NDArray[Any]]) -> Any:
        def place(context: Any) -> Any:
            replica = context.replica_id_in_sync_group
            with tf.device(self._devices.names[replica]):
                return tf.constant(value(replica))

        return self._strategy.experimental_distribute_values_from_function(place)

    # --- inside the graph -----------------------------------------------------------------------------

    def _train_positions(self, features: Any, labels: Any, batches: Any, class_weights: Any) -> Any:
        """Mean loss over the batches of positions [n, batch]."""
        total = 0.0
        for batch in batches:
            total += self._over_replicas(self._gather_and_train, (features, labels, batch, class_weights))
        return total / tf.cast(tf.shape(batches)[0], tf.float32)

    def _gather_and_train(self, features: Any, labels: Any, batch: Any, class_weights: Any) -> Any:
        own = self._own_share(batch)
        return self._train_step(tf.gather(features, own), tf.gather(labels, own), class_weights)

    def _train_shares(self, features: Any, labels: Any, class_weights: Any) -> Any:
        return self._over_replicas(self._train_step, (features, labels, class_weights))

    def _over_replicas(self, step: Callable[..., Any], arguments: Iterable[Any]) -> Any:
        losses = self._strategy.run(step, args=tuple(arguments))
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    def _train_step(self, features: Any, labels: Any, class_weights: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = self.model(tf.cast(features, tf.float32), training=True)
            weights = tf.gather(class_weights, labels)
            # Over the whole batch, so that the replicas' gradients add up to one device's.
            loss = tf.reduce_sum(self._loss(labels, logits) * weights) / self._batch
            scaled = self.optimizer.scale_loss(loss)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, [v.value for v in variables]), variables)
        return loss

    def _predict_step(self, features: Any) -> Any:
        def step(share: Any) -> Any:
            return tf.nn.softmax(self.model(tf.cast(share, tf.float32), training=False))

        return tf.concat(self._strategy.experimental_local_results(self._strategy.run(step, (features,))), 0)

    def _predict_positions(self, features: Any, batch: Any) -> Any:
        def step(held: Any) -> Any:
            return tf.gather(held, self._own_share(batch))

        return self._predict_step(self._strategy.run(step, (features,)))

    def _own_share(self, batch: Any) -> Any:
        """This replica's equal share of a batch of positions."""
        share = self._batch // len(self._devices.names)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.slice(batch, [replica * share], [share])

    def _assign_all(self, values: Sequence[Any]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)
