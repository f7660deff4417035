"""The report of a search: one self-contained HTML page, rendered from plain values.

`write_report` may be called as often as trials finish; with `best=None` the page says how far the search is.
Here are the values, their order and the charts; the words and the looks are in `templates/report.html.j2`.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from raypipe.metrics import ClassResult, Evaluation
from raypipe.store import write_atomically

Setting = str | int | float | bool | None
STATUSES = ("done", "running", "pruned", "pending", "failed")
"""What a trial can be, in the order of the leaderboard."""

NOT_MEASURED = "not measured"


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


@dataclass(frozen=True)
class TrialResult:
    """One row of the leaderboard. What is not known yet is NaN; `accuracy_interval` is 95 %."""

    trial_id: str
    status: str
    config: dict[str, Setting]
    epochs: tuple[EpochResult, ...]
    best_epoch: int
    score: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    wall_s: float
    message: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r} must be one of {', '.join(STATUSES)}")


@dataclass(frozen=True)
class ClassCount:
    """How much data a class has."""

    name: str
    train_clips: int
    test_clips: int
    groups: int


@dataclass(frozen=True)
class Miss:
    """A wrong answer, and the probability that the model gave it."""

    video_id: str
    truth: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class BestResult:
    """The chosen model: `validation` is out of fold; `misses` are of the test side if there is one."""

    trial_id: str
    validation: Evaluation
    test: Evaluation | None
    epochs: int
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class RunReport:
    """Everything on the page. `outcomes` counts videos by what extraction made of them."""

    name: str
    command: str
    metric: str
    """What `score` is; lower is better if it ends in "loss", else higher."""
    started: str
    wall_s: float
    features: str
    view: str
    backbone: str
    classes: tuple[ClassCount, ...]
    folds: int
    outcomes: dict[str, int]
    trials: tuple[TrialResult, ...]
    best: BestResult | None
    devices: str
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...]


def write_report(path: Path, run: RunReport) -> None:
    """Write `run` as one HTML file: whole or not at all, and equal bytes for equal values."""
    page = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a file name that is not UTF-8 arrives with lone surrogates
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))


def render(run: RunReport) -> str:
    """The page as text."""
    pages = Environment(
        loader=PackageLoader("raypipe"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for reading in (words, share, number, interval, duration, setting, measured_classes):
        pages.filters[reading.__name__] = reading
    board = leaderboard(run.trials, run.metric)
    best_id = run.best.trial_id if run.best else None
    curves = sorted((t for t in board if t.epochs), key=lambda t: t.trial_id != best_id)
    varying = varying_settings(run.trials)
    return pages.get_template("report.html.j2").render(
        run=run,
        board=board,
        best_id=best_id,
        varying=varying,
        common={k: v for trial in board for k, v in trial.config.items() if k not in varying},
        charts=learning_curves(curves, run.metric) if curves else (),
        legend=legend(curves),
    )


def leaderboard(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """Trials by status, then best score first, those without a score last."""
    sign = 1 if metric.endswith("loss") else -1

    def place(trial: TrialResult) -> tuple[int, bool, float]:
        unknown = math.isnan(trial.score)
        return STATUSES.index(trial.status), unknown, 0.0 if unknown else sign * trial.score

    return sorted(trials, key=place)


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


# --- how values read ---------------------------------------------------------------------------------------


def words(name: str) -> str:
    """balanced_accuracy → balanced accuracy."""
    return name.replace("_", " ")


def share(value: float) -> str:
    """0.873 → 87.3 %, with a space that does not break."""
    return f"{100 * value:.1f}\u00a0%" if math.isfinite(value) else NOT_MEASURED


def number(value: float) -> str:
    """0.8734 → 0.873."""
    return f"{value:.3f}" if math.isfinite(value) else NOT_MEASURED


def interval(bounds: tuple[float, float]) -> str:
    """(0.771, 0.934) → 77.1 to 93.4 %."""
    low, high = bounds
    return f"{100 * low:.1f} to {share(high)}" if math.isfinite(low + high) else NOT_MEASURED


def duration(seconds: float) -> str:
    """12.34 → 12.3 s; 754 → 12 min 34 s; 3725 → 1 h 2 min."""
    if not math.isfinite(seconds):
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Setting) -> str:
    """A setting as YAML would show it, floats short."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- learning curves ---------------------------------------------------------------------------------------

INK, ACCENT = "#010203", "#010204"
THEMED = {INK: "currentColor", ACCENT: "var(--accent)"}
"""Colours that stand in while drawing, and what the theme of the page then makes of them."""


@dataclass(frozen=True)
class Stroke:
    """How a line looks: width and dash (on, off, ...) in points."""

    colour: str
    width: float = 1.5
    dash: tuple[float, ...] = ()
    opacity: float = 1.0

    @property
    def css(self) -> str:
        dash = " ".join(map(str, self.dash)) or "none"
        colour = THEMED.get(self.colour, self.colour)
        return f"stroke:{colour};stroke-width:{self.width};stroke-dasharray:{dash};opacity:{self.opacity}"


BEST, TRAINING, OTHER = Stroke(ACCENT, 2.8), Stroke(ACCENT, dash=(2, 2)), Stroke(INK, 0.8, opacity=0.3)
# Okabe and Ito (2008): of their hues, those with a contrast of 3 or more on white and on near-black.
RIVALS = (
    Stroke("#d55e00"),
    Stroke("#009e73", dash=(8, 2)),
    Stroke("#cc79a7", dash=(4, 2)),
    Stroke(INK, 1.1, dash=(6, 2, 1, 2)),
)
Line = tuple[Stroke, list[int], list[float]]
"""A stroke, its epochs and its values."""


@dataclass(frozen=True)
class Chart:
    """An inline SVG and the sentence that says in numbers what it shows."""

    title: str
    finding: str
    svg: Markup


def strokes(n: int) -> list[Stroke]:
    """For `n` trials: the first stands out, the next few have a colour each, the rest are background."""
    return [BEST, *RIVALS, *[OTHER] * n][:n]


def legend(curves: Sequence[TrialResult]) -> list[tuple[str, Stroke]]:
    """A label for each kind of line."""
    named = [(t.trial_id, s) for t, s in zip(curves, strokes(len(curves)), strict=True) if s is not OTHER]
    if named:
        named.insert(1, (f"{named[0][0]}, training", TRAINING))
    rest = len(curves) + 1 - len(named)
    return [*named, (f"{rest} more", OTHER)] if named and rest else named


def learning_curves(curves: Sequence[TrialResult], metric: str) -> tuple[Chart, Chart]:
    """Loss and score on the validation folds per epoch, for trials with epochs, the best one first."""
    best, looks = curves[0], strokes(len(curves))
    epochs = [[e.epoch for e in trial.epochs] for trial in curves]
    losses = [[e.loss for e in trial.epochs] for trial in curves]
    scores = [[e.score for e in trial.epochs] for trial in curves]
    training: Line = (TRAINING, epochs[0], [e.train_loss for e in best.epochs])
    low = min(best.epochs, key=lambda e: e.loss if math.isfinite(e.loss) else math.inf)
    lowest = (
        f"Trial {best.trial_id} is lowest at epoch {low.epoch} of {epochs[0][-1]}: {number(low.loss)}, "
        f"with a training loss of {number(low.train_loss)}."
    )
    highest = f"Trial {best.trial_id} reaches {number(best.score)} at epoch {best.best_epoch}."
    others = [trial.score for trial in curves[1:] if math.isfinite(trial.score)]
    if others:
        highest += f" The other {len(others)}: {min(others):.3f} to {max(others):.3f}."
    loss_lines = [*zip(looks, epochs, losses, strict=True), training]
    score_lines = [*zip(looks, epochs, scores, strict=True)]
    return (
        Chart("Validation loss", lowest, draw("loss", loss_lines, mark=best.best_epoch)),
        Chart(f"Validation {words(metric)}", highest, draw("score", score_lines, mark=best.best_epoch)),
    )


def draw(key: str, lines: Sequence[Line], *, mark: int) -> Markup:
    """An SVG of values over epochs, a dot on the first line at epoch `mark`; `key` makes its ids unique."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "lines.scale_dashes": False}):
        figure = Figure(figsize=(4.9, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.7)
        axes.tick_params(which="both", length=0, colors=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        for order, (look, epochs, values) in enumerate(lines):
            dash, dot = (0, look.dash) if look.dash else "-", "o" if len(epochs) == 1 else ""
            (line,) = axes.plot(epochs, values, dot, color=look.colour, alpha=look.opacity, markersize=4)
            line.set(linestyle=dash, linewidth=look.width, zorder=10 + len(lines) - order)
        _, epochs, values = lines[0]
        marked = [y for x, y in zip(epochs, values, strict=True) if x == mark]
        axes.plot([mark] * len(marked), marked, "o", color=ACCENT, zorder=99)
        drawn = [y for _, _, values in lines for y in values if math.isfinite(y)]
        if drawn and 0 < 20 * min(drawn) < max(drawn):  # one diverging trial must not flatten the others
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # inside HTML, without XML declaration and document type
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family:[^;]*;", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    for stand_in, themed in THEMED.items():
        svg = svg.replace(stand_in, themed)
    return Markup(svg)
