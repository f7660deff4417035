"""Trials as values: their order, their JSON, the settings that their epochs were trained by."""

import json
import math
from dataclasses import replace

import pytest

from raypipe.config import TrialConfig
from raypipe.leaderboard import pending_trial
from raypipe.results import (
    EpochResult,
    Leg,
    TrialResult,
    leaderboard,
    lineage,
    trial_as_json,
    trial_from_json,
)


def trial(name: str, score: float, status: str = "done") -> TrialResult:
    return replace(pending_trial(name, TrialConfig()), status=status, score=score)


def test_the_order_is_by_status_then_score_then_number() -> None:
    trials = [
        trial("failed", 0.99, "failed"),
        trial("pending", math.nan, "pending"),
        trial("b", 0.7),
        trial("unknown", math.nan),
        trial("a", 0.9),
        trial("cut", 0.95, "pruned"),
    ]
    names = [one.trial_id for one in leaderboard(trials)]
    assert names == ["a", "b", "unknown", "cut", "pending", "failed"]
    ties = [trial("10", 0.5), trial("9", 0.5)]
    assert [one.trial_id for one in leaderboard(ties)] == ["9", "10"]


def test_a_status_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="status='lost' must be one of done, running"):
        trial("t", 0.5, "lost")


def with_legs() -> TrialResult:
    early, late = (TrialConfig(width=width).model_dump() for width in (8, 16))
    epochs = (EpochResult(1, 0.5, math.nan, 1 / 3, 0.8, 0.01, 1.5),)
    return replace(trial("3", 1 / 3), config=late, epochs=epochs, earlier=(Leg(5, "7", early),))


def test_what_is_unknown_is_null_in_json_and_comes_back() -> None:
    written = json.loads(json.dumps(trial_as_json(with_legs()), allow_nan=False))
    assert written["epochs"][0]["loss"] is None
    back = trial_from_json(written)
    assert repr(back) == repr(with_legs()), "a NaN equals nothing, not even itself"


def test_epochs_that_were_taken_over_keep_the_settings_they_were_trained_by() -> None:
    course = with_legs().course
    assert [course.at(epoch).width for epoch in (1, 5, 6)] == [8, 8, 16]
    assert lineage(with_legs()) == "trial 7 until epoch 5; then 3: width 8 to 16"
    assert lineage(trial("1", 0.5)) == ""
