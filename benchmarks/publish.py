"""Times sending a task to Celery: ``python -m benchmarks.publish``.

The peer is Celery's own ``task.delay()``, in the same process, to the same broker. Brokers
are Redis, which the program starts if ``redis-server`` is installed, and the memory of the
process, which costs nothing. The times are those for which the server's thread is busy:
``close()``, and the whole request. No worker runs.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from celery import Celery

from benchmarks.measure import HEADERS, in_turns, row, run, start_response
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, registered_task
from wsgi_bg.celery import CeleryRunner

CALLS = 50


@registered_task(name="benchmark.send_mail")
def send_mail(recipient: str, order: int, *, lines: list[str]) -> None:
    """A registered function; only a worker would call it."""


ARGUMENTS = ("ada@example.com", 4711)
LINES = ["tea", "sugar", "milk"]


@contextmanager
def redis() -> Iterator[str | None]:
    """Start a Redis and yield its URL; None if Redis is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        print("redis-server is not installed: left out")
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        try:
            for _ in range(100):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def application(url: str) -> Celery:
    app = Celery("benchmark", broker=url, set_as_current=False)
    app.conf.task_ignore_result = True
    return app


def add(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    environ[ENVIRON_KEY].add_task(send_mail, *ARGUMENTS, lines=LINES)
    start_response("200 OK", HEADERS)
    return [b"ok"]


def begin(app: Any) -> Callable[[], None]:
    """Make a request; return the ``close()`` that the server calls at its end."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "waitress.client_disconnected": None,  # the middleware recognises waitress
    }
    body = app(environ, cast("Any", start_response))
    for _ in body:
        pass
    return cast("Callable[[], None]", body.close)


def ours(url: str, *, whole: bool) -> Callable[[], float]:
    app = BackgroundTasksMiddleware(add, runner=CeleryRunner(application(url)))

    def measured() -> float:
        taken = 0.0
        for _ in range(CALLS):
            began = time.perf_counter()
            close = begin(app)
            if not whole:
                began = time.perf_counter()
            close()
            taken += time.perf_counter() - began
        return taken / CALLS * 1e6

    return measured


def celerys(url: str) -> Callable[[], float]:
    task = application(url).task(name="bare", shared=False)(send_mail)

    def measured() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            task.delay(*ARGUMENTS, lines=LINES)
        return (time.perf_counter() - began) / CALLS * 1e6

    return measured


def compare(name: str, url: str) -> None:
    subjects = (ours(url, whole=False), ours(url, whole=True), celerys(url))
    for subject in subjects:
        subject()  # opens the connections
    close, whole, bare = in_turns(*subjects)
    for what, mine in (("close()", close), ("the whole request", whole)):
        row(
            f"{what}, a task to {name}",
            f"{mine:.0f}",
            f"delay() {bare:.0f}",
            f"{mine / bare:.2f} of it",
            "",
        )


def to_redis() -> None:
    with redis() as url:
        if url is not None:
            compare("Redis", url)


ROWS: dict[str, Callable[[], None]] = {
    "redis": to_redis,
    "memory": partial(compare, "memory", "memory://"),
}


if __name__ == "__main__":
    run("Sending to Celery", ROWS)
