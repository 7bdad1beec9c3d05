"""Registered functions, and the module that a worker of the tests loads.

Each function writes its observations into a file whose name the test chooses.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from celery import Celery, current_task

from tests.support import app_that, text_of
from tests.support.celery_filesystem import install
from tests.support.files import append, write
from wsgi_bg import BackgroundTasksMiddleware, Retry, background_tasks, registered_task
from wsgi_bg.celery import CeleryRunner, correlation_id, traceparent

MODULE = "tests.support.celery_shop"

not_travelling: ContextVar[str] = ContextVar("not_travelling", default="not set")
local_calls: list[tuple[Any, ...]] = []
"""Arguments of the unregistered calls in this process."""


@registered_task
def note(path: str, *args: Any, **kwargs: Any) -> None:
    """Write the ``repr`` of the arguments, and the process id."""
    write(path, repr((os.getpid(), args, kwargs)))


@registered_task
def note_line(path: str, line: int) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@registered_task(celery={"acks_late": True})
def note_line_late(path: str, line: int, gate: str = "") -> None:
    """Wait for the file ``gate``, if there is a name; then write the line."""
    while gate and not Path(gate).exists():  # polls: no event spans processes
        time.sleep(0.01)
    note_line(path, line)


@registered_task(name="shop.again", celery={"queue": "other"})
def note_on_other_queue(path: str) -> None:
    write(path, current_task.request.delivery_info["routing_key"])


@registered_task
def add_line(path: str, line: str) -> None:
    append(path, line)


@registered_task
async def note_loop(path: str, together: int = 1) -> None:
    """Write the process id and the loop's once ``together`` calls run at the same time."""
    lines = append(path, f"{os.getpid()} {id(asyncio.get_running_loop())}")
    while len(lines) < together:  # polls: no event spans processes
        await asyncio.sleep(0.01)
        lines = text_of(Path(path)).splitlines()


@registered_task
def note_context(path: str) -> None:
    known = correlation_id.get(), traceparent.get(), background_tasks.request
    write(path, json.dumps([*known, not_travelling.get()]))


@registered_task
async def note_context_async(path: str) -> None:
    note_context(path)


@registered_task(celery={"acks_late": True, "reject_on_worker_lost": True})
def hold(path: str) -> None:
    """Block in the first call; write ``done`` in the second call."""
    if len(append(path, f"begun {os.getpid()}")) == 1:
        threading.Event().wait(600)
    append(path, "done")


@registered_task(celery={"autoretry_for": (KeyError, ValueError), "default_retry_delay": 0})
def fail_once(path: str, secret: str) -> None:
    if len(append(path, f"{correlation_id.get()} {secret}")) == 1:
        raise KeyError("again")


@registered_task(retry=Retry(4, first=0, on=LookupError))
def fail_twice(path: str, secret: str) -> None:
    if len(append(path, f"{correlation_id.get()} {secret}")) < 3:
        raise KeyError("again")


@registered_task(retry=Retry(9, first=0))
async def fail_always(path: str) -> None:
    append(path, "called")
    raise ConnectionResetError


@registered_task
def note_time(path: str) -> None:
    write(path, time.time())


@registered_task(celery={"soft_time_limit": 1})
async def outlast(path: str) -> None:
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        write(path, "cancelled")
        raise


@registered_task(name="shop.result", celery={"ignore_result": False})
def double(number: int) -> int:
    return 2 * number


@registered_task
def stand_still(path: str) -> None:
    """Stands for a call that only arguments of Celery's own options name."""
    write(path, "ran")


def not_registered(path: str = "") -> None:
    """The target of a forged message: importable, but not registered."""
    local_calls.append((path,))
    if path:
        write(path, f"ran in {os.getpid()}")


def make_app(url: str, options: dict[str, Any]) -> Celery:
    install()
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.update(
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
    )
    return app


if "SHOP_BROKER" in os.environ:
    app = make_app(*json.loads(os.environ["SHOP_BROKER"]))
    runner = CeleryRunner(app)
    if "SHOP_STATUS" in os.environ:
        folder = os.environ["SHOP_STATUS"]
        BackgroundTasksMiddleware(app_that(print), runner=runner, status_path=folder)
    del runner  # the worker needs no variable for the runner
