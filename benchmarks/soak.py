"""Checks that the tasks of 100,000 requests each run once: ``python -m benchmarks.soak``.

Eight clients request all kinds of responses and tasks from ``wsgi-bg``, first with the inline
runner, then with the pool. Some clients leave in the middle of a long stream, some tasks raise.
At the end of each half the program adds two tasks that never end, and sends SIGTERM to the
server while the clients go on.

A journal on disk records each task that was added, began or ended. Each added task must have
begun once and ended, or be named in the log as unfinished. The memory of each server must not
grow. The program takes some minutes, and ends with an ``AssertionError`` if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

from wsgi_bg import BackgroundTasks, background_tasks, get_background_tasks

CLIENTS = 8
CHUNK = b"x" * 8192
CHUNKS = [1] * 10 + [0] * 5 + [8] * 5 + [400]
"""The lengths of the responses; clients leave most of the longest."""
FAILURES = 0.02
LONGEST = 0.01
DRAIN_TIMEOUT = 3.0
TIMEOUT = 60.0
READINGS = 21
"""The number of readings of a server's memory."""
LONG_RUN = 20_000
"""Number of requests from which memory must not grow: the first thousands let it settle."""
GROWTH = 1.05
"""How much memory may grow from the second third of a server's life to the last."""

journal = os.open(os.environ.get("JOURNAL", os.devnull), os.O_WRONLY | os.O_APPEND)
numbers = itertools.count(os.getpid() * 10_000_000)


def note(event: str, number: int) -> None:
    os.write(journal, f"{event} {number}\n".encode())


@contextmanager
def noted(number: int) -> Iterator[None]:
    note("begun", number)
    yield
    note("ended", number)
    if random.random() < FAILURES:
        raise RuntimeError("a task that fails")


def plain(number: int, seconds: float) -> None:
    with noted(number):
        time.sleep(seconds)


async def coroutine(number: int, seconds: float) -> None:
    with noted(number):
        await asyncio.sleep(seconds)


def adding(number: int, seconds: float) -> None:
    with noted(number):
        add(background_tasks, coroutine, plain)


async def adding_async(number: int, seconds: float) -> None:
    with noted(number):
        add(background_tasks, plain)


TASKS: dict[str, tuple[Callable[[int, float], Any], ...]] = {
    "none": (),
    "plain": (plain,),
    "async": (coroutine,),
    "mixed": (plain, coroutine, coroutine, plain, plain),
    "nested": (adding, adding_async),
}
STUCK = {"stuck": (plain, plain), "stuck-async": (coroutine, coroutine)}


def add(
    tasks: BackgroundTasks, *functions: Callable[[int, float], Any], seconds: float = 0
) -> None:
    for func in functions:
        number = next(numbers)
        tasks.add_task(func, number, seconds or random.uniform(0, LONGEST))
        note("added", number)


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answer ``/CHUNKS/TASKS`` with so many chunks and these tasks."""
    chunks, name = environ["PATH_INFO"][1:].split("/")
    status = "204 No Content" if chunks == "0" else "200 OK"
    length = [("Content-Length", str(len(CHUNK)))] if chunks == "1" else []
    start_response(status, length)
    functions = {**TASKS, **STUCK}[name]
    seconds = 1000 if name in STUCK else 0
    add_all = partial(add, get_background_tasks(environ), *functions, seconds=seconds)
    if int(chunks) > 1:
        return stream(int(chunks), add_all)
    add_all()
    return [CHUNK] * int(chunks)


def stream(chunks: int, add: Callable[[], None]) -> Iterator[bytes]:
    for number in range(chunks):
        if number == chunks // 2:
            add()
        yield CHUNK


def fetch(connection: http.client.HTTPConnection, chunks: int, tasks: str) -> None:
    connection.request("GET", f"/{chunks}/{tasks}")
    response = connection.getresponse()
    length = chunks * len(CHUNK)
    if chunks > 100 and random.random() < 0.8:
        response.read(random.randrange(length // 2))
        connection.close()
        response.close()
    else:
        assert len(response.read()) == length
        assert response.status in (200, 204)


def keep_busy(port: int, done: Semaphore, is_stopping: Event) -> None:
    """Make requests until the server has ended; count them in ``done``."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        try:
            while True:
                fetch(connection, random.choice(CHUNKS), random.choice(list(TASKS)))
                done.release()
        except (OSError, http.client.HTTPException):
            if not is_stopping.is_set():
                raise


def soak(command: list[str], requests: int, journal: Path, log: Path) -> None:
    """Keep a server busy and stop it; check its memory, and how it stops."""
    done, is_stopping, memory = Semaphore(0), Event(), []
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command,
            env={**os.environ, "JOURNAL": str(journal)},
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(b":")[2])
            clients = [pool.submit(keep_busy, port, done, is_stopping) for _ in range(CLIENTS)]
            statm = Path(f"/proc/{process.pid}/statm")
            for _ in range(READINGS):
                for _ in range(requests // READINGS):
                    assert done.acquire(timeout=TIMEOUT), "the clients have stopped"
                memory.append(int(statm.read_text().split()[1]) * resource.getpagesize())
            for tasks in STUCK:
                fetch(http.client.HTTPConnection("127.0.0.1", port), 8, tasks)
            is_stopping.set()
            began = time.monotonic()
            process.terminate()
            status = process.wait(TIMEOUT)
            took = time.monotonic() - began
        finally:
            process.kill()
    print(f"  stopped in {took:.1f} s; MB:", *(f"{size / 1e6:.0f}" for size in memory))
    for client in clients:
        client.result()
    assert status == 1, f"tasks are left, but the exit status is {status}"
    assert took < DRAIN_TIMEOUT + 1
    third = READINGS // 3
    before, after = (
        statistics.median(part) for part in (memory[third:-third], memory[-third:])
    )
    assert requests < LONG_RUN // 2 or after < before * GROWTH, "memory grows"


def check(journal: str, log: str) -> None:
    """Compare the journal of both servers with their log."""
    lines = journal.splitlines()
    added, begun, ended = (
        {line.split()[1] for line in lines if line.startswith(event)}
        for event in ("added", "begun", "ended")
    )
    named = Counter(re.findall(r"background task \S*?(\w+) was not (?:run|finished)\b", log))
    print(f"{len(added)} tasks added, {len(ended)} ended; in the log as not run: {dict(named)}")
    assert len(lines) == len(set(lines)), "a task was run twice"
    assert begun <= added
    stuck = Counter(func.__name__ for funcs in STUCK.values() for func in funcs * 2)
    # More, if a client makes a request as the drain time ends: its tasks are named, too.
    assert named >= stuck, "tasks that never end are not named"
    assert len(added - ended) == named.total(), "tasks are lost"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000, help="default: %(default)s")
    requests = parser.parse_args().requests
    command = [sys.executable, "-m", "wsgi_bg", "benchmarks.soak:app", "--port=0"]
    command += [f"--drain-timeout={DRAIN_TIMEOUT}", "--runner"]
    with tempfile.TemporaryDirectory() as folder:
        journal, log = Path(folder, "journal"), Path(folder, "log")
        journal.touch()
        for runner in ("inline", "pool"):
            print(f"{requests // 2} requests, {runner}", flush=True)
            soak([*command, runner], requests // 2, journal, log)
        check(journal.read_text(), log.read_text())


if __name__ == "__main__":
    main()
