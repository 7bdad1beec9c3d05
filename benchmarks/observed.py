"""Times tasks that are observed: ``python -m benchmarks.observed``.

Each row is the time of a task that is observed beyond the same task that is not.
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

from benchmarks.measure import HEADERS, begin, interleave, row, run
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, PoolRunner
from wsgi_bg._status.recorder import recorder

BATCH = 100


def nothing() -> None:
    """A plain task."""


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    add_task = environ[ENVIRON_KEY].add_task
    for _ in range(BATCH):
        add_task(nothing)
    start_response("200 OK", HEADERS)
    return [b"ok"]


def status_inline() -> None:
    """Time inline tasks whose status is recorded, and written into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        plain, recorded, shared = (
            BackgroundTasksMiddleware(app, **options)
            for options in ({}, {"status": True}, {"status_path": folder})
        )
        bare, observed, written = interleave(
            lambda: begin(plain)(),
            lambda: begin(recorded)(),
            lambda: begin(shared)(),
            calls=5,
        )
        recorder.turn_off()  # before the folder is removed
    peer = "without the option"
    row("inline task, status, added", (observed - bare) / BATCH, peer, bare / BATCH, "<= 2")
    row("the same with a folder, added", (written - bare) / BATCH, peer, bare / BATCH, "<= 2")


def status_pool() -> None:
    """Time tasks of a pool, from the request to the end of the last task."""
    ended = threading.Event()

    def with_end(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = app(environ, start_response)
        environ[ENVIRON_KEY].add_task(ended.set)
        return body

    def handle(middleware: BackgroundTasksMiddleware) -> None:
        ended.clear()
        begin(middleware)()
        ended.wait()

    pool = PoolRunner(threads=1)
    plain, recorded = (
        BackgroundTasksMiddleware(with_end, runner=pool, status=status)
        for status in (None, True)
    )
    bare, observed = interleave(lambda: handle(plain), lambda: handle(recorded), calls=5)
    peer = "without the option"
    row("pool task, status, added", (observed - bare) / BATCH, peer, bare / BATCH, "<= 2")


if __name__ == "__main__":
    run("Observed tasks", {"status": status_inline, "pool": status_pool})
