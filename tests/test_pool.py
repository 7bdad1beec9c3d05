"""The pool: threads, the loop, the way of a batch between them, bounds, what is put off."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Gate, Server, app_that, make_server_environ, run_python
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    PoolRunner,
    background_tasks,
    portal,
    workers,
)
from wsgi_bg.batch import Batch
from wsgi_bg.executor import LoopExecutor
from wsgi_bg.portal_thread import PortalThread
from wsgi_bg.process import PerProcess
from wsgi_bg.runners import Runner, Statistics, pool
from wsgi_bg.tasks import CLOSED, ENDED


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that does not stay shut when a test fails."""
    gate = Gate()
    yield gate
    gate.open()


def submit(runner: Runner, *functions: Callable[[], Any], complete: bool = True) -> None:
    """One request whose tasks go to ``runner``; its response is complete, or is not."""

    def add(environ: object) -> None:
        for function in functions:
            background_tasks.add_task(function)

    headers = [("Content-Length", "2")] if complete else []
    app = app_that(add, headers=headers)
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())


def events(count: int) -> list[threading.Event]:
    return [threading.Event() for _ in range(count)]


async def nothing() -> None:
    pass


@pytest.fixture
def loop() -> None:
    """There is a portal: a first async batch makes it."""
    portal.portal()


class Wait:
    """Async tasks that wait on the loop and hold no thread."""

    def __init__(self) -> None:
        self.waiting = 0
        self.all_wait = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Event()

    def expect(self, count: int) -> Callable[[], Any]:
        async def task() -> None:
            self._loop = asyncio.get_running_loop()
            self.waiting += 1
            if self.waiting == count:
                self.all_wait.set()
            await asyncio.wait_for(self._gate.wait(), TIMEOUT)

        return task

    def open(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)


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


def test_consecutive_plain_functions_of_a_mixed_batch_take_one_thread_hop() -> None:
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


def test_what_tasks_add_runs_in_order_on_thread_and_loop() -> None:
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
        gate.task()  # on the loop's thread

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
    """The loop comes up only after the response was closed."""
    done = run_python(
        """
        import sys, threading
        import anyio
        from tests.test_pool import submit
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


def test_the_first_async_task_waits_for_no_plain_one() -> None:
    """The loop is not there yet, and all workers are taken."""
    done = run_python(
        """
        import threading
        from tests.test_pool import submit
        from wsgi_bg import PoolRunner

        runner, begun, ran = PoolRunner(threads=1), threading.Event(), threading.Event()

        async def task(): ran.set()

        submit(runner, lambda: (begun.set(), print(ran.wait(10))))
        assert begun.wait(10)
        submit(runner, task)
        """
    )
    assert done.stdout == "True\n", done.stderr


def test_without_a_loop_an_async_task_has_failed_and_the_next_runs() -> None:
    """No file descriptor is left for the loop."""
    done = run_python(
        """
        import os, resource
        import wsgi_bg.portal, anyio._backends._asyncio
        from tests.test_pool import submit
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


def test_a_signal_that_stops_a_hand_over_keeps_no_other_from_the_loop(
    loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, (ran,), thread = PoolRunner(), events(1), portal.peek()
    assert thread is not None

    async def run() -> None:
        ran.set()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        submit(runner, run)  # another thread's, which counts on this wake
        raise KeyboardInterrupt

    monkeypatch.setattr(thread._loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(runner, nothing)
    assert ran.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []


def test_a_batch_whose_hand_over_was_stopped_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    runner = PoolRunner()
    monkeypatch.setattr(workers.Workers, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(runner, int, int)
    assert runner.drain(0) == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, discarded=2)


class Meanwhile(list[BackgroundTask]):
    """A batch's list that lets something happen as a part of it is looked at."""

    def __init__(self, tasks: list[BackgroundTask], happens: Callable[[], object]) -> None:
        super().__init__(tasks)
        self._happens = happens

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            self._happens()
        return super().__getitem__(index)


def test_a_task_that_begins_as_the_batch_is_abandoned_is_named_too() -> None:
    first, second = Gate(), Gate()

    def second_begins() -> None:
        first.open()
        assert second.begun.wait(TIMEOUT)

    tasks = BackgroundTasks()
    tasks.add_task(first.task)
    tasks.add_task(second.task)
    tasks._list = Meanwhile(tasks.tasks, second_begins)
    batch = Batch(tasks, request_failed=False, response_complete=True)
    thread = threading.Thread(target=batch.run)
    thread.start()
    assert first.begun.wait(TIMEOUT)
    left = batch.tasks
    second.open()
    thread.join(TIMEOUT)
    assert [task.func for task in left] == [second.task]


def test_a_batch_that_is_abandoned_as_a_task_is_added_at_its_end_has_ended() -> None:
    class AddedAtTheEnd(BackgroundTasks):
        @property
        def _phase(self) -> int:
            return phases[-1]

        @_phase.setter
        def _phase(self, phase: int) -> None:
            if phase == CLOSED:
                left.extend(batch.abandon())
            phases.append(phase)
            if phase == ENDED and len(phases) == 2:
                self.tasks.append(BackgroundTask(int, "1"))

    phases, left = list[int](), list[BackgroundTask]()
    batch = Batch(AddedAtTheEnd(), request_failed=False, response_complete=True)
    batch.run()
    assert [task.args for task in left] == [("1",)]
    assert batch.has_ended


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


def test_a_signal_handler_may_submit_while_a_batch_is_handed_over() -> None:
    runner, (ran,) = PoolRunner(), events(1)
    with runner._crews.get()._workers._lock:  # held, as by an interrupted submit
        submit(runner, ran.set)
        assert ran.wait(TIMEOUT)


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


def test_a_flood_is_bounded_and_each_task_runs_once(gate: Gate) -> None:
    """Eight server threads; the server's threads run what there is no room for."""
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


def test_what_runs_in_close_for_want_of_room_takes_no_room(gate: Gate, log: Log) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    submit(runner, gate.task)

    def within_close() -> None:
        for _ in range(9):  # max_pending times ten, less the one that waits
            submit(runner, int, complete=False)

    submit(runner, within_close)
    assert log.warnings == []
    gate.open()
    assert runner.drain(TIMEOUT) == []


class Clock:
    """Lets a test see what a batch waits for; real time is for the benchmark."""

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
def test_an_incomplete_responses_batch_is_put_off(
    is_async: bool, loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, runner, (ran, other_ran) = Clock(), PoolRunner(), events(2)
    time = SimpleNamespace(monotonic=lambda: 100.0, sleep=clock.sleep)
    monkeypatch.setattr(pool, "time", time)
    monkeypatch.setattr(pool, "asyncio", SimpleNamespace(sleep=clock.sleep_on_loop))

    async def run() -> None:
        ran.set()

    submit(runner, run if is_async else ran.set, complete=False)
    assert clock.begun.wait(TIMEOUT)
    submit(runner, other_ran.set)  # a complete one is not
    assert other_ran.wait(TIMEOUT)
    assert not ran.is_set()
    clock.over.set()
    assert ran.wait(TIMEOUT)
    assert runner.drain(TIMEOUT) == []
    assert clock.asked == [pytest.approx(pool.PUT_OFF)]


def test_batches_outlive_a_loop_that_a_stray_task_has_ended(log: Log, gate: Gate) -> None:
    """One waits on it, one is put off, some have not begun; none is lost."""
    runner, wait, seen = PoolRunner(), Wait(), list[str]()
    strays: list[asyncio.Task[None]] = []

    async def stray() -> None:
        raise SystemExit

    async def end_the_loop() -> None:
        strays.append(asyncio.get_running_loop().create_task(stray()))
        gate.task()  # blocks the loop while the others are handed over

    async def run() -> None:
        seen.append("run")

    submit(runner, wait.expect(1), run)
    assert wait.all_wait.wait(TIMEOUT)
    submit(runner, end_the_loop)
    assert gate.begun.wait(TIMEOUT)
    submit(runner, run, lambda: seen.append("plain"))
    submit(runner, run, complete=False)
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert sorted(seen) == ["plain", "run", "run", "run"]
    assert runner.statistics().failed == 1  # the one that waited was cancelled
    assert any("CancelledError" in error for error in log.errors)
    assert isinstance(strays[0].exception(), SystemExit)  # or asyncio logs it, some time later


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


def test_a_task_may_use_a_thread_and_a_host_name_while_the_exit_waits() -> None:
    """The standard library's executor takes nothing any more by then."""
    done = run_python(
        """
        import asyncio, sys, threading
        from tests.test_pool import submit
        from wsgi_bg import PoolRunner

        leaving, begun = threading.Event(), threading.Event()
        threading._register_atexit(leaving.set)

        async def task():
            await asyncio.to_thread(begun.set)
            while not leaving.is_set():
                await asyncio.sleep(0.001)
            print(await asyncio.to_thread(lambda: "on a thread"))
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
            print("looked up")

        submit(PoolRunner(), task)
        assert begun.wait(10)
        """
    )
    assert done.stdout == "on a thread\nlooked up\n", done.stderr


def test_a_function_stuck_in_asyncios_thread_does_not_keep_the_process() -> None:
    done = run_python(
        """
        import asyncio, threading
        from tests.test_pool import submit
        from wsgi_bg import PoolRunner

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        async def task():
            await asyncio.to_thread(stuck)

        submit(PoolRunner(drain_timeout=0.2), task)
        assert begun.wait(10)
        """,
        timeout=20,
    )
    assert done.returncode == 0
    assert "background task __main__.task was not finished" in done.stderr


def test_a_function_that_was_cancelled_before_a_thread_had_it_is_not_called(gate: Gate) -> None:
    executor, seen = LoopExecutor(), list[str]()
    for _ in range(int(executor._workers._limit)):
        executor.submit(gate.task)
    cancelled = executor.submit(seen.append, "cancelled")
    last = executor.submit(seen.append, "last")
    assert cancelled.cancel()
    gate.open()
    last.result(TIMEOUT)
    assert seen == ["last"]


def test_a_function_for_which_there_is_no_thread_is_called_right_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mock: memory for not one more stack cannot be had here without ending the tests."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert LoopExecutor().submit(threading.get_ident).result(0) == threading.get_ident()


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Subject:
    """An argument of a task, which a test sees freed."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        weakref.finalize(self, self.freed.set)

    def touch(self) -> None:
        pass

    def fail(self) -> None:
        raise ValueError


@pytest.mark.usefixtures("no_collection")
def test_an_idle_thread_holds_no_request() -> None:
    runner, subject = PoolRunner(), Subject()
    freed = subject.freed
    submit(runner, subject.touch)
    del subject
    assert freed.wait(TIMEOUT)


@pytest.mark.usefixtures("no_collection")
def test_an_error_in_asyncios_thread_keeps_no_argument() -> None:
    runner, subjects = PoolRunner(), [Subject()]
    freed = subjects[0].freed

    async def fail() -> None:
        with suppress(ValueError):
            await asyncio.to_thread(subjects.pop().fail)

    submit(runner, fail)
    assert freed.wait(TIMEOUT)


def test_an_error_in_asyncios_thread_is_the_tasks() -> None:
    async def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    runner = PoolRunner()
    submit(runner, fail)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 1


def test_a_batch_without_a_task_to_run_holds_nothing(log: Log) -> None:
    runner, loud = PoolRunner(), list[str]()

    def add(environ: object) -> None:
        background_tasks.using(run_on="error").add_task(loud.append, "no")

    Server().run(BackgroundTasksMiddleware(app_that(add), runner=runner), make_server_environ())
    assert runner.statistics().discarded == 1
    assert runner.drain(0.0) == []
    assert "was not run: the request succeeded" in log.warnings[0]


@contextmanager
def no_threads() -> Iterator[None]:
    """A mock: memory for not one more stack cannot be had here without ending the tests."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


@pytest.fixture
def no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no portal yet."""
    monkeypatch.setattr(portal, "_threads", PerProcess(PortalThread))


def test_async_tasks_run_where_no_thread_can_start_for_the_loop(no_loop: None) -> None:
    seen: list[str] = []

    async def run() -> None:
        seen.append(threading.current_thread().name)

    with no_threads():
        submit(PoolRunner(), run)
    assert seen == ["MainThread"]


def test_a_plain_task_behind_an_async_one_runs_where_no_thread_can_start(loop: None) -> None:
    runner, seen = PoolRunner(), list[str]()

    async def run() -> None:
        seen.append("async")

    with no_threads():
        submit(runner, run, lambda: seen.append(threading.current_thread().name))
        assert runner.drain(TIMEOUT) == []
    assert seen == ["async", "wsgi_bg-portal"]


def test_asyncios_thread_pool_works_where_no_thread_can_start(no_loop: None) -> None:
    runner, seen = PoolRunner(), list[str]()

    async def run() -> None:
        with no_threads():
            seen.append(await asyncio.to_thread(lambda: threading.current_thread().name))

    submit(runner, run)
    assert runner.drain(TIMEOUT) == []
    assert seen == ["wsgi_bg-portal"]


def test_what_was_cancelled_before_a_thread_was_free_is_not_called() -> None:
    runner, (go,), seen = PoolRunner(), events(1), list[str]()
    count = 64  # more than the loop's executor has threads

    async def run() -> None:
        loop = asyncio.get_running_loop()
        busy = [loop.run_in_executor(None, go.wait, TIMEOUT) for _ in range(count)]
        behind = loop.run_in_executor(None, seen.append, "called")
        behind.cancel()
        await asyncio.gather(behind, return_exceptions=True)
        go.set()
        await asyncio.gather(*busy)

    submit(runner, run)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 1
    assert seen == []


def test_what_would_block_the_loop_for_ever_fails(log: Log) -> None:
    """A request that a task of the loop makes in the same process, with async tasks inline."""
    seen: list[str] = []

    class Future:
        def __await__(self) -> Iterator[None]:
            raise AssertionError("awaited")

    async def run() -> None:
        seen.append("ran")

    def add(environ: object) -> None:
        background_tasks.add_task(lambda: run())
        background_tasks.add_task(Future)
        background_tasks.add_task(run)
        background_tasks.add_task(seen.append, "plain")

    async def request() -> None:
        Server().run(BackgroundTasksMiddleware(app_that(add)), make_server_environ())

    runner = PoolRunner()
    submit(runner, request)
    assert runner.drain(TIMEOUT) == []
    assert seen == ["plain"]
    assert [type(error) for error in log.tracebacks] == [RuntimeError] * 3


def test_a_batch_goes_on_where_threads_are_greenlets(
    loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock; gevent itself is in test_gevent.py, where coverage does not see this."""
    runner, seen = PoolRunner(), list[str]()

    async def run() -> None:
        seen.append("async")

    monkeypatch.setattr("wsgi_bg.greenlets.are_threads", lambda: True)
    submit(runner, lambda: seen.append("first"), run, lambda: seen.append("last"))
    assert runner.drain(TIMEOUT) == []
    assert seen == ["first", "async", "last"]


def test_what_is_given_to_a_loop_that_has_ended_is_given_back(no_loop: None, log: Log) -> None:
    strays: list[asyncio.Task[None]] = []

    async def stray() -> None:
        raise SystemExit

    async def end_the_loop() -> None:
        strays.append(asyncio.get_running_loop().create_task(stray()))

    runner, back = PoolRunner(), list[str]()
    portal.portal()
    thread = portal.peek()
    assert thread is not None
    submit(runner, end_the_loop)
    assert runner.drain(TIMEOUT) == []
    while portal.peek() is not None:
        pass
    thread.start("subject", None, back.append)  # type: ignore[arg-type]  # not called
    assert back == ["subject"]
    assert isinstance(strays[0].exception(), SystemExit)


def test_a_process_that_can_start_no_thread_for_its_end_has_atexit() -> None:
    done = run_python(
        """
        import threading
        from tests.test_pool import no_threads, submit
        from wsgi_bg import InlineRunner

        with no_threads():
            submit(InlineRunner(), lambda: print("ran"))
        submit(InlineRunner(), lambda: print("ran too"), complete=False)
        """
    )
    assert done.stdout == "ran\nran too\n", done.stderr
