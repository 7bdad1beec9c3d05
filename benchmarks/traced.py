"""Times tasks with a span: ``python -m benchmarks.traced``.

Each row is the time of a task with ``OpenTelemetryHooks``, less that of the same task that
makes a span with a link and four attributes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, NoOpTracerProvider, SpanContext, SpanKind, TraceFlags

from benchmarks.measure import HEADERS, begin, interleave, row, run
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware
from wsgi_bg.opentelemetry import OpenTelemetryHooks

BATCH = 100
NAME = "process benchmarks.traced.nothing"
REQUEST = trace.NonRecordingSpan(
    SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
)


def nothing() -> None:
    """A plain task."""


def by_hand(tracer: trace.Tracer) -> None:
    """A task that makes its span by itself."""
    origin = trace.get_current_span().get_span_context()
    attributes = {
        "messaging.system": "wsgi_bg",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "code.function.name": "benchmarks.traced.nothing",
    }
    kind = SpanKind.CONSUMER
    with tracer.start_as_current_span(NAME, Context(), kind, attributes, [Link(origin)]):
        nothing()


def app_that_adds(task: Callable[[], object], **options: Any) -> BackgroundTasksMiddleware:
    """An application whose view adds tasks inside of a span."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        add_task = environ[ENVIRON_KEY].add_task
        with trace.use_span(REQUEST):
            for _ in range(BATCH):
                add_task(task)
        start_response("200 OK", HEADERS)
        return [b"ok"]

    return BackgroundTasksMiddleware(app, **options)


def compare(what: str, provider: trace.TracerProvider, goal: str) -> None:
    """Print a row for the tracers of ``provider``."""
    traced = app_that_adds(nothing, hooks=OpenTelemetryHooks(provider))
    bare = app_that_adds(partial(by_hand, provider.get_tracer("benchmark")))
    ours, theirs = interleave(
        lambda: begin(traced)(),
        lambda: begin(bare)(),
        calls=5,
    )
    row(f"{what}, added", (ours - theirs) / BATCH, "span by hand", theirs / BATCH, goal)


if __name__ == "__main__":
    run(
        "Traced tasks",
        {
            "recording": lambda: compare("span that is recorded", TracerProvider(), "<= 12"),
            "no-op": lambda: compare("span of a no-op tracer", NoOpTracerProvider(), "<= 6"),
        },
    )
