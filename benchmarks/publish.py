"""Times sending a task to Celery: ``python -m benchmarks.publish``.

The peer is Celery's own ``task.delay()``, in the same process, to the same broker: a Redis
that the program starts if ``redis-server`` is installed. No worker runs.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery import Celery

from benchmarks.measure import HEADERS, begin, in_turns, row, run, time_calls
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, registered_task
from wsgi_bg.celery import CeleryRunner

CALLS = 50
ARGUMENTS = ("ada@example.com", 4711)
LINES = ["tea", "sugar", "milk"]


@registered_task(name="benchmark.send_mail")
def send_mail(recipient: str, order: int, *, lines: list[str]) -> None:
    """A registered function; only a worker would call it."""


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    environ[ENVIRON_KEY].add_task(send_mail, *ARGUMENTS, lines=LINES)
    start_response("200 OK", HEADERS)
    return [b"ok"]


@contextmanager
def redis() -> Iterator[str]:
    """Start a Redis and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("Ready to accept connections" in line for line in process.stdout)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.kill()


def to_redis() -> None:
    if shutil.which("redis-server") is None:
        print("redis-server is not installed: left out")
        return
    with redis() as url:
        celery = Celery("benchmark", broker=url, set_as_current=False)
        celery.conf.task_ignore_result = True
        ours = BackgroundTasksMiddleware(app, runner=CeleryRunner(celery))
        delay = celery.task(name="bare", shared=False)(send_mail).delay
        subjects = (
            time_calls(partial(begin, ours), CALLS),
            time_calls(lambda: partial(delay, *ARGUMENTS, lines=LINES), CALLS),
        )
        for subject in subjects:
            subject()  # opens the connections
        close, peer = in_turns(*subjects)
    row("close(), a task to Redis", close, "delay()", peer)


if __name__ == "__main__":
    run("Sending to Celery", {"redis": to_redis})
