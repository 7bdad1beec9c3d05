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

from benchmarks.measure import interleave, row, run
from wsgi_bg import BackgroundTasks
from wsgi_bg._request.layer import merge_options
from wsgi_bg._tasks.background_tasks import View
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.options import Options
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


def run_batch(func: Callable[..., object], tasks: int) -> Callable[[], None]:
    def run() -> None:
        background = BackgroundTasks()
        for _ in range(tasks):
            background.add_task(func)
        Batch(background, response_complete=True).run()

    return run


def add_only(tasks: int) -> Callable[[], None]:
    def run() -> None:
        background = BackgroundTasks()
        for _ in range(tasks):
            background.add_task(nothing)
        Batch(background, response_complete=True)

    return run


def starlette(
    func: Callable[..., object], loop: asyncio.AbstractEventLoop
) -> Callable[[], None]:
    """Run Starlette's tasks in sequence, on an event loop as in Starlette."""

    async def run_all() -> None:
        for _ in range(BATCH):
            await StarletteTask(func)()

    return lambda: loop.run_until_complete(run_all())


def adding() -> None:
    ours, peer = interleave(add_to(BackgroundTasks), add_to(StarletteTasks), calls=20)
    ours, peer = ours / BATCH, peer / BATCH
    row(
        "add_task",
        f"{ours:.2f}",
        f"Starlette {peer:.2f}",
        f"{peer / ours:.1f} times less",
        "<= 0.4",
    )


def plain() -> None:
    with closing(asyncio.new_event_loop()) as loop:
        added, ran, peer = interleave(
            add_only(BATCH), run_batch(nothing, BATCH), starlette(nothing, loop), calls=5
        )
    ours, peer = (ran - added) / BATCH, peer / BATCH
    row(
        "inline plain task",
        f"{ours:.2f}",
        f"Starlette {peer:.1f}",
        f"{peer / ours:.0f} times less",
        "<= 0.6",
    )


def within(options: Options) -> Callable[[], None]:
    """Run tasks of a middleware layer whose options need more work for each task."""

    def run() -> None:
        background = BackgroundTasks()
        view = View(background, options)
        for _ in range(BATCH):
            view.add_task(nothing)
        Batch(background, response_complete=True).run()

    return run


def watched() -> None:
    app = Flask(__name__)

    def in_context_by_hand() -> None:
        for _ in range(BATCH):
            with app.app_context():
                nothing()

    bare, hooked, in_context, by_hand = interleave(
        within(Options()),
        within(merge_options(Options(), hooks=Hooks())),
        within(merge_options(Options(), around=app.app_context)),
        in_context_by_hand,
        calls=5,
    )
    row(
        "add and run a task that hooks watch, added",
        f"+{(hooked - bare) / BATCH:.2f}",
        f"without {bare / BATCH:.2f}",
        "",
        "",
    )
    row(
        "a task in a Flask application context, added",
        f"+{(in_context - bare) / BATCH:.2f}",
        f"app.app_context() by hand {by_hand / BATCH:.2f}",
        f"{(in_context - bare) / by_hand:.2f}x by hand",
        "",
    )


def async_batch() -> None:
    with closing(asyncio.new_event_loop()) as loop:
        one, hundred, peer = interleave(
            run_batch(nothing_async, 1),
            run_batch(nothing_async, BATCH),
            starlette(nothing_async, loop),
            calls=20,
        )
    row(
        "async batch of 100, inline",
        f"{hundred:.0f}",
        f"batch of one {one:.0f}",
        f"{hundred / one:.2f}x of one",
        "<= 2.5",
    )
    row(
        "one more async task of a batch",
        f"{(hundred - one) / (BATCH - 1):.2f}",
        f"Starlette, on its loop {peer / BATCH:.2f}",
        "",
        "",
    )


if __name__ == "__main__":
    run("Tasks", {"add": adding, "plain": plain, "async": async_batch, "watched": watched})
