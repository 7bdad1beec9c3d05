"""Times a task's start beside the response's end: ``python -m benchmarks.put_off``.

waitress and cheroot write the end of a stream only after they have called ``close()``. A
task that starts at once and holds the interpreter for 20 ms may delay this write. Here a
client in a separate process requests such a stream. By a shared clock the client notes when
the response was complete, and the server notes when the task began.

Lateness is the time of the whole request, less that of the same request without a task;
both requests are made in turns. ``at once`` is a runner that starts tasks without a delay.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import h11

from benchmarks.measure import App, quantile
from benchmarks.serving import TIMEOUT, ServerProcess, connect, serve_cheroot, serve_waitress
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware
from wsgi_bg.runners.base import Statistics

if TYPE_CHECKING:
    from wsgi_bg import BackgroundTask
    from wsgi_bg._tasks.batch import Batch

HOLD = 0.02
RUNNERS = ("pool", "inline", "at once")
SERVERS = {"waitress": serve_waitress, "cheroot": serve_cheroot}


class AtOnceRunner:
    """Submits each batch to a waiting thread, without a delay."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Batch] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    def submit(self, batch: Batch) -> None:
        self._queue.put(batch)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        return []

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0)

    def _work(self) -> None:
        while True:
            self._queue.get().run()


class HoldingTask:
    """A task that keeps the interpreter busy, written in Python."""

    def __init__(self) -> None:
        self._began: SimpleQueue[float] = SimpleQueue()
        self._loops = 1000
        while (took := self._time()) < HOLD / 4:
            self._loops *= 2
        self._loops = int(self._loops * HOLD / took)

    def _time(self) -> float:
        began = time.monotonic()
        self._hold()
        return time.monotonic() - began

    def _hold(self) -> None:
        for _ in range(self._loops):
            pass

    def __call__(self) -> None:
        began = time.monotonic()
        self._hold()
        self._began.put(began)

    def began(self) -> float:
        """Wait for the next task to be done; return the time when the task began."""
        return self._began.get(timeout=TIMEOUT)


def make_app(task: Callable[[], None]) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        if environ["PATH_INFO"] == "/task":
            environ[ENVIRON_KEY].add_task(task)
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        yield b"last"

    return app


def serve(server: str, runner: Any) -> None:
    task = HoldingTask()
    app = BackgroundTasksMiddleware(
        make_app(task), runner=AtOnceRunner() if runner == "at once" else runner
    )
    SERVERS[server](app, {"began": task.began})


def fetch(port: int, path: str) -> tuple[float, float]:
    """Return the times when the request was sent and the response's framing complete."""
    client = h11.Connection(h11.CLIENT)
    head = client.send(h11.Request(method="GET", target=path, headers=[("Host", "test")]))
    client.send(h11.EndOfMessage())
    with connect(port) as connection:
        sent = time.monotonic()
        connection.sendall(head)
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(connection.recv(65536))
            elif isinstance(event, h11.EndOfMessage):
                return sent, time.monotonic()


def measure(server: str, runner: str, requests: int) -> None:
    first, with_task, without = 0, [], []
    with ServerProcess("benchmarks.put_off", f"{server},{runner}") as process:
        for path in ("/", "/task"):  # warm up: the first request makes threads and caches
            fetch(process.port, path)
        process.ask("began")
        for _ in range(requests):
            sent, complete = fetch(process.port, "/")
            without.append(complete - sent)
            sent, complete = fetch(process.port, "/task")
            with_task.append(complete - sent)
            first += complete < process.ask("began")
    usual = statistics.median(without)
    late = [f"{(quantile(with_task, part) - usual) * 1000:.2f}" for part in (0.5, 0.95)]
    goal = f">= {requests * 195 // 200}" if runner != "at once" else ""
    print(
        f"{server:<10} {runner:<8} {first:>5} of {requests:<5} {goal:<8} "
        f"late by {late[0]:>6} ms at the median, {late[1]:>6} at p95 "
        f"(without a task {(quantile(without, 0.95) - usual) * 1000:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve.split(","))
        return
    print(f"\nThe client has its response first; CPython {sys.version.split()[0]}\n")
    for server in SERVERS:
        if find_spec(server) is None:
            print(f"{server} is not installed: left out")
            continue
        for runner in RUNNERS:
            measure(server, runner, options.requests)


if __name__ == "__main__":
    main()
