"""Trains small models on so many replicas and prints, as JSON, what came of each case.

One process for all cases of a number of replicas: starting TensorFlow takes far longer than training.
"""

import gc
import json
import os
import sys
from importlib import import_module

BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if __name__ == "__main__":
    # Only one of the two, as where only one is installed: Keras would import TensorFlow beside JAX.
    sys.modules["tensorflow" if BACKEND == "jax" else "jax"] = None

import keras  # noqa: E402 - takes its backend now
import numpy as np  # noqa: E402

from raypipe.config import TrialConfig  # noqa: E402
from raypipe.engines import Devices, Engine, TrainingData  # noqa: E402
from raypipe.models import MODELS, build_model  # noqa: E402

replicas_module = import_module("raypipe.replicas_jax" if BACKEND == "jax" else "raypipe.replicas")

STEPS, DIM, CLIPS, TRAINED, BATCH = 4, 12, 30, 23, 8
SMALL = {"width": 8, "dropout": 0.0, "learning_rate": 0.01, "batch_size": BATCH, "clip_norm": 0.05}


def clips() -> TrainingData:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, CLIPS)
    features = (rng.normal(size=(CLIPS, STEPS, DIM)) + labels[:, None, None]).astype(np.float16)
    return TrainingData(features, labels, np.bincount(labels), steps_per_epoch=3)


def engine(devices: Devices, data: TrainingData, **fields: object) -> Engine:
    keras.utils.set_random_seed(0)
    config = TrialConfig.model_validate(SMALL | fields)
    made = replicas_module.Replicas(
        devices, config, lambda: build_model(config, steps=STEPS, dim=DIM, classes=2), data
    )
    # Weights that do not depend on the backend; the last layer's stay zero.
    rng, state = np.random.default_rng(2), made.state()
    for i, variable in enumerate(made.model.variables):
        if len(variable.shape) > 1 and "logits" not in variable.path:
            state[i] = rng.normal(0, 0.3, state[i].shape).astype(np.float32)
    made.restore(state)
    return made


def train(devices: Devices, **fields: object) -> dict[str, object]:
    """Four epochs over an uneven number of clips; predictions after them and of the state before them."""
    rng = np.random.default_rng(1)
    made = engine(devices, clips(), **fields)
    start = made.state()
    weights = np.array([1.0, 2.0])
    losses = []
    for _ in range(4):
        if losses:
            made.schedule.observe(1.0)  # never better: the plateau lowers the rate
        order = np.resize(rng.permutation(TRAINED), 24)
        losses.append(made.train_epoch(order, weights).loss)
    after = made.predict(np.arange(CLIPS - 1)).tolist()
    made.restore(start)
    return {"losses": losses, "after": after, "before": made.predict(np.arange(CLIPS - 1)).tolist()}


def overflow(devices: Devices) -> list[dict[str, float]]:
    """Two steps in float16, the first with an infinite clip on one replica, each in turn; only the second
    may count."""
    data = clips()
    data.features[0] = np.inf
    made = engine(Devices(devices.names, "mixed_float16"), data, precision="mixed_float16")
    start, second = made.state(), np.arange(16, 24)
    made.train_epoch(second, np.ones(2))
    alone, scale = made.predict(second), float(keras.ops.convert_to_numpy(made.optimizer.dynamic_scale.value))
    results = []
    for bad in range(0, BATCH, BATCH // len(devices.names)):
        first = np.arange(8, 16)
        first[bad] = 0
        made.restore(start)
        made.train_epoch(np.concatenate([first, second]), np.ones(2))
        results.append(
            {
                "scale": float(keras.ops.convert_to_numpy(made.optimizer.dynamic_scale.value)) / scale,
                "difference": float(np.abs(made.predict(second) - alone).max()),
                "moved": float(np.abs(alone - 0.5).max()),
            }
        )
    return results


def clips_held(devices: Devices) -> list[int]:
    """Tensors with all clips that there are while an engine trains, and when it was let go of."""
    made = engine(devices, clips(), model="mean_pool")
    made.train_epoch(np.arange(24), np.ones(2))
    made.predict(np.arange(CLIPS))

    def count() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one).__name__ in ("EagerTensor", "ArrayImpl")]
        return sum(tuple(one.shape) == (CLIPS, STEPS, DIM) for one in tensors)

    while_it_trains = count()
    del made
    return [while_it_trains, count()]


def masks(devices: Devices) -> list[list[float]]:
    """What each replica drops of the same ones."""
    made = engine(devices, clips(), model="mean_pool", dropout=0.5)
    dropout = next(layer for layer in made.model.layers if isinstance(layer, keras.layers.Dropout))
    strategy, ones = replicas_module.strategy_over(devices.names), np.ones((1, 64), np.float32)

    @replicas_module.tf.function
    def drop() -> object:
        return strategy.run(lambda: dropout(ones, training=True))

    return [one.numpy()[0].tolist() for one in strategy.experimental_local_results(drop())]


CASES: dict[str, dict[str, object]] = {
    **{name: {"model": name} for name in MODELS},
    "never clipped": {"model": "mean_pool", "clip_norm": None},
    "adam": {"model": "mean_pool", "optimizer": "adam"},
    "all at once": {
        "model": "mean_pool",
        "inputs": "both",
        "loss": "focal",
        "focal_alpha": [0.3, 0.7],
        "label_smoothing": 0.1,
        "schedule": "cosine",
        "warmup_epochs": 1.0,
        "epochs": 4,
        "plateau_factor": 0.5,
        "plateau_patience": 1,
        "patience": 4,
    },
    "memmap": {"model": "mean_pool", "feeding": "memmap"},
    "fit": {"model": "mean_pool", "feeding": "fit"},
}


def main(replicas: int, *names: str) -> None:
    """The cases by these names; none: all."""
    devices = replicas_module.find_devices("auto", gpus=0, replicas=replicas)
    results: dict[str, object] = {name: train(devices, **CASES[name]) for name in names or CASES}
    results["overflow"] = overflow(devices)
    results["clips held"] = clips_held(devices)
    results["dropout"] = train(devices, model="mean_pool", dropout=0.5)
    if BACKEND == "tensorflow":
        results["masks"] = masks(devices)
    if replicas == 1 and BACKEND == "tensorflow":
        results["xla"] = train(devices, model="mean_pool", xla=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
