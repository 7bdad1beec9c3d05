"""Registered tasks with traces, for workers and for processes that are killed.

A process writes its spans to the file that the environment names, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

import wsgi_bg
from tests.support import Server, app_that, append_json, make_server_environ
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    Retry,
    background_tasks,
    registered_task,
)
from wsgi_bg.opentelemetry import OpenTelemetryHooks

MODULE = "tests.support.traced_shop"


class ToFile(SpanExporter):
    """Appends spans to a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            append_json(self._path, as_dict(span))
        return SpanExportResult.SUCCESS


def as_dict(span: ReadableSpan) -> dict[str, Any]:
    assert span.context is not None
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": span.context.trace_id,
        "span": span.context.span_id,
        "parent": span.parent and span.parent.span_id,
        "links": [[link.context.trace_id, link.context.span_id] for link in span.links],
        "status": span.status.status_code.name,
        "attributes": dict(span.attributes or {}),
        "events": [[event.name, dict(event.attributes or {})] for event in span.events],
    }


def provider_for(exporter: SpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@registered_task(name="traced.work")
def work() -> None:
    trace.get_tracer("shop", tracer_provider=provider).start_span("inside").end()


@registered_task(name="traced.work_async")
async def work_async() -> None:
    work()


@registered_task(name="traced.add")
def add() -> None:
    background_tasks.add_task(work)


@registered_task(name="traced.add_local")
def add_local() -> None:
    background_tasks.add_task(local_work)


def local_work() -> None:
    pass


@registered_task(name="traced.fail_once", retry=Retry(2, first=0.01, jitter=False))
def fail_once(secret: str, path: str) -> None:
    file = Path(path)
    if not file.exists():
        file.touch()
        raise ValueError("a bug")


provider = TracerProvider(shutdown_on_exit=False)

if "TRACED_SPANS" in os.environ:
    provider = provider_for(ToFile(os.environ["TRACED_SPANS"]))

PARENT: Any = os.environ.get("TRACED_PARENT", "child")

if "SHOP_BROKER" in os.environ:
    from tests.support.celery_shop import make_app
    from wsgi_bg.celery import CeleryRunner

    if "TRACED_CELERY" in os.environ:
        from opentelemetry.instrumentation.celery import CeleryInstrumentor

        make: Any = CeleryInstrumentor
        make().instrument(tracer_provider=provider)
    app = make_app(*json.loads(os.environ["SHOP_BROKER"]))
    runner = CeleryRunner(app)
    BackgroundTasksMiddleware(
        app_that(print), runner=runner, hooks=OpenTelemetryHooks(provider, PARENT)
    )


def request_in_span(runner: Any, *before: Callable[[], object]) -> None:
    """Handle a request that adds tasks inside of the span "request".

    :param before: functions that are called before ``work``.
    """

    def view(environ: object) -> None:
        tracer = trace.get_tracer("web", tracer_provider=provider)
        with tracer.start_as_current_span("request"):
            for function in (*before, work):
                background_tasks.add_task(function)

    hooks = OpenTelemetryHooks(provider, PARENT)
    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner, hooks=hooks),
        make_server_environ(),
    )


def send() -> None:
    """Send a task to Celery."""
    request_in_span(runner)
    assert wsgi_bg.drain(20) == []


def store_and_die(path: str) -> None:
    """Store a task that waits for another task when the process is killed."""
    request_in_span(DurableRunner(path), threading.Event().wait)
    os.kill(os.getpid(), signal.SIGKILL)
