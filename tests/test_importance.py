import math

import numpy as np

from raypipe.importance import FEWEST_TRIALS, fanova, importances
from raypipe.results import TrialResult


def trial(number: int, score: float, *, status: str = "done", **config: object) -> TrialResult:
    nan = math.nan
    return TrialResult(str(number), status, dict(config), (), 0, score, nan, (nan, nan), 1.0)  # type: ignore[arg-type]


def drawn(count: int, *, status: str = "done") -> list[TrialResult]:
    """Trials whose score depends on the learning rate, a little on the model, and not on the dropout."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        rate, model = float(10 ** rng.uniform(-4, -2)), str(rng.choice(["gru", "tcn"]))
        score = 0.8 + 0.1 * math.log10(rate) + 0.02 * (model == "tcn")
        found.append(
            trial(number, score, status=status, rate=rate, model=model, dropout=float(rng.uniform()))
        )
    return found


def test_what_the_score_depends_on_comes_first_and_stands_out() -> None:
    rows = importances(drawn(40), ["dropout", "model", "rate"], seed=0)
    assert rows[0].setting == "rate"
    assert rows[0].stands_out and rows[0].share > 0.6
    assert not next(row for row in rows if row.setting == "dropout").stands_out
    assert abs(sum(row.share for row in rows) - 1) < 1e-6
    assert importances(drawn(40), ["dropout", "model", "rate"], seed=0) == rows, "repeatable"


def test_failed_trials_do_not_count() -> None:
    trials = drawn(20)
    wrong = [trial(n, 5.0, status="failed", rate=1.0, model="gru", dropout=1.0) for n in range(20, 40)]
    assert importances([*trials, *wrong], ["dropout", "rate"], seed=0) == importances(
        trials, ["dropout", "rate"], seed=0
    )


def test_too_few_trials_tell_nothing() -> None:
    trials = drawn(FEWEST_TRIALS - 1) + drawn(5, status="running") + [trial(99, math.nan, rate=0.1)]
    assert importances(trials, ["rate"], seed=0) == ()
    assert importances(drawn(FEWEST_TRIALS), [], seed=0) == ()
    assert importances([trial(n, 0.5, rate=n) for n in range(20)], ["rate"], seed=0) == (), "all alike"


def test_any_setting_can_be_asked_about() -> None:
    columns = {
        "bool": [True, False] * 8,
        "some": [None, 0.5] * 8,
        "list": [[0.1, 0.9], [0.5, 0.5]] * 8,
        "count": [1, 2, 4, 8] * 4,
    }
    shares = fanova(columns, np.linspace(0, 1, 16).tolist(), seed=0)  # type: ignore[arg-type]
    assert shares.keys() == columns.keys()
    assert abs(sum(shares.values()) - 1) < 1e-6
