"""What the next trial is and when it is cut short, as pure functions of its number and the trials before it.

With C trials at once, trial n is decided on by the trials up to n - LAG * C, all of which have ended before
it starts, and by nothing else. So how fast machines are, which trial ends first and what is killed meanwhile
cannot change a search: the same seed gives the same trials, and a stopped search goes on where it was.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.config import MODEL_NAMES, TrialConfig, TuneConfig
from raypipe.results import Setting, TrialResult, leaderboard
from raypipe.space import Range, Value, Values, ends_of, is_ignored

if TYPE_CHECKING:
    import optuna

LAG = 2
"""With 1, trials that end early leave their places empty until the slowest has ended."""
REDUCTION = 3
"""asha: of the trials at a rung one in so many goes on; the next rung is so many times as far."""

Drawn = dict[str, Value]


def known_to(number: int, at_once: int) -> int:
    """The last trial that trial `number` (from 1) is decided on by; 0: none.

    >>> [known_to(number, 2) for number in (1, 4, 5, 9)]
    [0, 0, 1, 5]
    """
    return max(0, number - LAG * at_once)


# --- which trial ------------------------------------------------------------------------------------


def draw(
    config: TuneConfig,
    number: int,
    earlier: Sequence[TrialResult],
    *,
    known: int,
    first: Sequence[TrialConfig] = (),
) -> TrialConfig | None:
    """The settings of trial `number` (from 1); None where a grid has no more. `earlier` are trials 1 to
    number - 1, of which those up to `known` have ended; `first` are settings to try before any others."""
    if number <= len(first):
        return first[number - 1]
    number -= len(first)
    if config.search == "grid":
        return next(itertools.islice(grid(config), number - 1, None), None)
    if config.search == "random":
        return with_drawn(config, _draw_random(config, number))
    return with_drawn(config, _draw_tpe(config, len(first) + number, earlier, known=known))


def with_drawn(config: TuneConfig, drawn: Drawn) -> TrialConfig:
    """The trial with these fields over the fixed ones."""
    return TrialConfig.model_validate(config.trial.model_dump() | drawn)


def grid(config: TuneConfig) -> Iterator[TrialConfig]:
    """Every combination once, the last field changing fastest. A field that is not looked at is not gone
    through."""
    fixed = config.trial.model_dump()
    for model in config.space.get("model", [config.trial.model]):
        assert model in MODEL_NAMES
        space = config.space_of(model)
        seen = set()
        for values in itertools.product(*map(ends_of, space.values())):
            drawn: Drawn = {"model": model}
            for name, value in zip(space, values, strict=True):
                if not is_ignored(name, fixed | drawn):
                    drawn[name] = value
            if repr(drawn) not in seen:
                seen.add(repr(drawn))
                yield with_drawn(config, drawn)


def _draw_random(config: TuneConfig, number: int) -> Drawn:
    rng = np.random.default_rng([config.seed, number])
    fixed = config.trial.model_dump()
    drawn: Drawn = {}
    if "model" in config.space:
        drawn["model"] = random_value("model", config.space["model"], rng)
    for name, values in config.space_of((fixed | drawn)["model"]).items():
        if not is_ignored(name, fixed | drawn):
            drawn[name] = random_value(name, values, rng)
    return drawn


def random_value(name: str, values: Values, rng: np.random.Generator) -> Value:
    """One of the values of a field, each as likely as another."""
    if isinstance(values, list):
        return values[rng.integers(len(values))]
    if is_whole(name):
        low, high = int(values.low), int(values.high)
        if values.log:
            return int(np.clip(np.exp(rng.uniform(np.log(low - 0.5), np.log(high + 0.5))).round(), low, high))
        return int(rng.integers(low, high, endpoint=True))
    if values.log:
        return float(np.exp(rng.uniform(np.log(values.low), np.log(values.high))))
    return float(rng.uniform(values.low, values.high))


def _draw_tpe(config: TuneConfig, number: int, earlier: Sequence[TrialResult], *, known: int) -> Drawn:
    """By a tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's): a study made anew from what is
    known. Trials that still run keep others from being drawn beside them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not config.space:
        return {}
    with warnings.catch_warnings():
        # The joint draw of fields that only some models have is called experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]), group=True
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in earlier[: number - 1]:
            study.add_trial(_told(config, trial, ended=int(trial.trial_id) <= known))
        asked = study.ask()
        fixed = config.trial.model_dump()
        drawn: Drawn = {}
        if "model" in config.space:
            drawn["model"] = _ask(asked, "model", "model", config.space["model"])
        model = (fixed | drawn)["model"]
        for name, values in config.space_of(model).items():
            if not is_ignored(name, fixed | drawn):
                drawn[name] = _ask(asked, _label(config, model, name), name, values)
    return drawn


def _label(config: TuneConfig, model: str, name: str) -> str:
    """What Optuna calls a field: those that a model has its own values for are its own."""
    return f"{model}.{name}" if name in config.space_by_model.get(model, {}) else name  # type: ignore[call-overload]


def _ask(asked: "optuna.Trial", label: str, name: str, values: Values) -> Value:
    if isinstance(values, list):
        words = [repr(value) for value in values]
        return values[words.index(asked.suggest_categorical(label, words))]
    if is_whole(name):
        return int(asked.suggest_int(label, int(values.low), int(values.high), log=values.log))
    return float(asked.suggest_float(label, values.low, values.high, log=values.log))


def _told(config: TuneConfig, trial: TrialResult, *, ended: bool) -> "optuna.trial.FrozenTrial":
    """A trial in Optuna's terms. One that was cut short counts by how far it came."""
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import TrialState, create_trial

    def distribution(name: str, values: Values) -> BaseDistribution:
        if isinstance(values, list):
            return CategoricalDistribution([repr(value) for value in values])
        if is_whole(name):
            return IntDistribution(int(values.low), int(values.high), log=values.log)
        return FloatDistribution(values.low, values.high, log=values.log)

    model = str(trial.config["model"])
    space: dict[str, tuple[str, Values]] = {}
    if "model" in config.space:
        space["model"] = ("model", config.space["model"])
    for name, values in config.space_of(model).items():  # type: ignore[arg-type]
        if not is_ignored(name, trial.config):
            space[_label(config, model, name)] = (name, values)
    params = {
        label: repr(trial.config[name]) if isinstance(values, list) else trial.config[name]
        for label, (name, values) in space.items()
    }
    state, steps, value = TrialState.RUNNING, {}, None
    if ended and (trial.status == "failed" or np.isnan(trial.score)):
        state = TrialState.FAIL
    elif ended and trial.status == "pruned":
        state, steps = TrialState.PRUNED, {len(trial.epochs): trial.score}
    elif ended:
        state, value = TrialState.COMPLETE, trial.score
    return create_trial(
        state=state,
        value=value,
        params=params,
        distributions={label: distribution(*field) for label, field in space.items()},
        intermediate_values=steps,
    )


def is_whole(name: str) -> bool:
    """Whether a field of a trial is a whole number."""
    default = getattr(TrialConfig(), name)
    return isinstance(default, int) and not isinstance(default, bool)


def warm_settings(config: TuneConfig, earlier: Sequence[TrialResult]) -> list[TrialConfig]:
    """The best settings of an earlier run that this run's space could have drawn, each once, best first: up
    to half of this run's trials. What the space does not name stays as this run has it."""
    found: dict[str, TrialConfig] = {}
    for trial in leaderboard([t for t in earlier if t.status in ("done", "pruned")]):
        model = str(trial.config["model"])
        if "model" not in config.space:
            model = config.trial.model
        if model not in MODEL_NAMES or not _could_draw(config.space.get("model", [model]), model):
            continue
        space = config.space_of(model)
        shared = {name: trial.config[name] for name in space if name in trial.config}
        settled = config.trial.model_dump() | {"model": model} | shared
        drawn: dict[str, Setting] = {n: settled[n] for n in space if not is_ignored(n, settled)}
        if all(_could_draw(space[name], value) for name, value in drawn.items()):
            settings = with_drawn(config, {"model": model, **drawn})
            found.setdefault(repr(settings), settings)
    return list(found.values())[: max(1, config.num_samples // 2)]


def _could_draw(values: Values, value: Setting) -> bool:
    if isinstance(values, Range):
        return isinstance(value, int | float) and values.low <= value <= values.high
    return value in values


# --- when it is cut short -----------------------------------------------------------------------------


def bars(config: TuneConfig, earlier: Sequence[TrialResult]) -> dict[int, float]:
    """The score that a trial must have after an epoch to go on, by the number of that epoch, set by trials
    that have ended. Epochs of two trials are comparable, since each is over all folds."""
    if config.scheduler in ("none", "pbt"):
        return {}
    if config.scheduler == "median":
        epochs = list(range(config.grace_epochs, config.trial.epochs))
        return _bars(earlier, epochs, percentile=50.0)
    return _bars(earlier, rungs(config), percentile=100 * (1 - 1 / REDUCTION))


def rungs(config: TuneConfig) -> list[int]:
    """asha: the epochs after which trials are compared (successive halving; Li et al. 2020).

    >>> rungs(TuneConfig(grace_epochs=5, trial=TrialConfig(epochs=60)))
    [5, 15, 45]
    """
    epochs = [config.grace_epochs]
    while epochs[-1] * REDUCTION < config.trial.epochs:
        epochs.append(epochs[-1] * REDUCTION)
    return [epoch for epoch in epochs if epoch < config.trial.epochs]


def _bars(earlier: Sequence[TrialResult], epochs: Sequence[int], *, percentile: float) -> dict[int, float]:
    found: dict[int, float] = {}
    for epoch in epochs:
        scores = [score for trial in earlier if (score := score_at(trial, epoch)) is not None]
        if scores:
            found[epoch] = float(np.percentile(scores, percentile))
    return found


def score_at(trial: TrialResult, epoch: int) -> float | None:
    """A trial's score as of this epoch, its epochs chosen among those so far. One that stopped by itself
    before keeps its last; None for one that was cut short before, or failed."""
    if trial.status not in ("done", "pruned") or (trial.status == "pruned" and len(trial.epochs) < epoch):
        return None
    reached = [one.score_so_far for one in trial.epochs if one.epoch <= epoch]
    return None if not reached or np.isnan(reached[-1]) else reached[-1]


def out_of_patience(config: TuneConfig, known: Sequence[TrialResult]) -> bool:
    """Whether the last `patience_trials` of the known trials brought no better one."""
    patience = config.patience_trials
    if patience is None or len(known) <= patience:
        return False
    scores = [-np.inf if np.isnan(trial.score) else trial.score for trial in known]
    return max(scores[-patience:]) <= max(scores[:-patience])
