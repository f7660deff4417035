import csv
from dataclasses import replace

from raypipe.config import TrialConfig
from raypipe.leaderboard import Leaderboard, epoch_result, pending_trial


def board_of_three() -> Leaderboard:
    board = Leaderboard(total=5, metric="auc")
    config = TrialConfig(width=32)
    for number, status, score in [("1", "pruned", 0.9), ("2", "done", 0.8), ("3", "running", 0.7)]:
        trial = pending_trial(number, config)
        board.put(replace(trial, status=status, score=score, accuracy=score, wall_s=7))
    return board


def test_only_a_trial_that_came_to_its_end_can_be_best():
    board = board_of_three()
    assert board.best is not None and board.best.trial_id == "2"
    assert Leaderboard(total=1, metric="auc").best is None


def test_the_line_says_what_runs_what_is_best_and_how_long():
    assert board_of_three().line(20) == (
        "trials 2/5 · running 1 · done 1 · pruned 1 · best auc 0.900 (trial 1) · 0:30 left at most"
    )


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


def test_an_epoch_from_what_a_trial_reports():
    reported = {
        "epoch": 3, "train_loss": 0.5, "loss": 0.6, "epoch_score": 0.7, "epoch_accuracy": 0.8, "epoch_s": 1.5
    }  # fmt: skip
    result = epoch_result(reported, TrialConfig(learning_rate=0.01))
    assert (result.epoch, result.loss, result.score, result.learning_rate) == (3, 0.6, 0.7, 0.01)
