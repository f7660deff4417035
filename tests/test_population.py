"""Population based training: who takes over from whom, and that nothing but the scores decides it. No Ray."""

import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from raypipe.cluster import Claim
from raypipe.config import TrialConfig, TuneConfig
from raypipe.files import write_json
from raypipe.leaderboard import Leaderboard, pending_trial
from raypipe.population import changed, next_round, rounds, source_of
from raypipe.results import EpochResult, TrialResult, trial_as_json
from raypipe.run import Run
from raypipe.space import IN_MID_TRAINING, Range
from raypipe.steering import Assignment, Steering

SPACE = {
    "model": ["mean_pool", "linear"],
    "width": [8, 16, 32],
    "dropout": [0.1, 0.3, 0.5],
    "learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "label_smoothing": Range(low=0, high=0.2),
}
CONFIG = TuneConfig(
    scheduler="pbt",
    num_samples=8,
    grace_epochs=3,
    perturb_epochs=2,
    trial=TrialConfig(epochs=8),
    space=SPACE,
)


def member(number: int, *scores: float, **settings: object) -> TrialResult:
    curve = tuple(EpochResult(e, 0, 0, score, 0, 0, 0, score) for e, score in enumerate(scores, 1))
    trial = pending_trial(str(number), TrialConfig.model_validate({"model": "mean_pool", **settings}))
    return replace(trial, status="waiting", epochs=curve, wall_s=number, startup_s=0.1)


def test_the_worst_quarter_takes_over_from_the_best():
    trials = [member(n, 0.9, score, width=8 * n) for n, score in enumerate([0.5, 0.8, 0.4, 0.7, 0.6], 1)]
    begun = next_round(CONFIG, trials, number=2)
    taken = {trial.trial_id: source_of(trial) for trial in begun if source_of(trial) != trial.trial_id}
    assert taken.keys() == {"1", "3"} and set(taken.values()) <= {"2", "4"}, "by the last epoch's score"
    for trial, was in zip(begun, trials, strict=True):
        source = trials[int(source_of(trial)) - 1]
        assert trial.epochs == source.epochs and trial.wall_s == was.wall_s
        assert trial.config["width"] == source.config["width"], "what shapes the model comes as it is"
        if source is was:
            assert trial == was
        else:
            leg = trial.earlier[-1]
            assert (leg.last_epoch, leg.trial_id, leg.config) == (2, source.trial_id, source.config)
            assert trial.config != source.config


def test_one_without_a_score_is_the_worst_and_few_trials_exchange_too():
    two = [member(1, float("nan")), member(2, 0.5)]
    assert [source_of(trial) for trial in next_round(CONFIG, two, number=2)] == ["2", "2"]
    assert next_round(CONFIG, two[:1], number=2) == two[:1]


def test_what_was_taken_over_is_remembered_along_the_chain():
    trials = [member(n, score) for n, score in enumerate([0.9, 0.1, 0.5, 0.6], 1)]
    begun = next_round(CONFIG, trials, number=2)
    # Now the heir is the best, and the fourth the worst.
    later = [
        replace(t, epochs=(*t.epochs, replace(t.epochs[0], epoch=2, score=s)))
        for t, s in zip(begun, [0.5, 0.9, 0.6, 0.1], strict=True)
    ]
    heir = next_round(CONFIG, later, number=3)[3]
    assert [(leg.last_epoch, leg.trial_id) for leg in heir.earlier] == [(1, "1"), (2, "2")]
    course = heir.course
    assert [course.at(epoch).learning_rate for epoch in (1, 2, 3, 9)] == [
        trials[0].config["learning_rate"],
        begun[1].config["learning_rate"],
        heir.config["learning_rate"],
        heir.config["learning_rate"],
    ]
    assert course.until(2) == later[1].course and course.until(1) == trials[0].course


def test_settings_change_a_little_within_the_space_and_only_where_they_may():
    settings, seen = TrialConfig(model="mean_pool", width=16, learning_rate=1e-3, label_smoothing=0.19), set()
    for seed in range(200):
        other = changed(CONFIG, settings, np.random.default_rng(seed))
        differing = {k for k, v in other.model_dump().items() if v != getattr(settings, k)}
        assert differing <= IN_MID_TRAINING & SPACE.keys()
        assert 1e-4 <= other.learning_rate <= 1e-2 and other.label_smoothing <= 0.2
        assert other.dropout in SPACE["dropout"]
        seen.add(round(other.learning_rate, 9))
    assert {8e-4, 1.2e-3} < seen and len(seen) > 20, "one in four is drawn anew"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_samples": 1}, "needs num_samples 2"),
        ({"grace_epochs": 8}, "grace_epochs 8 must be below epochs 8"),
        ({"patience_trials": 3}, "patience_trials"),
        ({"space": {"epochs": [3, 4], "dropout": [0.1, 0.2]}}, "equally many epochs"),
        ({"space": {"inputs": ["features", "both"]}}, "search one of clip_norm, dropout"),
        ({"space": {"dropout": [0.0, 0.2]}}, "0 cannot be left"),
    ],
)
def test_what_a_population_cannot_do_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        TuneConfig.model_validate(CONFIG.model_dump() | fields)


# --- a whole search, its training made up ---------------------------------------------------------------


def steering(folder: Path, **fields: object) -> tuple[Steering, Leaderboard]:
    board = Leaderboard(total=CONFIG.num_samples, metric="auc")
    nothing: dict = dict.fromkeys(("store", "dataset", "splits"))
    claim = Claim(cpus=1, gpus=0, replicas=2)
    config = CONFIG.model_copy(update=fields)
    return Steering(
        Run(config, folder, claim=claim, at_once=3, started=datetime.now(), **nothing), board, []
    ), board


def train(steer: Steering, board: Leaderboard, work: Assignment) -> None:
    """A trial's score depends on its settings and on what it began with."""
    trial, until = work.trial(), work.until
    assert until is not None
    curve = list(trial.epochs)
    for number in range(len(curve) + 1, until + 1):
        before = curve[-1].score if curve else 0.5
        rate = work.config["learning_rate"] * (1 + number)
        score = float(before + 0.1 / (1 + abs(np.log10(rate) + 3)))
        curve.append(EpochResult(number, 0, 0, score, 0, 0, 0, 0.5))
    status = "failed" if work.number == "5" and work.round == 2 else "done" if until == 8 else "waiting"
    told = replace(trial, status=status, epochs=tuple(curve), score=curve[-1].score)
    file = steer.run.trial_file(work.number, work.round)
    file.parent.mkdir(parents=True)
    write_json(file, trial_as_json(told))
    board.put(told)


def search(seed: int, folder: Path, *, kill_after: int | None = None) -> Leaderboard:
    """Trials end in an order that chance has; the driver is killed after so many of them, and begins anew."""
    rng, ended = random.Random(seed), 0
    steer, board = steering(folder)
    running: list[Assignment] = []
    while not steer.finished:
        while work := steer.next():
            running.append(work)
        assert len(running) <= 3 and len({work.round for work in running}) <= 1, "all wait for each other"
        if running:
            train(steer, board, running.pop(rng.randrange(len(running))))
            ended += 1
            if ended == kill_after:
                steer, board = steering(folder)
                running = []
    return board


def test_neither_the_order_nor_a_kill_changes_anything(tmp_path):
    boards = [search(seed, tmp_path / str(seed)) for seed in range(4)]
    boards += [search(seed, tmp_path / f"kill-{seed}", kill_after=seed) for seed in (1, 8, 11, 25)]
    one = [repr(trial) for trial in boards[0].trials]
    assert all([repr(trial) for trial in board.trials] == one for board in boards)
    trials = boards[0].trials
    assert [trial.status for trial in trials].count("done") == 7
    assert trials[-1].trial_id == "5" and trials[-1].status == "failed", "the others went on without it"
    assert sum(bool(trial.earlier) for trial in trials) >= 2
    assert rounds(CONFIG) == [3, 5, 7, 8]
    again, _ = steering(tmp_path / "0")
    assert again.nothing_left() and again.finished


def test_when_time_is_up_no_round_begins(tmp_path):
    steer, board = steering(tmp_path, time_budget_s=1000)
    for _ in range(8):
        work = steer.next()
        assert work is not None
        train(steer, board, work)
    steer._ends_at_s = 1.0
    assert steer.next() is None and steer.finished
    assert {trial.status for trial in board.trials} == {"waiting"}
