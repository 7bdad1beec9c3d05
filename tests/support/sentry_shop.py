"""Applications with Sentry and its integrations, for processes of their own.

``sentry_sdk.init`` patches Flask, Celery, logging and threads for the rest of a process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from typing import Any

import dramatiq
import flask
import sentry_sdk
from dramatiq.brokers.stub import StubBroker
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations import Integration
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.integrations.rq import RqIntegration
from sentry_sdk.transport import Transport

import wsgi_bg
from tests.support import Server, app_that, append_json, make_server_environ
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    Retry,
    background_tasks,
    registered_task,
)
from wsgi_bg.dramatiq import DramatiqRunner
from wsgi_bg.flask import Background
from wsgi_bg.outbox import OutboxRunner
from wsgi_bg.sentry import SentryHooks

MODULE = "tests.support.sentry_shop"
DSN = "https://key@sentry.invalid/1"


class Recorder(Transport):
    """Keeps the items of envelopes, and writes them to the file that the environment names."""

    items: list[dict[str, Any]]

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        self.items = []

    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            if item.type in ("event", "transaction", "span", "client_report"):
                found = {"type": item.type, **json.loads(item.get_bytes())}
                self.items.append(found)
                if "SENTRY_ITEMS" in os.environ:
                    append_json(os.environ["SENTRY_ITEMS"], found)


def set_one() -> None:
    sentry_sdk.set_tag("one", "1")
    with sentry_sdk.start_span(op="db", name="query"):
        pass


async def set_two() -> None:
    sentry_sdk.set_tag("two", "1")
    await asyncio.sleep(0)
    with sentry_sdk.start_span(op="http", name="get"):
        pass


def fail(value: str) -> None:
    sentry_sdk.set_tag("failed", "1")
    raise ValueError("a bug")


async def fail_async(value: str) -> None:
    sentry_sdk.set_tag("failed", "1")
    await asyncio.sleep(0)
    raise KeyError("a bug")


@registered_task(name="sentry.work")
def work(value: str) -> None:
    with sentry_sdk.start_span(op="db", name="query"):
        pass


@registered_task(name="sentry.fail")
def fail_there(value: str) -> None:
    raise ValueError("a bug")


SECRET = "".join(("sec", "-", "ret"))  # not as a literal: events quote the source


def start(*integrations: Integration, **options: Any) -> None:
    sentry_sdk.init(
        dsn=DSN,
        transport=Recorder,
        traces_sample_rate=1.0,
        auto_enabling_integrations=False,  # there are many packages to find here
        integrations=[FlaskIntegration(), CeleryIntegration(), RqIntegration(), *integrations],
        **options,
    )


def run_flask(runner: Any = "pool", **options: Any) -> None:
    """Handle requests: tasks that succeed, tasks that fail, and one without hooks."""
    start(**options)
    app = flask.Flask("shop")
    Background(app, runner=runner, hooks=SentryHooks())

    @app.get("/good")
    def good() -> str:
        sentry_sdk.set_tag("request", "1")
        background_tasks.add_task(set_one)
        background_tasks.add_task(set_two)
        return "ok"

    @app.get("/bad")
    def bad() -> str:
        background_tasks.add_task(fail, SECRET)
        background_tasks.add_task(fail_async, SECRET)
        again = background_tasks.using(retry=Retry(2, first=0, jitter=False))
        again.add_task(fail, SECRET)
        return "ok"

    for path in ("/good", "/bad"):
        Server().run(app, make_server_environ(PATH_INFO=path))
        assert wsgi_bg.wait(20) == []
    unwatched = app_that(lambda _: background_tasks.add_task(int, "one"))
    Server().run(BackgroundTasksMiddleware(unwatched), make_server_environ())
    sentry_sdk.flush()


def request(runner: Any, *functions: Any, delay: float | None = None) -> None:
    """Handle a request that adds tasks inside of the transaction "request"."""

    def view(environ: object) -> None:
        with sentry_sdk.start_transaction(name="request", op="http.server"):
            for function in functions:
                background_tasks.using(delay=delay).add_task(function, SECRET)

    app = BackgroundTasksMiddleware(app_that(view), runner=runner, hooks=SentryHooks())
    Server().run(app, make_server_environ())


def hold(value: str) -> None:
    threading.Event().wait()


def store_and_die(path: str) -> None:
    """Store a task that waits for another task when the process is killed."""
    start()
    request(DurableRunner(path), hold, work)
    sentry_sdk.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def run_dramatiq(*functions: Any, integrations: Any = (), delay: float | None = None) -> None:
    """Let a worker of Dramatiq, which logs errors, run tasks."""
    start(*integrations)
    broker = StubBroker()
    request(DramatiqRunner(broker), *functions, delay=delay)
    assert wsgi_bg.wait(20) == []
    worker = dramatiq.Worker(broker, worker_timeout=100)
    worker.start()
    broker.join("default", fail_fast=False, timeout=20_000)
    worker.stop()
    sentry_sdk.flush()


def send() -> None:
    """Send tasks to Celery or RQ."""
    request(runner, work, fail_there)
    assert wsgi_bg.drain(20) == []
    sentry_sdk.flush()


if "SHOP_BROKER" in os.environ:
    from tests.support.celery_shop import make_app
    from wsgi_bg.celery import CeleryRunner

    start()
    app = make_app(*json.loads(os.environ["SHOP_BROKER"]))
    runner: OutboxRunner = CeleryRunner(app)
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=SentryHooks())

if "SHOP_REDIS" in os.environ:
    from tests.support.engine_shop import make_queue
    from wsgi_bg.rq import RQRunner

    start()
    runner = RQRunner(make_queue(os.environ["SHOP_REDIS"]))
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=SentryHooks())
