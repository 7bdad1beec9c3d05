"""Measures requests with a task of 10 ms, end to end: ``python -m benchmarks.end_to_end``.

Flask on waitress with four threads submits the task to each runner, and to Flask-Executor;
FastAPI on uvicorn adds the task to its ``BackgroundTasks``. Each server runs in a separate
process, started anew in every round, and is kept busy on all connections for some seconds.
The program prints the medians of the rounds as the table of docs/explanation/performance.md.

*left* counts the tasks that were added and not completed when the load ended; *drained* is
the time that these tasks then took.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from flask import Flask

from benchmarks import load
from benchmarks.serving import Counters, ServerProcess, serve_uvicorn, serve_waitress
from wsgi_bg import BackgroundTasksMiddleware, background_tasks

TASK = 0.01
COLUMNS = ("requests/s", "p50 ms", "p99 ms", "completed/s", "left", "drained s")


class Figures(NamedTuple):
    """The results of a subject in one round."""

    rate: float
    p50: float
    p99: float
    completed: float
    left: int
    drained: float


counters = Counters()


def task() -> None:
    time.sleep(TASK)
    counters.complete()


def flask_with(add: Callable[[Callable[[], None]], object]) -> Flask:
    app = Flask(__name__)

    def view() -> str:
        counters.add()
        add(task)
        return "ok"

    app.add_url_rule("/", view_func=view)
    return app


def bare() -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "ok", endpoint="view")
    serve_waitress(app, counters.answers)


def wsgi_bg(runner: Literal["inline", "pool"]) -> None:
    app = flask_with(lambda func: background_tasks.add_task(func))
    serve_waitress(BackgroundTasksMiddleware(app, runner=runner), counters.answers)


def flask_executor(threads: int | None) -> None:
    from flask_executor import Executor

    app = flask_with(lambda func: executor.submit(func))
    app.config["EXECUTOR_MAX_WORKERS"] = threads
    executor = Executor(app)
    serve_waitress(app, counters.answers)


def fastapi() -> None:
    from fastapi import BackgroundTasks, FastAPI

    async def view(tasks: Any) -> str:  # async, as in FastAPI's own documentation
        counters.add()
        tasks.add_task(task)
        return "ok"

    view.__annotations__["tasks"] = BackgroundTasks
    app = FastAPI()
    app.add_api_route("/", view)
    serve_uvicorn(app, counters.answers)


SUBJECTS: dict[str, tuple[Callable[[], None], str]] = {
    "Flask, no task": (bare, "waitress"),
    "Flask, inline": (partial(wsgi_bg, "inline"), "waitress"),
    "Flask, pool": (partial(wsgi_bg, "pool"), "waitress"),
    "Flask, Flask-Executor": (partial(flask_executor, None), "flask_executor"),
    "Flask, Flask-Executor of 40 threads": (partial(flask_executor, 40), "flask_executor"),
    "FastAPI on uvicorn": (fastapi, "fastapi"),
}
"""For each subject, the function that serves the application, and the required package."""


def measure(subject: str, seconds: int, connections: int) -> Figures:
    with ServerProcess("benchmarks.end_to_end", subject) as server:
        load.put_load(server.port, 1, connections)
        before = server.ask("drained")["completed"]
        began = time.monotonic()
        seen = load.put_load(server.port, seconds, connections)
        after = server.ask("report")
        ended = time.monotonic()
        server.ask("drained")
        completed = (after["completed"] - before) / (ended - began)
        left = after["added"] - after["completed"]
        return Figures(*seen, completed, left, time.monotonic() - ended)


def print_table(rounds: dict[str, list[Figures]]) -> None:
    medians = {
        subject: Figures(*map(statistics.median, zip(*figures, strict=True)))
        for subject, figures in rounds.items()
    }
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for subject, seen in medians.items():
        cells = f"{seen.rate:.0f} | {seen.p50:.1f} | {seen.p99:.1f} | "
        if subject == "Flask, no task":
            cells += "| | |"
        else:
            cells += f"{seen.completed:.0f} | {seen.left:.0f} | {seen.drained:.1f} |"
        print(f"| {subject} | {cells}")
    pool, inline = medians["Flask, pool"], medians["Flask, inline"]
    print(f"\npool / inline: {pool.rate / inline.rate:.1f} times the requests (to reach: 5)")
    no_task = medians["Flask, no task"]
    print(f"p99 of pool / of no task: {pool.p99 / no_task.p99:.2f} (to reach: 2)")
    if "FastAPI on uvicorn" in medians:
        ratio = pool.completed / medians["FastAPI on uvicorn"].completed
        print(f"completed, pool / FastAPI: {ratio:.2f} (to reach: 1)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--connections", type=int, default=16, help="default: %(default)s")
    options = parser.parse_args()
    if options.serve:
        SUBJECTS[options.serve][0]()
        return
    rounds: dict[str, list[Figures]] = {}
    for name, (_, package) in SUBJECTS.items():
        if find_spec(package) is None:
            print(f"{name}: {package} is not installed, left out")
        else:
            rounds[name] = []
    print(
        f"CPython {sys.version.split()[0]}, {load.NAME}, {options.connections} connections, "
        f"{options.rounds} rounds of {options.seconds} s\n"
    )
    for _ in range(options.rounds):
        for name, figures in rounds.items():
            figures.append(measure(name, options.seconds, options.connections))
    print_table(rounds)


if __name__ == "__main__":
    main()
