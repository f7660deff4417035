import sys

import numpy as np
import pytest

from raypipe.config import TrialConfig
from raypipe.engines import (
    Devices,
    choose_feeding,
    choose_precision,
    choose_xla,
    refuse_missing,
    refuse_uneven,
    whole_batches,
)
from raypipe.errors import UserError

ONE_GPU, TWO_GPUS = Devices(("GPU:0",), "float32"), Devices(("GPU:0", "GPU:1"), "float32")
ONE_CPU = Devices(("CPU:0",), "float32")


@pytest.mark.parametrize(
    ("wanted", "card", "policy"),
    [
        ("auto", (6, 1), "float32"),
        ("auto", (7, 0), "mixed_float16"),
        ("auto", (7, 5), "mixed_float16"),
        ("auto", (8, 0), "mixed_bfloat16"),
        ("auto", (9, 0), "mixed_bfloat16"),
        ("auto", None, "float32"),
        ("float32", (9, 0), "float32"),
        ("mixed_float16", None, "mixed_float16"),
        ("mixed_bfloat16", (8, 6), "mixed_bfloat16"),
    ],
)
def test_precision_follows_the_card(wanted, card, policy):
    assert choose_precision(wanted, card) == policy


def test_a_precision_that_the_card_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"mixed_bfloat16 needs .* 8.0 .* this one has 7.5; use precision"):
        choose_precision("mixed_bfloat16", (7, 5))


@pytest.mark.parametrize(
    ("fields", "devices", "compiled"),
    [
        ({"model": "mean_pool"}, ONE_GPU, True),
        ({"model": "mean_pool"}, TWO_GPUS, False),
        ({"model": "mean_pool"}, ONE_CPU, False),
        ({"model": "gru"}, ONE_GPU, False),
        ({"model": "mean_pool", "xla": False}, ONE_GPU, False),
        ({"model": "mean_pool", "xla": True}, ONE_CPU, True),
    ],
)
def test_xla_is_used_where_it_works_and_pays(fields, devices, compiled):
    assert choose_xla(TrialConfig(**fields), devices) is compiled


def test_xla_over_two_replicas_is_refused():
    with pytest.raises(ValueError, match="xla cannot compile a step of 2 replicas; use xla auto"):
        choose_xla(TrialConfig(model="mean_pool", xla=True), TWO_GPUS)


def test_a_batch_that_does_not_divide_is_refused():
    refuse_uneven(32, TWO_GPUS)
    with pytest.raises(ValueError, match="batch_size 33 does not divide by 2 replicas"):
        refuse_uneven(33, TWO_GPUS)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, "device"),
        ({"device_cache_mb": 1}, "device"),
        ({"device_cache_mb": 0}, "memmap"),
        ({"feeding": "fit"}, "fit"),
    ],
)
def test_features_lie_on_the_device_where_they_fit(fields, chosen):
    assert choose_feeding(TrialConfig(**fields), np.zeros((2**15, 4, 4), np.float16)) == chosen


def test_a_backend_that_is_not_installed_is_refused(monkeypatch):
    refuse_missing("tensorflow")
    monkeypatch.setitem(sys.modules, "jax", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"--backend jax: is not installed; install raypipe\[jax\]"):
        refuse_missing("jax")


def test_batches_are_whole_and_hold_every_position():
    batches = whole_batches(np.arange(10, 23), 8)
    assert batches.shape == (2, 8)
    assert set(batches.ravel().tolist()) == set(range(10, 23))
