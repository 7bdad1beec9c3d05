"""What handing tasks over costs, and how fast they then run: ``python -m benchmarks.handover``.

What is measured of this package is a whole request through the middleware, with an
application that only adds the tasks: a part of it is what an idle request costs. Of the
peers it is the bare call that hands the function over, without a request around it; what
they get is the better for it.

Each wait ends when the last task says so. ``--tasks`` makes the rows with thousands of
tasks shorter, ``--rounds`` all. Memory is what tracemalloc counts: Python's objects.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from benchmarks import peers
from benchmarks.measure import in_turns, options, request, row, run
from benchmarks.peers import Countdown, Func, HandOver
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, PoolRunner

TIMEOUT = 600.0
THREADS = 40
BLOCKED = 0.05

options.tasks = 10_000


def through_middleware(*, sized: bool = True) -> Callable[..., Any]:
    """A function that makes a request which adds the functions that it is given.

    :param sized: whether the response has a declared length, and is complete.
    """
    runner = PoolRunner(threads=THREADS, max_pending=None)
    headers = [("Content-Length", "2")] if sized else []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        add_task = environ[ENVIRON_KEY].add_task
        for func in environ["functions"]:
            add_task(func)
        start_response("200 OK", headers)
        return [b"ok"]

    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "waitress.client_disconnected": None,  # a server that is known
        "functions": (),
    }
    serve = request(BackgroundTasksMiddleware(app, runner=runner), environ)

    def hand_over(*functions: Func) -> None:
        environ["functions"] = functions
        serve()

    return hand_over


def one_by_one(
    hand_over: HandOver, func: Callable[[SimpleQueue[None]], Func], calls: int, block: bool
) -> Callable[[], float]:
    """How long a single call takes, made when the task before it is done."""
    finished: SimpleQueue[None] = SimpleQueue()
    blocked: SimpleQueue[None] = SimpleQueue()
    task = func(finished)

    async def block_loop() -> None:
        blocked.put(None)
        time.sleep(BLOCKED)  # noqa: ASYNC251  # what a user's task should not do

    def measured() -> float:
        taken = []
        for _ in range(calls):
            if block:
                hand_over(block_loop)
                blocked.get(timeout=TIMEOUT)
            began = time.perf_counter()
            hand_over(task)
            taken.append(time.perf_counter() - began)
            finished.get(timeout=TIMEOUT)
        return statistics.median(taken) * 1e6

    return measured


def telling(finished: SimpleQueue[None]) -> Func:
    return partial(finished.put, None)


def telling_async(finished: SimpleQueue[None]) -> Func:
    async def tell() -> None:
        finished.put(None)

    return tell


def compare(
    what: str,
    ours: HandOver,
    others: dict[str, HandOver],
    func: Callable[[SimpleQueue[None]], Func],
    goal: str,
    *,
    block: bool = False,
) -> None:
    subjects = [ours, *others.values()]
    calls = 3 if block else 50
    mine, *theirs = in_turns(*(one_by_one(each, func, calls, block) for each in subjects))
    for name, peer in zip(others, theirs, strict=True):
        row(what, f"{mine:.1f}", f"{name} {peer:.1f}", f"{peer / mine:.1f} times less", goal)


def idle() -> None:
    with peers.plain(THREADS) as plain, peers.portal() as portal:
        everyone = {**plain, "start_task_soon": portal["start_task_soon"]}
        compare("hand over a plain task", through_middleware(), everyone, telling, "<= 15 µs")
        del everyone["Flask-Executor"], everyone["start_task_soon"]
        stream = through_middleware(sized=False)
        compare("the same, of a stream", stream, everyone, telling, "")


def idle_async() -> None:
    with peers.portal() as others:
        compare("hand over an async task", through_middleware(), others, telling_async, "<= 15")
        stream = through_middleware(sized=False)
        compare("the same, of a stream", stream, others, telling_async, "")


def blocked() -> None:
    with peers.portal() as others:
        what = "the same, loop blocked for 50 ms"
        compare(what, through_middleware(), others, telling_async, "<= 1000", block=True)


def all_of_them(hand_over: HandOver, func: Callable[[Countdown], Func], size: int) -> float:
    """Seconds until ``options.tasks`` tasks are done, handed over ``size`` at a time."""
    countdown = Countdown(options.tasks // size * size)
    functions = (func(countdown),) * size
    began = time.perf_counter()
    for _ in range(options.tasks // size):
        hand_over(*functions)
    countdown.wait(TIMEOUT)
    return time.perf_counter() - began


def rate(size: int, goal: str) -> None:
    with peers.plain(THREADS) as plain:
        others: dict[str, Callable[[], float]] = {
            name: partial(all_of_them, hand_over, peers.counting, 1)
            for name, hand_over in plain.items()
            if name != "SimpleQueue"
        }
        others["Starlette"] = partial(peers.starlette, options.tasks, size)
        ours = partial(all_of_them, through_middleware(), peers.counting, size)
        mine, *theirs = in_turns(ours, *others.values(), rounds=min(options.rounds, 7))
    for name, peer in zip(others, theirs, strict=True):
        row(
            f"plain tasks a second, {size} a batch",
            f"{options.tasks / mine / 1000:.1f}k",
            f"{name} {options.tasks / peer / 1000:.1f}k",
            f"{peer / mine:.1f} times",
            goal if name == "Starlette" else "",
        )


def memory_of(subject: Callable[[], float]) -> float:
    """The kB of Python objects that a task needs, at the worst moment."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        subject()
        return (tracemalloc.get_traced_memory()[1] - before) / options.tasks / 1000
    finally:
        tracemalloc.stop()


def waiting_async() -> None:
    seconds = options.tasks / 10_000  # less for fewer, so that a short run is short
    func = partial(peers.waiting, seconds=seconds)
    with peers.portal() as portal:
        others: dict[str, Callable[[], float]] = {
            "anyio task group": partial(peers.task_group, options.tasks, func),
        }
        for name, hand_over in portal.items():
            others[name] = partial(all_of_them, hand_over, func, 1)
        ours = partial(all_of_them, through_middleware(), func, 1)
        mine, *theirs = in_turns(ours, *others.values(), rounds=min(options.rounds, 3))
        my_memory = memory_of(ours)
        their_memory = [memory_of(subject) for subject in others.values()]
    for name, peer, memory in zip(others, theirs, their_memory, strict=True):
        what = f"{options.tasks} async tasks of {seconds:g} s"
        row(what, f"{mine:.2f} s", f"{name} {peer:.2f} s", "", "<= 1.3 s")
        row("    memory each", f"{my_memory:.1f} kB", f"{memory:.1f} kB", "", "<= 2.5 kB")


def sleeping() -> None:
    with peers.plain(THREADS) as plain:
        submit = plain["ThreadPoolExecutor"]
        others: dict[str, Callable[[], float]] = {
            "anyio limiter": partial(peers.limited, options.tasks, THREADS, peers.sleeping),
            "ThreadPoolExecutor": partial(all_of_them, submit, peers.sleeping, 1),
        }
        ours = partial(all_of_them, through_middleware(), peers.sleeping, 1)
        mine, *theirs = in_turns(ours, *others.values(), rounds=min(options.rounds, 5))
    for name, peer in zip(others, theirs, strict=True):
        row(
            f"{options.tasks} plain tasks of 1 ms, {THREADS} threads",
            f"{mine:.2f} s",
            f"{name} {peer:.2f} s",
            f"{peer / mine:.1f} times less",
            f"<= 0.5 s; ideal {options.tasks * 0.001 / THREADS:.2f}",
        )


ROWS: dict[str, Callable[[], None]] = {
    "plain": idle,
    "async": idle_async,
    "blocked": blocked,
    "rate": partial(rate, 1, ">= 4 times"),
    "rate-ten": partial(rate, 10, ">= 10 times"),
    "async-many": waiting_async,
    "plain-many": sleeping,
}


if __name__ == "__main__":
    run("Handing over", ROWS, "microseconds where no unit is named")
