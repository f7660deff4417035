"""JAX trains the same trial, and two devices as one: virtual CPU devices, in processes without TensorFlow."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_replicas import run_cases

from raypipe.models import MODELS

pytest.importorskip("jax", reason="needs raypipe[jax]")

pytestmark = pytest.mark.timeout(900)  # starts several processes, on machines that may be busy
CASES = ("mean_pool", "all at once", "memmap")


@pytest.fixture(scope="module")
def trained() -> dict[int, dict]:
    return run_cases({1: CASES, 2: CASES}, backend="jax")


@pytest.mark.parametrize("case", CASES)
def test_two_devices_train_as_one(trained, case):
    one, two = trained[1][case], trained[2][case]
    assert one["losses"][0] > one["losses"][-1], "it learns"
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["after"], one["after"], atol=1e-5)
    # Not every processor's softmax of two zeros is one half exactly.
    np.testing.assert_allclose(one["before"], 0.5, rtol=1e-6)


def test_two_devices_drop_what_one_does(trained):
    np.testing.assert_allclose(trained[2]["dropout"]["losses"], trained[1]["dropout"]["losses"], rtol=1e-5)


@pytest.mark.slow
def test_it_trains_as_tensorflow_does(trained):
    tensorflow = run_cases({2: CASES})[2]
    for case in CASES:
        np.testing.assert_allclose(trained[2][case]["losses"], tensorflow[case]["losses"], rtol=1e-4)
        np.testing.assert_allclose(trained[2][case]["after"], tensorflow[case]["after"], atol=1e-3)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_overflow_on_any_device_skips_the_step_and_lowers_the_scale(trained, devices):
    assert len(trained[devices]["overflow"]) == devices
    for case in trained[devices]["overflow"]:
        assert (case["scale"], case["difference"] < 1e-3, case["moved"] > 1e-2) == (0.5, True, True)


@pytest.mark.slow
def test_a_killed_trial_goes_on_to_the_last_digit(tmp_path):
    def run(folder, *how):
        command = [sys.executable, Path(__file__).with_name("train_trial.py"), folder, *how, "jax"]
        return subprocess.run(command, capture_output=True, text=True).returncode

    assert run(tmp_path / "whole", "", "0") == 0
    assert run(tmp_path / "killed", "epoch", "3") == -signal.SIGKILL
    assert run(tmp_path / "killed", "", "0") == 0
    whole, killed = ((tmp_path / name / "epochs.json").read_text() for name in ("whole", "killed"))
    assert json.loads(killed) == json.loads(whole)


@pytest.mark.slow
def test_every_model_trains_on_jax_as_on_tensorflow():
    jax, tensorflow = run_cases({2: tuple(MODELS)}, backend="jax")[2], run_cases({2: tuple(MODELS)})[2]
    for model in MODELS:
        np.testing.assert_allclose(jax[model]["losses"], tensorflow[model]["losses"], rtol=1e-4)
