"""Registered functions, and the module that RQ's and Dramatiq's workers of the tests load.

Each function writes its observations into a file whose name the test chooses.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from flask import Flask, current_app, g
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from rq.worker import SpawnWorker

from tests.support.files import append, write
from wsgi_bg import BackgroundTasks, Retry, inject, registered_task
from wsgi_bg.dramatiq import DramatiqRunner
from wsgi_bg.flask import Background
from wsgi_bg.outbox import OutboxRunner, correlation_id
from wsgi_bg.rq import RQRunner

NAME = "the shop"
SLOW = "slow"


@registered_task
def note_call(path: str, *args: Any, **kwargs: Any) -> str:
    write(path, repr((os.getpid(), args, kwargs)))
    return "a result"


@registered_task(engine={"queue_name": SLOW})
def note_slowly(path: str) -> None:
    write(path, "ran")


def see_context(path: str) -> None:
    """Note the application, and if ``g`` is this call's own; the end of the context too."""
    append(path, f"{current_app.name}, {'path' in g}, {correlation_id.get()}")
    g.path = path


@registered_task
def look(path: str) -> None:
    see_context(path)


@registered_task
async def look_async(path: str) -> None:
    await asyncio.sleep(0)
    see_context(path)


@registered_task
def note_moment(path: str) -> None:
    write(path, time.time())


@registered_task(retry=Retry(4, first=0, on=LookupError))
def fail_twice(path: str, secret: str) -> None:
    if len(append(path, f"{correlation_id.get()} {secret}")) < 3:
        raise KeyError("again")


@registered_task(retry=Retry(9, first=0))
async def fail_always(path: str) -> None:
    append(path, "called")
    raise ConnectionResetError


@registered_task
def block(path: str) -> None:
    """Block in the first call; write ``done`` in the second call."""
    if len(append(path, f"{os.getpid()}")) == 1:
        threading.Event().wait(600)
    append(path, "done")


@registered_task(retry=Retry(2, first=0))
@inject
def spread(path: str, sent: str, tasks: BackgroundTasks) -> None:
    """Fail at first; add a task that is sent and a task that is not, in each attempt."""
    tasks.add_task(append, path, "local")
    tasks.add_task(note_call, sent, correlation_id.get())
    if len(append(path, "attempt")) == 1:
        raise KeyError


@registered_task
@inject
def spread_and_fail(path: str, tasks: BackgroundTasks) -> None:
    tasks.add_task(look, path)
    raise KeyError


@registered_task
@inject
def spread_and_leave(sent: str, tasks: BackgroundTasks) -> None:
    tasks.add_task(note_call, sent)
    raise SystemExit(0)


def not_registered(path: str = "") -> None:
    """The target of a forged message: importable, but not registered."""
    write(path, "ran")


class SpawningWorker(SpawnWorker):
    """Each new process imports this module, since it needs the class."""


def make_site() -> Flask:
    app = Flask(NAME)

    @app.teardown_appcontext
    def note_teardown(exc: BaseException | None) -> None:
        if "path" in g:
            append(g.path, "torn down")

    return app


def make_queue(url: str) -> Queue:
    return Queue("shop", connection=Redis.from_url(url), serializer=JSONSerializer)


def make_broker(url: str, **options: Any) -> RedisBroker:
    return RedisBroker(url=url, **options)


if "ENGINE_SHOP" in os.environ:
    engine, url, options = json.loads(os.environ["ENGINE_SHOP"])
    runner: OutboxRunner
    if engine == "rq":
        runner = RQRunner(make_queue(url))
    else:
        broker = make_broker(url, **options)
        dramatiq.set_broker(broker)
        runner = DramatiqRunner(broker)
    Background(make_site(), runner=runner, status_path=os.environ.get("ENGINE_STATUS"))
