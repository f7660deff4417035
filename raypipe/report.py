"""The report of a search: one self-contained HTML page, rendered from plain values.

`write_report` may be called as often as trials finish; with `best=None` the page says how far the search is.
Here are the values, their order and the charts; the words and the looks are in `templates/report.html.j2`.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from raypipe.charts import (
    BEST,
    OTHER,
    REFERENCE,
    RIVALS,
    SECOND,
    Chart,
    Legend,
    Scored,
    learning_curves,
    legend,
    precision_recall_chart,
    reliability,
    reliability_chart,
    roc_chart,
    slice_chart,
)
from raypipe.files import write_atomically
from raypipe.importance import FEWEST_TRIALS, Importance
from raypipe.metrics import ClassResult, Evaluation, wilson_interval
from raypipe.results import BestResult, TrialResult, Yardstick, leaderboard, lineage
from raypipe.storage import Place
from raypipe.wording import duration, interval, moment, number, setting, share, words

NAN = math.nan
SLICES_SHOWN = 9


@dataclass(frozen=True)
class ClassCount:
    """How much data a class has."""

    name: str
    train_clips: int
    test_clips: int
    groups: int


@dataclass(frozen=True)
class Miss:
    """A wrong answer, the probability that the model gave it, and what the clip shows."""

    video_id: str
    truth: str
    predicted: str
    probability: float
    jpeg: bytes = b""
    """A strip of its frames."""
    missing: str = ""
    """Why there is none."""

    @property
    def picture(self) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


@dataclass(frozen=True)
class Side:
    """What the best model says of the clips of one side."""

    title: str
    how: str
    labels: NDArray[np.int64]
    """[n] class numbers."""
    before: NDArray[np.floating]
    """[n, C] probabilities as the network gave them, before the temperature."""
    after: NDArray[np.floating]
    """[n, C], calibrated."""
    yardstick: NDArray[np.floating]
    """[n, C], of the yardstick."""


@dataclass(frozen=True)
class GroupResult:
    """The clips of one group: how many, how many answered rightly, and on which side they stand."""

    name: str
    side: str
    clips: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.clips

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.clips)


@dataclass(frozen=True)
class LookAlike:
    """Two clips on different sides that look alike, and whose they are."""

    first: str
    second: str
    groups: tuple[str, str]
    sides: tuple[str, str]
    cosine: float


@dataclass(frozen=True)
class LookAlikes:
    """The pairs of clips above the cut-off on the cosine, of so many compared."""

    view: str
    cut_off: float
    compared: int
    count: int
    shown: tuple[LookAlike, ...]


@dataclass(frozen=True)
class Cost:
    """What the search took; NaN where it was not measured."""

    trials_s: float
    """All trials together."""
    startup_s: float
    """Of it, until the first step of training."""
    cpu_hours: float
    """Claimed."""
    gpu_hours: float
    energy_kwh: float
    yardstick_s: float
    extraction_s: float
    extraction_cpu_s: float


@dataclass(frozen=True)
class Findings:
    """What takes some seconds to find out, once the best model is known."""

    sides: tuple[Side, ...]
    importances: tuple[Importance, ...]
    groups: tuple[GroupResult, ...]
    """The worst first; empty where the videos have no groups."""
    misses: tuple[Miss, ...]
    """Of the test side if there is one."""
    look_alikes: LookAlikes
    durations_s: tuple[tuple[float, float, float], ...]
    """Of each class the shortest, the middle and the longest clip."""
    cost: Cost


@dataclass(frozen=True)
class Commands:
    """What to type for the same again, to go on, and to use the model."""

    repeat: str
    resume: str
    predict: str


@dataclass(frozen=True)
class RunReport:
    """Everything on the page. `outcomes` counts clips by what extraction made of them."""

    name: str
    commands: Commands
    config: str
    """All that was asked, as YAML."""
    metric: str
    """What `score` is; higher is better."""
    started: datetime
    wall_s: float
    features: str
    view: str
    backbone: str
    classes: tuple[ClassCount, ...]
    folds: int
    validation_how: str
    """How the validation side was judged, as `Side.how`."""
    outcomes: dict[str, int]
    trials: tuple[TrialResult, ...]
    best: BestResult | None
    yardstick: Yardstick | None
    findings: Findings | None
    """Known together with `best`."""
    devices: str
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...]


def write_report(path: Place, run: RunReport) -> None:
    """Write `run` as one HTML file: whole or not at all, and equal bytes for equal values."""
    page = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a file name that is not UTF-8 arrives with lone surrogates
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))


def page_environment() -> Environment:
    """Where pages and what they share (style.css) are found, and how their values are escaped."""
    return Environment(
        loader=PackageLoader("raypipe"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: RunReport) -> str:
    """The page as text."""
    pages = page_environment()
    for reading in (
        words,
        share,
        number,
        interval,
        span,
        signed,
        number1,
        hours,
        energy,
        duration,
        moment,
        setting,
        measured_classes,
        lineage,
    ):
        pages.filters[reading.__name__] = reading
    board = leaderboard(run.trials)
    best_id = run.best.trial_id if run.best else None
    curves = sorted((t for t in board if t.epochs), key=lambda t: t.trial_id != best_id)
    varying = varying_settings(run.trials)
    scored = [trial for trial in board if trial.counts]
    return pages.get_template("report.html.j2").render(
        run=run,
        found=run.findings,
        board=board,
        best_id=best_id,
        varying=varying,
        common={k: v for trial in board for k, v in trial.config.items() if k not in varying},
        charts=learning_curves(curves, run.metric) if curves else (),
        legend=legend(curves),
        slices=slices(run, scored, varying),
        fewest_trials=FEWEST_TRIALS,
        scored=len(scored),
        decisions=decision_charts(run),
        calibration=calibration_charts(run),
        gain=run.best.gain_over_yardstick(run.metric) if run.best else None,
        nan=math.nan,
    )


def slices(run: RunReport, scored: Sequence[TrialResult], varying: Sequence[str]) -> list[Chart]:
    """The score over each setting, those first that matter most; drawn once all trials have ended."""
    if run.findings is None or run.best is None or len(scored) < 3:
        return []
    places = {row.setting: place for place, row in enumerate(run.findings.importances)}
    names = sorted(varying, key=lambda name: places.get(name, len(places)))
    return [slice_chart(name, scored, run.metric, run.best.trial_id) for name in names[:SLICES_SHOWN]]


@dataclass(frozen=True)
class Decisions:
    """Charts that share a legend."""

    charts: tuple[Chart, ...]
    legend: Legend


def decision_charts(run: RunReport) -> Decisions | None:
    """ROC and precision-recall: of two classes each side and the yardstick, of more one line a class."""
    if run.findings is None or run.best is None:
        return None
    names = [one.name for one in run.classes]
    sides = run.findings.sides
    last = sides[-1]
    if len(names) == 2:
        looks = [BEST, SECOND][: len(sides)]
        lines = [
            Scored(side.title.lower(), look, side.labels == 1, side.after[:, 1])
            for side, look in zip(reversed(sides), looks, strict=True)
        ]
        lines.append(
            Scored(f"yardstick, {last.title.lower()}", REFERENCE, last.labels == 1, last.yardstick[:, 1])
        )
    else:
        looks = [BEST, *RIVALS, *[OTHER] * len(names)]
        lines = [
            Scored(name, looks[number], last.labels == number, last.after[:, number])
            for number, name in enumerate(names)
        ]
    lines = [line for line in lines if line.both_classes]
    if not lines:
        return None
    threshold = run.best.calibration.threshold
    charts = (roc_chart(lines, threshold), precision_recall_chart(lines, threshold))
    named: Legend = [(line.name, line.look) for line in lines if line.look is not OTHER]
    rest = len(lines) - len(named)
    return Decisions(charts, [*named, (f"{rest} more", OTHER)] if rest else named)


def calibration_charts(run: RunReport) -> tuple[Chart, ...]:
    """Reliability of each side: of two classes of the second's probability, else of the most probable's."""
    if run.findings is None:
        return ()
    names = [one.name for one in run.classes]
    charts: list[Chart] = []
    for side in run.findings.sides:
        if len(names) == 2:
            axis, true = f"probability of {names[1]}", side.labels == 1
            before, after = (reliability(p[:, 1], true) for p in (side.before, side.after))
        else:
            axis = "probability of the answer"
            before, after = (
                reliability(p.max(axis=1), p.argmax(axis=1) == side.labels) for p in (side.before, side.after)
            )
        title = f"{side.title} ({side.how})"
        charts.append(reliability_chart(f"calibration-{len(charts)}", title, before, after, axis))
    return tuple(charts)


def span(bounds: tuple[float, float]) -> str:
    """
    >>> span((0.7714, 0.934))
    '0.771 to 0.934'
    """
    low, high = bounds
    return f"{number(low)} to {number(high)}" if math.isfinite(low + high) else number(math.nan)


def number1(value: float) -> str:
    """
    >>> number1(2.04), number1(math.nan)
    ('2.0', 'not measured')
    """
    return f"{value:.1f}" if math.isfinite(value) else number(value)


def hours(value: float) -> str:
    """
    >>> hours(0.1234), hours(math.nan)
    ('0.12 h', 'not measured')
    """
    return f"{value:.2f} h" if math.isfinite(value) else number(value)


def energy(value: float) -> str:
    """
    >>> energy(1.5), energy(math.nan)
    ('1.500 kWh', 'not measured')
    """
    return f"{value:.3f} kWh" if math.isfinite(value) else number(value)


def signed(value: float) -> str:
    """
    >>> signed(0.0512), signed(-0.2)
    ('+0.051', '\u22120.200')
    """
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else number(value)


def varying_settings(trials: Sequence[TrialResult]) -> list[str]:
    """Names of the settings that are not the same in all trials, in the order they first appear."""
    configs = [trial.config for trial in trials if trial.config]
    names = dict.fromkeys(name for config in configs for name in config)
    # as text, 1 and True differ; a setting that only some trials have varies, too
    return [n for n in names if len({repr(c[n]) if n in c else None for c in configs}) > 1]


def measured_classes(evaluation: Evaluation) -> list[ClassResult]:
    """The classes, NaN where there is nothing to divide by: no clip of the class, or none predicted as it."""
    nan, rows = math.nan, []
    for row, predicted in zip(evaluation.classes, zip(*evaluation.confusion, strict=True), strict=True):
        row = row if row.clips else replace(row, recall=nan, recall_interval=(nan, nan), f1=nan)
        rows.append(row if sum(predicted) else replace(row, precision=nan))
    return rows
