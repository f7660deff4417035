"""What a search yields, as frozen values: epochs, trials, the best model, and what it is measured by.

`tune` fills them, `report` shows them; nothing here knows of either.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.calibration import Calibration
from raypipe.config import TrialConfig
from raypipe.metrics import UNKNOWN, Difference, Evaluation, Interval
from raypipe.trial import Course

Setting = str | int | float | bool | None | list[float]
STATUSES = ("done", "running", "waiting", "pruned", "pending", "failed")
"""What a trial can be, in the order of the leaderboard. waiting: for the others of its population."""
ENDED = ("done", "pruned", "failed")


@dataclass(frozen=True)
class EpochResult:
    """One epoch of one trial; `loss`, `score` and `accuracy` are on the validation folds."""

    epoch: int
    train_loss: float
    loss: float
    score: float
    accuracy: float
    learning_rate: float
    epoch_s: float
    score_so_far: float = math.nan
    """Of the out-of-fold predictions, each fold at the epoch so far that is best on the others: by this
    trials are compared, and cut short."""


@dataclass(frozen=True)
class Leg:
    """Epochs that a trial took over with another's weights (scheduler pbt)."""

    last_epoch: int
    trial_id: str
    """Which trained them."""
    config: dict[str, Setting]
    """By which they were trained."""


@dataclass(frozen=True)
class TrialResult:
    """One row of the leaderboard. What is not known yet is NaN; intervals are 95 %, by group bootstrap, and
    known once a trial has ended."""

    trial_id: str
    status: str
    config: dict[str, Setting]
    epochs: tuple[EpochResult, ...]
    best_epoch: int
    score: float
    accuracy: float
    accuracy_interval: Interval
    wall_s: float
    message: str = ""
    score_interval: Interval = UNKNOWN
    reason: str = ""
    """Of a failed trial: error, diverged, out_of_memory, killed or disk_full; of one cut short, why.
    `message` has the words."""
    startup_s: float = math.nan
    """Seconds from the start of the trial in its process to its first step of training."""
    earlier: tuple[Leg, ...] = ()
    """What `epochs` began with, in order, where they are not the trial's own; `config` counts after them."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r} must be one of {', '.join(STATUSES)}")

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def counts(self) -> bool:
        """Whether its score says what its settings are worth: it has ended, and not by a fault."""
        return self.ended and self.status != "failed" and math.isfinite(self.score)

    @property
    def course(self) -> Course:
        """By which settings its epochs were trained."""
        legs = [(leg.last_epoch, TrialConfig.model_validate(leg.config)) for leg in self.earlier]
        return Course(TrialConfig.model_validate(self.config), tuple(legs))


@dataclass(frozen=True)
class SideResult:
    """Clips, what a model says of them, and how good that is."""

    positions: NDArray[np.int64]
    """[n] rows of `Dataset.clips`."""
    probabilities: NDArray[np.float32]
    """[n, C], calibrated."""
    answers: NDArray[np.int64]
    """[n] class numbers, by the threshold."""
    evaluation: Evaluation


@dataclass(frozen=True)
class Yardstick:
    """What a simple model gives on the same folds: a trial that is not better has not earned its cost."""

    name: str
    validation: SideResult
    test: SideResult | None
    wall_s: float


@dataclass(frozen=True)
class BestResult:
    """The chosen model, trained on the whole training side. `validation` is out of fold: each clip by a model
    that had not seen its group, at an epoch, a temperature and a threshold chosen on the other folds; a
    single fold chose its own."""

    trial_id: str
    config: TrialConfig
    epochs: int
    calibration: Calibration
    """Chosen on all out-of-fold predictions, stored with the model; `test` was judged by it."""
    validation: SideResult
    test: SideResult | None
    over_yardstick: dict[str, Difference]
    """On the validation side, by "accuracy", "auc" and the other names of `metrics.weighted_scores`."""
    random_folds: SideResult | None = None
    """The same config on folds that ignore groups, as published numbers are made (--protocol both)."""
    random_yardstick: SideResult | None = None
    raw_test: NDArray[np.float32] | None = None
    """[n, C] of `test`, before the temperature."""

    def gain_over_yardstick(self, metric: str) -> Difference:
        """In the metric that ranks trials."""
        return self.over_yardstick[{"balanced_accuracy": "recall", "macro_f1": "f1"}.get(metric, metric)]


def trial_as_json(trial: TrialResult) -> dict[str, object]:
    """With null for NaN, which JSON does not have."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    # A setting may be null, a NaN is none: settings are left as they are.
    found = plain(asdict(trial))
    assert isinstance(found, dict)
    return found


def trial_from_json(content: dict[str, Any]) -> TrialResult:
    """What `trial_as_json` wrote."""
    values = dict(content)
    for field in fields(TrialResult):
        if field.type is float and values[field.name] is None:
            values[field.name] = math.nan
        if field.type == Interval:
            values[field.name] = tuple(math.nan if end is None else end for end in values[field.name])
    epochs: list[dict[str, Any]] = content["epochs"]
    known: list[dict[str, Any]] = [
        {k: math.nan if v is None else v for k, v in epoch.items()} for epoch in epochs
    ]
    values["epochs"] = tuple(EpochResult(**epoch) for epoch in known)
    values["earlier"] = tuple(Leg(**leg) for leg in content.get("earlier", ()))
    return TrialResult(**values)


def leaderboard(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Trials by status, then best score first, those without a score last; of equal ones the first."""

    def place(trial: TrialResult) -> tuple[int, bool, float, int, str]:
        unknown = math.isnan(trial.score)
        score = 0.0 if unknown else -trial.score
        return STATUSES.index(trial.status), unknown, score, len(trial.trial_id), trial.trial_id

    return sorted(trials, key=place)


def lineage(trial: TrialResult) -> str:
    """Whose epochs a trial took over, and what was changed then; empty where it trained all by itself.

    >>> legs = (Leg(15, "5", {"dropout": 0.5, "width": 8}),)
    >>> settings = {"dropout": 0.4, "width": 8}
    >>> lineage(TrialResult("3", "done", settings, (), 0, 0.9, 0.9, UNKNOWN, 1.0, earlier=legs))
    'trial 5 until epoch 15; then 3: dropout 0.5 to 0.4'
    """
    if not trial.earlier:
        return ""
    words = f"trial {trial.earlier[0].trial_id} until epoch {trial.earlier[0].last_epoch}"
    befores = trial.earlier
    afters = [(leg.trial_id, leg.config, f" until epoch {leg.last_epoch}") for leg in trial.earlier[1:]]
    for before, (name, config, until) in zip(
        befores, [*afters, (trial.trial_id, trial.config, "")], strict=True
    ):
        differences = [
            f"{field} {_short(before.config[field])} to {_short(value)}"
            for field, value in config.items()
            if value != before.config[field]
        ]
        words += f"; then {name}{until}: {', '.join(differences) or 'nothing changed'}"
    return words


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
