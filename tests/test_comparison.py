"""What a comparison says, from made-up runs: figures, intervals, paired differences, and the files."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from page import Page

from raypipe.comparison import (
    Cell,
    Comparison,
    Row,
    RunFigures,
    Way,
    cost_rows,
    differing_settings,
    markdown,
    quality_rows,
    verdict,
    write_comparison,
)

CLIPS, CLASSES = 60, ("calm", "fight")
LABELS = (np.arange(CLIPS) // 2) % 2
GROUPS = [f"g{i // 2}" for i in range(CLIPS)]
TEST_SIDE = np.arange(CLIPS) >= 48


def run(way, seed=0, *, wrong=0, **figures):
    """A training that is wrong on the first `wrong` clips of each class."""
    hits = np.ones(CLIPS, bool)
    for label in range(2):
        hits[np.flatnonzero(label == LABELS)[:wrong]] = False
    right = np.where(hits, 0.8, 0.2)
    probabilities = np.where(LABELS[:, None] == np.arange(2), right[:, None], 1 - right[:, None])
    probabilities[TEST_SIDE] = np.nan
    defaults = {
        "epochs": 10,
        "best_epoch": 8,
        "batch_size": 32,
        "epoch_s": 0.5,
        "wall_s": 36.0,
        "data_share": 0.01,
        "gpu_use": 0.4,
        "gpu_memory_mb": 2000.0,
        "energy_j": 3600.0,
    }
    return RunFigures(way, seed, probabilities.astype(np.float32), **(defaults | figures))


def quality(**wrong_by_way):
    runs = {way: [run(way, seed, wrong=n) for seed, n in enumerate(w)] for way, w in wrong_by_way.items()}
    rows = quality_rows(runs, LABELS, GROUPS, CLASSES, seed=0)
    return {row.name: row for row in rows}


def test_scores_are_means_over_seeds_of_the_clips_that_take_part():
    rows = quality(before=[8, 4], after=[0, 0])
    assert list(rows) == [
        "accuracy",
        "precision, mean of classes",
        "recall, mean of classes",
        "ROC AUC",
        "accuracy on calm",
        "accuracy on fight",
    ]
    before, after = rows["accuracy"].cells
    assert before.value == pytest.approx(1 - 12 / 48)  # of 48, 16 and 8 are wrong
    assert (after.value, after.interval) == (1.0, (1.0, 1.0))
    assert after.difference == pytest.approx(0.25)
    low, high = after.difference_interval
    assert 0 < low < 0.25 < high < 0.5
    assert verdict(rows["accuracy"], after) == "better"


def test_the_same_predictions_differ_by_nothing_in_any_resample():
    for row in quality(before=[6], after=[6]).values():
        assert row.cells[1].difference == 0.0
        assert row.cells[1].difference_interval == (0.0, 0.0)
        assert verdict(row, row.cells[1]) == ""


def test_a_difference_is_surer_than_two_scores_because_it_is_paired():
    row = quality(before=[8], after=[7])["accuracy"]
    before, after = row.cells
    low, high = after.difference_interval
    assert high - low < (before.interval[1] - before.interval[0]) / 1.5


def test_middle_columns_are_compared_with_the_first():
    row = quality(before=[8], middle=[8], after=[0])["accuracy"]
    assert [cell.difference for cell in row.cells] == [None, 0.0, pytest.approx(1 / 3)]


def costs(before, after, **prices):
    prices = {"price_per_kwh": None, "price_per_hour": None, "currency": "EUR"} | prices
    rows = cost_rows({"before": before, "after": after}, extraction_s=(50.0, 0.7), **prices)
    return {row.name: row for row in rows}


def test_what_training_took():
    rows = costs(
        [run("before", 0, epoch_s=1.0), run("before", 1, epoch_s=2.0)],
        [run("after", 0, epoch_s=0.5, batch_size=64), run("after", 1, epoch_s=1.4, batch_size=64)],
    )
    before, after = rows["time per epoch"].cells
    assert (before.value, after.value, after.difference) == pytest.approx((1.5, 0.95, -0.55))
    # Student's t with one degree of freedom: 12.7 standard errors; differences are -0.5 and -0.6.
    assert after.difference_interval == pytest.approx(
        (-0.55 - 12.706 * 0.05, -0.55 + 12.706 * 0.05), abs=1e-3
    )
    assert after.interval[0] == 0.0, "no time is negative"
    assert rows["batch"].cells == (Cell(32.0), Cell(64.0, None, 32.0))
    assert rows["energy"].cells[0].value == 3600.0
    assert rows["features, run again"].cells == (Cell(50.0), Cell(0.7, None, pytest.approx(-49.3)))


@pytest.mark.parametrize(
    ("energy_j", "prices", "cost"),
    [
        (3600.0, {}, None),
        (3600.0, {"price_per_kwh": 500.0}, 0.5),
        (3600.0, {"price_per_hour": 2.0}, 0.02),
        (3600.0, {"price_per_kwh": 500.0, "price_per_hour": 2.0}, 0.52),
        (None, {"price_per_kwh": 500.0, "price_per_hour": 2.0}, None),  # half a cost would be a wrong one
        (None, {"price_per_hour": 2.0}, 0.02),
    ],
)
def test_cost_by_prices(energy_j, prices, cost):
    runs = [run(way, energy_j=energy_j) for way in ("before", "after")]
    assert costs([runs[0]], [runs[1]], **prices)["cost (EUR)"].cells[0].value == pytest.approx(cost)


UNMEASURED = {"data_share": None, "gpu_use": None, "gpu_memory_mb": None, "energy_j": None}


@pytest.mark.parametrize(("better", "bad"), [("higher", "worse"), ("lower", "better"), ("", "")])
def test_a_verdict_needs_an_interval_without_0(better, bad):
    row = Row("figure", "share", better, ())
    assert verdict(row, Cell(0.5, None, -0.2, (-0.3, -0.1))) == bad
    assert verdict(row, Cell(0.5, None, -0.2, (-0.3, 0.1))) == ""
    assert verdict(row, Cell(0.5, None, -0.2)) == ""


HOSTILE = "<b>calm|</b>"


def comparison(*, ways=("before", "after"), classes=CLASSES, **figures):
    wrong = dict(zip(ways, (8, 4, 2, 0), strict=False))
    runs = {way: [run(way, seed, wrong=wrong[way], **figures) for seed in (0, 1)] for way in ways}
    prices = {"price_per_kwh": None, "price_per_hour": 1.0, "currency": "EUR"}
    rows = quality_rows(runs, LABELS, GROUPS, classes, seed=0)
    rows += cost_rows(runs, extraction_s=(None, None), **prices)
    settings = {"loss": "cross_entropy", "focal_alpha": None, "width": 64}
    return Comparison(
        name="fights",
        command="python -m raypipe.compare --seeds 2",
        started=datetime(2026, 1, 14, 9, 12, tzinfo=UTC),
        wall_s=120.0,
        features="results/features",
        clips=48,
        groups=24,
        folds=5,
        classes=dict.fromkeys(classes, 24),
        seeds=(0, 1),
        devices="2 logical CPU devices a trial",
        versions={"keras": "3.15"},
        ways=tuple(
            Way(way, settings | {"loss": "focal" if i else "cross_entropy"}) for i, way in enumerate(ways)
        ),
        rows=tuple(rows),
        notes=("The test side takes no part.",),
    )


VARIANTS = {
    "two ways": comparison(),
    "with changes": comparison(ways=("before", "loss", "all views", "after")),
    "nothing measured": comparison(**UNMEASURED),
    "hostile": comparison(classes=(HOSTILE, "fight")),
    "no scores": replace(
        comparison(),
        rows=tuple(
            replace(row, cells=tuple(Cell(math.nan, None, math.nan) for _ in row.cells))
            for row in comparison().rows
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_stands_alone_and_is_whole(tmp_path, name):
    write_comparison(tmp_path, VARIANTS[name])
    page = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert page.references == ["data:,"]
    assert page.tags["script"] == page.tags["img"] == page.tags["b"] == 0
    assert page.tags["h1"] == 1 and {"figures", "ways", "notes", "repeat"} <= set(page.ids)
    assert ("changes" in page.ids) == (len(VARIANTS[name].ways) > 2)
    for wrong in ("nan", "None", "Undefined", "inf "):
        assert wrong not in page.text


def test_the_page_says_what_the_figures_are(tmp_path):
    write_comparison(tmp_path, comparison(**UNMEASURED))
    text = Page((tmp_path / "comparison.html").read_text(encoding="utf-8")).text
    for expected in (
        "After reaches 0.833 where before reaches 0.667",
        "on 48 clips that the models had not seen",
        "it excludes 0",
        "accuracy on fight",
        "GPU use not measured not measured not measured",
        "cross_entropy focal",
        "python -m raypipe.compare --seeds 2",
    ):
        assert expected in text, expected


def test_markdown_has_a_row_per_figure_and_a_column_per_way():
    lines = markdown(VARIANTS["with changes"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "|  | before | loss | all views | after | after against before |"
    assert len({line.count(" | ") for line in table}) == 1
    assert len(table) == 2 + len(VARIANTS["with changes"].rows)
    accuracy = next(line for line in table if line.startswith("| accuracy |"))
    assert accuracy.startswith("| accuracy | 66.7\u00a0% (")
    assert "| +33.3 points (" in accuracy
    assert r"<b>calm\|</b>" in markdown(VARIANTS["hostile"])


def test_json_has_every_value(tmp_path):
    write_comparison(tmp_path, comparison(**UNMEASURED))
    content = json.loads((tmp_path / "comparison.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["GPU use"]["cells"][0]["value"] is None
    assert rows["accuracy"]["cells"][1]["difference_interval"][0] > 0
    assert [way["name"] for way in content["ways"]] == ["before", "after"]


def test_settings_that_differ():
    assert differing_settings(comparison().ways) == [("loss", "cross_entropy", "focal")]
