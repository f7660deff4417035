"""The best trial judged: on made-up probabilities over a made-up store, without Ray or training."""

import csv
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from features import make_store

from raypipe.best import judge_best, measure_yardstick, sentences, write_best
from raypipe.cluster import Claim
from raypipe.config import TrialConfig, TuneConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.errors import UserError
from raypipe.leaderboard import pending_trial
from raypipe.results import BestResult, Yardstick
from raypipe.run import Run
from raypipe.splits import TEST


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("best")
    store = make_store(folder / "features", clips=120, signal=0.3)
    config = TuneConfig(features=str(store.path))
    dataset = load_dataset(store)
    splits = split_dataset(dataset, config.splits, seed=0, store=store)
    (folder / "run" / "best").mkdir(parents=True)
    claim = Claim(cpus=1, gpus=0, replicas=2)
    return Run(config, folder / "run", store, dataset, splits, claim, at_once=1, started=datetime.now())


def judged(run: Run, *, right: float) -> tuple[BestResult, Yardstick]:
    """A trial that gives the right class this probability, on all sides."""
    labels = run.dataset.clips.labels
    rng = np.random.default_rng(0)
    sure = np.clip(right + 0.2 * rng.normal(size=len(labels)), 0.01, 0.99)
    raw = np.where(labels[:, None] == [0, 1], sure[:, None], 1 - sure[:, None]).astype(np.float32)
    folds = raw.copy()
    folds[run.splits.test] = np.nan
    trial = replace(pending_trial("3", TrialConfig()), status="done", best_epoch=4)
    yardstick = measure_yardstick(run, run.splits)
    best = judge_best(run, trial, yardstick, out_of_fold=folds, refit=raw, random_folds=folds)
    return best, yardstick


def without_test_side(run: Run) -> Run:
    """The same run, the clips of its test side with other labels and features that no model can read."""
    clips, test = run.dataset.clips, run.splits.test
    features, labels = np.array(clips.features), clips.labels.copy()
    features[test], labels[test] = np.nan, 1 - labels[test]
    changed = replace(clips, features=features, labels=labels, source=None)
    return replace(run, dataset=replace(run.dataset, clips=changed))


def test_what_is_measured_on_random_folds_does_not_read_the_test_side(run):
    whole, yardstick = judged(run, right=0.7)
    labels = run.dataset.clips.labels
    raw = np.where(labels[:, None] == [0, 1], 0.7, 0.3).astype(np.float32)
    folds = np.where((run.splits.sides != TEST)[:, None], raw, np.nan)
    trial = replace(pending_trial("3", TrialConfig()), status="done", best_epoch=4)
    blind = without_test_side(run)
    best = judge_best(blind, trial, yardstick, out_of_fold=folds, refit=raw, random_folds=folds)
    assert best.random_yardstick is not None and whole.random_yardstick is not None
    assert best.random_yardstick.evaluation == whole.random_yardstick.evaluation
    with pytest.raises(UserError, match=r"the features of clip.* are not finite"):  # it would be noticed
        measure_yardstick(blind, blind.splits)


def test_of_one_source_no_interval_is_said(run):
    one = replace(run, dataset=replace(run.dataset, groups=["one"] * len(run.dataset.groups)))
    best, yardstick = judged(one, right=0.95)
    for sentence in sentences(best, yardstick, "auc")[:1] + sentences(best, yardstick, "auc")[-1:]:
        assert "of one source no interval is known" in sentence and "nan" not in sentence


@pytest.mark.parametrize(
    ("right", "is_gain", "words"),
    [(0.95, True, "it is better"), (0.5, False, "the search has not earned its cost")],
)
def test_a_trial_must_beat_the_yardstick_by_more_than_chance(run, right, is_gain, words):
    best, yardstick = judged(run, right=right)
    assert best.gain_over_yardstick("auc").is_gain == is_gain
    *_, last = sentences(best, yardstick, "auc")
    assert last.startswith("yardstick, a logistic regression") and last.endswith(words)


def test_every_side_is_told_with_its_interval(run):
    best, yardstick = judged(run, right=0.7)
    validation, dealt, test, _ = sentences(best, yardstick, "auc")
    assert validation.startswith("validation: accuracy 0.") and "95 % interval" in validation
    assert dealt.startswith("the same on random folds") and test.startswith("test: ")
    assert best.test is not None and best.test.evaluation.clips == len(run.splits.test)
    low, high = best.validation.evaluation.accuracy_interval
    assert low < best.validation.evaluation.accuracy < high


def test_what_lies_in_best(run):
    best, yardstick = judged(run, right=0.7)
    write_best(run, best, yardstick)
    model = json.loads((run.best / "model.json").read_text())
    assert model["temperature"] == best.calibration.temperature
    assert model["threshold"] == best.calibration.threshold
    metrics = json.loads((run.best / "metrics.json").read_text())
    assert metrics["random_folds"]["clips"] == metrics["validation"]["clips"]
    assert metrics["over_yardstick"]["auc"]["low"] <= metrics["over_yardstick"]["auc"]["value"]
    rows = list(csv.DictReader((run.best / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 120
    on_test = [row["answer"] == row["label"] for row in rows if row["side"] == "test"]
    assert np.mean(on_test) == pytest.approx(metrics["test"]["accuracy"])


def test_paths_lie_in_the_runs_folder(run):
    paths: list[Path] = [run.trial_file("2"), run.out_of_fold("2"), run.report, run.leaderboard, run.tune]
    assert all(path.is_relative_to(run.folder) for path in paths) and len(set(paths)) == len(paths)
