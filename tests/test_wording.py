"""How values read on pages."""

import math
from datetime import UTC, datetime

import pytest

from raypipe.wording import duration, interval, moment, number, setting, share, words

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (share(0.8734), "87.3\u00a0%"),
        (share(NAN), "not measured"),
        (number(0.87349), "0.873"),
        (number(math.inf), "not measured"),
        (interval((0.771, 0.934)), "77.1 to 93.4\u00a0%"),
        (interval((NAN, NAN)), "not measured"),
        (duration(12.34), "12.3 s"),
        (duration(59.97), "1 min 0 s"),
        (duration(754), "12 min 34 s"),
        (duration(3725), "1 h 2 min"),
        (duration(NAN), "not measured"),
        (moment(datetime(2026, 1, 14, 9, 12, 30, tzinfo=UTC)), "2026-01-14 09:12 UTC"),
        (setting(None), "null"),
        (setting(True), "true"),
        (setting(16), "16"),
        (setting(0.00048231), "0.000482"),
        (setting("gru"), "gru"),
        (words("balanced_accuracy"), "balanced accuracy"),
        (words("auc"), "AUC"),
    ],
)
def test_how_values_read(text: str, expected: str) -> None:
    assert text == expected
