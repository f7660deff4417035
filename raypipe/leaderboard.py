"""The trials of a search as they stand: who leads, how far each is, what a person reads meanwhile."""

import csv
import io
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raypipe.config import TrialConfig
from raypipe.console import duration, text_table
from raypipe.files import write_atomically
from raypipe.results import (
    ENDED,
    STATUSES,
    EpochResult,
    TrialResult,
    leaderboard,
    lineage,
    trial_from_json,
)
from raypipe.run import TRIAL_FILE
from raypipe.storage import Place

NAN = float("nan")
RUNNING_SHOWN = 12
_COLUMNS = (
    "trial status score metric score_low score_high accuracy accuracy_low accuracy_high epochs_run "
    "best_epoch wall_s startup_s reason message lineage"
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

    def __init__(
        self,
        *,
        total: int,
        metric: str,
        gpus: tuple[int, int] = (0, 0),
        before: Sequence[TrialResult] = (),
        retried: Sequence[str] = (),
    ) -> None:
        """`gpus`: of a trial, and of the cluster. `before`: what had ended when a run goes on. `retried`:
        trials that had failed and were, or are, trained once more."""
        self.total, self.metric, self.gpus, self.retried = total, metric, gpus, retried
        self._trials = {trial.trial_id: trial for trial in before}
        self.begin()

    def begin(self) -> None:
        """The clock starts: what is done up to here says nothing about the time left."""
        self._before = self._done

    @property
    def _done(self) -> float:
        """Trials' worth of work that is done."""
        return sum(_progress(trial) for trial in self._trials.values())

    @property
    def trials(self) -> list[TrialResult]:
        """Best first, then those that still run, then the failed ones."""
        return leaderboard(list(self._trials.values()))

    @property
    def best(self) -> TrialResult | None:
        """The best trial that came to its end; where none did, of those cut short."""
        for status in ("done", "pruned"):
            for trial in self.trials:
                if trial.status == status and not math.isnan(trial.score):
                    return trial
        return None

    @property
    def live(self) -> int:
        """Trials that run, or wait for their place."""
        return sum(trial.status in ("running", "pending") for trial in self._trials.values())

    def has(self, trial_id: str) -> bool:
        return trial_id in self._trials

    def put(self, trial: TrialResult) -> None:
        self._trials[trial.trial_id] = trial

    def get(self, trial_id: str) -> TrialResult:
        return self._trials[trial_id]

    def line(self, elapsed_s: float) -> str:
        """
        One line: trials by status, the best so far, the time left if no trial stops early from here.
        """
        counts = self._counts()
        parts = [f"trials {sum(counts[name] for name in ENDED)}/{self.total}", f"running {counts['running']}"]
        parts += [f"pending {counts['pending']}"] if counts["pending"] else []
        parts += [f"{name} {counts[name]}" for name in ENDED if counts[name]]
        if best := self._leader():
            parts.append(f"best {self.metric} {best.score:.3f} ({_within(best)}trial {best.trial_id})")
        if self.gpus[0]:
            parts.append(f"GPUs {counts['running'] * self.gpus[0]}/{self.gpus[1]}")
        if left := self._left(elapsed_s):
            parts.append(left)
        return " · ".join(parts)

    def live_table(self, elapsed_s: float) -> str:
        """The same as a small table, with a row for each trial that runs."""
        counts = self._counts()
        ended = ", ".join(f"{name} {counts[name]}" for name in ENDED)
        now = [f"running {counts['running']}, pending {counts['pending']}"]
        now += [f"GPUs {counts['running'] * self.gpus[0]} of {self.gpus[1]}"] if self.gpus[0] else []
        now += [left] if (left := self._left(elapsed_s)) else []
        lines = [f"trials {sum(counts[name] for name in ENDED)} of {self.total}: {ended}", " · ".join(now)]
        if best := self._leader():
            within = _within(best).removesuffix(", ")
            where = f"trial {best.trial_id}, {best.config['model']}"
            lines.append(f"best {self.metric} {best.score:.3f}{f' ({within})' if within else ''}: {where}")
        running = [trial for trial in self._trials.values() if trial.status == "running"]
        rows = [
            [
                trial.trial_id,
                f"{len(trial.epochs)}/{trial.config['epochs']}",
                _number(trial.score),
                duration(trial.wall_s),
                str(trial.config["model"]),
            ]
            for trial in running[:RUNNING_SHOWN]
        ]
        if rows:
            lines.append(text_table([["running", "epoch", self.metric, "time", "model"], *rows]))
        if len(running) > RUNNING_SHOWN:
            lines.append(f"and {len(running) - RUNNING_SHOWN} more")
        return "\n".join(lines)

    def _counts(self) -> dict[str, int]:
        """Trials by status; pending are all that neither run nor have ended."""
        counts = dict.fromkeys(STATUSES, 0)
        for trial in self._trials.values():
            counts[trial.status] += 1
        counts["pending"] = max(0, self.total - counts["running"] - sum(counts[name] for name in ENDED))
        return counts

    def _leader(self) -> TrialResult | None:
        """The best so far, whether it has ended or not; a failed one can lead to nothing."""
        alive = [trial for trial in self._trials.values() if trial.status != "failed"]
        scored = [trial for trial in alive if math.isfinite(trial.score)]
        return max(scored, key=lambda trial: trial.score, default=None)

    def _left(self, elapsed_s: float) -> str:
        share = (self._done - self._before) / max(1, self.total - self._before)
        if not 0.1 < share < 1:  # earlier, starting up would count for too much
            return ""
        return f"{duration(elapsed_s / share * (1 - share))} left at most"

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

    def write_csv(self, path: Place) -> None:
        """One row per trial, best first, every field of its config a column."""
        file = io.StringIO()
        settings = list(TrialConfig.model_fields)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS.split(), *settings])
        for t in self.trials:
            scores = [*t.score_interval, t.accuracy, *t.accuracy_interval]
            ends = [
                len(t.epochs),
                t.best_epoch,
                f"{t.wall_s:.1f}",
                _seconds(t.startup_s),
                t.reason,
                t.message,
                lineage(t),
            ]
            writer.writerow(
                [t.trial_id, t.status, _exact(t.score), self.metric, *map(_exact, scores), *ends]
                + [t.config[name] for name in settings]
            )
        write_atomically(path, file.getvalue().encode())


def with_epoch(epochs: Sequence[EpochResult], new: EpochResult) -> tuple[EpochResult, ...]:
    """The epochs so far and a new one, in order; a trial that goes on after a kill tells of its own again."""
    told = {epoch.epoch: epoch for epoch in (*epochs, new)}
    return tuple(told[number] for number in sorted(told))


READ_AT_ONCE = 16
"""From a bucket a file takes as long as an answer takes."""


def read_trials(folder: Place, name: str = TRIAL_FILE) -> list[TrialResult]:
    """The trials that have ended, from what they left in the run's folder of trials, by number."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = list(pool.map(_read_trial, folder.glob(f"trial-*/{name}")))
    return sorted(found, key=lambda trial: int(trial.trial_id))


def read_trial(file: Place) -> TrialResult | None:
    """What a trial left, or None where it has not said how it ended."""
    try:
        return _read_trial(file)
    except FileNotFoundError:
        return None


def _read_trial(file: Place) -> TrialResult:
    return trial_from_json(json.loads(file.read_text()))


def _progress(trial: TrialResult) -> float:
    """How far a trial is, 0 to 1."""
    if trial.ended:
        return 1.0
    return len(trial.epochs) / int(str(trial.config["epochs"]))


def _within(trial: TrialResult) -> str:
    """The interval of its score, known once it has ended."""
    low, high = trial.score_interval
    return f"{low:.3f} to {high:.3f}, " if math.isfinite(low + high) else ""


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}"


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
