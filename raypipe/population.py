"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846) as pure functions.

All trials train together, round by round. After a round each has a score, and by these alone, the seed and
the number of the round it is settled how every trial begins the next one. So it does not matter which trial
ended first, nor what was killed meanwhile.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raypipe.config import TrialConfig, TuneConfig
from raypipe.results import Leg, TrialResult
from raypipe.search import random_value
from raypipe.space import IN_MID_TRAINING, Range, Value, Values, is_ignored

QUANTILE = 0.25
"""Share of the trials that takes over, and share that it takes over from."""
ANEW = 0.25
"""How often a setting is drawn anew, instead of being changed a little."""
FACTORS = (0.8, 1.2)
"""A little, for a number of a range; of a list it is the value beside."""


def rounds(config: TuneConfig) -> list[int]:
    """The last epoch of each round.

    >>> rounds(TuneConfig(scheduler="pbt", grace_epochs=5, perturb_epochs=10, trial=TrialConfig(epochs=28)))
    [5, 15, 25, 28]
    """
    epochs = config.trial.epochs
    return [*range(config.grace_epochs, epochs, config.perturb_epochs), epochs]


def next_round(config: TuneConfig, trials: Sequence[TrialResult], *, number: int) -> list[TrialResult]:
    """How each of `trials`, which have all ended the round before, begins round `number`: as it is, or with
    what another has learnt, and its settings changed."""
    ranked = sorted(trials, key=lambda trial: (-_score(trial), int(trial.trial_id)))
    count = min(len(ranked) // 2, math.ceil(QUANTILE * len(ranked)))
    best, worst = ranked[:count], {trial.trial_id for trial in ranked[len(ranked) - count :]}
    return [
        heir(config, trial, best, number=number) if trial.trial_id in worst else trial for trial in trials
    ]


def heir(config: TuneConfig, trial: TrialResult, best: Sequence[TrialResult], *, number: int) -> TrialResult:
    """The trial with epochs and settings of one of the best, the settings changed."""
    rng = np.random.default_rng([config.seed, int(trial.trial_id), number])
    source = best[int(rng.integers(len(best)))]
    settings = changed(config, TrialConfig.model_validate(source.config), rng)
    taken = Leg(len(source.epochs), source.trial_id, source.config)
    return replace(
        source,
        trial_id=trial.trial_id,
        config=settings.model_dump(),
        earlier=(*source.earlier, taken),
        wall_s=trial.wall_s,
        startup_s=trial.startup_s,
    )


def source_of(trial: TrialResult) -> str:
    """The trial whose state this one goes on from at the beginning of a round: its own, or the one that it
    has just taken over."""
    last = trial.earlier[-1] if trial.earlier else None
    return last.trial_id if last and last.last_epoch == len(trial.epochs) else trial.trial_id


def changed(config: TuneConfig, settings: TrialConfig, rng: np.random.Generator) -> TrialConfig:
    """The settings, with others for all searched fields that can change in mid-training."""
    values = settings.model_dump()
    for name, space in config.space_of(settings.model).items():
        if name in IN_MID_TRAINING and not is_ignored(name, values):
            values[name] = _explored(name, values[name], space, rng)
    return TrialConfig.model_validate(values)


def _explored(name: str, value: Value, space: Values, rng: np.random.Generator) -> Value:
    anew = rng.random() < ANEW
    up = int(rng.integers(2))
    if isinstance(space, Range):
        if anew or not isinstance(value, int | float):
            return random_value(name, space, rng)
        return float(np.clip(value * FACTORS[up], space.low, space.high))
    if anew or value not in space:
        return random_value(name, space, rng)
    in_order = sorted(
        space, key=lambda one: (isinstance(one, int | float), one if isinstance(one, int | float) else 0)
    )
    place = in_order.index(value) + (1 if up else -1)
    return in_order[min(max(place, 0), len(in_order) - 1)]


def _score(trial: TrialResult) -> float:
    """What its weights are worth now, whatever they were at an earlier epoch."""
    score = trial.epochs[-1].score
    return -math.inf if math.isnan(score) else score
