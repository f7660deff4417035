import math
from collections.abc import Sequence
from html import escape

import numpy as np
import pytest
from matplotlib.axes import Axes

from raypipe.charts import (
    BEST,
    REFERENCE,
    Scored,
    calibration_error,
    precision_recall_chart,
    reliability,
    reliability_chart,
    roc_chart,
    slice_chart,
    svg,
    thinned,
)
from raypipe.results import Setting, TrialResult

LABELS = np.array([0, 0, 1, 1, 1, 0], bool)
PROBABILITIES = np.array([0.1, 0.6, 0.55, 0.9, 0.8, 0.2])


def test_the_curves_say_their_areas_and_mark_the_threshold() -> None:
    lines = [
        Scored("test", BEST, LABELS, PROBABILITIES),
        Scored("yardstick", REFERENCE, LABELS, 1 - PROBABILITIES),
    ]
    roc = roc_chart(lines, 0.5)
    assert roc.finding == "Area under the curve: test 0.889, yardstick 0.111."
    assert roc.table[0] == ("curve", "false positives", "true positives")
    assert ("test", "0.333", "1.000") in roc.table
    without = roc_chart(lines, None)
    # matplotlib draws a marker as a path of its own, used where it stands
    assert roc.svg.count("<use") == without.svg.count("<use") + 1
    found = precision_recall_chart(lines, 0.5)
    assert found.finding.startswith("Average precision: test 0.9")


def test_a_threshold_that_nothing_reaches_has_no_precision() -> None:
    chart = precision_recall_chart([Scored("test", BEST, LABELS, PROBABILITIES)], 0.95)
    assert "nan" not in chart.svg


def test_a_reliable_model_is_on_the_line() -> None:
    rng = np.random.default_rng(0)
    said = rng.uniform(size=4000)
    bins = reliability(said, rng.uniform(size=4000) < said)
    assert [one.clips for one in bins] == [500] * 8
    assert calibration_error(bins) < 0.03
    assert all(one.true_interval[0] <= one.true <= one.true_interval[1] for one in bins)
    boasting = reliability(said, rng.uniform(size=4000) < 0.5)
    assert calibration_error(boasting) > 0.2
    chart = reliability_chart("c", "Test", boasting, bins, "probability")
    assert "before the temperature" in chart.finding and len(chart.table) == 17


@pytest.mark.parametrize(("clips", "bins"), [(1, 1), (4, 1), (12, 2), (39, 7), (400, 8)])
def test_few_clips_make_few_bins(clips: int, bins: int) -> None:
    found = reliability(np.linspace(0, 1, clips), np.arange(clips) % 2 == 0)
    assert len(found) == bins and sum(one.clips for one in found) == clips


def trials(column: Sequence[Setting]) -> list[TrialResult]:
    nan = math.nan
    return [
        TrialResult(
            str(i), "done" if i else "pruned", {"x": value}, (), 0, 0.5 + i / 100, nan, (nan, nan), 1.0
        )
        for i, value in enumerate(column)
    ]


@pytest.mark.parametrize(
    ("column", "finding"),
    [
        ([1e-4, 1e-2, 1e-3], "Tried 0.0001 to 0.01; the best trial has 0.001."),
        ([32, 64, 128], "Tried 32 to 128; the best trial has 128."),
        (["gru", "tcn", "gru"], "Means: gru 0.510, tcn 0.510. The best trial has gru."),
        ([None, 0.5, True], "Means: 0.5 0.510, null 0.500, true 0.520. The best trial has true."),
        ([0.0, 0.5, 0.25], "Tried 0 to 0.5; the best trial has 0.25."),
    ],
)
def test_a_slice_says_what_was_tried_and_what_was_best(column: Sequence[Setting], finding: str) -> None:
    chart = slice_chart("x", trials(column), "auc", "2")
    assert chart.finding == finding
    assert len(chart.table) == 4 and 'role="img"' in chart.svg


def test_a_curve_behind_a_chart_keeps_its_ends() -> None:
    points = thinned(np.linspace(0, 1, 500), np.linspace(1, 0, 500))
    assert len(points) == 20 and (points[0], points[-1]) == ((0.0, 1.0), (1.0, 0.0))


@pytest.mark.parametrize("name", ["$$", "<$%$>", "$x^$", "$5-$10"])
def test_a_name_of_a_class_is_no_formula(name: str) -> None:
    def draw(axes: Axes) -> None:
        axes.set(xlabel=f"probability of {name}")

    assert f"probability of {escape(name)}" in svg("key", "title", "finding", draw)
