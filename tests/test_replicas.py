"""N replicas give what one gives. Each number of replicas trains in a process of its own: one strategy per
process.

The machine has no GPU: the replicas are logical CPU devices, which take the same path through TensorFlow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train_replicas import CASES

from raypipe.models import MODELS

pytestmark = pytest.mark.timeout(900)  # starts several processes, on machines that may be busy
SCRIPT = Path(__file__).with_name("train_replicas.py")


@pytest.fixture(scope="module")
def trained() -> dict[int, dict]:
    """What came of each case, by the number of replicas; they train at the same time."""
    # Four replicas take four times as long to trace.
    return run_cases({1: (), 2: (), 4: ("mean_pool",)})


def run_cases(wanted: dict[int, tuple[str, ...]], backend: str = "tensorflow") -> dict[int, dict]:
    runs = {
        replicas: subprocess.Popen(
            [sys.executable, SCRIPT, str(replicas), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"KERAS_BACKEND": backend},
        )
        for replicas, cases in wanted.items()
    }
    results = {}
    for replicas, run in runs.items():
        out, said = run.communicate()
        assert run.returncode == 0, said[-3000:]
        results[replicas] = json.loads(out.splitlines()[-1])
    return results


@pytest.mark.parametrize(("case", "replicas"), [*((case, 2) for case in CASES), ("mean_pool", 4)])
def test_several_replicas_train_as_one(trained, case, replicas):
    one, several = trained[1][case], trained[replicas][case]
    assert one["losses"][0] > one["losses"][-1], "it learns"
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(several["after"], one["after"], atol=1e-5)
    assert len(one["after"]) == 29, "an uneven number of clips is predicted, each once"
    # The untrained state was put back; not every processor's softmax of two zeros is one half exactly.
    np.testing.assert_allclose(one["before"], 0.5, rtol=1e-6)


@pytest.mark.slow
def test_every_model_trains_on_four_replicas_as_on_one(trained):
    four = run_cases({4: tuple(MODELS)})[4]
    for model in MODELS:
        np.testing.assert_allclose(four[model]["losses"], trained[1][model]["losses"], rtol=1e-5)
        np.testing.assert_allclose(four[model]["after"], trained[1][model]["after"], atol=1e-5)


@pytest.mark.parametrize("replicas", [2, 4])
def test_with_dropout_the_replicas_share_a_mask(trained, replicas):
    """What decision 5 says of dropout. Once this fails, Keras draws a mask for each replica."""
    first, *others = trained[replicas]["masks"]
    assert len(others) == replicas - 1 and 10 < first.count(0.0) < 54
    assert all(other == first for other in others)
    one, several = trained[1]["dropout"], trained[replicas]["dropout"]
    assert one["losses"][0] > one["losses"][-1] and several["losses"][0] > several["losses"][-1], "both learn"
    assert not np.allclose(several["losses"], one["losses"], rtol=1e-3), "not the same"


def test_clipping_does_something_here(trained):
    # Otherwise the test above would not see clipping at the wrong place.
    assert trained[1]["mean_pool"]["losses"][1:] != trained[1]["never clipped"]["losses"][1:]


@pytest.mark.parametrize("feeding", ["memmap", "fit"])
def test_every_way_of_feeding_trains_the_same(trained, feeding):
    for results in (trained[1], trained[2]):
        np.testing.assert_allclose(results[feeding]["losses"], results["mean_pool"]["losses"], rtol=1e-5)
        np.testing.assert_allclose(results[feeding]["after"], results["mean_pool"]["after"], atol=1e-5)


def test_xla_trains_the_same_on_one_device(trained):
    np.testing.assert_allclose(trained[1]["xla"]["losses"], trained[1]["mean_pool"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_an_overflow_on_any_replica_skips_the_step_and_lowers_the_scale(trained, replicas):
    cases = trained[replicas]["overflow"]
    assert len(cases) == replicas, "an infinite clip was given to each replica in turn"
    for case in cases:
        assert case["scale"] == 0.5
        assert case["difference"] < 1e-3, "as if there had been only the step after it"
        assert case["moved"] > 1e-2, "which did count"


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_clips_leave_the_devices_with_the_engine(trained, replicas):
    while_it_trains, after = trained[replicas]["clips held"]
    assert while_it_trains >= replicas and after == 0, "a process trains many trials"


# --- in this process: what needs no strategy --------------------------------------------------------


@pytest.mark.parametrize("kind", ["ReplicaAdam", "ReplicaAdamW"])
def test_an_optimizer_is_saved_with_its_schedule(kind, tmp_path):
    import keras

    from raypipe import replicas
    from raypipe.schedules import WarmupCosinePlateau

    schedule = WarmupCosinePlateau(0.1, warmup_steps=2, decay_steps=8, plateau_factor=0.5)
    optimizer = getattr(replicas, kind)(schedule, global_clipnorm=0.5)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(replicas.ReplicaLossScale(optimizer), "mse", auto_scale_loss=False)
    x = np.ones((4, 3), np.float32)
    model.fit(x, x[:, :1], verbose=0)
    schedule.observe(1.0)
    schedule.observe(1.0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert type(again.inner_optimizer) is type(optimizer)
    assert again.inner_optimizer.global_clipnorm == 0.5
    assert float(again.learning_rate) == float(model.optimizer.learning_rate) == pytest.approx(0.1 / 3)
    for before, after in zip(model.optimizer.variables, again.variables, strict=True):
        np.testing.assert_array_equal(before.numpy(), after.numpy())
