"""Measures requests with a task of 10 ms, end to end: ``python -m benchmarks.end_to_end``.

Flask on waitress with four threads submits the task to each runner, and to Flask-Executor;
FastAPI on uvicorn adds the task to its ``BackgroundTasks``. Each server runs in a separate
process, started anew in every round; wrk (Debian's package) keeps it busy for some seconds.
The program prints the medians of the rounds as the table of docs/explanation/performance.md.

*left* counts the tasks that were added and not completed when the load ended; *drained* is
the time that these tasks then took.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, Literal

import fastapi
import uvicorn
import waitress
from flask import Flask
from flask_executor import Executor

from benchmarks.measure import App
from wsgi_bg import BackgroundTasksMiddleware, background_tasks

TASK = 0.01
TIMEOUT = 120.0
CONNECTIONS = 16
COLUMNS = ("requests/s", "p50 ms", "p99 ms", "completed/s", "left", "drained s")
MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}

Figures = tuple[float, ...]
"""The results of a subject in one round, in the order of COLUMNS."""

processes = multiprocessing.get_context("spawn")


class Tasks:
    """The tasks of a server, counted in memory that the benchmark shares."""

    def __init__(self) -> None:
        self.added = processes.Value("l")
        self.completed = processes.Value("l")

    def add(self, submit: Callable[[Callable[[], None]], object]) -> str:
        with self.added:
            self.added.value += 1
        submit(self.run)
        return "ok"

    def run(self) -> None:
        time.sleep(TASK)
        with self.completed:
            self.completed.value += 1

    def left(self) -> int:
        left: int = self.added.value - self.completed.value
        return left

    def drain(self) -> float:
        """Wait until all tasks are completed; return the seconds that this took."""
        began = time.monotonic()
        while self.left():
            time.sleep(0.001)
            assert time.monotonic() < began + TIMEOUT, f"{self.left()} tasks are left"
        return time.monotonic() - began


def flask(view: Callable[[], str]) -> Flask:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=view, endpoint="view")
    return app


def with_runner(runner: Literal["inline", "pool"], tasks: Tasks) -> App:
    app = flask(lambda: tasks.add(background_tasks.add_task))
    return BackgroundTasksMiddleware(app, runner=runner)


def flask_executor(threads: int | None, tasks: Tasks) -> App:
    app = flask(lambda: tasks.add(executor.submit))
    app.config["EXECUTOR_MAX_WORKERS"] = threads
    executor = Executor(app)
    return app


def asgi(tasks: Tasks) -> fastapi.FastAPI:
    async def view(added: Any) -> str:  # async, as in FastAPI's own documentation
        return tasks.add(added.add_task)

    view.__annotations__["added"] = fastapi.BackgroundTasks
    app = fastapi.FastAPI()
    app.add_api_route("/", view)
    return app


SUBJECTS: dict[str, Callable[[Tasks], Any]] = {
    "Flask, no task": lambda tasks: flask(lambda: "ok"),
    "Flask, inline": partial(with_runner, "inline"),
    "Flask, pool": partial(with_runner, "pool"),
    "Flask, Flask-Executor": partial(flask_executor, None),
    "Flask, Flask-Executor of 40 threads": partial(flask_executor, 40),
    "FastAPI on uvicorn": asgi,
}


def serve(subject: str, tasks: Tasks, listener: socket.socket) -> None:
    """Serve until the process is killed."""
    app = SUBJECTS[subject](tasks)
    if isinstance(app, fastapi.FastAPI):
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])
    else:
        # This logger warns of each request that waits for a thread.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        waitress.serve(app, sockets=[listener], threads=4)


def put_load(url: str, seconds: int) -> tuple[float, float, float]:
    """Return the requests a second, and the median and p99 of the latencies in milliseconds."""
    sizes = ["--threads=1", f"--connections={CONNECTIONS}", f"--duration={seconds}s"]
    command = ["wrk", *sizes, "--latency", url]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in printed, printed
    if errors := re.search(r"Socket errors: .*", printed):  # probably a slow server
        print(errors[0], file=sys.stderr)
    rate = re.findall(r"Requests/sec:\s+([\d.]+)", printed)
    latencies = re.findall(r"^ +(?:50|99)% +([\d.]+)([a-z]+) *$", printed, re.MULTILINE)
    p50, p99 = (float(number) * MILLISECONDS[unit] for number, unit in latencies)
    return float(rate[0]), p50, p99


def measure(subject: str, seconds: int) -> Figures:
    tasks = Tasks()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = processes.Process(target=serve, args=(subject, tasks, listener))
        server.start()
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()  # waits until it serves
            put_load(url, 1)  # makes threads and caches
            tasks.drain()
            before, began = tasks.completed.value, time.monotonic()
            of_wrk = put_load(url, seconds)
            completed = (tasks.completed.value - before) / (time.monotonic() - began)
            return *of_wrk, completed, tasks.left(), tasks.drain()
        finally:
            server.kill()
            server.join()


def print_table(rounds: dict[str, list[Figures]]) -> None:
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for subject, figures in rounds.items():
        medians = map(statistics.median, zip(*figures, strict=True))
        print(f"| {subject} | " + " | ".join(f"{median:.1f}" for median in medians) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: left out")
        return
    print(
        f"CPython {sys.version.split()[0]}, wrk, {CONNECTIONS} connections, "
        f"{options.rounds} rounds of {options.seconds} s\n"
    )
    rounds: dict[str, list[Figures]] = {subject: [] for subject in SUBJECTS}
    for _ in range(options.rounds):
        for subject, figures in rounds.items():
            figures.append(measure(subject, options.seconds))
    print_table(rounds)


if __name__ == "__main__":
    main()
