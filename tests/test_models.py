import inspect

import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.models import (
    MODELS,
    POOLED,
    build_model,
    feature_statistics,
    pool,
    pooled_statistics,
    select_inputs,
    step_positions,
)

STEPS, DIM = 6, 10


RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, STEPS, DIM)).astype(np.float32)


def model_of(classes=3, **fields):
    """A model with random logits, as an untrained one's are all zero."""
    model = build_model(TrialConfig(width=8, **fields), steps=STEPS, dim=DIM, classes=classes)
    kernel = model.get_layer("logits").kernel
    kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    return model


@pytest.mark.parametrize(("depth", "inputs"), [(1, "differences"), (2, "both")])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_gives_logits_and_survives_saving(name, depth, inputs, tmp_path):
    import keras

    model = model_of(model=name, depth=depth, inputs=inputs)
    logits = model.predict(X, verbose=0)
    assert logits.shape == (4, 3) and logits.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(X, verbose=0), logits, rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_takes_less_precise_numbers_and_gives_float32_logits(name, policy):
    import keras

    keras.mixed_precision.set_global_policy(policy)
    try:
        model = model_of(model=name)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    dtypes = {layer.compute_dtype for layer in model.layers if layer.weights}
    assert dtypes == {policy.removeprefix("mixed_"), "float32"}
    logits = model.predict(X, verbose=0)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_learns_which_half_is_higher(name):
    import keras

    keras.utils.set_random_seed(0)
    x = RNG.normal(size=(64, STEPS, DIM)).astype(np.float32)
    labels = (x[:, 3:].mean((1, 2)) > x[:, :3].mean((1, 2))).astype(int)
    x[:, :3] -= labels[:, None, None]
    config = TrialConfig(model=name, width=16, depth=2, dropout=0.0, inputs="both")
    model = build_model(config, steps=STEPS, dim=DIM, classes=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(x, labels, epochs=30, batch_size=16, verbose=0)
    assert model.evaluate(x, labels, verbose=0)[1] > 0.95


@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_untrained_model_prefers_no_class(name):
    model = build_model(TrialConfig(model=name, width=8), steps=STEPS, dim=DIM, classes=3)
    np.testing.assert_array_equal(model.predict(X, verbose=0), np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("linear", False),
        ("mean_pool", False),
        ("gru", True),
        ("bilstm_attention", True),
        ("transformer", True),
        ("tcn", True),
    ],
)
def test_the_direction_of_time_matters_to_all_but_the_pooled(name, matters):
    model = model_of(model=name, classes=2)
    moved = np.abs(model.predict(X, verbose=0) - model.predict(X[:, ::-1], verbose=0)).max()
    assert moved > 1e-3 if matters else moved < 1e-5


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_step_is_seen(name):
    model = model_of(model=name)
    logits = model.predict(X, verbose=0)
    for step in (0, 2, STEPS - 1):
        x = X.copy()
        x[:, step] += 5
        assert np.abs(model.predict(x, verbose=0) - logits).max(axis=1).min() > 1e-4, step


def test_inputs_are_features_and_their_differences():
    differences = np.diff(X, axis=1, prepend=X[:, :1])
    assert (differences[:, 0] == 0).all() and differences.shape == X.shape
    np.testing.assert_array_equal(select_inputs(X, "features"), X)
    np.testing.assert_array_equal(select_inputs(X, "differences"), differences)
    np.testing.assert_array_equal(select_inputs(X, "both"), np.concatenate([X, differences], axis=-1))


def test_positions_are_the_papers():
    positions = step_positions(5, 6)
    assert positions[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert positions[3, 2:4].tolist() == pytest.approx(
        [np.sin(3 / 10_000 ** (2 / 6)), np.cos(3 / 10_000 ** (2 / 6))], abs=1e-3
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_is_short_and_names_its_source(name):
    assert len(inspect.getsource(MODELS[name]).splitlines()) < 60
    assert name in POOLED or "arXiv:" in inspect.getdoc(MODELS[name])


def test_feature_statistics_are_numpys():
    features = np.random.default_rng(0).normal(3, 2, size=(20, STEPS, DIM)).astype(np.float16)
    mean, variance = feature_statistics(features, np.arange(20))
    exact = features.astype(np.float64).reshape(-1, DIM)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-3)


def test_a_feature_that_never_changes_does_not_divide_by_zero():
    _, variance = feature_statistics(np.ones((3, STEPS, DIM), np.float16), np.arange(3))
    assert (variance > 0).all()


@pytest.mark.parametrize("inputs", ["features", "both"])
def test_pooled_statistics_are_those_of_what_is_pooled(monkeypatch, inputs):
    monkeypatch.setattr("raypipe.models.CLIPS_AT_ONCE", 7)
    features = np.random.default_rng(0).normal(3, 2, size=(20, STEPS, DIM)).astype(np.float16)
    mean, variance = feature_statistics(features, np.arange(20))
    found = pooled_statistics(features, np.arange(20), inputs, mean=mean, variance=variance)
    x = select_inputs((features.astype(np.float32) - mean) / np.sqrt(variance), inputs)
    pooled = np.asarray(pool(np.asarray(x)))
    np.testing.assert_allclose(found[0], pooled.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found[1], pooled.var(axis=0), rtol=1e-3, atol=1e-5)


def test_what_is_pooled_is_mean_spread_and_roughness():
    steady, rough = [0.0, 1, 2, 3, 4, 5], [0.0, 5, 1, 4, 2, 3]  # the same values in another order
    mean, spread, roughness = np.asarray(pool(np.array([steady, rough], np.float32)[..., None])).T
    assert mean.tolist() == [2.5, 2.5]
    assert spread.tolist() == pytest.approx([np.log(np.std(steady) + 0.1)] * 2)
    assert roughness.tolist() == pytest.approx([np.log(5 / 6 + 0.1), np.log(15 / 6 + 0.1)])
