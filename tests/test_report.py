"""The report page: what it says in each state of a search, and that it stands alone."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from page import Page

from raypipe.calibration import Calibration
from raypipe.config import TrialConfig
from raypipe.importance import Importance
from raypipe.metrics import Difference, Evaluation, evaluate
from raypipe.report import (
    ClassCount,
    Commands,
    Cost,
    Findings,
    GroupResult,
    LookAlike,
    LookAlikes,
    Miss,
    RunReport,
    Side,
    measured_classes,
    varying_settings,
    write_report,
)
from raypipe.results import (
    BestResult,
    EpochResult,
    Setting,
    SideResult,
    TrialResult,
    Yardstick,
)
from raypipe.wording import interval

NAN = math.nan
HOSTILE = "<script>alert('x')</script> & \"y\".mp4"
TWO = ("fight", "normal")
FIVE = ("walk", "run", "fight", "fall", "sit down")


def evaluation(names: Sequence[str], *, clips: int, wrong: int) -> Evaluation:
    """`clips` clips spread evenly over `names`, the first `wrong` of them taken for the next class."""
    labels = np.arange(clips) % len(names)
    predicted = np.where(np.arange(clips) < wrong, (labels + 1) % len(names), labels)
    rest = 0.2 / (len(names) - 1)
    probabilities = np.where(predicted[:, None] == np.arange(len(names)), 0.8, rest)
    return evaluate(labels, probabilities, names, groups=[f"g{i}" for i in range(clips)])


def side(evaluation: Evaluation) -> SideResult:
    clips, classes = evaluation.clips, len(evaluation.classes)
    return SideResult(
        np.arange(clips), np.full((clips, classes), 1 / classes, np.float32), np.zeros(clips, int), evaluation
    )


def epochs(n: int, *, top: float) -> tuple[EpochResult, ...]:
    return tuple(
        EpochResult(e, 0.5 / e, 0.6 / e, top - 0.01 * (n - e), 0.7, 1e-3, 2.0) for e in range(1, n + 1)
    )


def trial(trial_id: str, score: float = 0.8, *, status: str = "done", **config: Setting) -> TrialResult:
    return TrialResult(
        trial_id=trial_id,
        status=status,
        config={"model": "gru", "batch_size": 16, **config},
        epochs=epochs(4, top=score),
        best_epoch=4,
        score=score,
        accuracy=0.75,
        accuracy_interval=(0.64, 0.83),
        wall_s=754.0,
    )


FAILED = replace(
    trial("t-failed", NAN, status="failed"),
    epochs=(),
    accuracy=NAN,
    accuracy_interval=(NAN, NAN),
    message="out of <memory>",
)
PENDING = TrialResult("t-pending", "pending", {}, (), 0, NAN, NAN, (NAN, NAN), NAN)


def page_side(title: str, names: Sequence[str], clips: int) -> Side:
    """Clips of all classes in turn, each given its own class the likelier the higher its number."""
    labels = np.arange(clips) % len(names)
    right = np.linspace(0.3, 0.95, clips)
    probabilities = np.where(
        labels[:, None] == np.arange(len(names)), right[:, None], ((1 - right) / (len(names) - 1))[:, None]
    )
    return Side(title, "how", labels, probabilities, probabilities, probabilities)


def findings(names: Sequence[str]) -> Findings:
    return Findings(
        sides=(page_side("Validation", names, 60), page_side("Test", names, 20)),
        importances=(Importance("learning_rate", 0.7, 0.4), Importance("width", 0.3, 0.5)),
        groups=tuple(GroupResult(f"g{i}", "test", 4, i % 5) for i in range(12)),
        misses=(
            Miss(HOSTILE, names[0], names[1], 0.981, jpeg=b"\xff\xd8"),
            Miss("gone.mp4", names[1], names[0], 0.7, missing="the video is gone"),
        ),
        look_alikes=LookAlikes(
            "rgb", 0.7, 80, 3, (LookAlike("a.mp4", HOSTILE, ("g1", "g2"), ("test", "fold 1"), 0.93),)
        ),
        durations_s=tuple((1.0, 2.0, 4.5) for _ in names),
        cost=Cost(1508.0, 20.5, 0.42, NAN, NAN, 3.2, 73.0, 102.3),
    )


def run_report(names: Sequence[str] = TWO) -> RunReport:
    """A finished search over two trials that differ in the learning rate."""
    return RunReport(
        name="fights",
        commands=Commands(
            repeat="python -m raypipe.tune --num-samples 2",
            resume="python -m raypipe.tune --resume results/fights",
            predict="python -m raypipe.predict --model results/fights --input new_videos/",
        ),
        config="num_samples: 2\n",
        metric="balanced_accuracy",
        started=datetime(2026, 1, 14, 9, 12, tzinfo=UTC),
        wall_s=3725.0,
        features="results/features",
        view="both",
        backbone="efficientnet_lite0",
        classes=tuple(ClassCount(name, 60 + i, 20 + i, 9) for i, name in enumerate(names)),
        folds=4,
        validation_how="out of fold",
        outcomes={"ok": 97, "partial": 1, "failed": 2},
        trials=(trial("t-low", 0.7, learning_rate=0.01), trial("t-high", 0.9, learning_rate=0.001)),
        best=BestResult(
            trial_id="t-high",
            config=TrialConfig(),
            epochs=4,
            calibration=Calibration(1.2, 0.5 if len(names) == 2 else None),
            validation=side(evaluation(names, clips=60, wrong=12)),
            test=side(evaluation(names, clips=20, wrong=3)),
            over_yardstick={"recall": Difference(0.02, -0.01, 0.05)},
        ),
        yardstick=Yardstick(
            "logistic regression",
            side(evaluation(names, clips=60, wrong=14)),
            side(evaluation(names, clips=20, wrong=4)),
            wall_s=3.2,
        ),
        findings=findings(names),
        devices="2 x NVIDIA T4",
        versions={"raypipe": "0.1.0", "keras": "3.12"},
        seed=7,
        notes=("near-identical clips on both sides",),
    )


def written(folder: Path, run: RunReport) -> Page:
    path = folder / "report.html"
    write_report(path, run)
    return Page(path.read_text(encoding="utf-8"))


def variants() -> dict[str, RunReport]:
    finished = run_report()
    best, found = finished.best, finished.findings
    assert best is not None and found is not None
    running = replace(finished, best=None, findings=None)
    diverged = replace(trial("t-diverged"), epochs=(EpochResult(1, NAN, 1e6, 0.5, 0.5, 1.0, 1.0),))
    unmeasured = replace(trial("t-unmeasured", NAN), epochs=(EpochResult(1, NAN, NAN, NAN, NAN, NAN, NAN),))
    many = [trial(f"t-{i}", 0.5 + i / 100, width=i, model="ab"[i % 2]) for i in range(40)]
    bare = replace(found, misses=(), importances=(), groups=(), look_alikes=LookAlikes("rgb", 0.7, 80, 0, ()))
    one_class = replace(found.sides[1], labels=np.zeros(20, int))
    return {
        "finished": finished,
        "no test side": replace(
            finished, best=replace(best, test=None), findings=replace(found, sides=found.sides[:1])
        ),
        "nothing found": replace(finished, findings=bare),
        "one class on the test side": replace(
            finished, findings=replace(found, sides=(found.sides[0], one_class))
        ),
        "random folds": replace(
            finished, best=replace(best, random_folds=best.validation, random_yardstick=best.validation)
        ),
        "single trial": replace(finished, trials=finished.trials[1:]),
        "with failed": replace(finished, trials=(*finished.trials, FAILED)),
        "diverged": replace(finished, trials=(*finished.trials, diverged)),
        "all NaN": replace(running, trials=(unmeasured,)),
        "many trials": replace(finished, trials=tuple(many)),
        "running": replace(running, trials=(*finished.trials, FAILED, PENDING)),
        "only pending": replace(running, trials=(PENDING,)),
        "every trial failed": replace(running, trials=(FAILED,)),
        "zero trials": replace(running, trials=(), notes=(), outcomes={}, classes=()),
        "5 classes": run_report(FIVE),
        "20 classes": run_report([f"class {i}" for i in range(20)]),
    }


@pytest.mark.parametrize("name", variants())
def test_page_stands_alone_and_is_whole(tmp_path: Path, name: str) -> None:
    run = variants()[name]
    page = written(tmp_path, run)
    assert [r for r in page.references if not r.startswith(("#", "data:"))] == []
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert page.tags["script"] == page.tags["iframe"] == 0
    assert page.tags["svg"] > 0 or not any(t.epochs for t in run.trials)
    assert [i for i, n in Counter(page.ids).items() if n > 1] == []
    assert page.tags["h1"] == 1
    sections = ["leaderboard", "curves", "data", "repeat"]
    sections += ["notes"] if run.notes else []
    if run.best:
        sections += ["confusion", "yardstick", "classes", "decisions", "calibration", "groups", "misses"]
        sections += ["settings", "leaks", "cost"]
    assert set(sections) <= set(page.ids)
    for wrong in ("nan", "None", "Undefined", "inf "):
        assert wrong not in page.text


def test_finished_search_shows_numbers_with_intervals(tmp_path: Path) -> None:
    run = run_report()
    assert run.best is not None and run.best.test is not None
    page = written(tmp_path, run)
    for expected in (
        "The best model, trial t-high, is right on 85.0 % of 20 held-out test clips",
        f"(95 % interval {interval(run.best.test.evaluation.accuracy_interval)})".replace("\u00a0", " "),
        "read once",
        "Always answering",
        "64.0 to 83.0 %",  # a trial's accuracy
        "80.0 %",  # validation
        "0.900",
        "12 min 34 s",
        "near-identical clips on both sides",
        "97 (97.0 %)",
        "python -m raypipe.tune --num-samples 2",
        "2 x NVIDIA T4",
        "keras 3.12",
        "seed 7",
    ):
        assert expected in page.text, expected


def test_charts_state_their_finding_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    page = written(tmp_path, run_report())
    for said in (
        "Trial t-high is lowest at epoch 4 of 4: 0.150, with a training loss of 0.125.",
        "Trial t-high reaches 0.900 at epoch 4. The other 1: 0.700 to 0.700.",
        "Area under the curve: test 0.",
    ):
        assert page.text.count(said) == 2, "in the picture's description, and beside it"
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    svgs = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    charts = [one for one in svgs if 'role="img"' in one]
    assert len(charts) == html.count("<desc") == html.count("<figcaption><b>") - 2  # less two confusions
    assert all("currentColor" in one and not re.search(r"#01020\d|font-family", one) for one in charts)
    assert html.count("<summary>The numbers</summary>") == len(charts)


def test_one_validation_side_is_not_called_out_of_fold(tmp_path: Path) -> None:
    one = replace(run_report(), folds=1, validation_how="also used to choose")
    sides = tuple(replace(side, how="also used to choose") for side in findings(TWO).sides)
    text = " ".join(
        written(tmp_path, replace(one, findings=replace(findings(TWO), sides=sides))).text.split()
    )
    assert "also used to choose" in text and "out of fold" not in text


def test_whether_the_search_has_earned_its_cost(tmp_path: Path) -> None:
    run = run_report()
    assert run.best is not None
    for gain, verdict in (
        (Difference(0.02, -0.01, 0.05), "that can be chance, so the search has not earned its cost on these"),
        (Difference(0.04, 0.01, 0.05), "it is better by more than chance explains, so the search has earned"),
        (Difference(-0.04, -0.06, -0.01), "it is worse, so the search has not earned its cost"),
    ):
        best = replace(run.best, over_yardstick={"recall": gain})
        page = written(tmp_path, replace(run, best=best))
        assert page.text.count(verdict) == 2
    assert "gains \u22120.040 in balanced accuracy (95 % interval \u22120.060 to \u22120.010)" in page.text


def test_what_was_found_is_told(tmp_path: Path) -> None:
    page = written(tmp_path, run_report())
    for expected in (
        "learning rate 70.0 % 40.0 %",
        "width 30.0 % 50.0 %",
        "3 pairs of clips on different sides look alike",
        "And 2 more.",
        "g0 test 4 4 0.0 %",
        "The other 2 groups",
        "gone.mp4 is normal, taken for fight with 70.0 % No frames: the video is gone.",
        "1.0 to 4.5",
        "GPU hours not measured",
        "energy not measured",
        "1 min 13 s by the clock, 1 min 42 s of CPU",
        "The answer is normal from a probability of 0.500 on",
        "with the temperature of 1.200",
        "python -m raypipe.tune --resume results/fights",
        "python -m raypipe.predict --model results/fights --input new_videos/",
        "num_samples: 2",
    ):
        assert expected in page.text, expected
    assert page.tags["img"] == 1


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = replace(trial(HOSTILE, learning_rate=HOSTILE), message=HOSTILE)
    run = replace(
        run_report((HOSTILE, "normal")), name=HOSTILE, notes=(HOSTILE,), trials=(hostile, trial("t-2"))
    )
    page = written(tmp_path, run)
    assert page.tags["script"] == 0
    assert page.text.count("<script>alert('x')</script> & \"y\".mp4") >= 6


def test_a_name_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    run = replace(run_report(), name="clip\udcff")
    assert r"clip\udcff" in written(tmp_path, run).text


def test_running_search(tmp_path: Path) -> None:
    page = written(tmp_path, variants()["running"])
    assert "Search still running 3 of 4 trials have finished." in page.text
    assert "Ahead on the validation folds is trial t-high" in page.text
    assert "accuracy 75.0 % (95 % interval 64.0 to 83.0 %)" in page.text
    assert "t-pending pending not measured" in page.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero trials", "No trial has finished yet."),
        ("zero trials", "No epoch has finished yet."),
        ("only pending", "Search still running No trial has finished yet."),
        ("every trial failed", "No model Every trial failed"),
        ("with failed", "t-failed, failed out of <memory>"),
        ("no test side", "of 60 validation clips"),
        ("no test side", "The test side was not measured."),
        ("nothing found", "Worst mistakes No mistakes."),
        ("nothing found", "Too few trials to say: 2 have a score, 12 are needed."),
        ("nothing found", "The videos have no groups."),
        ("nothing found", "No clips on different sides are alike."),
        ("random folds", "Random folds ignore groups"),
        ("5 classes", "The answer is the most probable class"),
        ("single trial", "The same in all trials model gru batch size 16 learning rate 0.001"),
        ("many trials", "35 more"),
    ],
)
def test_state_in_words(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in written(tmp_path, variants()[name]).text


def test_five_classes_have_a_row_each_on_both_sides(tmp_path: Path) -> None:
    page = written(tmp_path, run_report(FIVE))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count('<th scope="row">sit down</th>') == 5  # confusion 2, per class 2, data
    assert "true \\ predicted walk run fight fall sit down walk 9 75 % 3 25 % 0 0 %" in page.text


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    labels = np.zeros(8, dtype=np.int64)  # no clip of the second class, and none predicted as it
    one_sided = evaluate(labels, np.tile([0.8, 0.2], (8, 1)), TWO)
    run = run_report()
    assert run.best is not None
    page = written(tmp_path, replace(run, best=replace(run.best, test=side(one_sided))))
    assert re.search(r"ROC AUC 0\.\d{3} ?0\.\d{3} to [01]\.\d{3} not measured cross", page.text)
    assert "normal 0 not measured not measured not measured" in page.text
    present, absent = measured_classes(one_sided)
    assert (present.recall, present.precision) == (1.0, 1.0)
    assert math.isnan(absent.recall) and math.isnan(absent.precision) and math.isnan(absent.f1)


def test_writing_is_atomic_and_repeatable(tmp_path: Path) -> None:
    path = tmp_path / "results" / "report.html"
    write_report(path, run_report())
    first = path.read_bytes()
    write_report(path, run_report())
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_failure_leaves_the_old_page_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        write_report(path, run_report())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"a": 1}, {"a": 1}], []),
        ([{"a": 1, "b": 2}, {"a": 1, "b": 3}], ["b"]),
        ([{"a": 1}, {"a": True}], ["a"]),
        ([{"a": 1, "b": None}, {"a": 1}], ["b"]),  # only some trials have it
        ([{"a": 1}, {}], []),  # pending: its settings are not known yet
        ([], []),
    ],
)
def test_varying_settings(configs: list[dict[str, Setting]], expected: list[str]) -> None:
    assert varying_settings([replace(PENDING, config=config) for config in configs]) == expected
