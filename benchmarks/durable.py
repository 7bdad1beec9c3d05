"""Times durable tasks: ``python -m benchmarks.durable``; peers that are missing are left out.

``normal`` and ``full`` time requests 1 ms apart, a request to each subject in turns: the whole
request on the server's thread, with one registered task, through the middleware. The peers are
the same request with ``PoolRunner``, one insert with commit by the bare ``sqlite3``, the call
of a Huey task on SQLite, and Celery's ``delay()`` on a Redis that the program starts.

``sharing`` makes each sync of the disk last 2 ms longer, by a sleep behind each commit that is
synced, while the thread still has the turn to write. ``rate`` counts from the first request
until all tasks have ended and their rows are gone.

``takeover`` times requests 1 ms apart while this process works off the tasks of a dead one.
``idle`` measures the processor time of a process that only looks around. ``million`` starts a
process on a folder with a million tasks that wait for their time, and then times requests.

Huey is no dependency of this package: ``pip install huey``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest.mock import patch

from celery import Celery

from benchmarks.handover import Countdown
from benchmarks.measure import HEADERS, begin, in_turns, options, row, run
from benchmarks.publish import broker
from wsgi_bg import (
    ENVIRON_KEY,
    BackgroundTasksMiddleware,
    DurableRunner,
    PoolRunner,
    registered_task,
)
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.rows import Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._store.writer import Writer, connect

PAUSE = 0.001
ARGUMENTS = ("ada@example.com", 4711)
ROW = ("benchmark.durable", '[["ada@example.com",4711],{}]', "", "", 0.0, 0, 0, "1-1", 0.0)
ENCODED = f"[1,{json.dumps(ARGUMENTS)},{{}}]"
SLOWER = 0.002
THREADS = 8
PROCESSES = 3
PERCENTILES = {"p50": 499, "p99": 989, "p99.9": 998}

options.tasks = 20_000
options.requests = 3000

Call = Callable[[], Any]
countdown = Countdown(0)


@registered_task(name="benchmark.durable")
def send_mail(recipient: str, order: int) -> None:
    countdown.tick()


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    for _ in repeat(None, environ["tasks"]):
        environ[ENVIRON_KEY].add_task(send_mail, *ARGUMENTS)
    start_response("200 OK", HEADERS)
    return [b"ok"]


@contextmanager
def durable(path: str = "", **given: Any) -> Iterator[tuple[Callable[..., None], Store]]:
    """Yield a function that makes a whole request, and the store of its tasks.

    :param path: the folder of the tasks; a new folder if empty.
    """
    with tempfile.TemporaryDirectory() as new:
        folder = path or new
        runner = DurableRunner(folder, **given)
        runner.start()
        yield request_to(runner), Store.own(check_folder(folder), Settings())
        runner.drain(60.0)
        runner.abandon()


def request_to(runner: Any) -> Callable[..., None]:
    wrapped = BackgroundTasksMiddleware(app, runner=runner)
    return lambda tasks=1: begin(wrapped, tasks=tasks)()


@contextmanager
def bare_insert(synchronous: str) -> Iterator[Call]:
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder, "bare"), isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        columns = "name, arguments, options, context, due, attempts, crashes, id, added"
        connection.execute(f"CREATE TABLE tasks ({columns}, key INTEGER PRIMARY KEY)")
        places = ", ".join("?" * len(ROW))
        insert = f"INSERT INTO tasks VALUES ({places}, NULL)"  # noqa: S608
        yield partial(connection.execute, insert, ROW)
        connection.close()


@contextmanager
def huey() -> Iterator[Call]:
    from huey import SqliteHuey

    with tempfile.TemporaryDirectory() as folder:
        yield partial(SqliteHuey(filename=f"{folder}/huey").task()(send_mail), *ARGUMENTS)


@contextmanager
def celery() -> Iterator[Call]:
    with broker("redis") as server:
        celery = Celery("benchmark", broker=server.fresh_url(), set_as_current=False)
        celery.conf.task_ignore_result = True
        yield partial(celery.task(name="bare", shared=False)(send_mail).delay, *ARGUMENTS)


def peers(stack: ExitStack) -> dict[str, Call]:
    """Return the peers that are installed."""
    found: dict[str, Call] = {}
    if importlib.util.find_spec("huey") is None:
        print("Huey is not installed: left out")
    else:
        found["Huey on SQLite"] = stack.enter_context(huey())
    if shutil.which("redis-server") is None:
        print("redis-server is not installed: Celery is left out")
    else:
        found["Celery's delay()"] = stack.enter_context(celery())
    return found


def paced(subjects: dict[str, Call]) -> dict[str, list[float]]:
    """Return the percentiles in microseconds of calls that are ``PAUSE`` apart, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(options.requests):
        for name, call in subjects.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - began) * 1e6)
    cuts = {name: quantiles(times[20:], n=1000) for name, times in taken.items()}
    return {name: [all_[cut] for cut in PERCENTILES.values()] for name, all_ in cuts.items()}


def paced_rows(synchronous: Any, goals: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        subjects: dict[str, Call] = {
            "ours": stack.enter_context(durable(synchronous=synchronous))[0],
            "pool": request_to(PoolRunner()),
            "bare insert": stack.enter_context(bare_insert(synchronous)),
        }
        if synchronous == "normal":
            subjects |= peers(stack)
        found = paced(subjects)
    ours, pool = found.pop("ours"), found["pool"]
    for place, (name, goal) in enumerate(zip(PERCENTILES, goals, strict=True)):
        more = ours[place] - pool[place]
        for peer, times in found.items():
            note = f"+{more:.0f} us, to reach {goal}" if peer == "pool" and goal else ""
            if synchronous == "full" and peer == "bare insert" and name == "p50":
                note = "<= 1.4"
            row(
                f"a request with a task, {synchronous}, {name}",
                ours[place],
                peer,
                times[place],
                note,
            )


def ten() -> None:
    with durable() as (request, _):
        found = paced({"ten": lambda: request(10), "one": request})
    row("ten tasks in a request", found["ten"][0], "one task", found["one"][0], "<= 3")


def flood(request: Call, threads: int, requests: int) -> float:
    """Return the seconds for ``requests`` requests from ``threads`` threads."""

    def make() -> None:
        for _ in range(requests // threads):
            request()

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for each in [pool.submit(make) for _ in range(threads)]:
            each.result()
        return time.perf_counter() - began


def sharing() -> None:
    syncs: list[None] = []
    execute = Writer.execute

    def counted(
        pause: float, self: Writer, statements: Any, *, is_synced: bool = False
    ) -> None:
        execute(self, statements, is_synced=is_synced)
        if is_synced:
            syncs.append(None)
            time.sleep(pause)

    requests = options.requests // 5 // THREADS * THREADS
    slower = patch.object(Writer, "execute", lambda *a, **k: counted(SLOWER, *a, **k))
    with slower, durable(synchronous="full") as (request, _):
        one, many = (requests / flood(request, n, requests) for n in (1, THREADS))
    row(
        f"requests a second, a sync of 2 ms, {THREADS} threads", many, "one thread", one, ">= 3"
    )
    real = patch.object(Writer, "execute", lambda *a, **k: counted(0.0, *a, **k))
    with real, durable(synchronous="full") as (request, _):
        syncs.clear()
        flood(request, THREADS, options.requests)
    row(
        f"syncs, {THREADS} threads, the real disk",
        len(syncs),
        "requests",
        options.requests,
        "<= 0.5",
    )


def run_all(threads: int, path: str = "") -> float:
    """Return the seconds from the first request until no task and no row is left."""
    global countdown
    countdown = Countdown(options.tasks)
    with durable(path) as (request, store):
        began = time.perf_counter()
        flood(request, threads, options.tasks)
        countdown.wait()
        while store.untidy:
            store.tidy()
        took = time.perf_counter() - began
        counts = store.count()
        assert counts["waiting"] + counts["running"] == 0, counts
    return took


def in_processes() -> float:
    """Return the seconds of as many processes as ``PROCESSES``, with all tasks each."""
    code = (
        "import sys; from benchmarks import durable as d; d.options.tasks = int(sys.argv[1]); "
        "input(); print(d.run_all(1, sys.argv[2]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(options.tasks), folder]
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            for _ in range(PROCESSES)
        ]
        time.sleep(2.0)  # until all have imported the package
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(process.communicate()[0]) for process in processes)


def with_huey() -> float:
    """Return the seconds until Huey's consumer, in threads of this process, has run all."""
    global countdown
    from huey import SqliteHuey

    countdown = Countdown(options.tasks // 20)
    with tempfile.TemporaryDirectory() as folder:
        queue = SqliteHuey(filename=f"{folder}/huey", results=False)
        send = queue.task()(send_mail)
        consumer = queue.create_consumer(workers=2, periodic=False, initial_delay=0.001)
        consumer.start()
        began = time.perf_counter()
        for _ in range(options.tasks // 20):
            send(*ARGUMENTS)
        countdown.wait()
        took = time.perf_counter() - began
        consumer.stop(graceful=True)
    return took * 20


def die_with(tasks: int, folder: str, due: float = 0.0) -> None:
    """Let a process store ``tasks`` in ``folder`` and die."""
    code = "import sys; from benchmarks import durable as d; d.fill(*map(eval, sys.argv[1:]))"
    arguments = map(repr, (tasks, folder, due))
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def fill(tasks: int, folder: str, due: float) -> None:
    """Store ``tasks``, a request each, and end this process without its exit."""
    store = Store.own(check_folder(folder), Settings())
    for start in range(0, tasks, 1000):
        store.leave(store.add([Row(ROW[0], ENCODED, due=due)] * min(1000, tasks - start)))
        store.tidy()
    with closing(connect(store.path)) as connection:
        connection.execute("UPDATE tasks SET request = key")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    os._exit(0)


def takeover() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with durable() as (request, _):
            alone = paced({"ours": request})["ours"]
        die_with(options.tasks, folder)
        taken: list[float] = []
        with durable(folder) as (request, _):
            began = time.perf_counter()
            while len(check_folder(folder).numbers()) > 1 or len(taken) < 100:
                time.sleep(PAUSE)
                before = time.perf_counter()
                request()
                taken.append((time.perf_counter() - before) * 1e6)
            took = time.perf_counter() - began
    print(f"{options.tasks} tasks of a dead process: {took:.1f} s, {len(taken)} requests")
    p99 = quantiles(taken, n=100)[98]
    row("a request during a take-over, p99", p99, "no take-over", alone[1], "<= 10,000 us")


def idle() -> None:
    seconds = 25.0
    code = (
        "import sys, tempfile, time; from wsgi_bg import DurableRunner; "
        "r = DurableRunner(tempfile.mkdtemp()); r.start(); time.sleep(2.0); "
        "began = time.process_time(); time.sleep(float(sys.argv[1])); "
        "print(time.process_time() - began)"
    )
    command = [sys.executable, "-c", code, str(seconds)]
    used = float(subprocess.run(command, capture_output=True, check=True).stdout)
    row("an idle process", used / seconds * 100, "of a core", 100.0, "<= 0.1 %", "%")


def million() -> None:
    tasks, due = 1_000_000, time.time() + 86400
    code = (
        "import sys; from benchmarks import durable as d; "
        "print(*d.started(eval(sys.argv[1])), sep=',')"
    )
    found = []
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as folder:
        die_with(tasks, folder, due)
        for path in (empty, folder):
            command = [sys.executable, "-c", code, repr(path)]
            out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            found.append([float(number) for number in out.split(",")])
    rows = (
        ("start", "<= 100 ms", "ms"),
        ("memory", "<= 20 MB", "MB"),
        ("a request", "<= 1.5", ""),
    )
    for (name, goal, unit), none, many in zip(rows, *found, strict=True):
        row(f"{name}, 1,000,000 tasks wait", many, "none", none, goal, unit)


def started(folder: str) -> tuple[float, float, float]:
    """Return milliseconds until the first look, megabytes, and microseconds of a request."""
    process = Path("/proc/self/statm")

    def megabytes() -> float:
        return int(process.read_text().split()[1]) * 4096 / 1e6

    with durable() as (request, _):
        request()  # imports everything, and starts the threads of a process
    files = len(check_folder(folder).numbers()) + 1
    before, began = megabytes(), time.perf_counter()
    runner = DurableRunner(folder)
    runner.start()
    while len(runner.ledger.files.open) < files:
        time.sleep(PAUSE)
    took = (time.perf_counter() - began) * 1e3
    time.sleep(2.0)  # the next looks
    used = megabytes() - before
    return took, used, paced({"ours": request_to(runner)})["ours"][0]


def inserted() -> float:
    """Return the seconds of as many bare inserts."""
    with bare_insert("normal") as insert:
        began = time.perf_counter()
        for _ in range(options.tasks):
            insert()
        return time.perf_counter() - began


def rate() -> None:
    has_huey = importlib.util.find_spec("huey") is not None
    subjects: list[Callable[[], float]] = [
        partial(run_all, 1),
        partial(run_all, 4),
        in_processes,
        inserted,
    ]
    one, four, three, bare, *of_huey = in_turns(
        *subjects, *[with_huey] * has_huey, rounds=min(options.rounds, 3)
    )
    thousand = options.tasks / 1000
    what = "durable tasks a second"
    inserts = "bare inserts", thousand / bare
    row(f"{what}, one server thread", thousand / one, *inserts, ">= 12k", "k")
    row(f"{what}, four server threads", thousand / four, *inserts, ">= 8k", "k")
    name = f"{what}, {PROCESSES} processes"
    row(name, PROCESSES * thousand / three, "one", thousand / one, ">= 1.5", "k")
    for taken in of_huey:
        row(f"{what}, one server thread", thousand / one, "Huey", thousand / taken, ">= 4", "k")


ROWS: dict[str, Callable[[], None]] = {
    "normal": partial(paced_rows, "normal", ("<= 40 us", "<= 150 us", "<= 1000 us")),
    "full": partial(paced_rows, "full", ("", "", "")),
    "ten": ten,
    "sharing": sharing,
    "rate": rate,
    "takeover": takeover,
    "idle": idle,
    "million": million,
}


if __name__ == "__main__":
    run("Durable tasks", ROWS, "microseconds if no unit is named")
