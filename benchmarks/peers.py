"""The subjects of :mod:`benchmarks.handover`: this package and its peers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import count
from queue import SimpleQueue
from typing import Any, cast

import anyio
import anyio.to_thread
from anyio.from_thread import start_blocking_portal
from flask import Flask
from starlette.background import BackgroundTasks as StarletteTasks

from benchmarks.measure import HEADERS, request, start_response
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, PoolRunner

Func = Callable[[], Any]
HandOver = Callable[..., Any]
"""Submits the functions that are its arguments, and returns."""

THREADS = 40


class Countdown:
    """Waits until a number of tasks have run, on any threads."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._numbers = count(1)  # next() is atomic
        self._done = threading.Event()

    def tick(self) -> None:
        if next(self._numbers) == self._tasks:
            self._done.set()

    def wait(self, timeout: float) -> None:
        assert self._done.wait(timeout), "not all tasks were run"


def counting(countdown: Countdown) -> Func:
    """A plain task that takes no time."""
    return countdown.tick


def sleeping(countdown: Countdown) -> Func:
    """A plain task of 1 ms."""

    def sleep() -> None:
        time.sleep(0.001)
        countdown.tick()

    return sleep


def waiting(countdown: Countdown, seconds: float) -> Func:
    """An async task that sleeps."""

    async def wait() -> None:
        await asyncio.sleep(seconds)
        countdown.tick()

    return wait


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
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "GET",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "waitress.client_disconnected": None,  # the middleware recognises waitress
            "functions": functions,
        }
        body: Any = self._app(environ, cast("Any", start_response))
        for _ in body:
            pass
        return body.close  # type: ignore[no-any-return]

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
def plain() -> Iterator[dict[str, HandOver]]:
    """Yield the subjects that run plain functions on threads."""
    with ExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(THREADS))
        handing = {"ThreadPoolExecutor": executor.submit}
        if find_spec("flask_executor") is None:
            print("Flask-Executor is not installed: left out")
        else:
            from flask_executor import Executor

            app = Flask(__name__)
            app.config["EXECUTOR_MAX_WORKERS"] = THREADS
            stack.enter_context(app.test_request_context())
            flask_executor = Executor(app)
            stack.callback(flask_executor.shutdown)
            handing["Flask-Executor"] = flask_executor.submit
        queue: SimpleQueue[Func | None] = SimpleQueue()
        threading.Thread(target=lambda: [func() for func in iter(queue.get, None)]).start()
        stack.callback(queue.put, None)
        yield {**handing, "SimpleQueue": queue.put}


@contextmanager
def portal() -> Iterator[dict[str, HandOver]]:
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


def limited(tasks: int, func: Callable[[Countdown], Func]) -> float:
    """Seconds for ``tasks`` plain tasks on anyio's threads."""
    sleep = func(Countdown(tasks))

    async def serve() -> float:
        limiter = anyio.CapacityLimiter(THREADS)
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(lambda: anyio.to_thread.run_sync(sleep, limiter=limiter))
        return time.perf_counter() - began

    return asyncio.run(serve())
