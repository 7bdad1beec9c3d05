"""The process's event loop: single, shared, and robust."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import CancelledError
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Gate, app_that, nothing, respond, run_python
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, background_tasks
from wsgi_bg._loop import portal
from wsgi_bg._loop.portal import LoopJob, PortalThread
from wsgi_bg._process.per_process import PerProcess

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def run(*functions: Any) -> None:
    def add(environ: object) -> None:
        for func in functions:
            background_tasks.add_task(func)

    respond(BackgroundTasksMiddleware(app_that(add)))


def test_all_requests_and_threads_share_the_same_loop() -> None:
    loops: list[object] = []

    async def look() -> None:
        loops.append(asyncio.get_running_loop())

    barrier = threading.Barrier(8)

    def request() -> None:
        barrier.wait(TIMEOUT)
        run(look)

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(loops) == 8
    assert len(set(loops)) == 1


def test_threads_that_race_for_the_first_portal_get_the_same_portal() -> None:
    done = run_python(
        """
        import threading
        from wsgi_bg._loop import portal

        barrier = threading.Barrier(16)
        seen = []

        def get():
            barrier.wait(10)
            seen.append(portal.portal())

        threads = [threading.Thread(target=get) for _ in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(10)
        print(len(seen), len(set(map(id, seen))),
              sum(t.name == "wsgi_bg-portal" for t in threading.enumerate()))
        """
    )
    assert done.stdout == "16 1 1\n", done.stderr


def test_threads_that_find_the_loop_ended_replace_the_loop_once() -> None:
    threads = PerProcess(object)
    ended = threads.get()
    threads.forget(ended)
    replaced = threads.get()
    threads.forget(ended)  # the slower thread
    assert threads.get() is replaced is not ended


def test_consecutive_async_tasks_make_a_single_portal_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trips: list[object] = []
    shared: Any = portal.portal()
    make = shared.make_call

    def counting_make(call: Any, *args: Any) -> Any:
        trips.append(call)
        return make(call, *args)

    monkeypatch.setattr(shared, "make_call", counting_make)
    seen: list[int] = []

    async def task(x: int) -> None:
        await asyncio.sleep(0)
        seen.append(x)
        if x == 0:
            background_tasks.add_task(task, 9)

    def add(environ: object) -> None:
        for x in range(5):
            background_tasks.add_task(task, x)

    respond(BackgroundTasksMiddleware(app_that(add)))
    assert seen == [0, 1, 2, 3, 4, 9]
    assert len(trips) == 1


def test_async_tasks_of_a_portal_call_have_separate_contexts() -> None:
    seen: list[str] = []

    async def task(name: str) -> None:
        seen.append(variable.get())
        variable.set(f"by {name}")
        await asyncio.sleep(0)
        seen.append(variable.get())
        await asyncio.create_task(child())
        await anyio.to_thread.run_sync(lambda: seen.append(variable.get()))

    async def child() -> None:
        seen.append(variable.get())

    def add(environ: object) -> None:
        for name in ("a", "b"):
            token = variable.set(f"for {name}")
            background_tasks.add_task(task, name)
            variable.reset(token)

    respond(BackgroundTasksMiddleware(app_that(add)))
    assert seen == ["for a", *["by a"] * 3, "for b", *["by b"] * 3]
    assert variable.get() == "unset"


def test_what_coroutines_expect_of_a_loop_works() -> None:
    """Timeouts, task groups and exceptions thrown into a waiting coroutine."""
    seen: list[str] = []

    async def asyncio_timeout() -> None:
        try:
            await asyncio.wait_for(asyncio.sleep(60), 0.01)
        except TimeoutError:
            seen.append("asyncio")

    async def anyio_timeout() -> None:
        with anyio.move_on_after(0.01):
            await anyio.sleep(60)
        seen.append("anyio")

    async def group() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 60)
            tasks.cancel_scope.cancel()
        seen.append("group")

    async def failing_future() -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, KeyError("x"))
        variable.set("future")
        with pytest.raises(KeyError):
            await future
        seen.append(variable.get())

    run(asyncio_timeout, anyio_timeout, group, failing_future)
    assert seen == ["asyncio", "anyio", "group", "future"]


def test_a_plain_function_in_a_batch_does_not_run_on_the_loop() -> None:
    names: list[str] = []

    async def task() -> None:
        names.append(threading.current_thread().name)

    run(task, lambda: names.append(threading.current_thread().name), task)
    assert names == ["wsgi_bg-portal", threading.current_thread().name, "wsgi_bg-portal"]


def test_a_slow_async_task_does_not_hold_up_the_task_of_another_request() -> None:
    gate = Gate()
    thread = threading.Thread(target=run, args=(gate.async_task,))
    thread.start()
    run(lambda: None, BackgroundTask(asyncio.sleep, 0).func)  # ends while the gate's task waits
    gate.open()
    gate.wait()
    thread.join(TIMEOUT)
    assert gate.passed == [True]


def test_an_async_task_called_on_the_loops_own_thread_is_refused() -> None:
    errors: list[BaseException] = []

    class Soon:
        def __await__(self) -> Any:
            return iter(())

    async def outer() -> None:
        for inner in (asyncio.sleep(0), Soon()):
            try:
                portal.wait_for(contextvars.copy_context(), inner)
            except RuntimeError as error:
                errors.append(error)

    run(outer)
    assert len(errors) == 2
    assert "cannot be called from the event loop thread" in str(errors[0])


def test_tasks_run_by_hand_from_an_async_task_leave_no_coroutine_behind(log: Log) -> None:
    async def by_hand() -> None:
        background_tasks()

    async def behind() -> None:
        raise AssertionError("cannot run here")

    run(by_hand, behind)
    assert "cannot be called from the event loop thread" in str(log.tracebacks[0])


def test_a_loop_that_a_stray_task_has_ended_is_replaced(log: Log) -> None:
    """asyncio lets a SystemExit of any task end the loop, even of a coroutine's subtask."""
    seen: list[str] = []

    async def stray() -> None:
        raise SystemExit(1)

    async def start_stray() -> None:
        stray_task = asyncio.create_task(stray())
        stray_task.add_done_callback(asyncio.Task.exception)  # or asyncio logs the exception
        await asyncio.sleep(60)

    async def then() -> None:
        seen.append("ran")

    portal.portal()
    before = next(t for t in threading.enumerate() if t.name == "wsgi_bg-portal")
    run(start_stray, then)
    run(then)
    assert seen == ["ran", "ran"]
    before.join(TIMEOUT)
    assert "the portal's event loop was ended by a task on it" in log.errors


def test_a_job_for_a_loop_that_has_ended_comes_back() -> None:
    thread, back = PortalThread(), list[str]()

    async def never(subject: str) -> None:
        raise AssertionError

    thread.stop(TIMEOUT)
    thread.start("subject", LoopJob(never, bool, back.append))
    assert back == ["subject"]


def test_stop_waits_for_the_clean_up_of_a_cancelled_task() -> None:
    thread, begun, seen = PortalThread(), threading.Event(), list[str]()

    async def clean_up(subject: str) -> None:
        begun.set()
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0.01)
            seen.append(subject)

    thread.start("cleaned up", LoopJob(clean_up, bool, id))
    assert begun.wait(TIMEOUT)
    thread.stop(TIMEOUT)
    assert seen == ["cleaned up"]


def test_stop_waits_for_the_clean_up_of_a_task_that_a_thread_waits_for() -> None:
    thread, begun, seen = PortalThread(), threading.Event(), list[str]()

    async def clean_up() -> None:
        begun.set()
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0.01)
            seen.append("cleaned up")

    def call() -> None:
        with pytest.raises(CancelledError):
            thread.portal.call(clean_up)
        seen.append("raised")

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(TIMEOUT)
    thread.stop(TIMEOUT)
    caller.join(TIMEOUT)
    assert seen == ["cleaned up", "raised"]


@pytest.fixture
def ending_loop(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that is ended after it has got a portal call, and before the call begins."""
    shared: Any = portal.portal()
    before = next(t for t in threading.enumerate() if t.name == "wsgi_bg-portal")
    gate, strays = Gate(), list[asyncio.Task[None]]()
    spawn = shared._spawn_task_from_thread

    def spawn_and_open(*args: Any) -> None:
        spawn(*args)
        gate.open()

    async def stray() -> None:
        raise SystemExit

    async def end_the_loop() -> None:
        strays.append(asyncio.get_running_loop().create_task(stray()))
        gate.task()

    portal.start(None, LoopJob(lambda _: end_the_loop(), bool, id))
    assert gate.begun.wait(TIMEOUT)
    monkeypatch.setattr(shared, "_spawn_task_from_thread", spawn_and_open)
    yield shared._loop
    gate.open()
    before.join(TIMEOUT)  # or the end would be logged after the test
    assert isinstance(strays[0].exception(), SystemExit)


def test_an_awaitable_whose_loop_is_ended_keeps_its_turn(
    ending_loop: asyncio.AbstractEventLoop,
) -> None:
    seen: list[object] = []

    async def first() -> None:
        seen.append(asyncio.get_running_loop() is ending_loop)

    run(lambda: first(), lambda: seen.append("second"))
    assert seen == [False, "second"]


def test_a_task_called_by_hand_whose_loop_is_ended_runs_on_the_next_loop(
    ending_loop: asyncio.AbstractEventLoop,
) -> None:
    async def task() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert BackgroundTask(task)() not in (None, ending_loop)


def test_the_end_of_the_loop_cancels_a_task_that_a_thread_waits_for_once(log: Log) -> None:
    """By a stray task: asyncio cancels the portal call, and the asyncio task of its work."""
    portal.portal()
    before = next(t for t in threading.enumerate() if t.name == "wsgi_bg-portal")
    strays, seen = list[asyncio.Task[None]](), list[str]()

    async def stray() -> None:
        raise SystemExit

    async def clean_up() -> None:
        strays.append(asyncio.create_task(stray()))
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0.01)
            seen.append("cleaned up")

    async def then() -> None:
        seen.append("then")

    run(clean_up, then)
    assert seen == ["cleaned up", "then"]
    before.join(TIMEOUT)
    assert isinstance(strays[0].exception(), SystemExit)


def test_work_for_which_a_thread_waits_raises_its_error() -> None:
    async def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        portal.run(fail, lambda: True)


def test_a_loop_that_cannot_be_had_is_the_tasks_error() -> None:
    """No file descriptor is left for the loop: the async task fails, the plain task runs."""
    done = run_python(
        """
        import logging, os, resource, sys
        from tests.support import Server, app_that, make_environ
        from wsgi_bg import BackgroundTasksMiddleware, background_tasks

        logging.basicConfig(stream=sys.stdout, format="%(message)s")

        async def task(): print("async ran")

        def add(environ):
            background_tasks.add_task(task)
            background_tasks.add_task(print, "plain ran")

        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        try:
            while True: held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError: pass
        app = BackgroundTasksMiddleware(app_that(add))
        Server().run(app, make_environ())
        for number in held: os.close(number)
        Server().run(app, make_environ())
        """
    )
    # Python 3.15 can format no traceback then: the message goes on in parentheses.
    lines = [
        line.partition(" (")[0]
        for line in done.stdout.splitlines()
        if "ran" in line or "raised" in line
    ]
    assert lines == [
        "background task __main__.task raised OSError",
        "plain ran",
        "async ran",
        "plain ran",
    ], done.stdout + done.stderr


def test_a_portal_call_raises_the_error_of_the_coroutine() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        portal.portal().call(fail)


def test_a_signal_handlers_exception_cancels_the_awaited_coroutine() -> None:
    """As Celery's ``soft_time_limit`` does; the coroutine must not go on."""
    cancelled = threading.Event()

    class TimeLimitError(Exception):
        """The handler's exception."""

    def handler(number: int, frame: object) -> None:
        raise TimeLimitError

    async def stuck() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeLimitError):
            portal.portal().call(stuck)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cancelled.wait(TIMEOUT)


def test_a_coroutine_does_not_begin_after_a_signal_handlers_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, begun = Gate(), list[str]()

    class TimeLimitError(Exception):
        """The handler's exception."""

    def handler(number: int, frame: object) -> None:
        raise TimeLimitError

    class SignalledEvent(threading.Event):
        """Sends the signal as soon as the caller waits for the loop."""

        def wait(self, timeout: float | None = None) -> bool:
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().wait(timeout)

    async def block() -> None:
        gate.task()

    async def begin() -> None:
        begun.append("begun")

    portal.start(None, LoopJob(lambda _: block(), bool, id))
    assert gate.begun.wait(TIMEOUT)  # the loop is busy
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("wsgi_bg._loop.portal_call.event", SignalledEvent)
            with pytest.raises(TimeLimitError):
                portal.portal().call(begin)
    finally:
        signal.signal(signal.SIGUSR1, before)
        gate.open()
    portal.portal().call(nothing)  # queued behind the first call
    assert begun == []


def test_a_call_that_is_cancelled_before_its_begin_does_not_begin() -> None:
    gate, begun = Gate(), list[bool]()

    async def block() -> None:
        gate.task()

    async def begin() -> None:
        begun.append(True)

    portal.start(None, LoopJob(lambda _: block(), bool, id))
    assert gate.begun.wait(TIMEOUT)  # the loop is busy
    future = portal.portal().start_task_soon(begin)
    assert future.cancel()
    gate.open()
    portal.portal().call(nothing)  # queued behind the first call
    assert futures.wait([future], TIMEOUT).done == {future}
    assert begun == []


def test_async_tasks_run_if_sniffio_is_installed() -> None:
    # anyio asks sniffio, which finds no task in a callback of the loop.
    pytest.importorskip("sniffio")
    libraries: list[str] = []

    async def note_library() -> None:
        await anyio.lowlevel.checkpoint()
        libraries.append(anyio.get_cancelled_exc_class().__module__)

    run(note_library)
    assert libraries == ["asyncio.exceptions"]


def test_a_child_that_is_forked_while_a_thread_makes_the_portal_makes_its_own() -> None:
    # In the child the lock of a module that a thread was importing would stay locked.
    done = run_python(
        """
        import os, signal, sys, threading, warnings
        import wsgi_bg

        warnings.simplefilter("ignore")  # of a fork beside threads
        is_importing, forks = threading.Event(), threading.Event()

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "asyncio":
                    is_importing.set()
                    forks.wait(10)

        async def answer():
            return 42

        call = wsgi_bg.portal  # imported here
        sys.meta_path.insert(0, Finder())
        first = threading.Thread(target=lambda: call().call(answer))
        first.start()
        assert is_importing.wait(10)
        os.register_at_fork(before=forks.set)  # called before the hooks of the package
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(call().call(answer))
        first.join()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), call().call(answer))
        """,
        timeout=40,
    )
    assert (done.stdout, done.stderr) == ("42 42\n", "")


def test_a_fork_waits_not_for_ever_for_a_portal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portal, "FORK_TIMEOUT", 0.01)
    with portal._threads.lock():
        for hook in (portal._before_fork, portal._after_fork_in_parent):
            thread = threading.Thread(target=hook)
            thread.start()
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    assert portal._threads.lock().acquire(timeout=TIMEOUT)
    portal._threads.lock().release()


def test_the_exit_waits_for_the_clean_up_of_calls_whose_loop_was_ended() -> None:
    done = run_python(
        """
import asyncio, logging, threading, wsgi_bg
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from tests.support import Server, app_that, make_server_environ

logging.disable()
begun = threading.Event()

async def clean_up():
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        while not (successor and successor[0].end.done()):  # until the exit stops it
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        print("cleaned up")

def stray():
    raise SystemExit

successor = []
app = BackgroundTasksMiddleware(
    app_that(lambda environ: background_tasks.add_task(int)), runner="pool"
)
Server().run(app, make_server_environ())
first = wsgi_bg.portal()
first.start_task_soon(clean_up)
assert begun.wait(10)
first._loop.call_soon_threadsafe(stray)
while wsgi_bg.portal() is first:
    pass
successor.append(wsgi_bg.portal())
"""
    )
    assert (done.stdout, done.stderr) == ("cleaned up\n", "")


def test_the_exit_waits_for_the_clean_up_of_calls_of_a_portal_without_tasks() -> None:
    done = run_python(
        """
import asyncio, threading, wsgi_bg

begun = threading.Event()

async def clean_up():
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.05)
        print("cleaned up")

wsgi_bg.portal().start_task_soon(clean_up)
assert begun.wait(10)
"""
    )
    assert (done.stdout, done.stderr) == ("cleaned up\n", "")
