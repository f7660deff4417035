"""Batches made ready in a thread while the devices work on the ones before."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
Batch = TypeVar("Batch")

AHEAD = 2
"""Batches that wait ready: one to begin with at once, one being made."""


class Prefetched(Generic[Item, Batch]):
    """Iterates over `load(item)` of each item, in order; `waited_s` is how long its user waited for them.

    >>> batches = Prefetched(str, range(3))
    >>> list(batches), batches.waited_s < 10
    (['0', '1', '2'], True)
    """

    def __init__(self, load: Callable[[Item], Batch], items: Iterable[Item]) -> None:
        self._load, self._items = load, iter(items)
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            started_s = time.monotonic()
            pending = deque(thread.submit(self._load, item) for item in islice(self._items, AHEAD))
            while pending:
                batch = pending.popleft().result()
                pending.extend(thread.submit(self._load, item) for item in islice(self._items, 1))
                self.waited_s += time.monotonic() - started_s
                yield batch
                started_s = time.monotonic()
