"""Which trial is next, whatever order trials end in. No Ray is needed to say."""

import random
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from raypipe.cluster import Claim
from raypipe.config import TrialConfig, TuneConfig
from raypipe.leaderboard import Leaderboard, pending_trial
from raypipe.results import EpochResult
from raypipe.run import Run
from raypipe.space import Range
from raypipe.steering import RETRIES, Assignment, Steering

SPACE = {"width": [8, 16, 32], "learning_rate": Range(low=1e-4, high=1e-2, log=True)}


def steering(at_once: int, **fields: object) -> tuple[Steering, Leaderboard]:
    trial = TrialConfig(model="mean_pool", epochs=9)
    config = TuneConfig.model_validate(
        {"num_samples": 14, "grace_epochs": 3, "space": SPACE, "trial": trial, **fields}
    )
    board = Leaderboard(total=14, metric="auc")
    nothing: dict = dict.fromkeys(("store", "dataset", "splits"))
    claim = Claim(cpus=1, gpus=0, replicas=2)
    run = Run(config, Path(), claim=claim, at_once=at_once, started=datetime.now(), **nothing)
    return Steering(run, board), board


def end(board: Leaderboard, work: Assignment) -> None:
    """A trial's score depends on its settings; it is cut short by its bars, as a real one is."""
    top = 1 - abs(np.log10(work.config["learning_rate"]) + 3) / 4 - 1 / work.config["width"]
    curve: list[EpochResult] = []
    status = "done"
    for number in range(1, 10):
        curve.append(EpochResult(number, 0, 0, 0, 0, 0, 0, score_so_far=top - 1 / (number + 1)))
        if curve[-1].score_so_far < work.bars.get(number, -np.inf):
            status = "pruned"
            break
    board.put(
        replace(board.get(work.number), status=status, epochs=tuple(curve), score=curve[-1].score_so_far)
    )


def searched(seed: int, at_once: int, **fields: object) -> list[Assignment]:
    """All that a search decides when trials end in an order that chance has."""
    steer, board = steering(at_once, **fields)
    rng, running, decided = random.Random(seed), [], []
    while not steer.finished:
        while work := steer.next():
            running.append(work)
            decided.append(work)
        assert len(running) <= at_once
        if running:
            end(board, running.pop(rng.randrange(len(running))))
    return sorted(decided, key=lambda work: int(work.number))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"scheduler": "median"}, {"patience_trials": 3}])
def test_the_order_in_which_trials_end_changes_nothing(at_once, fields):
    one = searched(0, at_once, **fields)
    assert all(searched(seed, at_once, **fields) == one for seed in range(1, 5))
    assert any(work.bars for work in one)
    assert len(one) == 14 if "patience_trials" not in fields else 4 <= len(one) < 14


def test_a_killed_trial_is_tried_again_so_often_and_in_its_own_place():
    steer, _ = steering(1)
    work = steer.next()
    assert work is not None and steer.next() is None, "there is one place"
    for _ in range(RETRIES):
        assert steer.try_again("1") and steer.next() == work and steer.next() is None
    assert not steer.try_again("1")


def test_a_run_that_goes_on_does_what_is_missing_and_no_more():
    whole, (_, board) = searched(0, 2), steering(2)
    for work in whole[:6]:
        board.put(pending_trial(work.number, TrialConfig.model_validate(work.config)))
        if work.number != "5":  # killed in its midst
            end(board, work)
    resumed, _ = steering(2)
    kept = Leaderboard(total=14, metric="auc")
    for trial in board.trials:
        if trial.ended:
            kept.put(trial)
    resumed.board = kept
    assert not resumed.nothing_left()
    done = []
    while not resumed.finished:
        work = resumed.next()
        if work:
            done.append(work)
            end(kept, work)
    assert done == [work for work in whole if work.number == "5" or int(work.number) > 6]
    again = Steering(resumed.run, kept)
    assert again.nothing_left() and again.finished


def test_trials_to_train_once_more_go_first_and_others_wait_for_them():
    whole, (_, board) = searched(0, 2), steering(2)
    for work in whole[:9]:
        board.put(pending_trial(work.number, TrialConfig.model_validate(work.config)))
        end(board, work)
    failed = replace(board.get("2"), status="failed", reason="error")
    steer = Steering(steering(2)[0].run, board, again=[failed])
    again = steer.next()
    assert again == next(work for work in whole if work.number == "2")
    assert steer.next() is None, "trial 10 is decided on by the trials up to 6"
    assert again is not None
    end(board, again)
    assert steer.next() == next(work for work in whole if work.number == "10")


def test_after_a_stop_nothing_starts():
    steer, board = steering(2)
    work = steer.next()
    assert work is not None
    steer.stop()
    assert steer.next() is None and not steer.try_again("1") and not steer.finished
    end(board, work)
    assert steer.finished


def test_when_time_is_up_no_trial_starts():
    steer, _ = steering(1, time_budget_s=0.01)
    time.sleep(0.02)
    assert steer.next() is None and steer.finished


def test_when_time_is_up_what_was_to_be_tried_once_more_stays_failed():
    (first, board), failed = steering(2), []
    for _ in range(2):
        work = first.next()
        assert work is not None
        failed.append(replace(board.get(work.number), status="failed", reason="error"))
    steer = Steering(steering(1, time_budget_s=0.2)[0].run, board, again=failed)
    again = steer.next()
    assert again is not None and again.number == "1"
    time.sleep(0.3)
    end(board, again)
    assert steer.next() is None and steer.finished
    assert [board.get(number).status for number in "12"] == ["done", "failed"]
