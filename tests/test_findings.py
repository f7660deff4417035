"""What a finished search is found to be, on a made-up store and real small videos."""

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from clips import write_video
from features import make_store

from raypipe.calibration import Calibration
from raypipe.cluster import Claim
from raypipe.config import SplitConfig, TrialConfig, TuneConfig
from raypipe.dataset import load_dataset, split_dataset
from raypipe.evidence import commands, held_out_side, out_of_fold_side
from raypipe.findings import addresses, energy_j, find, group_results, surest_misses
from raypipe.folders import begin, new_run_folder
from raypipe.leaderboard import Leaderboard, pending_trial
from raypipe.reading import load_config
from raypipe.results import BestResult, SideResult, Yardstick
from raypipe.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A search over 60 clips in 30 groups, as far as its files are needed."""
    store = make_store(tmp_path / "features")
    dataset = load_dataset(store)
    splits = split_dataset(dataset, SplitConfig(), seed=0, store=store)
    claim = Claim(cpus=2, gpus=0, replicas=2)
    started = datetime(2026, 1, 1, tzinfo=UTC)
    return Run(TuneConfig(), tmp_path / "run", store, dataset, splits, claim, at_once=1, started=started)


def probabilities_of(run: Run, *, wrong: int) -> np.ndarray:
    """0.8 for the right class; of the first clips so many are `wrong`, surer from clip to clip."""
    labels = run.dataset.clips.labels
    right = np.full(len(labels), 0.8)
    right[:wrong] = np.linspace(0.4, 0.1, wrong)
    return np.where(labels[:, None] == [0, 1], right[:, None], 1 - right[:, None]).astype(np.float32)


def best_of(run: Run, *, wrong: int = 10) -> tuple[BestResult, Yardstick]:
    clips, groups, splits = run.dataset.clips, run.dataset.groups, run.splits
    raw = probabilities_of(run, wrong=wrong)
    out_of_fold = np.where((splits.sides >= 0)[:, None], raw, np.nan)
    folder = run.trial("1")
    folder.mkdir(parents=True)
    np.save(run.out_of_fold("1"), out_of_fold)
    validation = out_of_fold_side(clips, groups, splits, out_of_fold, seed=0)
    calibration = Calibration(2.0, 0.5)
    test = held_out_side(clips, groups, splits, raw, calibration, seed=0)
    raw_test = raw[test.positions] if test else None
    best = BestResult("1", TrialConfig(), 3, calibration, validation, test, {}, raw_test=raw_test)
    return best, Yardstick("line", validation, test, 1.5)


def board_of(run: Run) -> Leaderboard:
    board = Leaderboard(total=1, metric="auc")
    board.put(replace(pending_trial("1", TrialConfig()), status="done", score=0.9, wall_s=1800.0))
    return board


def test_a_finished_search(run: Run) -> None:
    best, yardstick = best_of(run)
    found = find(run, board_of(run), best, yardstick)
    validation, test = found.sides
    assert len(validation.labels) + len(test.labels) == 60
    rows = run.splits.test
    np.testing.assert_allclose(test.before, probabilities_of(run, wrong=10)[rows], atol=1e-5)
    np.testing.assert_allclose(validation.before, probabilities_of(run, wrong=10)[best.validation.positions])
    assert np.abs(test.after - test.before).max() > 0.05
    assert found.importances == ()
    assert [miss.missing for miss in found.misses] == ["the video is gone"] * len(found.misses)
    assert found.durations_s == ((0.0, 0.0, 0.0),) * 2 or np.isnan(found.durations_s).all()
    assert found.look_alikes.compared == 60
    assert found.cost.cpu_hours == 1.0 and np.isnan([found.cost.gpu_hours, found.cost.energy_kwh]).all()


def test_one_fold_is_not_called_out_of_fold(run: Run) -> None:
    one = replace(run, splits=replace(run.splits, sides=np.minimum(run.splits.sides, 0), folds=1))
    best, yardstick = best_of(one)
    validation, _ = find(one, board_of(one), best, yardstick).sides
    assert (validation.title, validation.how) == ("Validation", "also used to choose")


def test_groups_with_the_most_mistakes_come_first(run: Run) -> None:
    best, _ = best_of(run)
    found = group_results(run, best)
    assert sum(group.clips for group in found) == 60
    mistakes = [group.clips - group.right for group in found]
    assert mistakes == sorted(mistakes, reverse=True) and mistakes[0] == 2
    assert {group.side for group in found} == {"validation", "test"}
    ungrouped = replace(run.dataset, groups=[f"video:{i}" for i in range(60)])
    assert group_results(replace(run, dataset=ungrouped), best) == ()


def test_the_surest_mistakes_come_first(run: Run) -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.4, 0.6], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]], np.float32)
    best, _ = best_of(run)
    side = SideResult(np.arange(4), probabilities, probabilities.argmax(axis=1), best.validation.evaluation)
    assert surest_misses(labels, side).tolist() == [1, 3, 0]


def test_a_mistake_shows_its_frames(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=10)
    best, yardstick = best_of(run, wrong=30)
    monkeypatch.setattr("raypipe.findings.addresses", lambda run, rows: [(str(path), 0)] * len(rows))
    found = find(run, board_of(run), best, yardstick)
    assert found.misses and all(miss.jpeg.startswith(b"\xff\xd8") for miss in found.misses)
    monkeypatch.undo()
    assert addresses(run, np.array([7, 3])) == [("/videos/clip007.mp4", 0), ("/videos/clip003.mp4", 0)]


def test_energy_is_the_sum_of_all_epochs_or_not_measured(run: Run) -> None:
    for number, lines in (("1", "10.5\n20"), ("2", "5\n"), ("3", "7\n\n")):
        folder = run.trial(number)
        folder.mkdir(parents=True)
        (folder / "history.csv").write_text(
            "epoch,energy_j\n" + "".join(f"1,{v}\n" for v in lines.split("\n")[:2])
        )
    assert energy_j(run, ["1"]) == 30.5
    assert np.isnan(energy_j(run, ["1", "3"]))
    assert np.isnan(energy_j(run, ["4"])), "it failed before its first epoch"


def test_what_the_features_cost_is_of_the_run_that_had_all_to_do(run: Run) -> None:
    best, yardstick = best_of(run)
    whole = {"videos": 60, "wall_s": 59.0, "cpu_s": {"decode": 30.0, "embed": 80.0}}
    later = {"videos": 65, "wall_s": 2.0, "cpu_s": {"decode": 0.5, "embed": 1.5}, "full_run": whole}
    (run.store.path / "summary.json").write_text(json.dumps(later))
    cost = find(run, board_of(run), best, yardstick).cost
    assert (cost.extraction_s, cost.extraction_cpu_s) == (59.0, 110.0)


def test_the_commands_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent)
    said = commands(run)
    assert said.repeat == "python -m raypipe.tune --config run/config.yaml --name run-again"
    assert said.resume == "python -m raypipe.tune --resume run"
    assert said.predict == "python -m raypipe.predict --model run --input new_videos/"


def test_the_command_to_repeat_is_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent)
    asked = TuneConfig(name="mine", num_samples=3, results=str(run.folder.parent / "my results"))
    folder = new_run_folder(Path(asked.results), asked.name)
    begin(asked, folder)
    repeat = shlex.split(commands(replace(run, folder=folder, config=asked)).repeat)
    again = load_config(TuneConfig, repeat[3:], prog="tune")
    assert again.model_copy(update={"name": "mine", "config": None}) == asked
    assert new_run_folder(Path(again.results), again.name).name == "mine-again"
