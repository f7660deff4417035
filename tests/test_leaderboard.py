import csv
from dataclasses import replace

from raypipe.config import TrialConfig
from raypipe.files import write_json
from raypipe.leaderboard import Leaderboard, pending_trial, read_trial, read_trials
from raypipe.results import EpochResult, trial_as_json


def board_of_three() -> Leaderboard:
    board = Leaderboard(total=5, metric="auc", gpus=(2, 4))
    config = TrialConfig(width=32)
    for number, status, score in [("1", "pruned", 0.9), ("2", "done", 0.8), ("3", "running", 0.7)]:
        trial = pending_trial(number, config)
        board.put(replace(trial, status=status, score=score, accuracy=score, wall_s=7))
        board.put(replace(board.get(number), score_interval=(score - 0.05, score + 0.05)))
    return board


def test_only_a_trial_that_came_to_its_end_can_be_best():
    board = board_of_three()
    assert board.best is not None and board.best.trial_id == "2"
    assert Leaderboard(total=1, metric="auc").best is None


def test_where_none_came_to_its_end_the_best_of_those_cut_short_counts():
    board = Leaderboard(total=2, metric="auc")
    for number, score in [("1", 0.6), ("2", 0.7)]:
        board.put(replace(pending_trial(number, TrialConfig()), status="pruned", score=score))
    assert board.best is not None and board.best.trial_id == "2"


def test_the_line_says_what_runs_what_is_best_and_how_long():
    assert board_of_three().line(20) == (
        "trials 2/5 · running 1 · pending 2 · done 1 · pruned 1 · best auc 0.900 (0.850 to 0.950, trial 1) "
        "· GPUs 2/4 · 0:30 left at most"
    )


def test_a_trial_that_failed_does_not_lead():
    board = board_of_three()
    unknown = (float("nan"),) * 2
    board.put(replace(board.get("1"), status="failed", score=0.99, score_interval=unknown))
    assert "best auc 0.800 (0.750 to 0.850, trial 2)" in board.line(20)
    assert "best auc 0.800 (0.750 to 0.850): trial 2" in board.live_table(20)
    board.put(replace(board.get("2"), score_interval=unknown))
    assert "best auc 0.800 (trial 2)" in board.line(20) and "nan" not in board.live_table(20)


def test_the_time_left_counts_from_where_a_run_goes_on():
    before = [replace(pending_trial(str(n), TrialConfig()), status="done", score=0.5) for n in range(1, 9)]
    board = Leaderboard(total=10, metric="auc", before=before)
    board.put(replace(before[0], trial_id="9"))
    assert board.line(30).endswith("· 0:30 left at most"), "one of two was done in half a minute"


def test_the_table_lines_up():
    lines = board_of_three().table().splitlines()
    assert lines[0].split()[:4] == ["trial", "model", "epochs", "auc"]
    assert lines[1].startswith("2") and lines[1].endswith("done")
    assert len({line.index("0:07") for line in lines[1:]}) == 1


def test_the_csv_has_a_row_per_trial_and_every_setting(tmp_path):
    board_of_three().write_csv(tmp_path / "leaderboard.csv")
    rows = list(csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["2", "3", "1"]
    assert (rows[0]["width"], rows[0]["score"], rows[0]["metric"]) == ("32", "0.8", "auc")
    header = (tmp_path / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert len(header) == len(set(header))


def test_a_pending_trial_has_no_numbers(tmp_path):
    board = Leaderboard(total=1, metric="auc")
    board.put(pending_trial("1", TrialConfig()))
    board.write_csv(tmp_path / "leaderboard.csv")
    (row,) = csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines())
    assert (row["score"], row["accuracy"]) == ("", "")


def test_a_trial_is_read_as_it_was_written(tmp_path):
    nan = float("nan")
    ended = replace(
        pending_trial("12", TrialConfig(focal_alpha=[0.3, 0.7], loss="focal", class_weights=False)),
        status="pruned",
        epochs=(EpochResult(1, 0.5, 0.6, nan, 0.8, 0.01, 1.5, 1 / 3),),
        score=1 / 3,
        score_interval=(0.1, nan),
    )
    for number in (3, 12):
        (tmp_path / f"trial-{number}").mkdir()
    write_json(tmp_path / "trial-12" / "trial.json", trial_as_json(ended))
    write_json(tmp_path / "trial-3" / "trial.json", trial_as_json(pending_trial("3", TrialConfig())))
    assert [repr(trial) for trial in read_trials(tmp_path)] == [
        repr(pending_trial("3", TrialConfig())),
        repr(ended),
    ]
    assert repr(read_trial(tmp_path / "trial-12" / "trial.json")) == repr(ended)
    assert read_trial(tmp_path / "trial-13" / "trial.json") is None


def test_the_live_table_says_the_same_and_fits_a_narrow_terminal():
    board = board_of_three()
    config = TrialConfig(model="bilstm_attention")
    running = replace(pending_trial("4", config), status="running", score=0.654, wall_s=40)
    board.put(replace(running, epochs=(EpochResult(1, 0, 0, 0, 0, 0, 0),) * 3))
    assert board.live_table(20).splitlines() == [
        "trials 2 of 5: done 1, pruned 1, failed 0",
        "running 2, pending 1 · GPUs 4 of 4 · 0:28 left at most",
        "best auc 0.900 (0.850 to 0.950): trial 1, linear",
        "running  epoch  auc    time  model",
        "3        0/40   0.700  0:07  linear",
        "4        3/40   0.654  0:40  bilstm_attention",
    ]
    assert max(map(len, board.live_table(20).splitlines())) < 60
