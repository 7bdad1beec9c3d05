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
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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

from benchmarks.measure import HEADERS, begin, in_turns, options, peak_memory, request, row, run
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


class Requests:
    """Requests through the middleware to an application that only adds given functions.

    :param sized: True if the responses have a declared length, and so are complete.
    """

    def __init__(self, *, sized: bool = True) -> None:
        self._headers = HEADERS if sized else []
        runner = PoolRunner(threads=THREADS, max_pending=None)
        self._app = BackgroundTasksMiddleware(self._add, runner=runner)

    def _add(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        add_task = environ[ENVIRON_KEY].add_task
        for func in environ["functions"]:
            add_task(func)
        start_response("200 OK", self._headers)
        return [b"ok"]

    def begin(self, *functions: Func) -> HandOver:
        """Make a request; return the ``close()`` that the server calls at its end."""
        return begin(self._app, functions=functions)

    def make(self, *functions: Func) -> None:
        self.begin(*functions)()


def beside_request(hand_over: HandOver) -> Callable[[Func], HandOver]:
    """For a peer: make a request to a bare application; return the peer's own call."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", HEADERS)
        return [b"ok"]

    serve = request(app)

    def begin(func: Func) -> HandOver:
        serve()
        return partial(hand_over, func)

    return begin


@contextmanager
def thread_peers() -> Iterator[dict[str, HandOver]]:
    """Yield the subjects that run plain functions on threads."""
    app = Flask(__name__)
    app.config["EXECUTOR_MAX_WORKERS"] = THREADS
    with ExitStack() as stack:
        stack.enter_context(app.test_request_context())
        flask_executor = Executor(app)
        stack.callback(flask_executor.shutdown)
        yield {
            "ThreadPoolExecutor": stack.enter_context(ThreadPoolExecutor(THREADS)).submit,
            "Flask-Executor": flask_executor.submit,
        }


@contextmanager
def loop_peers() -> Iterator[dict[str, HandOver]]:
    """Yield the subjects that run functions on an event loop in a separate thread."""
    with start_blocking_portal() as blocking:
        loop = blocking.call(asyncio.get_running_loop)
        yield {
            "start_task_soon": blocking.start_task_soon,
            "run_coroutine_threadsafe": lambda func: asyncio.run_coroutine_threadsafe(
                func(), loop
            ),
        }


def starlette(tasks: int, size: int) -> float:
    """Seconds for ``tasks`` plain tasks, ``size`` a response, on a running loop.

    After sending a response Starlette awaits its tasks, in the asyncio task of the request.
    Here 16 requests run at a time: Starlette is slower with a single request, and with all.
    """
    countdown = Countdown(tasks)
    responses = iter(range(tasks // size))

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


def task_group(tasks: int, func: Callable[[Countdown], Func]) -> float:
    """Seconds for ``tasks`` coroutines in one anyio task group."""
    wait = func(Countdown(tasks))

    async def serve() -> float:
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(wait)
        return time.perf_counter() - began

    return asyncio.run(serve())


def one_by_one(
    begin: Callable[[Func], HandOver], func: Callable[[SimpleQueue[None]], Func]
) -> Callable[[], float]:
    """Time single calls, each made after the previous call's task is done.

    :param begin: makes a request, and returns the call that submits a function.
    """
    finished: SimpleQueue[None] = SimpleQueue()
    task = func(finished)

    def measured() -> float:
        taken = []
        for _ in range(CALLS):
            time.sleep(PAUSE)
            hand_over = begin(task)
            began = time.perf_counter()
            hand_over()
            taken.append(time.perf_counter() - began)
            finished.get(timeout=TIMEOUT)
        return statistics.median(taken) * 1e6

    return measured


def telling(finished: SimpleQueue[None]) -> Func:
    """A plain task that puts an item into ``finished``."""
    return partial(finished.put, None)


def telling_async(finished: SimpleQueue[None]) -> Func:
    """The same as an async task."""

    async def tell() -> None:
        finished.put(None)

    return tell


def compare(
    what: str, others: dict[str, HandOver], func: Callable[[SimpleQueue[None]], Func]
) -> None:
    """Print a row for each of ``others``, and a row for streams."""
    begins: list[Callable[[Func], HandOver]] = [
        Requests().begin,
        Requests(sized=False).begin,
        *map(beside_request, others.values()),
    ]
    mine, of_stream, *theirs = in_turns(*(one_by_one(begin, func) for begin in begins))
    for name, peer in zip(others, theirs, strict=True):
        row(what, mine, name, peer, GOAL)
    # The tasks of a stream begin 5 ms later, so the CPU's caches are cold at the next call.
    row(f"{what}, of a stream", of_stream, "with a length", mine)


def plain() -> None:
    with thread_peers() as others, loop_peers() as portal:
        others["start_task_soon"] = portal["start_task_soon"]
        compare("hand over a plain task", others, telling)


def async_task() -> None:
    with loop_peers() as others:
        compare("hand over an async task", others, telling_async)


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
    with thread_peers() as plain:
        others: dict[str, Callable[[], float]] = {
            name: partial(all_of_them, hand_over, counting, 1)
            for name, hand_over in plain.items()
        }
        others["Starlette"] = partial(starlette, options.tasks, size)
        ours = partial(all_of_them, Requests().make, counting, size)
        mine, *theirs = in_turns(ours, *others.values(), rounds=min(options.rounds, 7))
    for name, peer in zip(others, theirs, strict=True):
        what, thousand = f"plain tasks a second, {size} a batch", options.tasks / 1000
        row(what, thousand / mine, name, thousand / peer, GOAL, "k")


def async_many() -> None:
    seconds = options.tasks / 10_000  # shorter for fewer tasks, to keep short runs short
    with loop_peers() as portal:
        handing = {"wsgi_bg": Requests().make, **portal}

        def subjects(seconds: float) -> dict[str, Callable[[], float]]:
            func = partial(waiting, seconds=seconds)
            group = partial(task_group, options.tasks, func)
            ours_and_portals = {
                name: partial(all_of_them, hand_over, func, 1)
                for name, hand_over in handing.items()
            }
            return {**ours_and_portals, "anyio task group": group}

        took = in_turns(*subjects(seconds).values(), rounds=min(options.rounds, 3))
        # Tracing slows submitting: longer tasks make sure that all tasks wait together.
        sizes = [peak_memory(each) / options.tasks for each in subjects(4 * seconds).values()]
    what = f"{options.tasks} async tasks of {seconds:g} s"
    names = [*portal, "anyio task group"]
    for name, peer, size in zip(names, took[1:], sizes[1:], strict=True):
        row(what, took[0], name, peer, "<= 1.3 s", " s")
        row("    memory each", sizes[0], name, size, "<= 2.6 kB", " kB")


ROWS: dict[str, Callable[[], None]] = {
    "plain": plain,
    "async": async_task,
    "rate": partial(rate, 1),
    "rate-ten": partial(rate, 10),
    "async-many": async_many,
}


if __name__ == "__main__":
    run("Handing over", ROWS, "microseconds if no unit is named")
