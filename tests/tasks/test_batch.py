"""Batches whose loop ends, whose worker is stopped, or which are abandoned."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from inspect import CORO_CLOSED, getcoroutinestate
from typing import Any

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
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    wait,
)
from wsgi_bg._loop import portal
from wsgi_bg._process import workers
from wsgi_bg._tasks.background_tasks import CLOSED, ENDED, TaskQueue
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.runners import Statistics
from wsgi_bg.runners.ledger import Ledger


def test_without_a_loop_an_async_task_has_failed_and_the_next_runs() -> None:
    """The process has no file descriptor left for the loop."""
    done = run_python(
        """
        import os, resource
        import wsgi_bg._loop.portal, anyio._backends._asyncio
        from tests.support import submit
        from wsgi_bg import PoolRunner

        async def task(): pass

        runner = PoolRunner()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        try:
            while True: held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError: pass
        submit(runner, task, lambda: print("ran"))
        print(runner.drain(10), runner.statistics().failed)
        for number in held: os.close(number)
        """
    )
    assert done.stdout == "ran\n[] 1\n", done.stderr
    assert "task raised OSError" in done.stderr


def test_a_signal_that_stops_a_submission_keeps_no_batch_from_the_loop(
    loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, (ran,), thread = PoolRunner(), events(1), portal.peek()
    assert thread is not None

    async def run() -> None:
        ran.set()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        submit(runner, run)  # of another thread, which relies on this wake
        raise KeyboardInterrupt

    monkeypatch.setattr(thread._loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(runner, nothing)
    assert ran.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []


def test_a_batch_whose_submission_was_stopped_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    runner = PoolRunner()
    monkeypatch.setattr(workers.Workers, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(runner, int, int)
    assert runner.drain(0) == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, discarded=2)


def test_between_thread_and_loop_no_task_of_a_batch_is_running() -> None:
    tasks = TaskQueue([BackgroundTask(int), BackgroundTask(nothing)])
    batch = Batch(tasks, response_complete=True)
    assert batch.run_plain()
    assert not batch.is_running
    assert [task.func for task in batch.tasks] == [nothing]


class Meanwhile(TaskQueue):
    """Calls ``happens`` after each look at the tasks left: another thread comes between."""

    happens: Callable[[], object]

    def left(self) -> list[BackgroundTask]:
        left = super().left()
        self.happens()
        return left


def test_a_task_that_begins_as_the_batch_is_abandoned_is_named_too() -> None:
    first, second = Gate(), Gate()

    def second_begins() -> None:
        first.open()
        assert second.begun.wait(TIMEOUT)

    tasks = Meanwhile()
    tasks.happens = second_begins
    tasks.add_task(first.task)
    tasks.add_task(second.task)
    batch = Batch(tasks, response_complete=True)
    thread = threading.Thread(target=batch.run)
    thread.start()
    assert first.begun.wait(TIMEOUT)
    left = batch.tasks
    second.open()
    thread.join(TIMEOUT)
    assert [task.func for task in left] == [second.task]


def test_a_batch_abandoned_while_its_last_task_is_added_has_ended() -> None:
    class AddedAtTheEnd(TaskQueue):
        @property
        def phase(self) -> int:
            return phases[-1]

        @phase.setter
        def phase(self, phase: int) -> None:
            if phase == CLOSED:
                left.extend(batch.abandon())
            phases.append(phase)
            if phase == ENDED and len(phases) == 2:
                self.tasks.append(BackgroundTask(int, "1"))

    phases, left = list[int](), list[BackgroundTask]()
    batch = Batch(AddedAtTheEnd(), response_complete=True)
    batch.run()
    assert [task.args for task in left] == [("1",)]
    assert batch.has_ended


def test_an_abandoned_task_is_not_logged_again_for_want_of_a_loop(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """A drain times out while another thread starts the portal in vain."""
    left: list[BackgroundTask] = []
    made: list[Coroutine[Any, Any, None]] = []

    def make() -> Coroutine[Any, Any, None]:
        made.append(nothing())
        return made[0]

    def fail() -> None:
        left.extend(batch.abandon())
        raise OSError

    monkeypatch.setattr(portal, "_thread", fail)
    batch = Batch(TaskQueue([BackgroundTask(make)]), response_complete=True)
    batch.run()
    assert [task.func for task in left] == [make]
    assert log.errors == []
    assert getcoroutinestate(made[0]) == CORO_CLOSED


def test_a_task_that_no_loop_can_be_had_for_is_logged_without_a_duration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never() -> None:
        pytest.fail("there is no loop")

    def fail() -> None:
        raise OSError

    monkeypatch.setattr(portal, "_thread", fail)
    caplog.set_level(logging.DEBUG, logger="wsgi_bg")
    tasks = [BackgroundTask(list), BackgroundTask(never)]
    Batch(TaskQueue(tasks), response_complete=True).run()
    names = [task.name for task in tasks]
    ended = [vars(each) for each in caplog.records if vars(each).get("wsgi_bg_task") in names]
    assert [each["wsgi_bg_outcome"] for each in ended] == ["succeeded", "failed"]
    assert [each["wsgi_bg_duration"] is None for each in ended] == [False, True]


def test_batches_outlive_a_loop_that_a_stray_task_has_ended(log: Log, gate: Gate) -> None:
    """One task waits on the loop, one batch is delayed, some have not begun; none is lost."""
    runner, wait, seen = PoolRunner(), Wait(), list[str]()
    strays: list[asyncio.Task[None]] = []

    async def stray() -> None:
        raise SystemExit

    async def end_the_loop() -> None:
        strays.append(asyncio.get_running_loop().create_task(stray()))
        gate.task()  # blocks the loop while more batches are submitted

    async def run() -> None:
        seen.append("run")

    submit(runner, wait.expect(1), run)
    assert wait.all_wait.wait(TIMEOUT)
    before = next(t for t in threading.enumerate() if t.name == "wsgi_bg-portal")
    submit(runner, end_the_loop)
    assert gate.begun.wait(TIMEOUT)
    submit(runner, run, lambda: seen.append("plain"))
    submit(runner, run, complete=False)
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert sorted(seen) == ["plain", "run", "run", "run"]
    assert runner.statistics().failed == 1  # the waiting task was cancelled
    assert any("CancelledError" in error for error in log.errors)
    before.join(TIMEOUT)  # or the ends would be logged after the test
    assert isinstance(strays[0].exception(), SystemExit)


def test_a_cancelled_task_does_not_cancel_the_next(log: Log) -> None:
    runner, seen = PoolRunner(), list[str]()

    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(TIMEOUT)

    async def run() -> None:
        await asyncio.sleep(0)
        seen.append("ran")

    submit(runner, cancel_itself, run)
    assert runner.drain(TIMEOUT) == []
    assert seen == ["ran"]


def test_the_tasks_of_a_request_that_an_async_task_makes_run_in_order(log: Log) -> None:
    """Its batch runs inline, on the thread of the loop, which cannot wait for an async task."""
    seen: list[object] = []

    class Soon:
        def __await__(self) -> Iterator[None]:
            seen.append("awaited")
            return iter(())

    async def run() -> None:
        seen.append("ran")

    def plain() -> None:
        seen.append(threading.current_thread().name)

    def add(environ: object) -> None:
        for func in (plain, lambda: run(), Soon, plain, run):
            background_tasks.add_task(func)

    async def request() -> None:
        Server().run(BackgroundTasksMiddleware(app_that(add)), make_server_environ())

    submit(PoolRunner(), request)
    assert wait(TIMEOUT) == wait(TIMEOUT) == []  # for the first request, then for the second
    assert seen == ["wsgi_bg-portal", "ran", "awaited", "wsgi_bg-batch", "ran"]
    assert log.errors == []


def test_the_async_tasks_of_such_a_request_fail_if_no_thread_can_start(log: Log) -> None:
    seen: list[str] = []

    async def run() -> None:
        raise AssertionError

    def add(environ: object) -> None:
        background_tasks.add_task(lambda: run())
        background_tasks.add_task(run)
        background_tasks.add_task(seen.append, "plain")

    async def request() -> None:
        with no_threads():
            Server().run(BackgroundTasksMiddleware(app_that(add)), make_server_environ())

    submit(PoolRunner(), request)
    assert wait(TIMEOUT) == wait(TIMEOUT) == []  # for the first request, then for the second
    assert seen == ["plain"]
    assert [type(error) for error in log.tracebacks] == [RuntimeError] * 2


@pytest.mark.parametrize("runner", [PoolRunner, InlineRunner])
def test_to_go_to_and_fro_between_kinds_of_tasks_looks_at_no_task_that_waits(
    monkeypatch: pytest.MonkeyPatch, runner: Callable[[], Any]
) -> None:
    """Else 200,000 tasks take minutes. To put a task into a dict or a set asks for its hash."""
    count = 400
    looks = itertools.count()

    def look(self: BackgroundTask) -> int:
        next(looks)
        return object.__hash__(self)

    monkeypatch.setattr(BackgroundTask, "__hash__", look)
    own, seen = runner(), list[int]()

    async def run_async() -> None:
        seen.append(1)

    submit(own, *[run_async, lambda: seen.append(1), lambda: run_async()] * count)
    assert own.drain(TIMEOUT) == []
    assert len(seen) == 3 * count
    assert next(looks) < 30 * count


def test_a_copy_that_comes_too_late_does_not_end_the_wait_for_the_running_batch(
    gate: Gate,
) -> None:
    class OfARequest(TaskQueue):
        def may_start(self) -> bool:
            return bool(right and right.pop())

    right, known = [True], Ledger()
    tasks = OfARequest([BackgroundTask(gate.task)])
    first = Batch(tasks, response_complete=True)
    known.add(first)
    again = first.again()
    thread = threading.Thread(target=first.run)
    thread.start()
    assert gate.begun.wait(TIMEOUT)
    again.run()  # returns at once
    assert known.batches == [first]
    gate.open()
    thread.join(TIMEOUT)
    assert known.batches == []
