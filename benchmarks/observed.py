"""Times tasks that are observed: ``python -m benchmarks.observed``.

Each row is the time of a task that is observed beyond the same task that is not, or that calls
the same libraries itself: a span with a link and four attributes, a counter, two histograms and
four moves of gauges.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, NoOpTracerProvider, SpanContext, SpanKind, TraceFlags
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from benchmarks.measure import HEADERS, begin, interleave, row, run
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, PoolRunner
from wsgi_bg._status.recorder import recorder
from wsgi_bg.opentelemetry import OpenTelemetryHooks
from wsgi_bg.prometheus import BUCKETS, PrometheusHooks

BATCH = 100
NAME = "benchmarks.observed.nothing"
REQUEST = trace.NonRecordingSpan(
    SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
)


def nothing() -> None:
    """A plain task."""


def app_with(task: Callable[[], object], **options: Any) -> BackgroundTasksMiddleware:
    """An application whose view adds tasks, inside of a span."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        add_task = environ[ENVIRON_KEY].add_task
        with trace.use_span(REQUEST):
            for _ in range(BATCH):
                add_task(task)
        start_response("200 OK", HEADERS)
        return [b"ok"]

    return BackgroundTasksMiddleware(app, **options)


class Bare:
    """A task that calls the libraries itself.

    :param tracer: makes a span; None for none.
    :param has_metrics: True to count and to measure the task.
    """

    def __init__(self, tracer: trace.Tracer | None, *, has_metrics: bool) -> None:
        self._tracer = tracer
        self._has_metrics = has_metrics
        registry, names = CollectorRegistry(), ("name",)
        self._count = Counter("bare", "", names, registry=registry).labels(NAME)
        self._wait, self._run = (
            Histogram(name, "", names, registry=registry, buckets=BUCKETS).labels(NAME)
            for name in ("bare_wait", "bare_run")
        )
        self._waiting, self._running = (
            Gauge(name, "", registry=registry) for name in ("bare_waiting", "bare_running")
        )

    def task(self) -> None:
        if self._has_metrics:
            self._waiting.inc()
            self._waiting.dec()
            self._running.inc()
            self._wait.observe(0.001)
        if self._tracer is None:
            nothing()
        else:
            self._trace(self._tracer)
        if self._has_metrics:
            self._count.inc()
            self._run.observe(0.001)
            self._running.dec()

    def _trace(self, tracer: trace.Tracer) -> None:
        origin = trace.get_current_span().get_span_context()
        attributes = {
            "messaging.system": "wsgi_bg",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "code.function.name": NAME,
        }
        kind, links = SpanKind.CONSUMER, [Link(origin)]
        with tracer.start_as_current_span(NAME, Context(), kind, attributes, links):
            nothing()


def compare(what: str, goal: str, bare: Bare | None = None, **options: Any) -> None:
    """Print a row: a task with ``options`` beside a task that does the same itself."""
    task = nothing if bare is None else bare.task
    ours, theirs = app_with(nothing, **options), app_with(task)
    observed, peer = interleave(lambda: begin(ours)(), lambda: begin(theirs)(), calls=5)
    beside = "a task alone" if bare is None else "the libraries bare"
    row(f"{what}, added", (observed - peer) / BATCH, beside, peer / BATCH, goal)


def status() -> None:
    """Time tasks whose status is recorded, and written into a folder."""
    compare("status", "<= 2", status=True)
    # The thread that writes may be at work when the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compare("status with a folder", "<= 2", status_path=folder)
        recorder.turn_off()  # before the folder is removed


def status_of_pool() -> None:
    """Time tasks of a pool, from the request to the end of the last task."""
    ended = threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        add_task = environ[ENVIRON_KEY].add_task
        for _ in range(BATCH):
            add_task(nothing)
        add_task(ended.set)
        start_response("200 OK", HEADERS)
        return [b"ok"]

    def handle(middleware: BackgroundTasksMiddleware) -> None:
        ended.clear()
        begin(middleware)()
        ended.wait()

    pool = PoolRunner(threads=1)
    plain, recorded = (
        BackgroundTasksMiddleware(app, runner=pool, status=status) for status in (None, True)
    )
    bare, observed = interleave(lambda: handle(plain), lambda: handle(recorded), calls=5)
    added = (observed - bare) / BATCH
    row("status, on a pool, added", added, "a task alone", bare / BATCH, "<= 2")


def metrics() -> None:
    bare = Bare(None, has_metrics=True)
    compare("metrics", "<= 12", bare, hooks=PrometheusHooks(CollectorRegistry()))


def traces(what: str, goal: str, provider: trace.TracerProvider) -> None:
    bare = Bare(provider.get_tracer("bare"), has_metrics=False)
    compare(what, goal, bare, hooks=OpenTelemetryHooks(provider))


def everything(what: str, goal: str, provider: trace.TracerProvider) -> None:
    bare = Bare(provider.get_tracer("bare"), has_metrics=True)
    hooks = [OpenTelemetryHooks(provider), PrometheusHooks(CollectorRegistry())]
    compare(what, goal, bare, hooks=hooks, status=True)


MEASUREMENTS: dict[str, Callable[[], None]] = {
    "status": status,
    "pool": status_of_pool,
    "metrics": metrics,
    "traces": partial(traces, "a span", "<= 12", TracerProvider()),
    "no-op": partial(traces, "a span that is not recorded", "<= 6", NoOpTracerProvider()),
    "all": partial(everything, "all three", "<= 12", TracerProvider()),
    "all no-op": partial(everything, "all, spans not recorded", "<= 6", NoOpTracerProvider()),
}

if __name__ == "__main__":
    run("Observed tasks", MEASUREMENTS)
