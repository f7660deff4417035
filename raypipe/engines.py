"""What trains a trial: the interface that TensorFlow's engine (`replicas`) and JAX's (`replicas_jax`) share,
and the choices that do not depend on which of the two it is.

An engine holds one compiled model on several devices. Its whole state can be taken out and put back, so that
the folds of a cross-validation share it.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raypipe.config import RECURRENT, Backend, TrialConfig
from raypipe.errors import UserError

if TYPE_CHECKING:
    import keras

    from raypipe.schedules import WarmupCosinePlateau

State = list[NDArray[Any]]


@dataclass(frozen=True)
class EpochFigures:
    """One pass over the clips of a fold."""

    loss: float
    """Mean over the clips as they were weighed, in nats."""
    data_s: float
    """Seconds in which the devices' next step waited for its clips."""
    wall_s: float


@dataclass(frozen=True)
class Devices:
    """What a trial trains on."""

    names: tuple[str, ...]
    precision: str
    """Keras dtype policy."""

    @property
    def are_gpus(self) -> bool:
        return self.names[0].lower().startswith("gpu")


@dataclass(frozen=True)
class TrainingData:
    """The clips that an engine learns from; training and predicting take positions in them."""

    features: NDArray[np.float16]
    """[N, T, D], perhaps memory-mapped."""
    labels: NDArray[np.int64]
    """[N] class numbers."""
    class_counts: NDArray[np.int64]
    """[C] clips of each class among those that train, for the loss."""
    steps_per_epoch: int
    """For the learning rate's schedule."""


class Engine(Protocol):
    """What a trial calls."""

    model: "keras.Model"
    optimizer: "keras.optimizers.Optimizer"
    schedule: "WarmupCosinePlateau"

    def train_epoch(self, order: NDArray[np.integer], class_weights: NDArray[np.floating]) -> EpochFigures:
        """One pass over the clips at `order` (positions, each batch full)."""

    def predict(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """Class probabilities [n, classes] of the clips at `positions`."""

    def state(self) -> State:
        """Every number that training changes: weights first, as in `model.variables`, then the others."""

    def restore(self, state: State) -> None: ...

    def profile(self, folder: Path) -> AbstractContextManager[object]:
        """Records what the devices do inside it, for TensorBoard."""


def open_engine(
    backend: Backend,
    build: Callable[[], "keras.Model"],
    config: TrialConfig,
    data: TrainingData,
    *,
    gpus: int,
    replicas: int,
    seed: int,
) -> Engine:
    """The engine for the `gpus` GPUs that Ray gave this process, or for `replicas` logical CPU devices.

    Keras takes its backend when it is first imported, and TensorFlow cannot start a second strategy: one
    engine per process. Raises RuntimeError where this process cannot have it, ValueError where `config`
    cannot work on these devices.
    """
    os.environ["KERAS_BACKEND"] = backend
    refuse_missing(backend)
    import keras

    if keras.backend.backend() != backend:
        raise RuntimeError(
            f"Keras runs on {keras.backend.backend()} in this process already, not on {backend}"
        )
    # An engine before refers to itself; it is let go of now and not some time, as clips lie on its devices.
    # And layers are named by how many there were: a trial's curves must not tell what was trained before it.
    keras.utils.clear_session(free_memory=True)
    keras.utils.set_random_seed(seed)
    module = importlib.import_module("raypipe.replicas_jax" if backend == "jax" else "raypipe.replicas")
    devices = module.find_devices(config.precision, gpus=gpus, replicas=replicas)
    engine: Engine = module.Replicas(devices, config, build, data)
    return engine


EXTRAS: dict[Backend, str] = {"tensorflow": "cpu", "jax": "jax"}


def refuse_missing(backend: Backend) -> None:
    """Raises UserError where the backend is not installed."""
    if importlib.util.find_spec(backend) is None:
        raise UserError(
            f"--backend {backend}: is not installed; install raypipe[{EXTRAS[backend]}] on every node"
        )


# --- choices ---------------------------------------------------------------------------------------


def choose_precision(wanted: str, compute_capability: tuple[int, int] | None) -> str:
    """The Keras dtype policy for the slowest card, None for CPUs. Raises ValueError where it has none such.

    Ampere (8.0) brought bfloat16, Volta (7.0) fast float16, which needs loss scaling.

    >>> [choose_precision("auto", card) for card in [(9, 0), (7, 5), (6, 1), None]]
    ['mixed_bfloat16', 'mixed_float16', 'float32', 'float32']
    """
    if wanted == "auto":
        if compute_capability is None or compute_capability < (7, 0):
            return "float32"
        return "mixed_bfloat16" if compute_capability >= (8, 0) else "mixed_float16"
    if wanted == "mixed_bfloat16" and compute_capability is not None and compute_capability < (8, 0):
        major, minor = compute_capability
        raise ValueError(
            f"precision mixed_bfloat16 needs a card of compute capability 8.0 (Ampere) or newer, "
            f"this one has {major}.{minor}; use precision auto"
        )
    return wanted


def choose_feeding(config: TrialConfig, features: NDArray[np.floating]) -> str:
    """`device`, `memmap` or `fit`: auto is device for features that `device_cache_mb` lets lie there."""
    if config.feeding != "auto":
        return config.feeding
    return "device" if features.nbytes <= config.device_cache_mb << 20 else "memmap"


def choose_xla(config: TrialConfig, devices: Devices) -> bool:
    """Whether TensorFlow compiles the step with XLA: on a single GPU, and not cuDNN's recurrent kernels.

    On CPUs it works and is many times slower. Raises ValueError where it is wanted and cannot work.
    """
    if config.xla != "auto":
        if config.xla and len(devices.names) > 1:
            raise ValueError(f"xla cannot compile a step of {len(devices.names)} replicas; use xla auto")
        return config.xla
    return len(devices.names) == 1 and devices.are_gpus and config.model not in RECURRENT


def refuse_uneven(batch_size: int, devices: Devices) -> None:
    """Raises ValueError where the devices' shares of a batch would differ."""
    if batch_size % len(devices.names):
        raise ValueError(f"batch_size {batch_size} does not divide by {len(devices.names)} replicas")


def whole_batches(positions: NDArray[np.integer], batch_size: int) -> NDArray[np.int32]:
    """Positions as full batches [n, batch_size], the last one filled with positions from the start.

    >>> whole_batches(np.array([7, 8, 9]), 2).tolist()
    [[7, 8], [9, 7]]
    """
    count = -(-len(positions) // batch_size)
    return np.resize(positions, count * batch_size).reshape(-1, batch_size).astype(np.int32)
