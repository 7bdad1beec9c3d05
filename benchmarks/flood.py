"""Adds tasks faster than the pool runs them, for some seconds: ``python -m benchmarks.flood``.

A waitress in a separate process is kept busy with requests, each of which adds a task with an
argument of 5 kB. ``max_pending`` bounds the number of submitted and unfinished tasks, and so
the memory; above the bound complete responses wait for their tasks, so that the server slows
down. For streams, which must not wait, the bound is ten times as high. The peer is a
ThreadPoolExecutor.

The exit status is 1 if the tasks exceeded the bound, or memory grew at the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread
from typing import Any, NamedTuple

from benchmarks import load
from benchmarks.measure import HEADERS
from benchmarks.serving import THREADS, Counters, ServerProcess, serve_waitress
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, get_background_tasks

CONNECTIONS = 16
POOL_THREADS = 4
GROWTH = 0.05


class Subject(NamedTuple):
    """An application to serve, and the bound of its unfinished tasks."""

    serve: Callable[[], None]
    bound: int | None


def plain(payload: bytes) -> None:
    time.sleep(0.02)


async def waiting(payload: bytes) -> None:
    await asyncio.sleep(0.5)


def answer(start_response: Any, *, sized: bool) -> Iterable[bytes]:
    start_response("200 OK", HEADERS if sized else [])
    return [b"ok"] if sized else iter([b"o", b"k"])


def serve_pool(func: Callable[[bytes], Any], max_pending: int, *, sized: bool = True) -> None:
    runner = PoolRunner(threads=POOL_THREADS, max_pending=max_pending)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        get_background_tasks(environ).add_task(func, bytes(5000))
        return answer(start_response, sized=sized)

    def in_hand() -> int:  # counts tasks: each batch has a single task
        numbers = runner.statistics()
        return numbers.pending + numbers.running

    logging.getLogger("wsgi_bg").setLevel(logging.ERROR)  # no warning for each late stream
    serve_waitress(BackgroundTasksMiddleware(app, runner=runner), {"in hand": in_hand})


def serve_executor() -> None:
    executor = ThreadPoolExecutor(POOL_THREADS)
    counters = Counters()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        counters.add()
        executor.submit(plain, bytes(5000)).add_done_callback(lambda _: counters.complete())
        return answer(start_response, sized=True)

    serve_waitress(app, {"in hand": lambda: counters.added - counters.completed})


SUBJECTS = {
    "plain tasks": Subject(partial(serve_pool, plain, 1000), 1000 + THREADS),
    "async tasks": Subject(partial(serve_pool, waiting, 1000), 1000 + THREADS),
    "tasks of streams": Subject(partial(serve_pool, plain, 100, sized=False), 1000 + THREADS),
    "ThreadPoolExecutor": Subject(serve_executor, None),
}
"""The bounds include batches that run in ``close()``, on the server's threads."""


def flood(name: str, bound: int | None, seconds: int) -> bool:
    """Load a server; print its unfinished tasks and memory; True if both are bounded."""
    in_hand, memory = [], []
    with ServerProcess("benchmarks.flood", name) as server:
        client = Thread(target=load.put_load, args=(server.port, seconds, CONNECTIONS))
        client.start()
        while client.is_alive():
            client.join(seconds / 20)
            in_hand.append(server.ask("in hand"))
            memory.append(server.memory())
    print(f"{name}, in hand {max(in_hand)} at most (bound: {bound})")
    print("   in hand:", *in_hand[::2])
    print("   MB:", *(f"{reading:.0f}" for reading in memory[::2]))
    reached = [number >= 0.9 * (bound or 0) for number in in_hand]
    since = memory[reached.index(True) :] if any(reached) else []
    half = len(since) // 2
    growth = statistics.median(since[half:]) / statistics.median(since[:half]) if half else 1.0
    print(f"   memory since the bound was reached, second half / first half: {growth:.2f}\n")
    sys.stdout.flush()
    return bound is None or (max(in_hand) <= bound and growth <= 1 + GROWTH)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("name", nargs="?", choices=list(SUBJECTS))
    parser.add_argument("--seconds", type=int, default=15, help="default: %(default)s")
    options = parser.parse_args()
    if options.serve:
        SUBJECTS[options.serve].serve()
        return
    print(f"CPython {sys.version.split()[0]}, {load.NAME}, {options.seconds} s each\n")
    names = [options.name] if options.name else SUBJECTS
    bounded = [flood(name, SUBJECTS[name].bound, options.seconds) for name in names]
    sys.exit(0 if all(bounded) else "not bounded")


if __name__ == "__main__":
    main()
