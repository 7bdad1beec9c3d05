"""The pool's threads: their number, their order, their end."""

from __future__ import annotations

import queue
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Gate, Subject, no_threads, submit
from wsgi_bg import PoolRunner
from wsgi_bg._process import workers


def test_threads_end_after_the_idle_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_TIMEOUT", 0.01)
    runner, threads = PoolRunner(threads=2), list[threading.Thread]()
    barrier = threading.Barrier(3)  # the third party is this thread, which joins the workers

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


def test_a_light_load_uses_a_single_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that became idle last works next, so that the rest reach their time limit."""
    came = threading.Semaphore(0)  # counts the threads that became idle

    class Wakes(queue.SimpleQueue[None]):
        def get(self, block: bool = True, timeout: float | None = None) -> None:
            came.release()
            return super().get(block, timeout)

    monkeypatch.setattr(workers, "queue", SimpleNamespace(SimpleQueue=Wakes, Empty=queue.Empty))
    runner, names = PoolRunner(threads=3), list[str]()
    barrier = threading.Barrier(3)

    def meet() -> None:
        barrier.wait(TIMEOUT)

    def note() -> None:
        names.append(threading.current_thread().name)

    for _ in range(3):
        submit(runner, meet)
    for _ in range(3):
        assert came.acquire(timeout=TIMEOUT)
    for _ in range(30):
        submit(runner, note)
        assert came.acquire(timeout=TIMEOUT)  # a thread is busy for a while after its task
    assert len(names) == 30
    assert len(set(names)) == 1


def test_jobs_that_come_while_a_thread_sleeps_get_a_thread_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleeps, awake = threading.Event(), threading.Event()
    barrier = threading.Barrier(4)

    def sleep(seconds: float) -> None:
        sleeps.set()
        assert awake.wait(TIMEOUT)

    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=sleep))
    runner = PoolRunner(threads=3)
    submit(runner, int)
    assert sleeps.wait(TIMEOUT)
    for _ in range(3):
        submit(runner, partial(barrier.wait, TIMEOUT))
    awake.set()
    barrier.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []


def test_a_thread_that_has_found_several_jobs_sleeps_longer_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept, wakes = queue.SimpleQueue[float](), queue.SimpleQueue[None]()
    of_other_tests = threading.enumerate()

    def sleep(seconds: float) -> None:
        if threading.current_thread() not in of_other_tests:
            slept.put(seconds)
            wakes.get(timeout=TIMEOUT)

    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=sleep))
    runner = PoolRunner(threads=1)
    submit(runner, int)
    assert slept.get(timeout=TIMEOUT) == workers.LINGER
    for jobs, seconds in ((2, workers.FLOOD_LINGER), (1, workers.LINGER)):
        for _ in range(jobs):
            submit(runner, int)
        wakes.put(None)
        assert slept.get(timeout=TIMEOUT) == seconds
    wakes.put(None)
    assert runner.drain(TIMEOUT) == []


@pytest.mark.usefixtures("no_collection")
def test_an_idle_thread_holds_no_request() -> None:
    runner, subject = PoolRunner(), Subject()
    freed = subject.freed
    submit(runner, subject.touch)
    del subject
    assert freed.wait(TIMEOUT)


def start_nothing(*args: Any) -> None:
    raise KeyboardInterrupt


class Noted:
    """Workers that record their jobs, in states that a race of threads may cause."""

    def __init__(self, limit: float = 1) -> None:
        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.workers: workers.Workers[str] = workers.Workers(self.done.put, limit, "noted")

    def next(self) -> str:
        return self.done.get(timeout=TIMEOUT)


def test_a_worker_that_another_submit_has_woken_first_is_not_counted_on() -> None:
    class Emptied(list[Any]):
        def __bool__(self) -> bool:
            return True  # as before the other thread came

    noted = Noted()
    noted.workers._idle = Emptied()
    assert noted.workers.submit("job")
    assert noted.next() == "job"


def test_two_threads_that_start_the_last_worker_start_a_single_worker() -> None:
    class Crowded(dict[Any, None]):
        def __setitem__(self, worker: Any, value: None) -> None:
            super().__setitem__("the other thread's", None)
            super().__setitem__(worker, value)

    noted = Noted()
    noted.workers._alive = Crowded()
    assert noted.workers.submit("job")  # to the other thread's worker
    assert list(noted.workers._alive) == ["the other thread's"]
    assert list(noted.workers._backlog) == ["job"]


def test_a_start_that_a_signal_handler_stops_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = Noted()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "start_daemon", start_nothing)
        with pytest.raises(KeyboardInterrupt):
            noted.workers.submit("first")
    assert noted.workers.submit("second")
    assert [noted.next(), noted.next()] == ["first", "second"]


def test_a_job_that_a_thread_does_before_its_end_is_not_taken_back() -> None:
    class Done(deque[str]):
        def remove(self, job: str) -> None:
            super().remove(job)
            super().remove(job)  # a second time, which raises

    noted = Noted()
    noted.workers._backlog = Done()
    with no_threads():
        assert noted.workers.submit("job")


def test_a_worker_that_finds_nothing_waits_again() -> None:
    class Vanishing(deque[str]):
        looks = 0

        def __len__(self) -> int:
            self.looks += 1
            return 1 if self.looks == 1 else super().__len__()

    noted = Noted()
    assert noted.workers.submit("first")
    assert noted.next() == "first"
    noted.workers._backlog = Vanishing()
    assert noted.workers._wake() or noted.workers.submit("wakes")
    assert noted.workers.submit("second")
    while noted.next() != "second":
        pass


def test_an_unexpected_error_does_not_end_a_worker(log: Log) -> None:
    class Stop(BaseException):
        pass

    def work(job: str) -> None:
        if job == "first":
            raise Stop
        done.put(job)

    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    some: workers.Workers[str] = workers.Workers(work, 1, "some")
    assert some.submit("first")
    assert some.submit("second")
    assert done.get(timeout=TIMEOUT) == "second"
    assert log.errors == ["some was stopped"]


def test_a_worker_that_is_not_known_any_more_ends() -> None:
    """A signal handler has interrupted the start, which did not see the thread begin."""
    noted, threads = Noted(), list[threading.Thread]()
    noted.workers._work = lambda job: threads.append(threading.current_thread())
    noted.workers._alive = Forgetful()
    assert noted.workers.submit("job")
    while not threads:
        threading.Event().wait(0.001)
    threads[0].join(TIMEOUT)
    assert not threads[0].is_alive()


class Forgetful(dict[Any, None]):
    """Knows a worker at the worker's first look for a job, and not afterwards."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def __contains__(self, worker: object) -> bool:
        self.asked.append(worker)
        return self.asked.count(worker) == 1


def test_a_job_that_comes_as_the_last_worker_ends_gets_another() -> None:
    class Late(deque[str]):
        """Gets a job from another thread as the worker ends."""

        def __bool__(self) -> bool:
            if not noted.workers._alive and not self.came:
                self.came = True
                self.append("late")
            return super().__len__() > 0

        came = False

    noted = Noted()
    late = Late()
    noted.workers._backlog = late
    noted.workers._alive = Forgetful()
    late.append("first")
    assert noted.workers._start()
    assert noted.next() == "first"
    assert noted.next() == "late"


def test_a_worker_that_is_chosen_as_its_time_is_up_works_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Chosen(list[Any]):
        """The first time that a worker withdraws, a submit() has chosen the worker."""

        was_chosen = False

        def remove(self, wake: Any) -> None:
            super().remove(wake)
            if not self.was_chosen:
                self.was_chosen = True
                monkeypatch.setattr(workers, "IDLE_TIMEOUT", TIMEOUT)
                waits.set()
                raise ValueError

    waits = threading.Event()
    monkeypatch.setattr(workers, "IDLE_TIMEOUT", 0.01)
    noted = Noted()
    noted.workers._idle = Chosen()
    assert noted.workers.submit("first")
    assert waits.wait(TIMEOUT)
    assert noted.workers.submit("second")
    assert [noted.next(), noted.next()] == ["first", "second"]


def test_an_idle_worker_looks_for_a_job_again() -> None:
    class Late(deque[str]):
        """Gets a job between the last two looks of a worker."""

        def __bool__(self) -> bool:
            if was_empty := super().__len__() == 0:
                self.looks += 1
                if self.looks == 3:
                    self.append("late")
                    was_empty = False
            return not was_empty

        looks = 0

    noted = Noted()
    noted.workers._backlog = Late()
    assert noted.workers.submit("first")
    assert [noted.next(), noted.next()] == ["first", "late"]


def test_a_worker_whose_job_another_worker_took_goes_on() -> None:
    class Taken(deque[str]):
        was_taken = False

        def popleft(self) -> str:
            if not self.was_taken:
                self.was_taken = True
                raise IndexError
            return super().popleft()

    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    some: workers.Workers[str] = workers.Workers(done.put, 1, "some")
    some._backlog = Taken()
    assert some.submit("job")
    assert done.get(timeout=TIMEOUT) == "job"
