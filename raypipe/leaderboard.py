"""The trials of a search as they stand: who leads, how far each is, what a person reads meanwhile."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from raypipe.config import TrialConfig
from raypipe.console import duration
from raypipe.report import EpochResult, TrialResult, leaderboard
from raypipe.store import write_atomically

NAN = float("nan")
_COLUMNS = (
    "trial status score metric accuracy accuracy_low accuracy_high epochs_run best_epoch wall_s message"
)


def pending_trial(trial_id: str, config: TrialConfig) -> TrialResult:
    """A trial that has not reported yet."""
    return TrialResult(
        trial_id=trial_id,
        status="pending",
        config=config.model_dump(),
        epochs=(),
        best_epoch=0,
        score=NAN,
        accuracy=NAN,
        accuracy_interval=(NAN, NAN),
        wall_s=0.0,
    )


class Leaderboard:
    """All trials of one search, by id. Fed by events; asked for rows, lines and files."""

    def __init__(self, *, total: int, metric: str) -> None:
        self.total, self.metric = total, metric
        self._trials: dict[str, TrialResult] = {}

    @property
    def trials(self) -> list[TrialResult]:
        """Best first, then those that still run, then the failed ones."""
        return leaderboard(list(self._trials.values()), self.metric)

    @property
    def best(self) -> TrialResult | None:
        """The best trial that came to its end."""
        done = [trial for trial in self.trials if trial.status == "done"]
        return done[0] if done else None

    def put(self, trial: TrialResult) -> None:
        self._trials[trial.trial_id] = trial

    def get(self, trial_id: str) -> TrialResult:
        return self._trials[trial_id]

    def line(self, elapsed_s: float) -> str:
        """
        One line: trials by status, the best so far, the time left if no trial stops early from here.
        """
        counts = {status: 0 for status in ("done", "pruned", "failed", "running")}
        for trial in self._trials.values():
            counts[trial.status] = counts.get(trial.status, 0) + 1
        ended = counts["done"] + counts["pruned"] + counts["failed"]
        parts = [f"trials {ended}/{self.total}", f"running {counts['running']}"]
        parts += [f"{name} {counts[name]}" for name in ("done", "pruned", "failed") if counts[name]]
        scored = [trial for trial in self._trials.values() if not math.isnan(trial.score)]
        if scored:
            best = max(scored, key=lambda trial: trial.score)
            parts.append(f"best {self.metric} {best.score:.3f} (trial {best.trial_id})")
        share = (
            ended + sum(_progress(t) for t in self._trials.values() if t.status == "running")
        ) / self.total
        if 0.1 < share < 1:  # earlier, starting up would count for too much
            parts.append(f"{duration(elapsed_s / share * (1 - share))} left at most")
        return " · ".join(parts)

    def table(self) -> str:
        """The trials as a text table, for the log."""
        header = ["trial", "model", "epochs", self.metric, "accuracy", "95 % interval", "time", "status"]
        rows = [
            [
                trial.trial_id,
                str(trial.config["model"]),
                str(len(trial.epochs)),
                _number(trial.score),
                _number(trial.accuracy),
                f"{_number(trial.accuracy_interval[0])} to {_number(trial.accuracy_interval[1])}",
                duration(trial.wall_s),
                trial.status,
            ]
            for trial in self.trials
        ]
        return text_table([header, *rows])

    def write_csv(self, path: Path) -> None:
        """One row per trial, best first, every field of its config a column."""
        file = io.StringIO()
        settings = list(TrialConfig.model_fields)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS.split(), *settings])
        for t in self.trials:
            low, high = t.accuracy_interval
            scores = [_exact(value) for value in (t.score, t.accuracy, low, high)]
            ends = [len(t.epochs), t.best_epoch, f"{t.wall_s:.1f}", t.message]
            writer.writerow(
                [t.trial_id, t.status, scores[0], self.metric, *scores[1:], *ends]
                + [t.config[name] for name in settings]
            )
        write_atomically(path, file.getvalue().encode())


def epoch_result(report: Mapping[str, float], config: TrialConfig) -> EpochResult:
    """One epoch from the numbers a trial reported."""
    return EpochResult(
        epoch=int(report["epoch"]),
        train_loss=report["train_loss"],
        loss=report["loss"],
        score=report["epoch_score"],
        accuracy=report["epoch_accuracy"],
        learning_rate=config.learning_rate,
        epoch_s=report["epoch_s"],
    )


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(text_table([["a", "b"], ["long", "1"]]))
    a     b
    long  1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _progress(trial: TrialResult) -> float:
    """How far a running trial is, 0 to 1."""
    return len(trial.epochs) / int(trial.config["epochs"] or 1)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
