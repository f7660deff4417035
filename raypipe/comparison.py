"""Ways to train, side by side: each figure with its interval and its paired difference to the first way.

Plain values in, one `Comparison` out, and that as JSON, Markdown and a page.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raypipe.files import write_atomically, write_json
from raypipe.metrics import Interval, group_weights, middle_95, weighted_scores
from raypipe.report import page_environment
from raypipe.results import Setting
from raypipe.storage import Place
from raypipe.wording import NOT_MEASURED, duration, moment, number, setting, share, words

RESAMPLES = 2000


@dataclass(frozen=True)
class RunFigures:
    """What one training of all folds came to. None: not measured."""

    way: str
    seed: int
    probabilities: NDArray[np.float32]
    """[N, C] out of fold, NaN for clips that take no part."""
    epochs: int
    best_epoch: int
    batch_size: int
    epoch_s: float
    """Seconds an epoch of all folds, median over the epochs after the first, which compiles."""
    wall_s: float
    """Seconds of all epochs, compiling and predicting included."""
    data_share: float | None
    """Share of the epochs' time, the first one left out, in which steps waited for clips."""
    gpu_use: float | None
    gpu_memory_mb: float | None
    energy_j: float | None


@dataclass(frozen=True)
class Cell:
    """A figure of one way to train: the mean over seeds. Intervals are 95 %; None: not measured."""

    value: float | None
    interval: Interval | None = None
    difference: float | None = None
    """To the first way, seed by seed and clip by clip."""
    difference_interval: Interval | None = None


@dataclass(frozen=True)
class Row:
    """One figure for all ways to train."""

    name: str
    unit: str
    """share, number, seconds, mebibytes, joules, count, or money."""
    better: str
    """higher, lower, or empty where neither is."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Way:
    """One column: a way to train, and in what it differs from the first."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Everything that comparison.json, .md and .html say."""

    name: str
    command: str
    started: datetime
    wall_s: float
    features: str
    clips: int
    groups: int
    folds: int
    classes: dict[str, int]
    """Clips of each class that were compared on."""
    seeds: tuple[int, ...]
    devices: str
    versions: dict[str, str]
    ways: tuple[Way, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


# --- figures ----------------------------------------------------------------------------------------


def quality_rows(
    runs: Mapping[str, Sequence[RunFigures]],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    class_names: Sequence[str],
    *,
    seed: int,
) -> list[Row]:
    """Scores on out-of-fold predictions, means over seeds; intervals from resampling groups, the same
    resamples for all ways, so that a difference is judged on the same clips."""
    ways = list(runs)
    taking_part = ~np.isnan(runs[ways[0]][0].probabilities[:, 0])
    weights = group_weights(
        [g for g, part in zip(groups, taking_part, strict=True) if part], RESAMPLES, seed=seed
    )
    once = np.ones((1, weights.shape[1]), np.int64)

    def scores(weights: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.float64]]]:
        def of_way(way: str) -> dict[str, NDArray[np.float64]]:
            each = [
                weighted_scores(labels[taking_part], run.probabilities[taking_part], weights)
                for run in runs[way]
            ]
            return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}

        return {way: of_way(way) for way in ways}

    points, resampled = scores(once), scores(weights)

    def cell(way: str, name: str) -> Cell:
        value, spread = float(points[way][name][0]), resampled[way][name]
        if way == ways[0]:
            return Cell(value, _interval(spread))
        first, first_spread = points[ways[0]][name], resampled[ways[0]][name]
        return Cell(value, _interval(spread), value - float(first[0]), _interval(spread - first_spread))

    named = {
        "accuracy": ("accuracy", "share"),
        "precision": ("precision, mean of classes", "share"),
        "recall": ("recall, mean of classes", "share"),
        "auc": ("ROC AUC", "number"),
    }
    named |= {f"recall_of_{i}": (f"accuracy on {name}", "share") for i, name in enumerate(class_names)}
    return [
        Row(title, unit, "higher", tuple(cell(way, name) for way in ways))
        for name, (title, unit) in named.items()
    ]


def cost_rows(
    runs: Mapping[str, Sequence[RunFigures]],
    *,
    price_per_kwh: float | None,
    price_per_hour: float | None,
    currency: str,
    extraction_s: tuple[float | None, float | None],
) -> list[Row]:
    """What training took: means over seeds, intervals by Student's t over seeds, differences seed by seed.

    `extraction_s` are the seconds of a full extraction, which the first way repeats, and of a re-run.
    """

    def money(run: RunFigures) -> float | None:
        parts = []
        if price_per_kwh is not None:
            parts.append(None if run.energy_j is None else run.energy_j / 3.6e6 * price_per_kwh)
        if price_per_hour is not None:
            parts.append(run.wall_s / 3600 * price_per_hour)
        return None if not parts or None in parts else sum(part for part in parts if part is not None)

    figures: list[tuple[str, str, str, Callable[[RunFigures], float | None]]] = [
        ("time per epoch", "seconds", "lower", lambda run: run.epoch_s),
        ("time in total", "seconds", "lower", lambda run: run.wall_s),
        ("epochs", "count", "", lambda run: run.epochs),
        ("waiting for data", "share", "lower", lambda run: run.data_share),
        ("GPU use", "share", "higher", lambda run: run.gpu_use),
        ("memory per GPU", "mebibytes", "lower", lambda run: run.gpu_memory_mb),
        ("batch", "count", "", lambda run: run.batch_size),
        ("energy", "joules", "lower", lambda run: run.energy_j),
        (f"cost ({currency})", "money", "lower", money),
    ]
    rows = []
    for name, unit, better, figure in figures:
        values = {way: [figure(run) for run in runs[way]] for way in runs}
        first = next(iter(values.values()))
        cells = [Cell(*_over_seeds(first, least=0.0))]
        for those in list(values.values())[1:]:
            both = [None if a is None or b is None else b - a for a, b in zip(first, those, strict=True)]
            cells.append(Cell(*_over_seeds(those, least=0.0), *_over_seeds(both)))
        rows.append(Row(name, unit, better, tuple(cells)))
    full_s, again_s = extraction_s
    saved = None if full_s is None or again_s is None else again_s - full_s
    again = [Cell(full_s)] * (len(runs) - 1) + [Cell(again_s, None, saved)]
    return [*rows, Row("features, run again", "seconds", "lower", tuple(again))]


def _interval(values: NDArray[np.float64]) -> Interval | None:
    """The middle 95 % of resampled values; None where all lacked a class."""
    low, high = middle_95(values)
    return None if math.isnan(low) else (low, high)


def _over_seeds(
    values: Sequence[float | None], *, least: float = -math.inf
) -> tuple[float | None, Interval | None]:
    """Mean, and its 95 % interval by Student's t where there are several values that differ, cut at the
    `least` that the figure can be.

    >>> _over_seeds([1.0, 3.0]), _over_seeds([2.0]), _over_seeds([1.0, None])  # doctest: +ELLIPSIS
    ((2.0, (-10.70..., 14.70...)), (2.0, None), (None, None))
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    mean = float(np.mean(known))
    if len(set(known)) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known)))
    return mean, (max(mean - half, least), mean + half)


# --- how figures read -------------------------------------------------------------------------------


def figure(value: float | None, unit: str) -> str:
    """A figure in its unit, or that it was not measured.

    >>> figure(0.5, "share"), figure(None, "share"), figure(83.2, "seconds"), figure(12, "count")
    ('50.0\\xa0%', 'not measured', '1\\xa0min\\xa023\\xa0s', '12')
    """
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if unit == "seconds":
        return f"{value:.2f}\u00a0s" if value < 10 else duration(value).replace(" ", "\u00a0")
    return _UNITS[unit](value)


_UNITS: dict[str, Callable[[float], str]] = {
    "share": share,
    "number": number,
    "mebibytes": lambda value: f"{value:,.0f}\u00a0MiB",
    "joules": lambda value: f"{value / 1000:,.2f}\u00a0kJ",
    "count": lambda value: f"{value:.3g}",
    "money": lambda value: f"{value:.4f}",
}


def bounds(interval: Interval, unit: str) -> str:
    """
    >>> bounds((0.7, 0.81), "share"), bounds((0.1, 0.2), "number"), bounds((1.0, 2.0), "seconds")
    ('70.0 to 81.0\\xa0%', '0.100 to 0.200', '1.00\\xa0s to 2.00\\xa0s')
    """
    low, high = interval
    return f"{_bare(low, unit)} to {figure(high, unit)}"


def _bare(value: float, unit: str) -> str:
    """Without its unit, where the other end of an interval says it."""
    return f"{100 * value:.1f}" if unit == "share" else figure(value, unit)


def change(value: float | None, unit: str) -> str:
    """A difference with its sign; of shares in percentage points.

    >>> change(0.051, "share"), change(-0.02, "number"), change(-1.5, "seconds"), change(None, "share")
    ('+5.1 points', '-0.020', '-1.50\\xa0s', 'not measured')
    """
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if unit == "share":
        return f"{100 * value:+.1f} points"
    sign = "-" if value < 0 else "+"
    return sign + figure(abs(value), unit)


def change_bounds(interval: Interval, unit: str) -> str:
    """
    >>> change_bounds((-0.01, 0.05), "share"), change_bounds((-0.01, 0.05), "number")
    ('-1.0 to +5.0', '-0.010 to +0.050')
    """
    low, high = interval
    if unit == "share":
        return f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{change(low, unit)} to {change(high, unit)}"


def verdict(row: Row, cell: Cell) -> str:
    """better, worse, or nothing where the interval of the difference holds 0 or there is none."""
    if not row.better or cell.difference_interval is None:
        return ""
    low, high = cell.difference_interval
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) == (row.better == "higher") else "worse"


# --- files ------------------------------------------------------------------------------------------


def write_comparison(folder: Place, comparison: Comparison) -> None:
    """comparison.json, .md and .html in the folder."""
    write_json(
        folder / "comparison.json",
        asdict(comparison) | {"started": comparison.started.isoformat(timespec="seconds")},
    )
    for name, text in (("md", markdown(comparison)), ("html", render(comparison))):
        write_atomically(folder / f"comparison.{name}", text.encode("utf-8", errors="backslashreplace"))


def markdown(comparison: Comparison) -> str:
    """The table with all ways as columns, the notes and how to repeat it."""
    ways = [way.name for way in comparison.ways]
    header = ["", *ways, f"{ways[-1]} against {ways[0]}"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in comparison.rows:
        last = row.cells[-1]
        cells = [_with(figure(c.value, row.unit), c.interval, bounds, row.unit) for c in row.cells]
        against = _with(change(last.difference, row.unit), last.difference_interval, change_bounds, row.unit)
        lines.append(_line([row.name, *cells, against]))
    seeds = ", ".join(map(str, comparison.seeds))
    facts = (
        f"{comparison.clips} clips in {comparison.groups} groups "
        f"({', '.join(f'{count} {name}' for name, count in comparison.classes.items())}), "
        f"{comparison.folds} folds, seeds {seeds}, {comparison.devices}. "
        f"In brackets: 95 % intervals."
    )
    notes = [f"- {note}" for note in comparison.notes]
    return "\n".join(
        [f"# {comparison.name}", "", facts, "", *lines, "", *notes, "", f"`{comparison.command}`", ""]
    )


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", r"\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _with(text: str, interval: Interval | None, read: Callable[[Interval, str], str], unit: str) -> str:
    return text if interval is None else f"{text} ({read(interval, unit)})"


def render(comparison: Comparison) -> str:
    """The page as text."""
    pages = page_environment()
    for reading in (figure, bounds, change, change_bounds, verdict, moment, setting, words):
        pages.filters[reading.__name__] = reading
    return pages.get_template("comparison.html.j2").render(
        comparison=comparison,
        rows={row.name: row for row in comparison.rows},
        differing=differing_settings(comparison.ways),
        reach_of=reach_of,
    )


def reach_of(row: Row) -> float:
    """The farthest end of the differences' intervals from 0: where a drawing of them must end."""
    ends = [end for cell in row.cells[1:] for end in (cell.difference_interval or (cell.difference or 0.0,))]
    return max((abs(end) for end in ends), default=0.0) or 1.0


def differing_settings(ways: Sequence[Way]) -> list[tuple[str, Setting, Setting]]:
    """Fields that are not the same in the first and the last way, with both values."""
    first, last = ways[0].settings, ways[-1].settings
    return [(name, first[name], last[name]) for name in first if first[name] != last[name]]
