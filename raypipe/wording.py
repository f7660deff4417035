"""How values read on pages and in lines: shares, numbers, intervals, durations, settings."""

import math
from datetime import datetime

from raypipe.results import Setting

NOT_MEASURED = "not measured"
NO_INTERVAL = "of one source no interval is known"


def words(name: str) -> str:
    """balanced_accuracy → balanced accuracy; auc → AUC."""
    return "AUC" if name == "auc" else name.replace("_", " ")


def share(value: float) -> str:
    """0.873 → 87.3 %, with a space that does not break."""
    return f"{100 * value:.1f}\u00a0%" if math.isfinite(value) else NOT_MEASURED


def number(value: float) -> str:
    """0.8734 → 0.873."""
    return f"{value:.3f}" if math.isfinite(value) else NOT_MEASURED


def scored(value: float, bounds: tuple[float, float], name: str = "") -> str:
    """A score for a line of text.

    >>> scored(0.8474, (0.77, 0.909), "95 % interval "), scored(0.9, (0.842, 0.947))
    ('0.847 (95 % interval 0.770 to 0.909)', '0.900 (0.842 to 0.947)')
    >>> scored(0.8, (math.nan, math.nan)), scored(math.nan, (math.nan, math.nan))
    ('0.800 (of one source no interval is known)', 'not measured')
    """
    if not math.isfinite(value):
        return NOT_MEASURED
    low, high = bounds
    known = f"{name}{low:.3f} to {high:.3f}" if math.isfinite(low + high) else NO_INTERVAL
    return f"{value:.3f} ({known})"


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


def moment(at: datetime) -> str:
    """2026-01-14 09:12 UTC."""
    return f"{at:%Y-%m-%d %H:%M %Z}".strip()


def setting(value: Setting) -> str:
    """A setting as YAML would show it, floats short."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)
