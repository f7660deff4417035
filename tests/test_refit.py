"""Waiting for the last training, on a real Ray. What it trains is tested in test_tune.py."""

import logging
import re
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
        assert results_of(dict.fromkeys([after.remote(2.0, 1), after.remote(0.0, 2)]), "training") == [1, 2]
    told = [record.message for record in caplog.records if record.name == "raypipe"]
    assert told and all(re.fullmatch(r"training: \d+:\d\d", line) for line in told)


@ray.remote(num_cpus=2)
class WantsAll:
    def train(self, value: int) -> int:
        return value


@pytest.mark.timeout(60)
def test_where_one_trainer_fits_the_next_begins_when_it_has_ended() -> None:
    work = {}
    for value in (1, 2):
        actor = WantsAll.remote()
        work[actor.train.remote(value)] = actor
    del actor
    assert results_of(work, "training") == [1, 2]


def test_a_task_that_fails_is_not_waited_for_by_the_others() -> None:
    started_s = time.monotonic()
    with pytest.raises(ray.exceptions.RayError, match="ValueError: no"):
        results_of(dict.fromkeys([after.remote(60.0, 1), after.remote(0.0, -1)]), "training")
    assert time.monotonic() - started_s < 40
