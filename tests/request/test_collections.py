"""Outcomes and claims hold during garbage collections and without a global lock."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Server,
    app_that,
    make_server_environ,
    run_python,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    PoolRunner,
    get_background_tasks,
)


@contextmanager
def collection_on_another_thread() -> Iterator[None]:
    """Hold a garbage collection open on another thread until the block ends.

    A callback of :mod:`gc` is Python code: while a callback runs, other threads run too.
    """
    begun, free = threading.Event(), threading.Event()

    def hold(phase: str, info: object) -> None:
        if phase == "start" and threading.current_thread() is thread:
            begun.set()
            free.wait(TIMEOUT)

    thread = threading.Thread(target=gc.collect)
    gc.callbacks.append(hold)  # behind the package's callback, if there is one
    try:
        thread.start()
        assert begun.wait(TIMEOUT)
        yield
    finally:
        free.set()
        thread.join(TIMEOUT)
        gc.callbacks.remove(hold)


def failing() -> Iterator[bytes]:
    yield b"o"
    raise ValueError("midway")


def serve(body: Any) -> None:
    try:
        for _ in body:
            pass
    except ValueError:
        pass
    finally:
        body.close()


@pytest.mark.parametrize("moment", ["all along", "while it is closed"])
def test_a_stream_that_raised_has_failed_while_another_thread_collects(
    log: Log, moment: str
) -> None:
    seen: list[str] = []
    runner = PoolRunner()

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        for word in ("success", "error", "always"):
            tasks.using(run_on=word).add_task(seen.append, word)

    app = BackgroundTasksMiddleware(app_that(add, headers=[], body=failing), runner=runner)
    body: Any = app(make_server_environ(), Server().start_response)
    if moment == "all along":
        with collection_on_another_thread():
            serve(body)
    else:
        chunks = iter(body)
        with pytest.raises(ValueError, match="midway"):
            list(chunks)
        with collection_on_another_thread():
            body.close()
    assert runner.drain(TIMEOUT) == []
    assert seen == ["error", "always"]
    assert any("was not run: the request failed" in message for message in log.warnings)


def test_a_stream_that_the_client_left_has_not_failed_while_another_thread_collects() -> None:
    seen: list[str] = []
    runner = PoolRunner()

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        for word in ("success", "error"):
            tasks.using(run_on=word).add_task(seen.append, word)

    app = BackgroundTasksMiddleware(app_that(add, headers=[], body=failing), runner=runner)
    body: Any = app(make_server_environ(), Server().start_response)
    with collection_on_another_thread():
        assert next(iter(body)) == b"o"
        body.close()
    assert runner.drain(TIMEOUT) == []
    assert seen == ["success"]


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Make threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def race(count: int, *functions: Callable[[], object]) -> None:
    """Call each function ``count`` times on its thread, each time at the same moment."""
    barrier = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            for _ in range(count):
                barrier.wait(TIMEOUT)
                function()
                barrier.wait(TIMEOUT)
        except BaseException as exc:
            errors.append(exc)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * TIMEOUT)
    assert errors == []


def test_tasks_that_two_threads_run_at_once_run_once(fast_switches: None) -> None:
    seen: list[int] = []
    batches = [
        BackgroundTasks([BackgroundTask(seen.append, 10 * batch + x) for x in range(10)])
        for batch in range(500)
    ]
    first, second = iter(batches), iter(batches)
    race(len(batches), lambda: next(first)(), lambda: next(second)())
    assert sorted(seen) == list(range(5000))


def test_tasks_that_are_called_by_hand_as_the_request_ends_run_once(
    fast_switches: None,
) -> None:
    seen: list[object] = []
    held: list[BackgroundTasks] = []
    bodies: list[Any] = []
    runner = PoolRunner(threads=2)

    def add(environ: Environ) -> None:
        held.append(get_background_tasks(environ))
        for x in range(10):
            held[-1].add_task(seen.append, (len(held), x))

    app = BackgroundTasksMiddleware(app_that(add), runner=runner)
    for _ in range(300):
        body = app(make_server_environ(), Server().start_response)
        list(body)
        bodies.append(body)
    by_hand, by_server = iter(held), iter(bodies)
    race(len(bodies), lambda: next(by_hand)(), lambda: next(by_server).close())
    assert runner.drain(TIMEOUT) == []
    assert len(seen) == len(set(seen)) == 3000


def test_threads_that_close_a_response_at_once_close_the_applications_once(
    fast_switches: None,
) -> None:
    closed: list[int] = []
    seen: list[int] = []
    runner = PoolRunner(threads=2)

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter((b"ok",))

        def close(self) -> None:
            closed.append(1)

    def add(environ: Environ) -> None:
        get_background_tasks(environ).add_task(seen.append, 1)

    app = BackgroundTasksMiddleware(app_that(add, body=Body), runner=runner)
    bodies: list[Any] = [
        app(make_server_environ(), Server().start_response) for _ in range(1000)
    ]
    closers = [iter(bodies) for _ in range(4)]
    race(len(bodies), *(lambda i=i: next(i).close() for i in closers))
    assert runner.drain(TIMEOUT) == []
    assert len(closed) == len(seen) == len(bodies)


def test_a_request_that_adds_and_ends_on_two_threads_runs_or_refuses_each_task(
    fast_switches: None,
) -> None:
    seen: list[object] = []
    refused: list[object] = []
    held: list[BackgroundTasks] = []
    runner = PoolRunner(threads=2)
    app = BackgroundTasksMiddleware(
        app_that(
            lambda environ: held.append(get_background_tasks(environ)), body=lambda: iter(())
        ),
        runner=runner,
    )
    bodies: list[Any] = [
        app(make_server_environ(), Server().start_response) for _ in range(1000)
    ]
    adders, closers = iter(held), iter(bodies)

    def add() -> None:
        tasks = next(adders)
        try:
            tasks.add_task(seen.append, id(tasks))
        except RuntimeError:
            refused.append(id(tasks))

    race(len(bodies), add, lambda: next(closers).close())
    assert runner.drain(TIMEOUT) == []
    assert sorted([*seen, *refused], key=str) == sorted(map(id, held), key=str)


# Threads that live as long as the process.

PLACES = """
import asyncio, contextvars, gc, logging, sys, threading
from tests.support import Server, Subject, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg._loop import portal

variable = contextvars.ContextVar("variable", default=None)
gc.disable()

def plain(): pass

async def coroutine():
    await asyncio.sleep(0)

def make(add, runner, headers=()):
    return BackgroundTasksMiddleware(app_that(add, headers=headers), runner=runner)
"""


@pytest.mark.parametrize("functions", ["plain", "coroutine", "plain, coroutine, plain"])
@pytest.mark.parametrize("runner", ["PoolRunner()", "'pool'", "'inline'"])
@pytest.mark.parametrize("way", ["close", "free"])
def test_what_the_first_requests_context_holds_is_freed_after_its_tasks(
    way: str, runner: str, functions: str
) -> None:
    """No thread that the view has started keeps the view's context; in a new process."""
    done = run_python(
        PLACES
        + f"""
def add(environ):
    variable.set(subject)
    for func in ({functions},):
        background_tasks.add_task(func)
    background_tasks.add_task(done.set)

def serve():
    environ = make_server_environ()
    body = make(add, {runner})(environ, Server().start_response)
    list(body)
    if {way!r} == "close":
        body.close()

done, subject = threading.Event(), Subject()
freed = subject.freed
contextvars.copy_context().run(serve)
del subject
assert done.wait(10)
for _ in range(100):
    gc.collect()
    if freed.wait(0.02):
        print("freed")
        break
"""
    )
    assert done.stdout == "freed\n", done.stderr


def test_a_loops_own_callbacks_do_not_see_the_first_requests_context() -> None:
    done = run_python(
        PLACES
        + """
def add(environ):
    variable.set("the first request's")
    background_tasks.add_task(coroutine)

contextvars.copy_context().run(
    Server().run, make(add, PoolRunner()), make_server_environ()
)
loop = portal.portal().call(asyncio.get_running_loop)
seen, done = [], threading.Event()
empty = contextvars.Context()
empty.run(loop.call_soon_threadsafe, lambda: (seen.append(variable.get()), done.set()))
assert done.wait(10)

async def look():
    return variable.get()

seen.append(empty.run(portal.portal().call, look))
print(seen)
"""
    )
    assert done.stdout == "[None, None]\n", done.stderr


def test_a_thread_of_the_pool_does_not_see_the_first_requests_context() -> None:
    """A handler of logging sees the thread's own context outside of tasks."""
    done = run_python(
        PLACES
        + """
variable_of = []
workers = []
real = threading.Thread.run

def run(self):
    if self.name.startswith("wsgi_bg"):
        variable_of.append((self.name.rpartition("-")[0] or self.name, variable.get()))
    real(self)

real_start = threading.Thread.start

def start(self):  # Sentry copies the context here
    variable_of.append((self.name, variable.get()))
    real_start(self)

threading.Thread.run = run
threading.Thread.start = start

def add(environ):
    variable.set("the first request's")
    for func in (plain, coroutine, plain):
        background_tasks.add_task(func)

runner = PoolRunner()
contextvars.copy_context().run(Server().run, make(add, runner), make_server_environ())
assert runner.drain(10) == []
assert len(variable_of) > 1, variable_of
print({value for name, value in variable_of})
"""
    )
    assert done.stdout == "{None}\n", done.stderr
