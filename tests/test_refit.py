"""Waiting for the last training, on a real Ray. What it trains is tested in test_tune.py."""

import logging
import time
from collections.abc import Iterator

import pytest
import ray

from raypipe import refit
from raypipe.refit import results_of


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
def after(seconds: float, value: int) -> int:
    time.sleep(seconds)
    if value < 0:
        raise ValueError("no")
    return value


def test_what_tasks_return_is_in_their_order_and_the_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refit, "PLAIN_LINE_S", 0.5)
    monkeypatch.setattr(refit, "SHOW_EVERY_S", 0.2)
    monkeypatch.setattr(logging.getLogger("raypipe"), "propagate", True)
    with caplog.at_level(logging.INFO, "raypipe"):
        assert results_of([after.remote(2.0, 1), after.remote(0.0, 2)], "training") == [1, 2]
    assert caplog.messages and all(line.startswith("training: 0:0") for line in caplog.messages)


def test_a_task_that_fails_is_not_waited_for_by_the_others() -> None:
    started_s = time.monotonic()
    with pytest.raises(ray.exceptions.RayError, match="ValueError: no"):
        results_of([after.remote(60.0, 1), after.remote(0.0, -1)], "training")
    assert time.monotonic() - started_s < 40
