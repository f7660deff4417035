"""Backbones made with Keras: the networks of keras.applications, and a user's own `.keras` file.

On a CPU they run as ONNX where tf2onnx is installed and its export gives the same numbers, else in
TensorFlow, which a line says. Nothing is made up: without weights there is no network.
"""

import importlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.backbones import LOG, Network, OnnxNetwork, Pictures, file_digest, onnx_sees_gpus, probe
from raypipe.console import TENSORFLOW_GREETINGS, duration, without_lines
from raypipe.errors import UserError

TOLERANCE = 1e-3
"""How far the features of an export may be off, as a share of the largest one."""
WORDS = 300
EXPORT_MEMORY_GB, EXPORT_TIMEOUT_S = 8, 300.0
"""What the export of a network to ONNX may take."""


@cache
def application_names() -> frozenset[str]:
    """The networks of keras.applications, read from its source: importing Keras takes seconds."""
    spec = importlib.util.find_spec("keras")
    if spec is None or spec.origin is None:
        return frozenset()
    source = (Path(spec.origin).parent / "applications" / "__init__.py").read_text()
    return frozenset(re.findall(r"\b([A-Z]\w+) as \1\b", source))


@dataclass(frozen=True)
class KerasBackbone:
    """A network of keras.applications, with weights from a file or Keras' own, or a `.keras` file."""

    name: str
    weights_path: Path | None
    """None: those trained on ImageNet, which Keras downloads once."""
    frame_size: int
    known_dim: int | None = None

    @cached_property
    def weights_digest(self) -> str:
        return file_digest(self.weights_path) if self.weights_path else "imagenet"

    @cached_property
    def dim(self) -> int:
        return self.known_dim or probe(self._as_keras.session(), self.name, self.frame_size)

    def with_dim(self, dim: int) -> "KerasBackbone":
        return replace(self, known_dim=dim)

    @property
    def _as_keras(self) -> "KerasNetwork":
        return KerasNetwork(self.name, self.weights_path, self.frame_size)

    def network(self, *, gpu: bool = False) -> Network:
        """As ONNX where that gives the same features, else as it is, with a notice; as it is, too, for GPUs
        that ONNX Runtime cannot use.

        Raises UserError where there are no weights.
        """
        model = self._as_keras.build()
        if gpu and not onnx_sees_gpus():
            return self._as_keras
        why = "tf2onnx, of raypipe[onnx], is not installed"
        if importlib.util.find_spec("tf2onnx"):
            try:
                exported = OnnxNetwork(to_onnx(self._as_keras), self.name)
                off = difference(exported.session(), KerasEmbedder(model), self.frame_size)
            except Exception as error:  # ONNX Runtime has an exception for each of its status codes
                why = f"its export to ONNX fails ({first_line(error)})"
            else:
                if off <= TOLERANCE:
                    return exported
                why = f"its export to ONNX changes the features by {off:.1g} of the largest one"
        LOG.info("backbone %s runs in TensorFlow, slower on a CPU than ONNX: %s", self.name, why)
        return self._as_keras


@dataclass(frozen=True)
class KerasNetwork:
    """A network that runs in Keras itself; every node reads the weights from the same path."""

    name: str
    weights_path: Path | None
    frame_size: int

    def session(self, *, gpu: bool = False) -> "KerasEmbedder":
        return KerasEmbedder(self.build(gpu=gpu))

    def build(self, *, gpu: bool = False) -> Any:
        """The Keras model from uint8 pictures [N, H, W, 3] to features [N, D].

        On a GPU in mixed precision: float16 is what all of them compute fast. Raises UserError.
        """
        if not gpu:  # one worker a core: threads inside them only fight for it
            os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
            os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with without_lines(*TENSORFLOW_GREETINGS):
            import keras

            if gpu and not keras.distribution.list_devices("gpu"):  # Keras itself would use the CPU
                raise UserError(f"--backbone {self.name}: TensorFlow sees no GPU; install raypipe[gpu] there")
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16" if gpu else "float32")
        try:
            if self.name in application_names():
                return from_pictures(*application(self.name, self.weights_path), self.frame_size, self.name)
            return from_pictures(load_file(str(self.weights_path)), None, self.frame_size, self.name)
        finally:
            keras.config.set_dtype_policy(policy)


class KerasEmbedder:
    """A loaded Keras model: uint8 RGB pictures [N, H, W, 3] to float32 features [N, D]."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]:
        return np.asarray(self._model.predict_on_batch(pictures), np.float32)


def application(name: str, weights: Path | None) -> tuple[Any, Any]:
    """What the classifier of a network in keras.applications sees, and how it wants its pictures."""
    import keras

    build = getattr(keras.applications, name)
    module = importlib.import_module(build.__module__)
    try:
        network = build(weights=str(weights) if weights else "imagenet")
    except Exception as error:  # Keras raises a plain Exception where a download fails
        if weights:
            raise UserError(f"--weights {weights}: not weights of {name}: {first_line(error)}") from None
        raise UserError(
            f"--backbone {name}: its weights are not on this machine and cannot be downloaded "
            f"({first_line(error)}); get them elsewhere and name the file with --weights"
        ) from None
    classifier = [layer for layer in network.layers if layer.weights][-1]
    return keras.Model(network.input, classifier.input), module.preprocess_input


def load_file(path: str) -> Any:
    """The model in a `.keras` file; what would run code from the file is refused by Keras."""
    import keras

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever the file holds
        raise UserError(f"--backbone {path}: is not a model that Keras loads: {first_line(error)}") from None


def from_pictures(model: Any, preprocess: Any, frame_size: int, name: str) -> Any:
    """The model with uint8 pictures as its input and one vector a picture as its output."""
    import keras

    shape = tuple(model.input_shape) if not isinstance(model.input_shape, list) else ()
    if len(shape) != 4 or shape[3] not in (3, None):
        raise UserError(f"--backbone {name}: takes {list(shape)}; it must take pictures, [N, H, W, 3]")
    if any(side not in (frame_size, None) for side in shape[1:3]):
        raise UserError(f"--backbone {name}: takes pictures of {shape[1]}; give it --frame-size {shape[1]}")
    pictures = keras.Input((frame_size, frame_size, 3), dtype="uint8", name="pictures")
    scaled = keras.ops.cast(pictures, "float32")
    features = model(preprocess(scaled) if preprocess else scaled)
    if len(features.shape) == 4:  # a vector at every place
        features = keras.layers.GlobalAveragePooling2D()(features)
    return keras.Model(pictures, keras.ops.cast(features, "float32"))


class ExportFailed(Exception):
    """What kept a network from becoming ONNX."""


def to_onnx(network: "KerasNetwork") -> bytes:
    """The network as ONNX, exported by a process of its own: for VGG19 tf2onnx took 22 GB and brought the
    machine down. Raises ExportFailed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        settings = [network.name, str(network.weights_path or ""), str(network.frame_size), str(file)]
        try:
            export = subprocess.run(
                [sys.executable, "-m", "raypipe.keras_backbones", *settings],
                capture_output=True,
                text=True,
                timeout=EXPORT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ExportFailed(f"it took longer than {duration(EXPORT_TIMEOUT_S)}") from None
        if export.returncode == 0:
            return file.read_bytes()
        words = export.stderr.strip().splitlines()
        if any("bad_alloc" in line or "MemoryError" in line for line in words):
            raise ExportFailed(f"it took more memory than {EXPORT_MEMORY_GB} GB")
        raise ExportFailed(words[-1] if words else f"it ended with status {export.returncode}")


def export_main(name: str, weights: str, frame_size: str, file: str) -> None:
    """The exporting process."""
    limit = EXPORT_MEMORY_GB << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model = KerasNetwork(name, Path(weights) if weights else None, int(frame_size)).build()
    model(np.zeros((1, *model.input_shape[1:]), np.uint8))  # Keras exports only what was called
    model.export(file, format="onnx", verbose=False)
    drop_unread_inputs(file)


def drop_unread_inputs(file: str) -> None:
    """tf2onnx 1.17 leaves constants that it has folded away as inputs that nothing reads."""
    import onnx

    model = onnx.load(file)
    read = {name for node in model.graph.node for name in node.input}
    for given in [given for given in model.graph.input if given.name not in read]:
        model.graph.input.remove(given)
    onnx.save(model, file)


def difference(exported: Any, model: Any, frame_size: int) -> float:
    """By how much two networks differ on noise, as a share of the largest feature."""
    noise = np.random.default_rng(0).integers(0, 256, (4, frame_size, frame_size, 3), dtype=np.uint8)
    expected = model(noise)
    return float(np.abs(exported(noise) - expected).max() / max(np.abs(expected).max(), 1e-9))


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:WORDS]


if __name__ == "__main__":
    export_main(*sys.argv[1:])
