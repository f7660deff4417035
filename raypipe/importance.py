"""Which settings the scores of a search vary with: functional ANOVA over its trials (Hutter et al. 2014),
beside what the same trials give when their scores are shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.results import Setting, TrialResult

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_TRIALS = 12
SHUFFLES = 12
TREES = 32
LOG_RATIO = 8.0
"""A numeric setting whose largest value is so many times its smallest is taken by its logarithm."""


@dataclass(frozen=True)
class Importance:
    """Share of the scores' variation that goes with a setting, and the most that chance gave."""

    setting: str
    share: float
    by_chance: float

    @property
    def stands_out(self) -> bool:
        return self.share > self.by_chance


def importances(
    trials: Sequence[TrialResult], settings: Sequence[str], *, seed: int
) -> tuple[Importance, ...]:
    """Of each varying setting, the largest first; empty where the trials are too few to tell.

    Pruned trials count with the score they had when they were stopped; failed ones do not.
    """
    scored = [trial for trial in trials if trial.counts]
    scores = [trial.score for trial in scored]
    if len(scored) < FEWEST_TRIALS or not settings or np.ptp(scores) == 0:
        return ()
    columns = {name: [trial.config[name] for trial in scored] for name in settings}
    found = fanova(columns, scores, seed=seed)
    rng = np.random.default_rng(seed)
    shuffled = [fanova(columns, rng.permutation(scores).tolist(), seed=seed) for _ in range(SHUFFLES)]
    rows = [Importance(name, share, max(one[name] for one in shuffled)) for name, share in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.share))


def fanova(columns: dict[str, list[Setting]], scores: Sequence[float], *, seed: int) -> dict[str, float]:
    """Share of each setting, given its value in each trial; together 1."""
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {}
    values: dict[str, list[Any]] = {}
    for name, column in columns.items():
        distributions[name], values[name] = _distribution(column)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: values[name][i] for name in columns},
                distributions=distributions,
                value=float(score),
            )
            for i, score in enumerate(scores)
        ]
    )
    evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(column: list[Setting]) -> "tuple[BaseDistribution, list[Any]]":
    """Optuna's idea of where a setting's values come from, and the values as it takes them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if is_numeric(column):
        numbers = [float(value) for value in column]  # type: ignore[arg-type]
        return FloatDistribution(min(numbers), max(numbers), log=is_log(column)), list(numbers)
    names = [repr(value) for value in column]
    return CategoricalDistribution(sorted(set(names))), list(names)


def is_numeric(column: Sequence[Setting]) -> bool:
    """
    >>> is_numeric([1, 2.5]), is_numeric([True, False]), is_numeric([1, None])
    (True, False, False)
    """
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in column)


def is_log(column: Sequence[Setting]) -> bool:
    """
    >>> is_log([1e-4, 1e-2]), is_log([0.0, 0.5]), is_log([0.2, 0.6])
    (True, False, False)
    """
    numbers = [float(value) for value in column]  # type: ignore[arg-type]
    return min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_RATIO
