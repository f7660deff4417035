"""Training one model on several devices at once, exactly: N replicas give what one gives.

The only module that touches TensorFlow. `tf.distribute.MirroredStrategy` keeps the replicas equal; what
Keras gets wrong under it is put right here: gradients are clipped after they are summed over the
replicas, and every batch divides evenly, so that no replica is empty and no example counts double.

One `Replicas` per process: TensorFlow cannot tear a strategy down and start another.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from raypipe.config import TrialConfig

FAKE_GPUS = "RAYPIPE_FAKE_GPUS"
"""Set in tests: Ray hands out GPUs that do not exist, and logical CPU devices take their place."""


@dataclass(frozen=True)
class Devices:
    """What a trial trains on."""

    names: tuple[str, ...]
    precision: str
    """Keras dtype policy."""


def find_devices(gpus: int, replicas: int) -> Devices:
    """The `gpus` GPUs that Ray gave this process, or `replicas` logical CPU devices where it gave none.

    Must run before any TensorFlow operation. Raises RuntimeError where TensorFlow sees other GPUs.
    """
    if gpus and FAKE_GPUS not in os.environ:
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
        return Devices(tuple(f"GPU:{i}" for i in range(gpus)), precision_policy(capability))
    tf.config.set_visible_devices([], "GPU")
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(gpus or replicas)]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    return Devices(tuple(f"CPU:{i}" for i in range(len(logical))), "float32")


def precision_policy(compute_capability: tuple[int, int]) -> str:
    """The Keras dtype policy for the slowest card: Ampere (8.0) brought bfloat16, Volta (7.0) fast
    float16, which needs loss scaling."""
    if compute_capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if compute_capability >= (7, 0) else "float32"


@keras.saving.register_keras_serializable("raypipe")
class ReplicaAdamW(keras.optimizers.AdamW):
    """AdamW that clips the gradient of the whole batch, not each replica's part of it."""

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        return grads  # too early: each replica has only its own part here

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        summed = super()._all_reduce_sum_gradients(grads_and_vars)
        clipped = super()._clip_gradients([grad for grad, _ in summed])
        return [(grad, variable) for grad, (_, variable) in zip(clipped, summed, strict=True)]


@keras.saving.register_keras_serializable("raypipe")
class ReplicaLossScale(keras.optimizers.LossScaleOptimizer):
    """Loss scaling that skips a step when the gradients of any replica overflow, not the first's only."""

    def check_finite(self, grads: list[Any]) -> Any:
        finite = tf.cast(super().check_finite(grads), tf.float32)
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, finite) >= context.num_replicas_in_sync


State = list[NDArray[Any]]


class Replicas:
    """One model on several devices, with the clips it learns from beside it.

    `features` [N, T, D] and `labels` [N] are those of all clips; training and predicting take positions
    in them. The state (weights, optimizer, random) can be taken out and put back, so that the folds of a
    cross-validation share one compiled model.
    """

    def __init__(
        self,
        devices: Devices,
        config: TrialConfig,
        build: Callable[[], keras.Model],
        features: NDArray[np.floating],
        labels: NDArray[np.integer],
    ) -> None:
        keras.mixed_precision.set_global_policy(devices.precision)
        self._strategy = tf.distribute.MirroredStrategy(list(devices.names))
        self._replicas = self._strategy.num_replicas_in_sync
        if config.batch_size % self._replicas:
            raise ValueError(f"batch_size {config.batch_size} does not divide by {self._replicas} replicas")
        self._batch = config.batch_size
        with self._strategy.scope():
            self.model = build()
            self.optimizer: keras.optimizers.Optimizer = ReplicaAdamW(
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                global_clipnorm=config.clip_norm,
            )
            if devices.precision == "mixed_float16":
                self.optimizer = ReplicaLossScale(self.optimizer)
            self.optimizer.build(self.model.trainable_variables)
        self._features = tf.constant(np.asarray(features))
        self._labels = tf.constant(labels.astype(np.int32))
        self._variables = [v.value for v in [*self.model.variables, *self.optimizer.variables]]
        self._train = tf.function(
            self._train_epoch,
            input_signature=[
                tf.TensorSpec([None, self._batch], tf.int32),
                tf.TensorSpec([None], tf.float32),
            ],
        )
        self._predict = tf.function(
            self._predict_batch, input_signature=[tf.TensorSpec([self._batch], tf.int32)]
        )
        self._assign = tf.function(self._assign_all)

    # --- what a trial calls --------------------------------------------------------------------------

    def train_epoch(self, order: NDArray[np.integer], class_weights: NDArray[np.floating]) -> float:
        """One pass over the clips at `order` (positions, each batch full); the mean loss."""
        batches = order.reshape(-1, self._batch).astype(np.int32)
        return float(self._train(batches, class_weights.astype(np.float32)))

    def predict(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Class probabilities [n, classes] of the clips at `positions`."""
        padded = np.resize(positions, -(-len(positions) // self._batch) * self._batch)
        parts = [self._predict(batch) for batch in padded.reshape(-1, self._batch).astype(np.int32)]
        return np.concatenate([part.numpy() for part in parts])[: len(positions)]

    def state(self) -> State:
        """Every number that training changes."""
        return [np.array(v.numpy()) for v in self._variables]

    def restore(self, state: State) -> None:
        self._assign([tf.convert_to_tensor(value) for value in state])

    # --- inside the graph -----------------------------------------------------------------------------

    def _train_epoch(self, batches: Any, class_weights: Any) -> Any:
        total = 0.0
        for batch in batches:
            losses = self._strategy.run(self._train_step, args=(batch, class_weights))
            total += self._strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)
        return total / tf.cast(tf.shape(batches)[0], tf.float32)

    def _train_step(self, batch: Any, class_weights: Any) -> Any:
        own = self._own_part(batch)
        labels = tf.gather(self._labels, own)
        with tf.GradientTape() as tape:
            logits = self.model(self._inputs(own), training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            # Over the whole batch, so that the replicas' gradients add up to one device's.
            loss = tf.reduce_sum(losses * tf.gather(class_weights, labels)) / self._batch
            scaled = self.optimizer.scale_loss(loss)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, [v.value for v in variables]), variables)
        return loss

    def _predict_batch(self, batch: Any) -> Any:
        def step(batch: Any) -> Any:
            return tf.nn.softmax(self.model(self._inputs(self._own_part(batch)), training=False))

        return tf.concat(self._strategy.experimental_local_results(self._strategy.run(step, (batch,))), 0)

    def _own_part(self, batch: Any) -> Any:
        """This replica's equal share of a batch."""
        size = self._batch // self._replicas
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.slice(batch, [number * size], [size])

    def _inputs(self, positions: Any) -> Any:
        return tf.cast(tf.gather(self._features, positions), tf.float32)

    def _assign_all(self, values: Sequence[Any]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)
