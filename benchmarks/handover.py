"""What handing tasks over costs, and how fast they then run: ``python -m benchmarks.handover``.

What is measured of this package is a whole request through the middleware, with an
application that only adds the tasks: a part of it is what an idle request costs. Of the
peers it is the bare call that hands the function over, without a request around it; what
they get is the better for it.

Each wait ends when the last task says so. ``--tasks`` makes the rows with thousands of
tasks shorter, ``--rounds`` all. Memory is what tracemalloc counts: Python's objects.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from benchmarks import peers
from benchmarks.measure import in_turns, options, peak_memory, row, run
from benchmarks.peers import THREADS, Countdown, Func, HandOver, through_middleware

TIMEOUT = 600.0
BLOCKED = 0.05

options.tasks = 10_000


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
    return lambda: finished.put(None)


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
    with peers.plain() as plain, peers.portal() as portal:
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
    with peers.plain() as plain:
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


def waiting_async() -> None:
    seconds = options.tasks / 10_000  # less for fewer, so that a short run is short
    with peers.portal() as portal:
        handing = {"wsgi_bg": through_middleware(), **portal}

        def subjects(seconds: float) -> dict[str, Callable[[], float]]:
            func = partial(peers.waiting, seconds=seconds)
            group = partial(peers.task_group, options.tasks, func)
            ours_and_portals = {
                name: partial(all_of_them, hand_over, func, 1)
                for name, hand_over in handing.items()
            }
            return {**ours_and_portals, "anyio task group": group}

        took = in_turns(*subjects(seconds).values(), rounds=min(options.rounds, 3))
        # Traced, to hand over takes longer: all of them are to wait at the same time.
        sizes = [peak_memory(each) / options.tasks for each in subjects(4 * seconds).values()]
    what = f"{options.tasks} async tasks of {seconds:g} s"
    for name, peer, size in zip(
        [*portal, "anyio task group"], took[1:], sizes[1:], strict=True
    ):
        row(what, f"{took[0]:.2f} s", f"{name} {peer:.2f} s", "", "<= 1.3 s")
        row("    memory each", f"{sizes[0]:.1f} kB", f"{size:.1f} kB", "", "<= 2.5 kB")


def sleeping() -> None:
    with peers.plain() as plain:
        submit = plain["ThreadPoolExecutor"]
        others: dict[str, Callable[[], float]] = {
            "anyio limiter": partial(peers.limited, options.tasks, peers.sleeping),
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
