import threading

import pytest

from raypipe.feeding import AHEAD, Prefetched


def test_batches_come_in_order_and_some_are_made_ahead():
    made, enough = [], threading.Event()

    def load(item: int) -> int:
        made.append(item)
        if len(made) == AHEAD + 1:
            enough.set()
        return item * 10

    batches = iter(Prefetched(load, range(6)))
    assert next(batches) == 0
    assert enough.wait(10), "while the first batch is in use, the next ones are made"
    assert len(made) == AHEAD + 1, "and no more than those"
    assert list(batches) == [10, 20, 30, 40, 50]


def test_nothing_to_load_gives_nothing():
    assert list(Prefetched(str, [])) == []


def test_an_error_in_the_thread_reaches_its_user():
    def load(item: int) -> float:
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        list(Prefetched(load, [1, 0, 1]))


def test_the_wait_is_measured():
    free = threading.Event()
    batches = Prefetched(lambda _: free.wait(0.05), [1])
    list(batches)
    assert batches.waited_s >= 0.04
