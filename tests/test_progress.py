"""What the tally knows of its workers, and the line that shows it."""

import threading
import time
from collections.abc import Callable

import pytest

from raypipe import progress
from raypipe.progress import Reporter, Tally, progress_line, stalled_line


class Direct:
    """Stands for Ray's handle of a tally: a message is a call."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> "Message":
        return Message(self, name)


class Message:
    def __init__(self, direct: Direct, name: str) -> None:
        self._direct, self._name = direct, name

    def remote(self, *values: object) -> object:
        self._direct.heard.append(self._name)
        return getattr(self._direct.tally, self._name)(*values)


def wait_for(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(0.01)


def test_the_tally_counts_videos_and_knows_the_longest_step() -> None:
    tally = Tally()
    assert tally.begun_s() is None and tally.standing() == ({}, pytest.approx(0, abs=1))
    tally.begin("1", "one", "decoding", "a.mp4")
    tally.begin("2", "two", "decoding", "b.mp4")
    assert [step[:3] for step in tally.steps()] == [
        ("one", "decoding", "a.mp4"),
        ("two", "decoding", "b.mp4"),
    ]
    tally.rest("1", ["ok", "failed"])
    assert tally.counts() == {"ok": 1, "failed": 1}
    assert [worker for worker, *_ in tally.steps()] == ["two"] and tally.begun_s() is not None


def test_a_worker_that_takes_over_work_replaces_the_one_that_died_of_it() -> None:
    tally = Tally()
    tally.begin("1", "dead", "embedding", "a.mp4")
    tally.begin("2", "next", "embedding", "a.mp4")
    assert [worker for worker, *_ in tally.steps()] == ["next"]


def test_a_worker_in_place_of_one_that_died_is_at_its_own_step_alone() -> None:
    """What the dead one was at may be done elsewhere, in too short a time to be told."""
    tally = Tally()
    tally.begin("1", "dead", "embedding", "a.mp4")
    tally.begin("1", "next", "decoding", "b.mp4")
    assert [step[:3] for step in tally.steps()] == [("next", "decoding", "b.mp4")]


def test_short_steps_are_not_told_and_lasting_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LASTING_S", 0.2)
    direct = Direct()
    reporter = Reporter(direct, "actor")
    reporter.begin("decoding", "a.mp4", tell=True)
    for _ in range(100):
        reporter.begin("decoding", "a.mp4")
        reporter.begin("embedding", "a.mp4")
    wait_for(lambda: [step[1] for step in direct.tally.steps()] == ["embedding"])
    assert direct.heard.count("begin") < 20
    reporter.rest(["ok"])
    assert direct.tally.steps() == [] and direct.tally.counts() == {"ok": 1}


def test_a_step_that_has_ended_is_not_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LASTING_S", 1.0)
    direct = Direct()
    reporter = Reporter(direct, "actor")
    reporter.begin("decoding", "a.mp4")
    reporter.rest([])
    threading.Event().wait(1.5)
    assert direct.heard == ["rest"]


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, "videos 0/242 · starting"),
        (
            {"ok": 115, "partial": 1, "failed": 2},
            "videos 118/242 · ok 115 · partial 1 · failed 2 · 11.8/s · 0:11 left",
        ),
        ({"ok": 242}, "videos 242/242 · ok 242 · partial 0 · failed 0 · 24.2/s · 0:00 left"),
        # A worker died after it had told of eight, which another did again.
        ({"ok": 250}, "videos 242/242 · ok 250 · partial 0 · failed 0 · 24.2/s · 0:00 left"),
    ],
)
def test_progress_line(counts: dict[str, int], line: str) -> None:
    assert progress_line(counts, 242, 10.0) == line


def test_what_hangs_is_named_with_its_time() -> None:
    steps = [
        ("process 7 on head", "embedding", "a.mp4", 1000.0),
        ("process 8 on head", "decoding", "b.mp4", 1800.0),
    ]
    assert stalled_line(steps, 1900.0, "") == "embedding a.mp4 hangs for 15:00 (process 7 on head)"
    assert stalled_line([], 1900.0, "StageShards") == "StageShards hangs"
    assert "cannot start" in stalled_line([], 1900.0, "")
