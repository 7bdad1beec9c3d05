"""Shows the memory of a process with a status page: ``python -m benchmarks.monitored``.

A server gets 100,000 tasks a minute, of 50 functions, of which one always fails, while the page
asks for new numbers every two seconds. The program prints the memory of the process, which runs
server and client, and the time of an answer. The memory must not grow after two minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from benchmarks.measure import HEADERS
from tests.support import waitress
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware
from wsgi_bg.monitor import Monitor

TASKS = 50
"""The number of tasks of a request, each another function."""

PER_MINUTE = 100_000
POLL = 2.0  # seconds, as the page does


def make_task(number: int) -> Callable[[], None]:
    def task() -> None:
        if number == 0:
            raise ValueError("a task that fails")

    task.__qualname__ = f"task_{number}"
    return task


FUNCTIONS = [make_task(number) for number in range(TASKS)]


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    for function in FUNCTIONS:
        environ[ENVIRON_KEY].add_task(function)
    start_response("200 OK", HEADERS)
    return [b"ok"]


def memory() -> float:
    """The resident memory of this process, in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def ask(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    return connection.getresponse().read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    minutes = parser.parse_args().minutes
    logging.getLogger("wsgi_bg").addHandler(logging.NullHandler())
    monitored: Any = DispatcherMiddleware(
        BackgroundTasksMiddleware(app, runner="pool", status=True, on_error=lambda *_: None),
        {"/tasks": Monitor(allowed=lambda environ: True)},
    )
    with (
        waitress(monitored) as port,
        closing(http.client.HTTPConnection("127.0.0.1", port)) as connection,
    ):
        began = next_poll = next_row = time.monotonic()
        sent = 0
        slowest = 0.0
        while (now := time.monotonic()) < began + 60 * minutes:
            if sent * TASKS < PER_MINUTE * (now - began) / 60:
                ask(connection, "/")
                sent += 1
            elif now >= next_poll:
                answer = json.loads(ask(connection, "/tasks/overview.json"))
                slowest = max(slowest, time.monotonic() - now)
                next_poll = now + POLL
                if now >= next_row:
                    succeeded = answer["counts"]["succeeded"]
                    print(
                        f"{now - began:5.0f} s  {memory():6.1f} MB  {succeeded:,} tasks, "
                        f"slowest answer {1000 * slowest:.0f} ms"
                    )
                    next_row, slowest = now + 30, 0.0
            else:
                time.sleep(0.005)


if __name__ == "__main__":
    main()
