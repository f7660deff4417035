"""What goes on in an extraction while it does: the tally of its workers, and the live line.

Nothing here imports Ray; `extract.py` makes an actor of the tally.
"""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from raypipe.console import LiveLine, duration
from raypipe.outcomes import OUTCOMES


class Tally:
    """An actor that knows what goes on: finished videos by outcome, and what each worker is busy with."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._steps: dict[str, tuple[str, str, str, float]] = {}
        self._begun_s: float | None = None

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def begin(self, actor: str, worker: str, step: str, what: str) -> None:
        """`actor`: whose process the worker is, perhaps in place of one that died at whatever step."""
        # The same work again: the worker that had it has died, and where its actor is now has nothing to do.
        again = [other for other, busy in self._steps.items() if busy[1:3] == (step, what)]
        for other in again:
            del self._steps[other]
        self._steps[actor] = (worker, step, what, time.time())
        self._begun_s = self._begun_s or time.time()

    def rest(self, actor: str, outcomes: list[str]) -> None:
        self._steps.pop(actor, None)
        self._counts.update(outcomes)

    def standing(self) -> tuple[dict[str, int], float]:
        """Finished videos by outcome, and seconds since the first step began."""
        return self.counts(), time.time() - (self._begun_s or time.time())

    def begun_s(self) -> float | None:
        """When the first step began, in seconds of the clock."""
        return self._begun_s

    def steps(self) -> list[tuple[str, str, str, float]]:
        """Worker, step, videos and the time it began, the longest first."""
        return sorted(self._steps.values(), key=lambda step: step[3])


class Reporter:
    """Tells the tally what this worker is busy with, so that work that hangs or kills has a name.

    There is one tally for the whole cluster, and each message costs it a millisecond. So it hears of a video
    when work on it begins, and of the steps within not more than once a second.
    """

    def __init__(self, tally: Any, actor: str) -> None:
        """`actor`: the id that stays when Ray starts this process anew."""
        self._tally, self._actor = tally, actor
        self._worker = f"process {os.getpid()} on {socket.gethostname()}"
        self._lock = threading.Lock()
        self._untold: tuple[str, str] | None = None
        self._told_s = 0.0
        threading.Thread(target=self._tell_lasting, daemon=True).start()

    def begin(self, step: str, what: str, *, tell: bool = False) -> None:
        """The worker's step until its next one, or `rest`; the tally hears of it at once or in a second."""
        with self._lock:
            self._untold = (step, what)
            if tell:
                self._tell()

    def rest(self, outcomes: list[str]) -> None:
        """The worker waits for others; since it did so last, videos have ended with these outcomes."""
        with self._lock:
            self._untold = None
            self._tally.rest.remote(self._actor, outcomes)

    def _tell_lasting(self) -> None:
        while True:
            time.sleep(LASTING_S / 2)
            with self._lock:
                if time.monotonic() - self._told_s >= LASTING_S:
                    self._tell()

    def _tell(self) -> None:
        if self._untold:
            self._tally.begin.remote(self._actor, self._worker, *self._untold)
            self._untold, self._told_s = None, time.monotonic()


LASTING_S = 1.0
"""Between two messages about steps."""


def stalled_line(steps: list[tuple[str, str, str, float]], now_s: float, stages: str) -> str:
    """The step that hangs, as it told the tally, or else the stages that were at work.

    >>> stalled_line([("process 7 on head", "embedding", "a.mp4", 1000.0)], 1900.0, "ExtractClips")
    'embedding a.mp4 hangs for 15:00 (process 7 on head)'
    >>> stalled_line([], 1900.0, "StageShards")
    'StageShards hangs'
    """
    if steps:
        worker, step, what, since_s = steps[0]
        return f"{step} {what} hangs for {duration(now_s - since_s)} ({worker})"
    if stages:
        return f"{stages} hangs"
    return "no worker is at work; they cannot start, or the cluster lacks room for them"


class Progress:
    """Shows finished videos as one live line until it is closed.

    `standing` gives what `Tally.standing` does, or None while the cluster is too busy to say.
    """

    def __init__(self, standing: Callable[[], tuple[dict[str, int], float] | None], total: int) -> None:
        self._standing, self._total = standing, total
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        line = LiveLine()
        while not self._closed.wait(0.5):
            if (standing := self._standing()) is not None:
                counts, elapsed_s = standing
                line.show(progress_line(counts, self._total, elapsed_s))
        line.close()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def progress_line(counts: dict[str, int], total: int, elapsed_s: float) -> str:
    """`elapsed_s`: since the first video was begun.

    >>> progress_line({"ok": 115, "partial": 1, "failed": 2}, 242, 19.3)
    'videos 118/242 · ok 115 · partial 1 · failed 2 · 6.1/s · 0:20 left'
    """
    done = min(total, sum(counts.values()))  # what is done twice after a fault counts twice
    outcomes = " · ".join(f"{name} {counts.get(name, 0)}" for name in OUTCOMES)
    if not done:
        return f"videos 0/{total} · starting"
    rate = done / elapsed_s
    return f"videos {done}/{total} · {outcomes} · {rate:.1f}/s · {duration((total - done) / rate)} left"
