"""Times tasks with PrometheusHooks: ``python -m benchmarks.observed_prometheus``.

The peer calls prometheus_client bare: a counter, two histograms and four moves of gauges for
each task. ``PROMETHEUS_MULTIPROC_DIR`` makes both sides use the multiprocess mode.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from benchmarks.measure import begin, interleave, row, run
from benchmarks.tasks import nothing
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.prometheus import BUCKETS, PrometheusHooks

BATCH = 100


def _app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    add_task = background_tasks.add_task
    for _ in range(BATCH):
        add_task(nothing)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


class _Bare:
    """The calls that an application would make itself, without this package."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        names = ("name",)
        self._count = Counter("bare", "", names, registry=registry).labels("nothing")
        self._wait, self._run = (
            Histogram(name, "", names, registry=registry, buckets=BUCKETS).labels("nothing")
            for name in ("bare_wait", "bare_run")
        )
        self._waiting, self._running = (
            Gauge(name, "", registry=registry, multiprocess_mode="livesum")
            for name in ("bare_waiting", "bare_running")
        )

    def __call__(self) -> None:
        for _ in range(BATCH):
            self._waiting.inc()
            self._waiting.dec()
            self._running.inc()
            self._wait.observe(0.001)
            self._count.inc()
            self._run.observe(0.001)
            self._running.dec()


def prometheus() -> None:
    without: Any = BackgroundTasksMiddleware(_app)
    observed: Any = BackgroundTasksMiddleware(_app, hooks=PrometheusHooks(CollectorRegistry()))
    plain, ours, bare = interleave(
        lambda: begin(without)(), lambda: begin(observed)(), _Bare(), calls=5
    )
    costs = (ours - plain) / BATCH
    row("PrometheusHooks, a plain task", costs, "prometheus_client", bare / BATCH, "<= 12 more")


MEASUREMENTS = {"prometheus": prometheus}

if __name__ == "__main__":
    run("Metrics of tasks", MEASUREMENTS)
