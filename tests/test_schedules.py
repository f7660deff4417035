import math

import keras
import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.schedules import WarmupCosinePlateau, build_schedule


def rates(schedule, steps):
    return np.array([float(schedule(step)) for step in steps])


def plain_rate(step, *, peak, warmup, decay, final):
    """The rate of one step, by hand."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / decay, 1)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_rate_of_every_step(warmup, final):
    schedule = WarmupCosinePlateau(0.5, warmup_steps=warmup, decay_steps=40, final_share=final)
    steps = range(warmup + 60)
    expected = [plain_rate(step, peak=0.5, warmup=warmup, decay=40, final=final) for step in steps]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-5, atol=1e-7)


def test_it_is_continuous_at_the_end_of_warmup_and_decays_over_the_steps_after_it():
    schedule = WarmupCosinePlateau(1.0, warmup_steps=1000, decay_steps=1000, final_share=0.0)
    around = rates(schedule, range(990, 1010))
    assert np.abs(np.diff(around)).max() < 0.0011, "no jump"
    assert around.max() == around[10] == pytest.approx(1.0), "the peak is the first step after warm-up"
    assert float(schedule(1500)) == pytest.approx(0.5)  # not 0.0, as if warm-up were part of the decay
    assert float(schedule(2000)) == float(schedule(3000)) == pytest.approx(0.0, abs=1e-7)
    assert float(schedule(0)) > 0, "no step is wasted"


def plateau(**more):
    return WarmupCosinePlateau(1.0, plateau_factor=0.5, plateau_patience=2, plateau_min_delta=0.01, **more)


@pytest.mark.parametrize(
    ("losses", "factor"),
    [
        ([1.0, 0.9, 0.8, 0.7], 1.0),
        ([1.0, 1.1], 1.0),
        ([1.0, 1.1, 1.1], 0.5),
        ([1.0, 1.1, 0.5, 1.1], 1.0),  # a better one starts the waiting anew
        ([1.0, 0.995, 0.995], 0.5),  # better by less than min_delta is no better
        ([1.0, 1.1, 1.1, 1.1, 1.1], 0.25),
        ([1.0] + [1.1] * 20, 0.01),  # not under the floor
        ([math.nan, math.nan], 0.5),
    ],
)
def test_the_factor_falls_when_the_loss_no_longer_does(losses, factor):
    schedule = plateau()
    for loss in losses:
        schedule.observe(loss)
    assert float(schedule.factor) == pytest.approx(factor)
    assert float(schedule(0)) == pytest.approx(factor)


def test_plateau_and_cosine_work_together_inside_an_optimizer():
    # Keras' ReduceLROnPlateau raises TypeError here, when it first fires.
    schedule = plateau(decay_steps=10, final_share=0.0)
    weight = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(schedule)
    optimizer.build([weight])
    for _ in range(5):
        optimizer.apply([np.zeros(1, np.float32)])
    for loss in (1.0, 1.0, 1.0):
        schedule.observe(loss)
    assert float(optimizer.learning_rate) == pytest.approx(0.5 * 0.5)


def test_a_saved_one_goes_on_as_the_other_would(tmp_path):
    schedule = plateau(warmup_steps=3, decay_steps=7, final_share=0.1)
    for loss in (1.0, 1.0, 1.0, 1.0):
        schedule.observe(loss)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.AdamW(schedule), "mse")
    model.fit(np.ones((4, 2)), np.ones(4), batch_size=1, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").optimizer._learning_rate
    assert again.get_config() == schedule.get_config()
    for one in (schedule, again):
        one.observe(1.0)
    assert float(schedule.factor) == float(again.factor) == 0.25
    np.testing.assert_array_equal(rates(again, range(12)), rates(schedule, range(12)))


def test_its_variables_are_all_that_changes():
    one, other = plateau(), plateau()
    for loss in (1.0, 1.0, 1.0, 1.0):
        one.observe(loss)
    for mine, theirs in zip(other.variables, one.variables, strict=True):
        mine.assign(theirs)
    assert other.get_config() == one.get_config()


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (TrialConfig(learning_rate=0.1, schedule="constant"), (0, 50, 599), (0.1, 0.1, 0.1)),
        (
            TrialConfig(learning_rate=0.1, schedule="constant", warmup_epochs=1),
            (0, 10, 599),
            (0.1 / 11, 0.1, 0.1),
        ),
        (
            TrialConfig(learning_rate=0.1, warmup_epochs=0.5, schedule="cosine", final_share=0.2),
            (5, 600),
            (0.1, 0.02),
        ),
        (TrialConfig(learning_rate=0.1, schedule="cosine", epochs=2), (0, 10, 20), (0.1, 0.05, 0.0)),
    ],
)
def test_the_schedule_that_a_config_names(config, steps, expected):
    schedule = build_schedule(config, steps_per_epoch=10)
    np.testing.assert_allclose(rates(schedule, steps), expected, atol=1e-8)


def test_nothing_to_decay_over_is_refused():
    with pytest.raises(ValueError, match="decay_steps 0 must be at least 1"):
        WarmupCosinePlateau(1.0, decay_steps=0)
