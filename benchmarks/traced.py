"""Compares tasks with traces to the same calls of OpenTelemetry alone.

Run with ``python -m benchmarks.traced``. The peer makes the same requests, whose task makes a
span with a link and six attributes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import (
    Link,
    NoOpTracerProvider,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
)

from benchmarks import measure
from benchmarks.measure import HEADERS, alone, begin, row
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.opentelemetry import OpenTelemetryHooks

CALLS = 300
TASKS = 10

REQUEST = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))


class Nothing(SpanProcessor):
    """Takes the spans as a batch processor does, and drops them."""

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        """Do nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Do nothing."""


def nothing() -> None:
    """A task without work."""


def bare(tracer: Tracer) -> None:
    """A task that makes its span by itself."""
    origin = trace.get_current_span().get_span_context()
    attributes = {
        "messaging.system": "wsgi_bg",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "code.function.name": "benchmarks.traced.nothing",
    }
    with tracer.start_as_current_span(
        "process benchmarks.traced.nothing",
        Context(),
        SpanKind.CONSUMER,
        attributes,
        [Link(origin)],
    ):
        nothing()


def app_that(task: Callable[[], object], hooks: Any = None) -> Any:
    """An application whose view adds tasks."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        with trace.use_span(trace.NonRecordingSpan(REQUEST)):
            for _ in range(TASKS):
                background_tasks.add_task(task)
        start_response("200 OK", HEADERS)
        return [b"ok"]

    return BackgroundTasksMiddleware(alone(app), hooks=hooks)


def compare(what: str, provider: trace.TracerProvider, goal: float) -> None:
    """Print what a task costs beyond its span."""
    tracer = provider.get_tracer("benchmark")
    hooks = OpenTelemetryHooks(provider)
    subjects = [app_that(nothing, hooks), app_that(partial(bare, tracer)), app_that(nothing)]
    ours, theirs, plain = measure.in_turns(
        *(measure.time_calls(partial(_request, app), CALLS) for app in subjects)
    )
    ours, theirs, plain = ours / TASKS, theirs / TASKS, plain / TASKS
    row(f"{what}: a task with its span", ours, "span alone", theirs)
    print(f"{'':<44} {ours - theirs:>9.2f} us beyond it; to reach: {goal} us")
    print(f"{'':<44} {plain:>9.2f} us without any")


def _request(app: Any) -> Callable[[], object]:
    def serve() -> None:
        begin(app)()

    return serve


def main() -> None:
    """Print the table."""
    recording = TracerProvider()
    recording.add_span_processor(Nothing())
    measure.options.rounds = 20
    measure.run(
        "Traced tasks",
        {
            "recording": lambda: compare("a tracer that records", recording, 12),
            "no-op": lambda: compare("a tracer that records nothing", NoOpTracerProvider(), 6),
        },
    )


if __name__ == "__main__":
    main()
