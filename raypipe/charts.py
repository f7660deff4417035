"""Charts for pages: inline SVG that takes the page's colours, light and dark, the sentence that says what it
shows, and the numbers behind it as a table.

matplotlib draws with stand-in colours, which become the page's CSS variables afterwards.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from sklearn import metrics as sk

from raypipe.importance import is_log, is_numeric
from raypipe.metrics import wilson_interval
from raypipe.results import EpochResult, Setting, TrialResult
from raypipe.wording import number, setting, share, words

INK, ACCENT, WRONG, MUTED = "#010203", "#010204", "#010205", "#010206"
THEMED = {INK: "currentColor", ACCENT: "var(--accent)", WRONG: "var(--wrong)", MUTED: "var(--muted)"}
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
SECOND, REFERENCE = Stroke(ACCENT, 1.6, dash=(5, 2)), Stroke(WRONG, 1.6, dash=(1.5, 1.5))
# Okabe and Ito (2008): of their hues, those with a contrast of 3 or more on white and on near-black.
RIVALS = (
    Stroke("#d55e00"),
    Stroke("#009e73", dash=(8, 2)),
    Stroke("#cc79a7", dash=(4, 2)),
    Stroke(INK, 1.1, dash=(6, 2, 1, 2)),
)
Line = tuple[Stroke, Sequence[float], Sequence[float]]
"""A stroke, its x and its y."""
Legend = list[tuple[str, Stroke]]


@dataclass(frozen=True)
class Chart:
    """An inline SVG, the sentence that says in words what it shows, and the numbers: a header, then rows."""

    title: str
    finding: str
    svg: Markup
    table: tuple[tuple[str, ...], ...] = ()


def strokes(n: int) -> list[Stroke]:
    """For `n` trials: the first stands out, the next few have a colour each, the rest are background."""
    return [BEST, *RIVALS, *[OTHER] * n][:n]


def legend(curves: Sequence[TrialResult]) -> Legend:
    """A label for each kind of line."""
    named = [(t.trial_id, s) for t, s in zip(curves, strokes(len(curves)), strict=True) if s is not OTHER]
    if named:
        named.insert(1, (f"{named[0][0]}, training", TRAINING))
    rest = len(curves) + 1 - len(named)
    return [*named, (f"{rest} more", OTHER)] if named and rest else named


# --- learning curves ---------------------------------------------------------------------------------------


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

    def chart(
        key: str, title: str, finding: str, lines: list[Line], table: Sequence[tuple[str, ...]]
    ) -> Chart:
        def draw(axes: Axes) -> None:
            draw_epochs(axes, lines, mark=best.best_epoch)

        return Chart(title, finding, svg(key, title, finding, draw), tuple(table))

    named = curves[: 1 + len(RIVALS)]
    head = ("epoch", *(f"trial {trial.trial_id}" for trial in named))
    longest = range(max(len(trial.epochs) for trial in named))

    def cells(epoch: int, of: Callable[[EpochResult], float]) -> list[str]:
        return [number(of(t.epochs[epoch])) if epoch < len(t.epochs) else "" for t in named]

    def trained(epoch: int) -> str:
        return number(best.epochs[epoch].train_loss) if epoch < len(best.epochs) else ""

    return (
        chart(
            "loss",
            "Validation loss",
            lowest,
            [*zip(looks, epochs, losses, strict=True), training],
            [(*head, f"{best.trial_id}, training")]
            + [(str(1 + i), *cells(i, lambda e: e.loss), trained(i)) for i in longest],
        ),
        chart(
            "score",
            f"Validation {words(metric)}",
            highest,
            [*zip(looks, epochs, scores, strict=True)],
            [head] + [(str(1 + i), *cells(i, lambda e: e.score)) for i in longest],
        ),
    )


def draw_epochs(axes: Axes, lines: Sequence[Line], *, mark: int) -> None:
    """Values over epochs, a dot on the first line at epoch `mark`."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    for order, (look, epochs, values) in enumerate(lines):
        plot(axes, look, epochs, values, zorder=10 + len(lines) - order)
    _, epochs, values = lines[0]
    marked = [y for x, y in zip(epochs, values, strict=True) if x == mark]
    axes.plot([mark] * len(marked), marked, "o", color=ACCENT, zorder=99)
    drawn = [y for look, _, values in lines for y in values if look is not TRAINING and math.isfinite(y)]
    if drawn and 0 < 20 * min(drawn) < max(drawn):  # one diverging trial must not flatten the others
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


# --- what mattered -----------------------------------------------------------------------------------------


def slice_chart(name: str, trials: Sequence[TrialResult], metric: str, best_id: str | None) -> Chart:
    """The score of each trial over its value of one setting; pruned trials as far as they came."""
    scored = [t for t in trials if t.ended and math.isfinite(t.score) and name in t.config]
    column = [t.config[name] for t in scored]
    title, finding = words(name), _slice_finding(column, [t.score for t in scored])
    rows = [(t.trial_id, setting(t.config[name]), number(t.score), t.status) for t in scored]

    def draw(axes: Axes) -> None:
        numeric = is_numeric(column)
        labels = sorted({setting(value) for value in column})
        places = [float(v) if numeric else float(labels.index(setting(v))) for v in column]  # type: ignore[arg-type]
        for trial, x in zip(scored, places, strict=True):
            best = trial.trial_id == best_id
            done = trial.status == "done"
            (dot,) = axes.plot([x], [trial.score], "o", color=ACCENT if done else MUTED)
            dot.set(markersize=8 if best else 5.5, alpha=1 if best else 0.65, zorder=9 if best else 5)
            dot.set_markerfacecolor(ACCENT if done else "none")
        if not numeric:
            axes.set_xticks(range(len(labels)), [words(label) for label in labels])
            axes.set_xlim(-0.6, len(labels) - 0.4)
        elif is_log(column):
            axes.set_xscale("log")
            span = max(places) / min(places)
            if span < 5:  # hardly more than one of the ticks below
                axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
            elif span < 100:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: tick(x))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))

    table = (("trial", words(name), words(metric), "status"), *rows)
    return Chart(title, finding, svg(f"slice-{_key(name)}", title, finding, draw, size=(3.2, 2.3)), table)


def tick(value: float) -> str:
    """
    >>> tick(0.00005), tick(0.0005), tick(0.002), tick(20.0)
    ('5e-5', '5e-4', '0.002', '20')
    """
    return f"{value:g}" if value >= 0.001 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _slice_finding(column: Sequence[Setting], scores: Sequence[float]) -> str:
    """What the better half of the trials has in common."""
    best = int(np.argmax(scores))
    if is_numeric(column):
        values = sorted(float(value) for value in column)  # type: ignore[arg-type]
        tried = f"{setting(values[0])} to {setting(values[-1])}"
        return f"Tried {tried}; the best trial has {setting(column[best])}."
    means = {
        name: np.mean([s for s, value in zip(scores, column, strict=True) if setting(value) == name])
        for name in sorted({setting(value) for value in column})
    }
    listed = ", ".join(f"{words(name)} {mean:.3f}" for name, mean in means.items())
    return f"Means: {listed}. The best trial has {words(setting(column[best]))}."


# --- decisions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Probabilities of class 1 [n] against what is true [n], and how they are drawn."""

    name: str
    look: Stroke
    positive: NDArray[np.bool_]
    probabilities: NDArray[np.floating]

    @property
    def both_classes(self) -> bool:
        return bool(self.positive.any() and not self.positive.all())


def roc_chart(lines: Sequence[Scored], threshold: float | None) -> Chart:
    """True against false positives at every threshold; a dot where the stored one is."""
    curves: list[Line] = []
    rows: list[tuple[str, ...]] = []
    dots: list[tuple[Stroke, float, float]] = []
    said: list[tuple[str, float]] = []
    for line in lines:
        false, true, _ = sk.roc_curve(line.positive, line.probabilities)
        curves.append((line.look, false, true))
        area = float(sk.roc_auc_score(line.positive, line.probabilities))
        said.append((line.name, area))
        rows += [(line.name, number(x), number(y)) for x, y in thinned(false, true)]
        if threshold is not None and line.look is not REFERENCE:
            hit = line.probabilities >= threshold
            dots.append((line.look, float(hit[~line.positive].mean()), float(hit[line.positive].mean())))
    finding = f"Area under the curve: {listed(said)}."
    return _unit_square("roc", "ROC", finding, curves, dots, ("false positives", "true positives"), rows)


def precision_recall_chart(lines: Sequence[Scored], threshold: float | None) -> Chart:
    """Precision over recall at every threshold; a dot where the stored one is."""
    curves: list[Line] = []
    rows: list[tuple[str, ...]] = []
    dots: list[tuple[Stroke, float, float]] = []
    said: list[tuple[str, float]] = []
    for line in lines:
        precision, recall, _ = sk.precision_recall_curve(line.positive, line.probabilities)
        curves.append((line.look, recall, precision))
        said.append((line.name, float(sk.average_precision_score(line.positive, line.probabilities))))
        rows += [(line.name, number(x), number(y)) for x, y in thinned(recall, precision)]
        if threshold is not None and line.look is not REFERENCE:
            hit = line.probabilities >= threshold
            if hit.any():
                dots.append((line.look, float(hit[line.positive].mean()), float(line.positive[hit].mean())))
    finding = f"Average precision: {listed(said)}."
    names = ("recall", "precision")
    return _unit_square("precision-recall", "Precision and recall", finding, curves, dots, names, rows)


def listed(said: Sequence[tuple[str, float]]) -> str:
    """
    >>> listed([("test", 0.9), ("validation", 0.85)])
    'test 0.900, validation 0.850'
    >>> listed([(f"class {i}", i / 10) for i in range(9)])
    '0.000 (class 0) to 0.800 (class 8), in the middle 0.400'
    """
    if len(said) <= 1 + len(RIVALS):
        return ", ".join(f"{name} {value:.3f}" for name, value in said)
    low, high = min(said, key=lambda one: one[1]), max(said, key=lambda one: one[1])
    middle = float(np.median([value for _, value in said]))
    return f"{low[1]:.3f} ({low[0]}) to {high[1]:.3f} ({high[0]}), in the middle {middle:.3f}"


def thinned(x: NDArray[np.floating], y: NDArray[np.floating]) -> list[tuple[float, float]]:
    """At most some 20 points of a curve, both ends among them."""
    kept = np.unique(np.linspace(0, len(x) - 1, 20).round().astype(int))
    return [(float(x[i]), float(y[i])) for i in kept]


def _unit_square(
    key: str,
    title: str,
    finding: str,
    curves: Sequence[Line],
    dots: Sequence[tuple[Stroke, float, float]],
    names: tuple[str, str],
    rows: Sequence[tuple[str, ...]],
) -> Chart:
    def draw(axes: Axes) -> None:
        _square(axes, *names)
        for order, (look, x, y) in enumerate(curves):
            plot(axes, look, x, y, zorder=20 - order)
        for look, a, b in dots:
            filled = look.colour if not look.dash else "none"
            axes.plot([a], [b], "o", markersize=8, color=look.colour, markerfacecolor=filled, zorder=99)

    table = (("curve", *names), *rows)
    return Chart(title, finding, svg(key, title, finding, draw, size=(3.9, 3.6)), table)


def _square(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


# --- calibration -------------------------------------------------------------------------------------------

BINS = 8


@dataclass(frozen=True)
class ReliabilityBin:
    """Clips of about the same probability: its mean, and the share that is right."""

    clips: int
    said: float
    true: float
    true_interval: tuple[float, float]


def reliability(said: NDArray[np.floating], true: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """About equally many clips a bin, from the least sure up; never fewer than five, as far as there are."""
    order = np.argsort(said, kind="stable")
    count = max(1, min(BINS, len(said) // 5))
    bins = []
    for part in np.array_split(order, count):
        hits = int(true[part].sum())
        interval = wilson_interval(hits, len(part))
        bins.append(ReliabilityBin(len(part), float(said[part].mean()), hits / len(part), interval))
    return bins


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean distance of what is said to what is true, weighed by clips (Naeini et al. 2015)."""
    clips = sum(one.clips for one in bins)
    return sum(one.clips * abs(one.said - one.true) for one in bins) / clips


def reliability_chart(
    key: str, title: str, before: list[ReliabilityBin], after: list[ReliabilityBin], axis: str
) -> Chart:
    """How often what is said with a probability is true, before and after the temperature."""
    finding = (
        f"On average {share(calibration_error(before))} away from the truth before the temperature, "
        f"{share(calibration_error(after))} after."
    )

    def draw(axes: Axes) -> None:
        _square(axes, axis, "share that is true")
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.35, linewidth=0.8)
        plot(axes, REFERENCE, [one.said for one in before], [one.true for one in before], zorder=5)
        for one in after:
            axes.plot([one.said] * 2, one.true_interval, color=ACCENT, linewidth=1.2, alpha=0.55, zorder=6)
        plot(axes, BEST, [one.said for one in after], [one.true for one in after], zorder=7)
        axes.plot([b.said for b in after], [b.true for b in after], "o", color=ACCENT, markersize=5, zorder=8)

    table = [("temperature", "clips", "probability", "true", "95 % interval")]
    for when, bins in (("before", before), ("after", after)):
        for one in bins:
            low, high = one.true_interval
            table.append(
                (when, str(one.clips), number(one.said), share(one.true), f"{share(low)} to {share(high)}")
            )
    return Chart(title, finding, svg(key, title, finding, draw, size=(3.9, 3.6)), tuple(table))


# --- drawing -----------------------------------------------------------------------------------------------


def plot(axes: Axes, look: Stroke, x: Sequence[float], y: Sequence[float], *, zorder: float) -> None:
    dash, dot = (0, look.dash) if look.dash else "-", "o" if len(x) == 1 else ""
    (line,) = axes.plot(x, y, dot, color=look.colour, alpha=look.opacity, markersize=4)
    line.set(linestyle=dash, linewidth=look.width, zorder=zorder)


def svg(
    key: str,
    title: str,
    finding: str,
    draw: Callable[[Axes], None],
    *,
    size: tuple[float, float] = (4.9, 3.0),
) -> Markup:
    """What `draw` puts on the axes, as inline SVG with title and description; `key` makes its ids unique."""
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": key,
            "lines.scale_dashes": False,
            "text.parse_math": False,  # names of classes are no formulas
        }
    ):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.7)
        axes.tick_params(which="both", length=0, colors=INK)
        draw(axes)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
        axes.tick_params(which="both", length=0, colors=INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]  # inside HTML, without XML declaration and document type
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>| font-family:[^;]*;", "", drawn, flags=re.DOTALL
    )
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", drawn)
    for stand_in, themed in THEMED.items():
        drawn = drawn.replace(stand_in, themed)
    described = (
        f'<svg role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(finding)}</desc>'
    )
    head, _, rest = drawn.partition(">")
    return Markup(
        head.replace("<svg", described.partition(">")[0], 1) + ">" + described.partition(">")[2] + rest
    )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
