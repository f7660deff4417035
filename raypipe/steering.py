"""Which trial is next, and what its process is told: the state of a search while it runs.

Everything is decided on by the board and by files of trials that have ended, so nothing here depends on the
order in which trials end.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raypipe.checkpoints import STATES
from raypipe.config import TrialConfig
from raypipe.leaderboard import Leaderboard, pending_trial, read_trial
from raypipe.population import next_round, rounds, source_of
from raypipe.results import TrialResult, trial_as_json, trial_from_json
from raypipe.run import Run
from raypipe.search import bars, draw, known_to, out_of_patience
from raypipe.storage import Place
from raypipe.training import Part

RETRIES = 3
"""Times that a trial whose process or node was killed goes on from its last epoch."""
TIME_UP = "time was up"


@dataclass(frozen=True)
class Assignment:
    """What a trial's process is told."""

    number: str
    config: dict[str, Any]
    bars: dict[int, float]
    """Scores that it must have after an epoch to go on."""
    ends_at_s: float | None
    """Time since 1970 after which it ends."""
    round: int = 0
    """scheduler pbt: the number of this round; else 0."""
    until: int | None = None
    """The round's last epoch."""
    source: str | None = None
    """The trial whose state the round goes on from."""
    before: dict[str, Any] = field(default_factory=dict)
    """The trial as it begins the round, in JSON's terms."""

    @property
    def name(self) -> str:
        return f"trial-{self.number}-round-{self.round}" if self.round else f"trial-{self.number}"

    def trial(self) -> TrialResult:
        """The trial as it begins."""
        if self.before:
            return trial_from_json(self.before)
        return pending_trial(self.number, TrialConfig.model_validate(self.config))

    def source_in(self, run: Run) -> Place | None:
        """The folder whose state the round goes on from."""
        return run.part(self.source, self.round - 1) if self.source else None

    def part(self, source: Path | None) -> Part | None:
        """What is trained of it, by the folder to go on from; None: all."""
        if self.until is None:
            return None
        trial = self.trial()
        return Part(self.until, len(trial.epochs), source, trial.course.earlier)


class Steering:
    """Which trial is next, from the board alone."""

    def __init__(
        self,
        run: Run,
        board: Leaderboard,
        first: Sequence[TrialConfig] = (),
        *,
        again: Sequence[TrialResult] = (),
    ) -> None:
        """`first`: settings to try before any others. `again`: trials that failed, to train once more."""
        self.run, self.board, self._first = run, board, first
        self._failed = list(again)
        for trial in again:  # others are decided on when these have ended
            board.put(replace(trial, status="waiting", reason="", message=""))
        self._next = 1
        self._assignments: dict[str, Assignment] = {}
        self._again: list[str] = []
        self._attempts: dict[str, int] = {}
        self._no_more = self._stopped = False
        self._ahead: Assignment | None = None
        self._round = 0
        self._queue: list[tuple[TrialResult, Assignment]] = []
        budget_s = run.config.time_budget_s
        self._ends_at_s = time.time() + budget_s if budget_s else None

    @property
    def finished(self) -> bool:
        """No trial runs and none will."""
        return self._no_more and not self._again and self.board.live == 0

    def nothing_left(self) -> bool:
        """Whether a run that goes on has come to its end before."""
        self._ahead = self.next()
        return self._ahead is None

    def stop(self) -> None:
        """No trial starts from here on."""
        self._no_more = self._stopped = True
        self._again = []

    def next(self) -> Assignment | None:
        """The trial to start now; None: not now."""
        if self._ahead:
            assignment, self._ahead = self._ahead, None
            return assignment
        if self._again:  # it still has its place
            return self._assignments[self._again.pop(0)]
        if self._no_more or self.board.live >= self.run.at_once:
            return None
        begun = self._next_of_round() if self.run.config.scheduler == "pbt" else self._next_trial()
        if begun is None:
            return None
        trial, assignment = begun
        self.board.put(trial)
        self._assignments[assignment.number] = assignment
        return assignment

    def try_again(self, number: str) -> bool:
        """Whether a trial whose process was killed goes on once more."""
        self._attempts[number] = self._attempts.get(number, 0) + 1
        if self._attempts[number] > RETRIES or self._stopped:
            return False
        self._again.append(number)
        return True

    @property
    def _is_time_up(self) -> bool:
        return self._ends_at_s is not None and time.time() > self._ends_at_s

    # --- trials one by one --------------------------------------------------------------------------

    def _next_trial(self) -> tuple[TrialResult, Assignment] | None:
        config, board = self.run.config, self.board
        if self._is_time_up:
            self._no_more = True
            for trial in self._failed:  # for another --retry-failed
                board.put(trial)
            return None
        if self._failed:  # with the settings they had
            trial = self._failed.pop(0)
            return self._assigned(trial.trial_id, TrialConfig.model_validate(trial.config))
        while board.has(str(self._next)):  # of a run that goes on: it has ended
            self._next += 1
        known = known_to(self._next, self.run.at_once)
        earlier = [board.get(str(number)) for number in range(1, self._next)]
        if not all(trial.ended for trial in earlier[:known]):
            return None
        settings = None
        if not (self._next > config.num_samples or out_of_patience(config, earlier[:known])):
            settings = draw(config, self._next, earlier, known=known, first=self._first)
        if settings is None:
            self._no_more = True
            return None
        return self._assigned(str(self._next), settings)

    def _assigned(self, number: str, settings: TrialConfig) -> tuple[TrialResult, Assignment]:
        known = known_to(int(number), self.run.at_once)
        earlier = [self.board.get(str(n)) for n in range(1, known + 1)]
        must = bars(self.run.config, earlier)
        assignment = Assignment(number, settings.model_dump(), must, self._ends_at_s)
        return pending_trial(number, settings), assignment

    # --- a population, round by round (scheduler pbt) -----------------------------------------------

    def _next_of_round(self) -> tuple[TrialResult, Assignment] | None:
        while not self._queue and self.board.live == 0:
            if self._round == len(rounds(self.run.config)) or not self._begin_round():
                self._no_more = True
                return None
        if self._is_time_up:
            self._no_more, self._queue = True, []
        return self._queue.pop(0) if self._queue else None

    def _begin_round(self) -> bool:
        """Queues what is missing of the next round; False where no trial is left to train."""
        self._round += 1
        run, number = self.run, self._round
        trials = [trial for trial in self.board.trials if trial.status == "waiting"]
        begun = next_round(run.config, trials, number=number) if number > 1 else self._population()
        for trial in sorted(begun, key=lambda trial: int(trial.trial_id)):
            if number > 2:  # nothing goes on from there any more
                (run.part(trial.trial_id, number - 2) / STATES).unlink(missing_ok=True)
            file = run.trial_file(trial.trial_id, number)
            told = read_trial(file)
            if told and told.status != "pruned":
                self.board.put(told)
                continue
            file.unlink(missing_ok=True)  # time was up in its midst, and there is more now
            trial = replace(trial, status="pending")
            assignment = Assignment(
                trial.trial_id,
                trial.config,
                {},
                self._ends_at_s,
                round=number,
                until=rounds(run.config)[number - 1],
                source=source_of(trial) if number > 1 else None,
                before=trial_as_json(trial),
            )
            self._queue.append((trial, assignment))
        return bool(begun)

    def _population(self) -> list[TrialResult]:
        """The trials of the first round."""
        config, found = self.run.config, []
        for number in range(1, config.num_samples + 1):
            settings = draw(config, number, [], known=0, first=self._first)
            if settings is None:  # a grid has no more
                break
            # What lags behind takes over another's weights, so none ends by itself.
            settings = settings.model_copy(update={"patience": max(settings.patience, settings.epochs)})
            found.append(pending_trial(str(number), settings))
        return found
