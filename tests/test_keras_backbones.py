"""Networks of Keras as backbones. Their weights are random: none can be downloaded in a test."""

import importlib.util
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from networks import onnx_model

from raypipe import keras_backbones
from raypipe.backbones import OnnxNetwork, load_backbone
from raypipe.errors import UserError
from raypipe.keras_backbones import (
    KerasBackbone,
    KerasNetwork,
    application_names,
    difference,
    drop_unread_inputs,
    to_onnx,
)

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
NOT_INSTALLED = "tf2onnx, of raypipe[onnx], is not installed"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one's own, which wants pictures from 0 to 255."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, strides=2, activation="relu")(layers.Rescaling(1 / 255)(inputs))
    path = tmp_path_factory.mktemp("networks") / "small.keras"
    keras.Model(inputs, layers.GlobalAveragePooling2D()(x)).save(path)
    return path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "raypipe")
    return caplog


def test_a_keras_file_gives_its_own_features(small: Path, said: pytest.LogCaptureFixture) -> None:
    backbone = load_backbone(str(small), frame_size=32)
    assert (backbone.name, backbone.dim, len(backbone.weights_digest)) == ("small.keras", 8, 16)
    expected = keras.saving.load_model(small).predict_on_batch(PICTURES.astype(np.float32))
    np.testing.assert_allclose(backbone.network().session()(PICTURES), expected, atol=1e-4)


@pytest.fixture
def no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tf2onnx" else find(name))


def test_without_an_exporter_it_runs_in_tensorflow_and_says_so(
    small: Path, said: pytest.LogCaptureFixture, no_exporter: None
) -> None:
    assert isinstance(load_backbone(str(small), frame_size=32).network(), KerasNetwork)
    assert (
        f"backbone {small.name} runs in TensorFlow, slower on a CPU than ONNX: {NOT_INSTALLED}"
        in said.messages
    )


@pytest.mark.parametrize(
    ("to_onnx", "words"),
    [
        (lambda network: b"not a model", "its export to ONNX fails (--backbone "),
        (
            lambda network: to_onnx(replace(network, weights_path=Path("gone.keras"))),
            "its export to ONNX fails (raypipe.errors.UserError: --backbone gone.keras: ",
        ),
        (
            lambda network: onnx_model(gain=1.5),
            "its export to ONNX changes the features by 0.5 of the largest",
        ),
    ],
    ids=["unreadable", "raises", "other numbers"],
)
def test_an_export_that_breaks_falls_back_to_tensorflow(
    to_onnx: Callable[[object], bytes],
    words: str,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exporters have failed in each of these ways."""
    inputs = keras.Input((32, 32, 3))
    keras.Model(inputs, layers.GlobalAveragePooling2D()(inputs)).save(tmp_path / "means.keras")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tf2onnx" or find(name))
    monkeypatch.setattr(keras_backbones, "to_onnx", to_onnx)
    network = load_backbone(str(tmp_path / "means.keras"), frame_size=32).network()
    assert isinstance(network, KerasNetwork)
    assert network.session()(PICTURES) == pytest.approx(PICTURES.mean((1, 2)), rel=1e-4)
    assert words in said.text


def test_gpus_that_onnx_cannot_use_are_used_by_tensorflow(small: Path) -> None:
    backbone = load_backbone(str(small), frame_size=32)
    assert isinstance(backbone.network(gpu=True), KerasNetwork)


@pytest.mark.slow
def test_a_real_export_of_a_network_that_exporters_have_broken(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    keras.applications.EfficientNetB0(weights=None).save_weights(tmp_path / "random.weights.h5")
    backbone = load_backbone("EfficientNetB0", weights=str(tmp_path / "random.weights.h5"))
    network = backbone.network()
    assert isinstance(network, OnnxNetwork) and backbone.dim == 1280, said.text
    pictures = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    expected = KerasNetwork(backbone.name, backbone.weights_path, 224).session()(pictures)
    np.testing.assert_allclose(network.session()(pictures), expected, atol=1e-3 * np.abs(expected).max())


def test_a_gpu_that_is_not_there_is_no_cpu(small: Path) -> None:
    network = load_backbone(str(small), frame_size=32).network()
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"CUDA|sees no GPU"):
        warnings.simplefilter("ignore")  # ONNX Runtime's, in place of an error
        network.session(gpu=True)


def test_a_gpu_that_tensorflow_does_not_see(small: Path) -> None:
    with pytest.raises(UserError, match="TensorFlow sees no GPU"):
        KerasNetwork(str(small), small, 32).session(gpu=True)


def test_what_tensorflow_prints_when_it_is_loaded_is_not_shown(small: Path, clip_path: Path) -> None:
    command = [sys.executable, "-m", "raypipe.extract", "--backbone", str(small), "--frame-size", "32"]
    command += ["--input", str(clip_path.parent), "--output", str(small.parent / "features"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.match(r"\d\d:\d\d:\d\d \w", line) for line in done.stderr.splitlines()), done.stderr


def test_inputs_that_an_export_leaves_over_go(tmp_path: Path) -> None:
    file = tmp_path / "means.onnx"
    file.write_bytes(onnx_model(unread=["folded"]))
    drop_unread_inputs(str(file))
    assert file.read_bytes() == onnx_model()


@pytest.mark.parametrize("channels_first", [False, True])
def test_an_onnx_file_is_given_what_it_wants(channels_first: bool, tmp_path: Path) -> None:
    file = tmp_path / "means.onnx"
    file.write_bytes(onnx_model(channels_first=channels_first))
    backbone = load_backbone(str(file), frame_size=32)
    assert backbone.dim == 3
    np.testing.assert_allclose(backbone.network().session()(PICTURES), PICTURES.mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_onnx_file_with_a_fixed_batch_is_given_such_batches(batch: int, tmp_path: Path) -> None:
    (tmp_path / "means.onnx").write_bytes(onnx_model(batch=batch))
    backbone = load_backbone(str(tmp_path / "means.onnx"), frame_size=32)
    assert backbone.dim == 3
    pictures = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(backbone.network().session()(pictures), pictures.mean((1, 2)), rtol=1e-4)


def test_a_file_is_known_by_its_name_and_content_wherever_it_lies(tmp_path: Path) -> None:
    found = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "means.onnx").write_bytes(onnx_model())
        found.append(load_backbone(str(tmp_path / folder / "means.onnx"), frame_size=32))
    one, other = found
    assert (
        (one.name, one.weights_digest)
        == (other.name, other.weights_digest)
        == ("means.onnx", one.weights_digest)
    )


@pytest.mark.parametrize(
    ("content", "frame_size", "words"),
    [
        (b"not a model", 32, "ONNX Runtime cannot load it: "),
        (onnx_model(), 48, "does not take pictures of --frame-size 48, RGB from 0 to 255: "),
        (
            onnx_model(keeps_axes=True),
            32,
            r"gives \[1, 1, 1, 3\] for one picture; it must give a vector",
        ),
    ],
)
def test_an_onnx_file_that_cannot_serve(content: bytes, frame_size: int, words: str, tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"--backbone {file.name}: {words}"):
        _ = load_backbone(str(file), frame_size=frame_size).dim


def test_a_keras_file_that_cannot_serve(small: Path, tmp_path: Path) -> None:
    (tmp_path / "text.keras").write_text("not a model")
    with pytest.raises(UserError, match=r"text.keras: is not a model that Keras loads"):
        load_backbone(str(tmp_path / "text.keras")).network()
    with pytest.raises(UserError, match="takes pictures of 32; give it --frame-size 32"):
        load_backbone(str(small), frame_size=64).network()


# --- keras.applications -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network in keras.applications, as they are without training."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    keras.applications.MobileNetV3Small(weights=None).save_weights(path)
    return path


def test_an_application_with_weights_from_a_file(mobilenet: Path, no_exporter: None) -> None:
    backbone = load_backbone("MobileNetV3Small", weights=str(mobilenet))
    assert (backbone.name, backbone.dim) == ("MobileNetV3Small", 1024)
    again = keras.applications.MobileNetV3Small(weights=str(mobilenet))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    classifier = [layer for layer in again.layers if layer.weights][-1]
    expected = keras.Model(again.input, classifier.input).predict_on_batch(pictures.astype(np.float32))
    features = backbone.network().session()(pictures)
    assert features.shape == (2, 1024)
    np.testing.assert_allclose(features, expected.reshape(2, -1), atol=1e-4 * np.abs(expected).max() + 1e-6)


@pytest.mark.slow
def test_the_classic_4096_are_those_of_fc2() -> None:
    network = keras.applications.VGG19(weights=None)
    classifier = [layer for layer in network.layers if layer.weights][-1]
    assert classifier.input is network.get_layer("fc2").output
    assert classifier.input.shape == (None, 4096)


def test_weights_of_another_network(mobilenet: Path) -> None:
    with pytest.raises(UserError, match=r"--weights .*mobilenet.weights.h5: not weights of MobileNetV2: "):
        load_backbone("MobileNetV2", weights=str(mobilenet)).network()


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never random ones in their place."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path), raising=False)
    with pytest.raises(UserError, match=r"not on this machine and cannot be downloaded .*--weights"):
        load_backbone("MobileNetV3Small").network()


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("VGG19", "none.h5", "--weights none.h5: no such file"),
        ("none.onnx", None, "--backbone none.onnx: no such file"),
        ("efficientnet_lite0", "a.h5", "--weights a.h5: efficientnet_lite0 brings its own"),
        ("vgg19", None, "--backbone vgg19: unknown backbone; choose from: "),
    ],
)
def test_mistakes(name: str, weights: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(name, weights=weights)


def test_names_are_known_without_loading_keras() -> None:
    assert {"VGG19", "ResNet50", "EfficientNetB0"} <= application_names()
    assert all(hasattr(keras.applications, name) for name in application_names())


def test_what_is_known_is_not_asked_again(small: Path) -> None:
    backbone = KerasBackbone("none.keras", small, 32).with_dim(7)
    assert backbone.dim == 7


def test_the_difference_is_a_share_of_the_largest_feature() -> None:
    one = OnnxNetwork(onnx_model(), "a").session()
    two = OnnxNetwork(onnx_model(gain=1.5), "b").session()
    assert difference(two, one, 32) == pytest.approx(0.5, abs=1e-3)
