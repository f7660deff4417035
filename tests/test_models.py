import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.models import MODELS, build_model, feature_statistics

STEPS, DIM = 6, 10


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_gives_logits_and_survives_saving(name, tmp_path):
    import keras

    model = build_model(TrialConfig(model=name, width=8), steps=STEPS, dim=DIM, classes=3)
    x = np.random.default_rng(0).normal(size=(4, STEPS, DIM)).astype(np.float32)
    kernel = model.get_layer("logits").kernel
    kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    logits = model.predict(x, verbose=0)
    assert logits.shape == (4, 3)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), logits, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_untrained_model_prefers_no_class(name):
    model = build_model(TrialConfig(model=name, width=8), steps=STEPS, dim=DIM, classes=3)
    x = np.random.default_rng(0).normal(size=(2, STEPS, DIM)).astype(np.float32)
    np.testing.assert_array_equal(model.predict(x, verbose=0), np.zeros((2, 3)))


def test_the_order_of_steps_matters_to_the_lstm_and_not_to_the_mean():
    x = np.random.default_rng(0).normal(size=(4, STEPS, DIM)).astype(np.float32)
    moved = {}
    for name in MODELS:
        model = build_model(TrialConfig(model=name, width=8), steps=STEPS, dim=DIM, classes=2)
        kernel = model.get_layer("logits").kernel
        kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
        moved[name] = np.abs(model.predict(x, verbose=0) - model.predict(x[:, ::-1], verbose=0)).max()
    assert moved["mean_pool"] < 1e-5 < 1e-3 < moved["bilstm_attention"]


def test_feature_statistics_are_numpys():
    features = np.random.default_rng(0).normal(3, 2, size=(20, STEPS, DIM)).astype(np.float16)
    mean, variance = feature_statistics(features)
    exact = features.astype(np.float64).reshape(-1, DIM)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-3)


def test_a_feature_that_never_changes_does_not_divide_by_zero():
    _, variance = feature_statistics(np.ones((3, STEPS, DIM), np.float16))
    assert (variance > 0).all()
