"""The pool's threads: how many there are, who works next, when they end."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tests.support import (
    TIMEOUT,
    Gate,
    Subject,
    events,
    submit,
)
from wsgi_bg import (
    PoolRunner,
    workers,
)


def test_threads_end_when_they_were_idle_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_TIMEOUT", 0.01)
    runner, threads = PoolRunner(threads=2), list[threading.Thread]()
    barrier = threading.Barrier(2)

    def meet() -> None:
        threads.append(threading.current_thread())
        barrier.wait(TIMEOUT)

    for _ in range(2):  # they are started again when needed
        submit(runner, meet)
        submit(runner, meet)
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    assert len(set(threads)) == 4
    assert runner.drain(TIMEOUT) == []


def test_no_batch_is_lost_to_a_thread_whose_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_TIMEOUT", 0.0)
    runner = PoolRunner(threads=3, max_pending=None)
    for _ in range(2000):
        submit(runner, int)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 2000


def test_batches_that_wait_for_a_thread_begin_in_the_order_of_the_requests(gate: Gate) -> None:
    runner, seen = PoolRunner(threads=1), list[int]()
    submit(runner, gate.task)
    for number in range(5):
        submit(runner, partial(seen.append, number))
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert seen == [0, 1, 2, 3, 4]


def test_a_light_load_leaves_the_other_threads_idle() -> None:
    """The one that was idle last works next, so that the others come to their end."""
    runner, names = PoolRunner(), list[str]()
    barrier = threading.Barrier(3)

    def meet() -> None:
        barrier.wait(TIMEOUT)

    def note() -> None:
        names.append(threading.current_thread().name)

    for _ in range(3):
        submit(runner, meet)
    for _ in range(30):
        (done,) = events(1)
        submit(runner, note, done.set)
        assert done.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []
    assert len(set(names[-20:])) < 3


@pytest.mark.usefixtures("no_collection")
def test_an_idle_thread_holds_no_request() -> None:
    runner, subject = PoolRunner(), Subject()
    freed = subject.freed
    submit(runner, subject.touch)
    del subject
    assert freed.wait(TIMEOUT)
