"""Times adding and running tasks: ``python -m benchmarks.tasks``.

The peer is Starlette's ``BackgroundTasks``, in an event loop that already runs, as in a
Starlette application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from typing import Any

from flask import Flask
from starlette.background import BackgroundTask as StarletteTask
from starlette.background import BackgroundTasks as StarletteTasks

from benchmarks.measure import HEADERS, begin, interleave, row, run
from wsgi_bg import ENVIRON_KEY, BackgroundTasks, BackgroundTasksMiddleware
from wsgi_bg._tasks.background_tasks import TaskQueue
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks

BATCH = 100


def nothing(*args: object, **kwargs: object) -> None:
    """A plain task."""


async def nothing_async(*args: object, **kwargs: object) -> None:
    """An async task."""


def add_to(make: Callable[[], Any]) -> Callable[[], None]:
    def add() -> None:
        add_task = make().add_task
        for _ in range(BATCH):
            add_task(nothing, 1, to="x")

    return add


def batch_of(func: Callable[..., object], tasks: int = BATCH) -> Batch:
    background = TaskQueue()
    for _ in range(tasks):
        background.add_task(func)
    return Batch(background, response_complete=True)


async def starlette() -> None:
    """Run Starlette's tasks in sequence, on a running event loop."""
    for _ in range(BATCH):
        await StarletteTask(nothing)()


def adding() -> None:
    ours, peer = interleave(add_to(BackgroundTasks), add_to(StarletteTasks), calls=20)
    row("add_task", ours / BATCH, "Starlette", peer / BATCH, "<= 0.4")


def plain() -> None:
    with closing(asyncio.new_event_loop()) as loop:
        added, ran, peer = interleave(
            lambda: batch_of(nothing),
            lambda: batch_of(nothing).run(),
            lambda: loop.run_until_complete(starlette()),
            calls=5,
        )
    row("inline plain task", (ran - added) / BATCH, "Starlette", peer / BATCH, "<= 0.6")


def async_batch() -> None:
    one, hundred = interleave(
        lambda: batch_of(nothing_async, 1).run(),
        lambda: batch_of(nothing_async).run(),
        calls=20,
    )
    row("async batch of 100, inline", hundred, "batch of one", one, "ratio <= 2.5")


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    add_task = environ[ENVIRON_KEY].add_task
    for _ in range(BATCH):
        add_task(nothing)
    start_response("200 OK", HEADERS)
    return [b"ok"]


def watched() -> None:
    """Time requests whose tasks hooks watch, or run in a Flask application context."""
    flask_app = Flask(__name__)
    flask_app.wsgi_app = app  # type: ignore[method-assign]
    Background(flask_app)

    def by_hand() -> None:
        for _ in range(BATCH):
            with flask_app.app_context():
                nothing()

    plain, watched = (BackgroundTasksMiddleware(app, hooks=hooks) for hooks in (None, Hooks()))
    bare, hooked, in_context, peer = interleave(
        lambda: begin(plain)(),
        lambda: begin(watched)(),
        lambda: begin(flask_app.wsgi_app)(),
        by_hand,
        calls=5,
    )
    what = "add and run a task that hooks watch, added"
    row(what, (hooked - bare) / BATCH, "without hooks", bare / BATCH)
    what = "a task in a Flask application context, added"
    row(what, (in_context - bare) / BATCH, "app.app_context() by hand", peer / BATCH)


if __name__ == "__main__":
    run("Tasks", {"add": adding, "plain": plain, "async": async_batch, "watched": watched})
