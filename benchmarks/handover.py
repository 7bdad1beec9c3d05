"""Times submitting tasks, and how fast the tasks run: ``python -m benchmarks.handover``.

For a single task the time is that of the ``close()`` that the server calls, through the
middleware; for a peer, that of the peer's call, after the same request. Both calls follow a
short pause, so that the threads and the loop are asleep: most of the cost is to wake them.

For many tasks this package makes whole requests through the middleware, and a peer makes bare
calls. Each wait ends when the last task reports its end. Memory is the size of Python's
objects, by tracemalloc. ``--tasks`` shortens these rows, ``--rounds`` all rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from operator import attrgetter
from queue import SimpleQueue
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from flask import Flask
from flask_executor import Executor
from starlette.background import BackgroundTasks as StarletteTasks

from benchmarks.measure import (
    HEADERS,
    begin,
    in_turns,
    options,
    peak_memory,
    request,
    row,
    run,
    time_calls,
)
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, PoolRunner

THREADS = 40
CALLS = 50
PAUSE = 0.0003
TIMEOUT = 600.0
GOAL = "no worse than before"

options.tasks = 10_000

Func = Callable[[], Any]
HandOver = Callable[..., Any]
"""Submits the functions that are its arguments, and returns."""


class Countdown:
    """Waits until a number of tasks have run, on any threads."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._numbers = count(1)  # next() is atomic
        self._done = threading.Event()

    def tick(self) -> None:
        if next(self._numbers) == self._tasks:
            self._done.set()

    def wait(self) -> None:
        assert self._done.wait(TIMEOUT), "not all tasks were run"


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    for func in environ.get("functions", ()):
        environ[ENVIRON_KEY].add_task(func)
    start_response("200 OK", HEADERS)
    return [b"ok"]


def ours() -> Callable[..., HandOver]:
    """Return a function that makes a request to an application that adds given functions.

    The function returns the ``close()`` that the server calls at the end of the request.
    """
    runner = PoolRunner(threads=THREADS, max_pending=None)
    wrapped = BackgroundTasksMiddleware(app, runner=runner)
    return lambda *functions: begin(wrapped, functions=functions)


def ours_at_once() -> HandOver:
    """Return a function that makes a whole request."""
    make = ours()
    return lambda *functions: make(*functions)()


def beside_request(hand_over: HandOver) -> Callable[[Func], HandOver]:
    """For a peer: make a request to a bare application; return the peer's own call."""
    serve = request(app)

    def begin(func: Func) -> HandOver:
        serve()
        return partial(hand_over, func)

    return begin


@contextmanager
def peers() -> Iterator[dict[str, HandOver]]:
    """Yield functions that hand over to threads, or to an event loop in a separate thread."""
    flask = Flask(__name__)
    flask.config["EXECUTOR_MAX_WORKERS"] = THREADS
    with (
        flask.test_request_context(),
        ThreadPoolExecutor(THREADS) as pool,
        start_blocking_portal() as portal,
    ):
        flask_executor = Executor(flask)
        loop = portal.call(asyncio.get_running_loop)
        yield {
            "ThreadPoolExecutor": pool.submit,
            "Flask-Executor": flask_executor.submit,
            "start_task_soon": portal.start_task_soon,
            "run_coroutine_threadsafe": lambda func: asyncio.run_coroutine_threadsafe(
                func(), loop
            ),
        }
        flask_executor.shutdown()


def starlette(size: int) -> float:
    """Seconds for ``options.tasks`` plain tasks, ``size`` a response, on a running loop.

    After sending a response Starlette awaits its tasks, in the asyncio task of the request.
    Here 16 requests run at a time: Starlette is slower with a single request, and with all.
    """
    countdown = Countdown(options.tasks)
    responses = iter(range(options.tasks // size))

    async def connection() -> None:
        for _ in responses:
            background = StarletteTasks()
            for _ in range(size):
                background.add_task(countdown.tick)
            await background()

    async def serve() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(connection() for _ in range(16)))
        return time.perf_counter() - began

    return asyncio.run(serve())


def task_group(func: Callable[[Countdown], Func]) -> float:
    """Seconds for ``options.tasks`` coroutines in one anyio task group."""
    wait = func(Countdown(options.tasks))

    async def serve() -> float:
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(options.tasks):
                group.start_soon(wait)
        return time.perf_counter() - began

    return asyncio.run(serve())


def one_by_one(begin: Callable[[Func], HandOver], *, is_async: bool) -> Callable[[], float]:
    """Time single calls, each made after the previous call's task is done.

    :param begin: makes a request, and returns the call that submits a function.
    """
    finished: SimpleQueue[None] = SimpleQueue()

    async def async_task() -> None:
        finished.put(None)

    task = async_task if is_async else partial(finished.put, None)

    def start() -> HandOver:
        time.sleep(PAUSE)
        return begin(task)

    return time_calls(start, CALLS, partial(finished.get, timeout=TIMEOUT))


def compare(names: tuple[str, ...], *, is_async: bool) -> None:
    with peers() as hand_overs:
        begins = [ours(), *(beside_request(hand_overs[name]) for name in names)]
        mine, *theirs = in_turns(*(one_by_one(begin, is_async=is_async) for begin in begins))
    what = "hand over an async task" if is_async else "hand over a plain task"
    for name, peer in zip(names, theirs, strict=True):
        row(what, mine, name, peer, GOAL)


def all_of_them(hand_over: HandOver, func: Callable[[Countdown], Func], size: int) -> float:
    """Seconds until ``options.tasks`` tasks are done, submitted ``size`` at a time."""
    countdown = Countdown(options.tasks // size * size)
    functions = (func(countdown),) * size
    began = time.perf_counter()
    for _ in range(options.tasks // size):
        hand_over(*functions)
    countdown.wait()
    return time.perf_counter() - began


def waiting(countdown: Countdown, seconds: float) -> Func:
    """An async task that sleeps."""

    async def wait() -> None:
        await asyncio.sleep(seconds)
        countdown.tick()

    return wait


def rate(size: int) -> None:
    counting = attrgetter("tick")  # a plain task that takes no time
    with peers() as hand_overs:
        mine, *theirs = in_turns(
            partial(all_of_them, ours_at_once(), counting, size),
            *(partial(all_of_them, hand_overs[name], counting, 1) for name in OF_THREADS),
            partial(starlette, size),
            rounds=min(options.rounds, 7),
        )
    for name, peer in zip((*OF_THREADS, "Starlette"), theirs, strict=True):
        what, thousand = f"plain tasks a second, {size} a batch", options.tasks / 1000
        row(what, thousand / mine, name, thousand / peer, GOAL, "k")


def async_many() -> None:
    seconds = options.tasks / 10_000  # shorter for fewer tasks, to keep short runs short

    def subjects(seconds: float) -> tuple[Callable[[], float], Callable[[], float]]:
        func = partial(waiting, seconds=seconds)
        return partial(all_of_them, ours_at_once(), func, 1), partial(task_group, func)

    mine, peer = in_turns(*subjects(seconds), rounds=min(options.rounds, 3))
    # Tracing slows submitting: longer tasks make sure that all tasks wait together.
    size, of_peer = (peak_memory(each) / options.tasks for each in subjects(4 * seconds))
    what = f"{options.tasks} async tasks of {seconds:g} s"
    row(what, mine, "anyio task group", peer, "<= 1.3 s", " s")
    row("    memory each", size, "anyio task group", of_peer, "<= 2.6 kB", " kB")


OF_THREADS = ("ThreadPoolExecutor", "Flask-Executor")
OF_LOOPS = ("start_task_soon", "run_coroutine_threadsafe")
ROWS: dict[str, Callable[[], None]] = {
    "plain": partial(compare, (*OF_THREADS, "start_task_soon"), is_async=False),
    "async": partial(compare, OF_LOOPS, is_async=True),
    "rate": partial(rate, 1),
    "rate-ten": partial(rate, 10),
    "async-many": async_many,
}


if __name__ == "__main__":
    run("Handing over", ROWS, "microseconds if no unit is named")
