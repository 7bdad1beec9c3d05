"""The pool: the way of a batch between threads and loop, limits, delayed batches."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Gate,
    Server,
    Wait,
    app_that,
    events,
    make_server_environ,
    no_threads,
    nothing,
    run_python,
    submit,
)
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg.runners import Statistics, pool


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda: f()], ids=["async", "lambda"])
def test_waiting_async_batches_hold_no_thread(wrap: Any) -> None:
    runner, wait, (ran,) = PoolRunner(threads=1), Wait(), events(1)
    task = wait.expect(50)
    for _ in range(50):
        submit(runner, wrap(task))
    assert wait.all_wait.wait(TIMEOUT)
    submit(runner, ran.set)
    assert ran.wait(TIMEOUT)
    wait.open()
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 51


def test_plain_functions_of_a_mixed_batch_hold_no_loop(gate: Gate) -> None:
    runner, (ran,) = PoolRunner(), events(1)

    async def run() -> None:
        ran.set()

    submit(runner, nothing, gate.task, nothing)
    assert gate.begun.wait(TIMEOUT)
    submit(runner, run)
    assert ran.wait(TIMEOUT)
    gate.open()
    assert runner.drain(TIMEOUT) == []


def test_consecutive_plain_functions_of_a_mixed_batch_take_a_single_thread_hop() -> None:
    runner, seen = PoolRunner(threads=1), list[str]()
    begun, submitted = events(2)

    def first() -> None:
        begun.set()
        submitted.wait(TIMEOUT)
        seen.append("first")

    submit(runner, nothing, first, lambda: seen.append("second"))
    assert begun.wait(TIMEOUT)
    submit(runner, lambda: seen.append("other batch"))
    submitted.set()
    assert runner.drain(TIMEOUT) == []
    assert seen == ["first", "second", "other batch"]


def test_tasks_that_tasks_add_run_in_order_on_thread_and_loop() -> None:
    runner, seen = PoolRunner(), list[tuple[str, bool]]()

    def note(name: str) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            seen.append((name, False))
        else:
            seen.append((name, True))

    async def last() -> None:
        note("last")

    def plain() -> None:
        note("plain")
        background_tasks.add_task(last)

    async def first() -> None:
        note("first")
        background_tasks.add_task(plain)

    submit(runner, first)
    assert runner.drain(TIMEOUT) == []
    assert seen == [("first", True), ("plain", False), ("last", True)]


def test_handing_over_does_not_wait_for_the_loop(loop: None, gate: Gate) -> None:
    runner, (ran,) = PoolRunner(), events(1)

    async def block() -> None:
        gate.task()  # blocks the loop's thread

    async def run() -> None:
        ran.set()

    submit(runner, block)
    assert gate.begun.wait(TIMEOUT)
    submit(runner, run)
    submit(runner, run, complete=False)
    assert not ran.is_set()  # and so the loop was blocked all the time
    gate.open()
    assert ran.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []
    assert gate.passed == [True]


def test_handing_over_does_not_wait_for_the_loop_to_be_made() -> None:
    """The loop starts only after the response was closed."""
    done = run_python(
        """
        import sys, threading
        import anyio
        from tests.support import submit
        from wsgi_bg import PoolRunner

        closed, run = threading.Event(), anyio.run

        def come_up(*args, **kwargs):
            assert closed.wait(10)
            return run(*args, **kwargs)

        anyio.run = come_up
        runner = PoolRunner()

        async def task():
            sys.stdout.write("ran\\n")  # at once, on whatever thread

        submit(runner, task)
        submit(runner, task, complete=False)
        closed.set()
        """
    )
    assert done.stdout == "ran\nran\n", done.stderr


def test_the_first_async_task_waits_for_no_plain_task() -> None:
    """The loop has not started yet, and all workers are busy."""
    done = run_python(
        """
        import threading
        from tests.support import submit
        from wsgi_bg import PoolRunner

        runner, begun, ran = PoolRunner(threads=1), threading.Event(), threading.Event()

        async def task(): ran.set()

        submit(runner, lambda: (begun.set(), print(ran.wait(10))))
        assert begun.wait(10)
        submit(runner, task)
        """
    )
    assert done.stdout == "True\n", done.stderr


def test_a_flood_is_bounded_and_each_task_runs_once(gate: Gate) -> None:
    """Eight server threads; they run the batches for which the pool has no room."""
    runner, counts = PoolRunner(threads=2, max_pending=10), Counter[int]()
    lock, here = threading.Lock(), list[int]()
    pending: list[int] = []

    def task(number: int) -> Callable[[], None]:
        def plain() -> None:
            pending.append(runner.statistics().pending)
            with lock:
                counts[number] += 1
                here.append(threading.get_ident())

        return plain

    def async_task(number: int) -> Callable[[], Any]:
        async def run() -> None:
            task(number)()

        return run

    def serve(first: int) -> None:
        for number in range(first, 800, 8):
            submit(runner, task(number), async_task(number), complete=bool(number % 5))

    servers = [threading.Thread(target=serve, args=(first,)) for first in range(8)]
    for _ in range(2):
        submit(runner, gate.task)
    assert gate.begun.wait(TIMEOUT)
    for server in servers:
        server.start()
    gate.open()
    for server in servers:
        server.join(TIMEOUT)
    assert runner.drain(TIMEOUT) == []
    assert counts == dict.fromkeys(range(800), 2)
    # Two tasks a batch: 10 pending of complete responses, 100 in all, and 8 in the servers.
    assert max(pending) <= (100 + 8) * 2
    assert {server.ident for server in servers} & set(here)


def test_waiting_async_batches_are_bounded_too() -> None:
    runner, wait = PoolRunner(max_pending=5), Wait()
    here: list[int] = []
    task = wait.expect(5)
    for _ in range(5):
        submit(runner, task)
    assert wait.all_wait.wait(TIMEOUT)
    submit(runner, lambda: here.append(threading.get_ident()))
    assert here == [threading.get_ident()]
    wait.open()
    assert runner.drain(TIMEOUT) == []


def test_batches_that_run_in_close_for_want_of_room_take_no_room(gate: Gate, log: Log) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    submit(runner, gate.task)

    def within_close() -> None:
        for _ in range(9):  # max_pending times ten, less the waiting batch
            submit(runner, int, complete=False)

    submit(runner, within_close)
    assert runner.statistics().run_here == 1
    assert [message for message in log.warnings if "ten times" in message] == []
    gate.open()
    assert runner.drain(TIMEOUT) == []


class Clock:
    """Records the times that a batch waits for; real time is for the benchmark."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.begun, self.over = events(2)

    def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        self.begun.set()
        assert self.over.wait(TIMEOUT)

    async def sleep_on_loop(self, seconds: float) -> None:
        await anyio.to_thread.run_sync(self.sleep, seconds)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_an_incomplete_responses_batch_is_delayed(
    is_async: bool, loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, runner, (ran, other_ran) = Clock(), PoolRunner(), events(2)
    time = SimpleNamespace(monotonic=lambda: 100.0, sleep=clock.sleep)
    monkeypatch.setattr(pool, "time", time)
    monkeypatch.setattr(asyncio, "sleep", clock.sleep_on_loop)

    async def run() -> None:
        ran.set()

    submit(runner, run if is_async else ran.set, complete=False)
    assert clock.begun.wait(TIMEOUT)
    submit(runner, other_ran.set)  # a complete response's batch does not wait
    assert other_ran.wait(TIMEOUT)
    assert not ran.is_set()
    clock.over.set()
    assert ran.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []
    assert clock.asked == [pytest.approx(0.005)]  # as rule 8 says, and no longer


def test_a_batch_whose_delay_is_over_begins_at_once(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, slept = PoolRunner(threads=1), list[float]()
    submit(runner, gate.task)
    now = [100.0]
    time = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr(pool, "time", time)
    submit(runner, int, complete=False)
    now[0] += pool.START_DELAY
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert slept == []


def test_a_batch_of_which_nothing_is_to_run_takes_no_thread(log: Log) -> None:
    before = set(threading.enumerate())
    runner = PoolRunner()
    app = app_that(lambda environ: background_tasks.using(run_on="error").add_task(int))
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    started = set(threading.enumerate()) - before
    assert [thread for thread in started if thread.name.startswith("wsgi_bg-pool")] == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, discarded=1)
    assert "was not run: the request succeeded" in log.warnings[0]


def test_async_tasks_run_if_no_thread_can_start_for_the_loop(no_loop: None) -> None:
    seen: list[str] = []

    async def run() -> None:
        seen.append(threading.current_thread().name)

    with no_threads():
        submit(PoolRunner(), run)
    assert seen == ["MainThread"]


def test_a_plain_task_behind_an_async_task_runs_if_no_thread_can_start(loop: None) -> None:
    runner, seen = PoolRunner(), list[str]()

    async def run() -> None:
        seen.append("async")

    with no_threads():
        submit(runner, run, lambda: seen.append(threading.current_thread().name))
        assert runner.drain(TIMEOUT) == []
    assert seen == ["async", "wsgi_bg-portal"]


def test_a_batch_goes_on_if_threads_are_greenlets(
    loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock; gevent itself is in test_gevent.py, which coverage does not see."""
    runner, seen = PoolRunner(), list[str]()

    async def run() -> None:
        seen.append("async")

    monkeypatch.setattr("wsgi_bg._process.greenlets.are_threads", lambda: True)
    submit(runner, lambda: seen.append("first"), run, lambda: seen.append("last"))
    assert runner.drain(TIMEOUT) == []
    assert seen == ["first", "async", "last"]


def test_a_process_that_can_start_no_exit_thread_uses_atexit() -> None:
    done = run_python(
        """
        import threading
        from tests.support import no_threads, submit
        from wsgi_bg import InlineRunner

        with no_threads():
            submit(InlineRunner(), lambda: print("ran"))
        submit(InlineRunner(), lambda: print("ran too"), complete=False)
        """
    )
    assert done.stdout == "ran\nran too\n", done.stderr
