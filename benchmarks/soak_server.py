"""The server process of :mod:`benchmarks.soak`: an application with tasks of all kinds.

The path ``/RUNNER/RESPONSE/TASKS`` selects the runner, the response and the tasks. Each task
has a unique number and writes to the journal, a file to which all processes append, with one
write for each line:

- ``added NAME NUMBER`` after ``add_task`` has returned,
- ``begun NUMBER`` and ``ended NUMBER`` when the task runs, ``failed NUMBER`` if it then raises.

SIGTERM ends the server's loop as Ctrl-C does; interpreter exit drains.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Literal

from benchmarks.measure import App
from benchmarks.serving import serve_waitress
from wsgi_bg import BackgroundTasks, BackgroundTasksMiddleware, PoolRunner, get_background_tasks
from wsgi_bg.runners import Runner

FAILURES = 0.02
LONGEST = 0.01
CHUNK = b"x" * 8192

journal = -1
"""The journal's descriptor; -1 in the process that only imports this module's names."""
numbers = itertools.count(os.getpid() * 10_000_000)
Add = Callable[[BackgroundTasks], None]


def note(*words: object) -> None:
    os.write(journal, (" ".join(map(str, words)) + "\n").encode())


def add(tasks: BackgroundTasks, func: Callable[..., Any], *args: object) -> None:
    number = next(numbers)
    tasks.add_task(func, number, *args)
    note("added", func.__name__, number)


def end(number: int) -> None:
    note("ended", number)
    if random.random() < FAILURES:
        note("failed", number)
        raise RuntimeError("a task that fails")


def plain(number: int) -> None:
    note("begun", number)
    time.sleep(random.uniform(0, LONGEST))
    end(number)


async def coroutine(number: int) -> None:
    note("begun", number)
    await asyncio.sleep(random.uniform(0, LONGEST))
    end(number)


def adding(number: int, tasks: BackgroundTasks) -> None:
    note("begun", number)
    add(tasks, coroutine)
    add(tasks, plain)
    end(number)


async def adding_async(number: int, tasks: BackgroundTasks) -> None:
    note("begun", number)
    add(tasks, plain)
    await asyncio.sleep(0)
    end(number)


def stuck(number: int) -> None:
    note("begun", number)
    time.sleep(1000)


async def stuck_async(number: int) -> None:
    note("begun", number)
    await asyncio.sleep(1000)


def adding_mixed(tasks: BackgroundTasks) -> None:
    for func in (plain, coroutine, coroutine, plain, plain):
        add(tasks, func)


def adding_nested(tasks: BackgroundTasks) -> None:
    add(tasks, adding, tasks)
    add(tasks, adding_async, tasks)


def adding_stuck(tasks: BackgroundTasks) -> None:
    add(tasks, stuck)
    add(tasks, plain)


def adding_stuck_async(tasks: BackgroundTasks) -> None:
    add(tasks, stuck_async)
    add(tasks, coroutine)


STUCK: dict[str, Add] = {"stuck": adding_stuck, "stuck-async": adding_stuck_async}
TASKS: dict[str, Add] = {
    "none": lambda tasks: None,
    "plain": lambda tasks: add(tasks, plain),
    "async": lambda tasks: add(tasks, coroutine),
    "mixed": adding_mixed,
    "nested": adding_nested,
}


def length(add_tasks: Add, tasks: BackgroundTasks, start_response: Any) -> Iterable[bytes]:
    add_tasks(tasks)
    start_response("200 OK", [("Content-Length", str(len(CHUNK)))])
    return [CHUNK]


def empty(add_tasks: Add, tasks: BackgroundTasks, start_response: Any) -> Iterable[bytes]:
    add_tasks(tasks)
    start_response("204 No Content", [])
    return []


def stream(
    chunks: int, add_tasks: Add, tasks: BackgroundTasks, start_response: Any
) -> Iterator[bytes]:
    start_response("200 OK", [])
    for number in range(chunks):
        if number == chunks // 2:
            add_tasks(tasks)
        yield CHUNK


RESPONSES: dict[str, Callable[[Add, BackgroundTasks, Any], Iterable[bytes]]] = {
    "length": length,
    "empty": empty,
    "stream": partial(stream, 8),
    "long": partial(stream, 400),
}
LENGTHS = {"length": len(CHUNK), "empty": 0, "stream": 8 * len(CHUNK), "long": 400 * len(CHUNK)}
RUNNERS: dict[str, Runner | Literal["inline", "pool"]] = {"inline": "inline", "pool": "pool"}
STRICT = "strict"
DRAIN_TIMEOUT = 2.0
"""The drain timeout of the runner "strict", in seconds. The runner gets the stuck tasks,
which the log names when the process exits."""


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    _, _, response, tasks = environ["PATH_INFO"].split("/")
    add_tasks = {**TASKS, **STUCK}[tasks]
    return RESPONSES[response](add_tasks, get_background_tasks(environ), start_response)


def mounted() -> App:
    strict = PoolRunner(threads=2, drain_timeout=DRAIN_TIMEOUT)
    mounts = {
        name: BackgroundTasksMiddleware(app, runner=runner)
        for name, runner in {**RUNNERS, STRICT: strict}.items()
    }

    def choose(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return mounts[environ["PATH_INFO"].split("/")[1]](environ, start_response)

    return choose


def stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, stop)
    journal = os.open(sys.argv[-1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    serve_waitress(mounted(), {})
