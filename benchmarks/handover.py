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
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from benchmarks import peers
from benchmarks.measure import in_turns, options, peak_memory, row, run
from benchmarks.peers import THREADS, Countdown, Func, HandOver, Requests, beside_request

TIMEOUT = 600.0
BLOCKED = 0.05
PAUSE = 0.0003
PUT_OFF = 0.005

options.tasks = 10_000

GOAL = "no worse than before"


def one_by_one(
    begin: Callable[[Func], HandOver], func: Callable[..., Func], calls: int, block: bool
) -> Callable[[], float]:
    """Time single calls, each made after the previous call's task is done.

    :param begin: makes a request, and returns the call that submits a function.
    """
    finished: SimpleQueue[None] = SimpleQueue()
    blocked: SimpleQueue[None] = SimpleQueue()
    task = func(finished)

    async def block_loop() -> None:
        blocked.put(None)
        time.sleep(BLOCKED)  # noqa: ASYNC251  # a user's task should not block the loop

    def measured() -> float:
        taken = []
        for _ in range(calls):
            if block:
                begin(block_loop)()
                blocked.get(timeout=TIMEOUT)
            else:
                time.sleep(PAUSE)
            hand_over = begin(task)
            began = time.perf_counter()
            hand_over()
            taken.append(time.perf_counter() - began)
            finished.get(timeout=TIMEOUT)
        return statistics.median(taken) * 1e6

    return measured


def telling(finished: SimpleQueue[None], after: float = 0.0) -> Func:
    def tell() -> None:
        if after:
            time.sleep(after)
        finished.put(None)

    return tell


def telling_async(finished: SimpleQueue[None], after: float = 0.0) -> Func:
    async def tell() -> None:
        if after:
            await asyncio.sleep(after)
        finished.put(None)

    return tell


def compare(
    what: str,
    ours: Requests,
    others: dict[str, HandOver],
    func: Callable[..., Func],
    goal: str,
    *,
    block: bool = False,
    late: bool = False,
) -> None:
    """Print a row for each of ``others``.

    :param late: True if our tasks start with a delay; then the tasks of the peers take as
        long, as a call costs some times more after a longer pause, with cold CPU caches.
    """
    calls = 3 if block else 50
    their_func = partial(func, after=PUT_OFF) if late else func
    mine, *theirs = in_turns(
        one_by_one(ours.begin, func, calls, block),
        *(
            one_by_one(beside_request(hand_over), their_func, calls, block)
            for hand_over in others.values()
        ),
    )
    for name, peer in zip(others, theirs, strict=True):
        row(what, f"{mine:.1f}", f"{name} {peer:.1f}", f"{peer / mine:.1f} times less", goal)


def idle() -> None:
    with peers.plain() as plain, peers.portal() as portal:
        everyone = {**plain, "start_task_soon": portal["start_task_soon"]}
        compare("hand over a plain task", Requests(), everyone, telling, GOAL)
        few = {name: plain[name] for name in ("ThreadPoolExecutor", "SimpleQueue")}
        compare("the same, of a stream", Requests(sized=False), few, telling, "", late=True)


def idle_async() -> None:
    with peers.portal() as others:
        compare("hand over an async task", Requests(), others, telling_async, GOAL)
        what = "the same, of a stream"
        compare(what, Requests(sized=False), others, telling_async, "", late=True)


def blocked() -> None:
    with peers.portal() as others:
        what = "the same, loop blocked for 50 ms"
        compare(what, Requests(), others, telling_async, "<= 1000", block=True)


def all_of_them(hand_over: HandOver, func: Callable[[Countdown], Func], size: int) -> float:
    """Seconds until ``options.tasks`` tasks are done, submitted ``size`` at a time."""
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
        ours = partial(all_of_them, Requests().make, peers.counting, size)
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
    seconds = options.tasks / 10_000  # shorter for fewer tasks, to keep short runs short
    with peers.portal() as portal:
        handing = {"wsgi_bg": Requests().make, **portal}

        def subjects(seconds: float) -> dict[str, Callable[[], float]]:
            func = partial(peers.waiting, seconds=seconds)
            group = partial(peers.task_group, options.tasks, func)
            ours_and_portals = {
                name: partial(all_of_them, hand_over, func, 1)
                for name, hand_over in handing.items()
            }
            return {**ours_and_portals, "anyio task group": group}

        took = in_turns(*subjects(seconds).values(), rounds=min(options.rounds, 3))
        # Tracing slows submitting: longer tasks make sure that all tasks wait together.
        sizes = [peak_memory(each) / options.tasks for each in subjects(4 * seconds).values()]
    what = f"{options.tasks} async tasks of {seconds:g} s"
    for name, peer, size in zip(
        [*portal, "anyio task group"], took[1:], sizes[1:], strict=True
    ):
        row(what, f"{took[0]:.2f} s", f"{name} {peer:.2f} s", "", "<= 1.3 s")
        row("    memory each", f"{sizes[0]:.1f} kB", f"{size:.1f} kB", "", "<= 2.6 kB")


def sleeping() -> None:
    with peers.plain() as plain:
        submit = plain["ThreadPoolExecutor"]
        others: dict[str, Callable[[], float]] = {
            "anyio limiter": partial(peers.limited, options.tasks, peers.sleeping),
            "ThreadPoolExecutor": partial(all_of_them, submit, peers.sleeping, 1),
        }
        ours = partial(all_of_them, Requests().make, peers.sleeping, 1)
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
    "rate": partial(rate, 1, GOAL),
    "rate-ten": partial(rate, 10, GOAL),
    "async-many": waiting_async,
    "plain-many": sleeping,
}


if __name__ == "__main__":
    run("Handing over", ROWS, "microseconds where no unit is named")
