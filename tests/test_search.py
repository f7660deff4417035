"""What a search draws and what it cuts short: plain functions, no Ray."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from raypipe.config import TrialConfig, TuneConfig
from raypipe.leaderboard import pending_trial
from raypipe.results import EpochResult, TrialResult
from raypipe.search import bars, draw, grid, known_to, out_of_patience, score_at, warm_settings
from raypipe.space import Range

SPACE = {
    "model": ["mean_pool", "tcn"],
    "width": [8, 16],
    "loss": ["cross_entropy", "focal"],
    "focal_gamma": Range(low=1, high=3),
    "learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "epochs": Range(low=5, high=9),
    "clip_norm": [None, 1.0],
}
CONFIG = TuneConfig(space=SPACE, space_by_model={"tcn": {"depth": [2, 3], "width": [32]}}, num_samples=40)


def ended(trial: TrialConfig, number: int, *scores: float, status: str = "done") -> TrialResult:
    epochs = tuple(EpochResult(e, 0, 0, 0, 0, 0, 0, score) for e, score in enumerate(scores, 1))
    score = scores[-1] if scores else float("nan")
    return replace(pending_trial(str(number), trial), status=status, epochs=epochs, score=score)


def drawn(config: TuneConfig, count: int, at_once: int = 1) -> list[TrialConfig]:
    """The trials of a search in which the score is better the nearer the learning rate is to 1e-3."""
    trials: list[TrialResult] = []
    for number in range(1, count + 1):
        trial = draw(config, number, trials, known=known_to(number, at_once))
        assert trial is not None
        status = "failed" if number % 7 == 0 else "pruned" if number % 3 == 0 else "done"
        trials.append(ended(trial, number, -abs(np.log10(trial.learning_rate) + 3), status=status))
    return [TrialConfig.model_validate(trial.config) for trial in trials]


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_every_draw_is_in_the_space_of_its_model(search):
    trials = drawn(CONFIG.model_copy(update={"search": search}), 30)
    assert {trial.model for trial in trials} == {"mean_pool", "tcn"}
    for trial in trials:
        if trial.model == "tcn":
            assert trial.width == 32 and trial.depth in (2, 3)
        else:
            assert trial.width in (8, 16) and trial.depth == TrialConfig().depth
        assert 1e-4 <= trial.learning_rate <= 1e-2 and 5 <= trial.epochs <= 9
        assert trial.clip_norm in (None, 1.0)
        assert (1 <= trial.focal_gamma <= 3) if trial.loss == "focal" else trial.focal_gamma == 2.0
    assert {trial.epochs for trial in trials} >= {5, 9}, "both ends"


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_a_seed_draws_the_same_and_another_others(search):
    config = CONFIG.model_copy(update={"search": search})
    assert drawn(config, 15, at_once=2) == drawn(config, 15, at_once=2)
    assert drawn(config, 3) != drawn(config.model_copy(update={"seed": 1}), 3)


def test_a_trial_is_decided_on_by_what_had_ended_and_by_nothing_else():
    trials = [ended(trial, n, 0.5) for n, trial in enumerate(drawn(CONFIG, 14), 1)]
    known = known_to(15, 2)
    assert known == 11
    others = [replace(t, score=0.9, status="pruned") if int(t.trial_id) > known else t for t in trials]
    assert draw(CONFIG, 15, trials, known=known) == draw(CONFIG, 15, others, known=known)
    others = [replace(t, score=float(i)) for i, t in enumerate(trials)]
    assert draw(CONFIG, 15, trials, known=known) != draw(CONFIG, 15, others, known=known)


def test_tpe_learns_from_the_trials_before():
    far = [abs(np.log10(trial.learning_rate) + 3) for trial in drawn(CONFIG, 40)]
    assert np.mean(far[25:]) < 0.6 * np.mean(far[:10])


def test_a_space_as_people_write_it_is_searched_by_tpe():
    """YAML has 0 for a field of fractions and 32.0 for a whole number; a trial has 0.0 and 32."""
    space = {"dropout": [0, 0.3], "weight_decay": [0, 0.1, 1], "batch_size": [16.0, 32], "focal_alpha": [1]}
    config = TuneConfig(trial={"loss": "focal"}, space=space | {"focal_alpha": [None, [1, 2]]})
    trials = drawn(config, 5)
    assert {trial.dropout for trial in trials} <= {0.0, 0.3} and {t.batch_size for t in trials} <= {16, 32}
    assert all(trial.focal_alpha in (None, [1.0, 2.0]) for trial in trials)


def test_a_grid_is_every_combination_once():
    space = {"width": [8, 16], "loss": ["focal", "cross_entropy"], "focal_gamma": [1.0, 2.0]}
    config = TuneConfig(trial={"model": "mean_pool"}, space=space, space_by_model={}, search="grid")
    trials = list(grid(config))
    seen = Counter((trial.width, trial.loss, trial.focal_gamma) for trial in trials)
    assert len(trials) == 6 and set(seen.values()) == {1}, "gamma is not gone through without focal loss"
    assert [draw(config, number, [], known=0) for number in range(1, 8)] == [*trials, None]


def test_what_an_earlier_trial_never_looked_at_need_not_be_in_the_space():
    config = CONFIG.model_copy(update={"space": SPACE | {"focal_gamma": [1.0, 3.0]}})
    trial = TrialConfig(model="mean_pool", width=8, epochs=7, clip_norm=None)
    assert trial.focal_gamma == 2.0 and warm_settings(config, [ended(trial, 1, 0.7)]) == [trial]
    focal = trial.model_copy(update={"loss": "focal"})
    assert warm_settings(config, [ended(focal, 1, 0.7)]) == []


def test_an_earlier_run_goes_first_where_this_one_could_have_drawn_it():
    one, two, outside = (
        TrialConfig(model="mean_pool", width=width, learning_rate=rate, epochs=7, clip_norm=None)
        for width, rate in [(8, 1e-3), (16, 2e-3), (64, 1e-3)]
    )
    board = [ended(one, 1, 0.7), ended(outside, 2, 0.9), ended(two, 3, 0.8), ended(two, 4, 0.5)]
    first = warm_settings(CONFIG, board)
    assert [(trial.width, trial.learning_rate) for trial in first] == [(16, 2e-3), (8, 1e-3)]
    assert draw(CONFIG, 1, [], known=0, first=first) == first[0]
    assert draw(CONFIG, 3, [], known=0, first=first) not in first


# --- cutting short -----------------------------------------------------------------------------------

TRIAL = TrialConfig(epochs=20)


def curves(*lasts: float) -> list[TrialResult]:
    return [ended(TRIAL, n, *np.linspace(0.5, last, 20)) for n, last in enumerate(lasts, 1)]


def test_asha_lets_the_best_third_of_those_before_go_on():
    config = TuneConfig(trial=TRIAL, grace_epochs=5, space={})
    found = bars(config, curves(0.6, 0.7, 0.8, 0.9))
    assert list(found) == [5, 15]
    at_5 = [score_at(trial, 5) for trial in curves(0.6, 0.7, 0.8, 0.9)]
    assert found[5] == pytest.approx(at_5[2])
    assert bars(config, []) == {}, "the first trials have nothing to be compared with"
    assert bars(config.model_copy(update={"scheduler": "none"}), curves(0.6)) == {}


def test_the_median_counts_from_the_grace_epoch_on():
    config = TuneConfig(trial=TRIAL, grace_epochs=5, scheduler="median", space={})
    found = bars(config, curves(0.6, 0.7, 0.9))
    assert list(found) == list(range(5, 20))
    assert found[19] == pytest.approx(score_at(curves(0.7)[0], 19))


def test_what_was_cut_short_or_failed_is_not_compared_beyond():
    stopped, cut = ended(TRIAL, 1, 0.5, 0.6), ended(TRIAL, 2, 0.5, 0.7, status="pruned")
    failed = ended(TRIAL, 3, 0.5, status="failed")
    assert [score_at(trial, 2) for trial in (stopped, cut, failed)] == [0.6, 0.7, None]
    assert [score_at(trial, 9) for trial in (stopped, cut)] == [0.6, None]


def test_patience_counts_trials_since_the_best():
    config = TuneConfig(patience_trials=2)
    trials = [ended(TRIAL, n, score) for n, score in enumerate([0.7, 0.8, 0.75, 0.8], 1)]
    assert [out_of_patience(config, trials[:count]) for count in range(5)] == [False] * 4 + [True]
    assert not out_of_patience(TuneConfig(), trials)


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_a_trial_without_a_score_does_not_end_the_search(search):
    config = CONFIG.model_copy(update={"search": search})
    trials: list[TrialResult] = []
    for number in range(1, 15):
        trial = draw(config, number, trials, known=known_to(number, 1))
        assert trial is not None
        trials.append(ended(trial, number, float("nan") if number % 2 else 0.7))
