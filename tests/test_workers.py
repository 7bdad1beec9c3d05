"""The pool's threads: how many there are, who works next, when they end."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

from tests.support import (
    TIMEOUT,
    Gate,
    Subject,
    submit,
)
from wsgi_bg import (
    PoolRunner,
    workers,
)


def test_threads_end_when_they_were_idle_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_TIMEOUT", 0.01)
    runner, threads = PoolRunner(threads=2), list[threading.Thread]()
    barrier = threading.Barrier(3)  # this thread too: it joins the others

    def meet() -> None:
        threads.append(threading.current_thread())
        barrier.wait(TIMEOUT)

    for _ in range(2):  # they are started again when needed
        submit(runner, meet)
        submit(runner, meet)
        barrier.wait(TIMEOUT)
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


class Idle(list[Any]):
    """The idle workers of a pool; ``came`` counts those that became idle."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Semaphore(0)

    def append(self, worker: Any) -> None:
        super().append(worker)
        self.came.release()


def test_a_light_load_leaves_the_other_threads_idle() -> None:
    """The thread that became idle last works next, so that the others reach their end."""
    runner, names, idle = PoolRunner(), list[str](), Idle()
    runner._crews.get()._workers._idle = idle
    barrier = threading.Barrier(3)

    def meet() -> None:
        barrier.wait(TIMEOUT)

    def note() -> None:
        names.append(threading.current_thread().name)

    for _ in range(3):
        submit(runner, meet)
    for _ in range(3):
        assert idle.came.acquire(timeout=TIMEOUT)
    for _ in range(30):
        submit(runner, note)
        assert idle.came.acquire(timeout=TIMEOUT)  # a thread is busy for a while after its task
    assert len(names) == 30
    assert len(set(names)) == 1


@pytest.mark.usefixtures("no_collection")
def test_an_idle_thread_holds_no_request() -> None:
    runner, subject = PoolRunner(), Subject()
    freed = subject.freed
    submit(runner, subject.touch)
    del subject
    assert freed.wait(TIMEOUT)
