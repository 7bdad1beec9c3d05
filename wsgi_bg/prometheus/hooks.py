"""``PrometheusHooks``: metrics of the tasks for Prometheus, by the library prometheus-client.

Counters and histograms are those of the tasks whose layer has the hooks. Gauges are those of
the process: all runners, all layers. Nothing is counted up and down for a gauge: each is read
from the runners, so that no fork, signal or lost task can leave a gauge too high.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal
from weakref import WeakKeyDictionary

from wsgi_bg._process import greenlets, per_process
from wsgi_bg._process.clock import on_the_wall
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._process.workers import Workers
from wsgi_bg._status.live import load
from wsgi_bg._tasks.checks import whole_number
from wsgi_bg.exceptions import ExtraMissingError, OptionTypeError, OptionValueError
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners.ledger import batches_under_way, ledgers_here

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, values
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("prometheus", "wsgi_bg.prometheus") from _exc

BUCKETS: tuple[float, ...] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0),
)
"""The upper bounds of the histograms' buckets, in seconds, if ``buckets`` is not given."""

OTHER = "other"
"""The label ``name`` of the tasks beyond ``max_names``; no function has this name."""

OUTCOMES = ("succeeded", "failed", "retried", "discarded", "sent")
"""The values of the label ``outcome``."""

INTERVAL = 1.0
"""Seconds between two looks of the thread that writes the gauges, in multiprocess mode."""

_IDLE_INTERVAL = 10.0
"""The same if nothing ran or waited at the last look, and no task has begun since."""

SLOW = 0.1
"""Each wait and each call of so many seconds or more may have an exemplar."""

EXEMPLAR_INTERVAL = 1.0
"""Seconds between two exemplars of a name's other waits and calls."""

# The thread sleeps so many times longer than the look has taken: there may be 100,000 batches.
_SHARE = 50.0

# By name: the text for HELP, and how the numbers of several processes become one.
_GAUGES: dict[str, tuple[str, Literal["livesum", "liveall"]]] = {
    "wsgi_bg_pending_batches": ("Batches that the pools have got and not ended", "livesum"),
    "wsgi_bg_max_pending_batches": ("The pools' max_pending; +Inf without limit", "livesum"),
    "wsgi_bg_waiting_tasks": ("Tasks that were handed over and have not begun", "livesum"),
    "wsgi_bg_running_tasks": ("Tasks that run", "livesum"),
    "wsgi_bg_delayed_tasks": ("Tasks that wait for a delay or for a retry", "livesum"),
    "wsgi_bg_unsent_tasks": ("Tasks that wait to be sent to a broker", "livesum"),
    "wsgi_bg_busy_threads": ("Threads of the pools that run tasks", "livesum"),
    "wsgi_bg_idle_threads": ("Threads of the pools that wait for tasks", "livesum"),
    "wsgi_bg_max_threads": ("The most threads that the pools may start", "livesum"),
    # A minimum of all processes would be the 0 of those that have no waiting task.
    "wsgi_bg_oldest_waiting_task_timestamp_seconds": (
        "When the task was handed over that has waited for the longest time; 0 if none waits",
        "liveall",
    ),
}

# The gauges that are above 0 while something runs or waits.
_OF_WORK = [name for name in _GAUGES if "max" not in name and "idle" not in name]


class PrometheusHooks(Hooks):
    """Counts tasks and measures their times, for a scrape by Prometheus.

    Several of these hooks share the metrics of their registry. In multiprocess mode (the
    environment has ``PROMETHEUS_MULTIPROC_DIR`` when prometheus_client is imported) a daemon
    thread of each process writes the gauges once a second; else a scrape reads them.

    :param registry: where the metrics are registered; None for prometheus_client's
        ``REGISTRY``. In multiprocess mode no registry with a ``MultiProcessCollector``.
    :param max_names: how many names of tasks a process counts; all further tasks are counted
        by the name ``"other"``. Each name is about 45 series.
    :param buckets: the upper bounds of the histograms' buckets in seconds, ascending.
    :raises TypeError: if an option is of the wrong type.
    :raises ValueError: if an option is out of range, or is another than that of earlier hooks
        with this registry, or if the registry has foreign metrics of these names.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        max_names: int = 100,
        buckets: Sequence[float] = BUCKETS,
    ) -> None:
        if registry is None:
            registry = REGISTRY
        elif not isinstance(registry, CollectorRegistry):
            raise OptionTypeError("registry", registry, "a prometheus_client.CollectorRegistry")
        whole_number("max_names", max_names, least=0)
        self._metrics = _metrics_of(registry, max_names, _checked(buckets))

    def task_started(self, record: TaskRecord) -> None:
        of = self._metrics.of(record)
        wait = record.wait
        if wait is not None:
            of.wait(wait, self._metrics.exemplar(of.of_waits, record, is_rare=wait >= SLOW))

    def task_finished(self, record: TaskRecord) -> None:
        self._ended(record, "succeeded")

    def task_failed(self, record: TaskRecord) -> None:
        self._ended(record, "failed")

    def task_retried(self, record: TaskRecord) -> None:
        self._ended(record, "retried")

    def task_discarded(self, record: TaskRecord) -> None:
        self._metrics.of(record).count["discarded"](1)

    def task_sent(self, record: TaskRecord) -> None:
        self._metrics.of(record).count["sent"](1)

    def _ended(self, record: TaskRecord, outcome: str) -> None:
        of = self._metrics.of(record)
        duration = record.duration
        is_rare = outcome != "succeeded" or duration is None or duration >= SLOW
        exemplar = self._metrics.exemplar(of.of_runs, record, is_rare=is_rare)
        of.count[outcome](1, exemplar)
        if duration is not None:
            of.run(duration, exemplar)


def _checked(buckets: Sequence[float]) -> tuple[float, ...]:
    try:
        bounds = tuple(float(each) for each in buckets)
    except (TypeError, ValueError, OverflowError):
        raise OptionTypeError("buckets", buckets, "a sequence of seconds") from None
    if not bounds or not bounds[0] > 0 or not all(low < high for low, high in pairwise(bounds)):
        raise OptionValueError("buckets", buckets, "seconds above 0, in ascending order")
    return bounds


class _Series:
    """The metrics of one name.

    :ivar count: by outcome: adds to the counter.
    :ivar wait: observes the seconds of a wait.
    :ivar run: observes the seconds of a call.
    :ivar of_waits: the pace of the exemplars of waits.
    :ivar of_runs: the same for calls and their count.
    """

    __slots__ = ("count", "of_runs", "of_waits", "run", "wait")

    def __init__(self, name: str, tasks: Counter, wait: Histogram, run: Histogram) -> None:
        # All outcomes from the start: rate() does not see an increase from nothing to 1.
        self.count: dict[str, Callable[..., None]] = {
            outcome: tasks.labels(name, outcome).inc for outcome in OUTCOMES
        }
        self.wait: Callable[..., None] = wait.labels(name).observe
        self.run: Callable[..., None] = run.labels(name).observe
        self.of_waits = _Exemplars()
        self.of_runs = _Exemplars()


class _Exemplars:
    """The pace of exemplars, each of which costs as much as all metrics of a task.

    A scrape shows the last exemplar of each bucket. Slow and failed tasks always give one;
    of the other tasks of a name, one task a second does.

    :ivar due: when a quick task gives the next exemplar (:func:`time.monotonic`).
    """

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due: float = 0.0


class _Metrics:
    """The metrics of a registry.

    :ivar options: ``max_names`` and ``buckets``.
    """

    def __init__(
        self, registry: CollectorRegistry, max_names: int, buckets: tuple[float, ...]
    ) -> None:
        self.options = max_names, buckets
        is_single = values.ValueClass is values.MutexValue
        self._max_names = max_names
        self._pid = per_process.pid()
        self._series: dict[str, _Series] = {}
        # Guards the addition of a name. A forked child has a lock of its own.
        self._lock = PerProcess(threading.RLock)
        self._writers: PerProcess[_Writer] | None = None
        if is_single:
            # First: a scrape in a forked child drops the parent's numbers before it reads them.
            registry.register(_GaugesOfProcess(self.look_at_process))
        else:
            self._writers = _writers(registry)
        self._tasks = Counter(
            "wsgi_bg_tasks_total", "Tasks by outcome", ("name", "outcome"), registry=registry
        )
        self._wait, self._run = (
            Histogram(name, text, ("name",), registry=registry, buckets=buckets)
            for name, text in (
                ("wsgi_bg_task_wait_seconds", "Time from the end of the request to the call"),
                ("wsgi_bg_task_run_seconds", "Time of the call"),
            )
        )

    def of(self, record: TaskRecord) -> _Series:
        """Return the metrics of the task."""
        if self._pid != per_process.pid():
            self.look_at_process()
        if self._writers is not None:
            self._writers.get().wake()
        name = record.task.name
        try:
            return self._series[name]
        except KeyError:
            return self._add(name)

    def _add(self, name: str) -> _Series:
        # Half of a surrogate pair would make every scrape of the registry fail.
        name = name.encode("utf-8", "backslashreplace").decode()
        with self._lock.get():
            if name not in self._series and len(self._series) >= self._max_names:
                name = OTHER
            found = self._series.get(name)
            if found is None:
                found = _Series(name, self._tasks, self._wait, self._run)
                self._series[name] = found
            return found

    def exemplar(
        self, of: _Exemplars, record: TaskRecord, *, is_rare: bool
    ) -> dict[str, str] | None:
        """Return the labels of an exemplar; None if the metric gets no exemplar."""
        if self._writers is not None:
            return None
        now = record.ended_at or record.started_at or 0.0
        if now < of.due and not is_rare:
            return None
        found = _ids_of_span(record)
        if found is not None:
            of.due = now + EXEMPLAR_INTERVAL
        return found

    def look_at_process(self) -> None:
        """Count from 0 in a forked child. In multiprocess mode the library does this."""
        pid = per_process.pid()
        if pid == self._pid:
            return
        self._pid = pid
        if self._writers is None:
            self._series = {}
            for each in (self._tasks, self._wait, self._run):
                each.clear()


_shared: WeakKeyDictionary[CollectorRegistry, _Metrics] = WeakKeyDictionary()
_shared_lock = threading.RLock()


def _metrics_of(
    registry: CollectorRegistry, max_names: int, buckets: tuple[float, ...]
) -> _Metrics:
    with _shared_lock:
        found = _shared.get(registry)
        if found is None:
            found = _shared[registry] = _Metrics(registry, max_names, buckets)
    given = {"max_names": max_names, "buckets": buckets}
    for (option, value), first in zip(given.items(), found.options, strict=True):
        if value != first:
            wanted = f"{first!r}, as for the first PrometheusHooks of this registry"
            raise OptionValueError(option, value, wanted)
    return found


def _ids_of_span(record: TaskRecord) -> dict[str, str] | None:
    """Return the ids of the task's span, if OpenTelemetry is imported and samples the span."""
    trace = sys.modules.get("opentelemetry.trace")
    get_current_span = getattr(trace, "get_current_span", None)  # None during the import, too
    if get_current_span is None:
        return None
    # The span of a hook that has traced the call, else that of the request.
    spans = [each for each in record.data.values() if hasattr(each, "get_span_context")]
    span = spans[0] if spans else get_current_span()
    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return None
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def _writers(registry: CollectorRegistry) -> PerProcess[_Writer]:
    gauges = {
        name: Gauge(name, text, registry=registry, multiprocess_mode=mode)
        for name, (text, mode) in _GAUGES.items()
    }
    return PerProcess(lambda: _Writer(gauges))


def _look() -> dict[str, float]:
    """Return the values of the gauges of this process."""
    running = waiting = 0
    oldest = float("inf")
    for batch in batches_under_way():
        is_running = batch.is_running
        left = max(0, batch.length - is_running)
        running += is_running
        waiting += left
        task = batch.next_task if left else None
        for record in [] if task is None else list(task.record):
            oldest = min(oldest, record.handed_over_at or oldest)
    now = load()
    found = (
        now.pending,
        float("inf") if now.max_pending is None else now.max_pending,
        waiting,
        running,
        sum(later.length() for ledger in ledgers_here() for later in list(ledger.waiting)),
        now.outbox,
        now.threads_busy,
        now.threads_idle,
        now.threads,
        0.0 if oldest == float("inf") else on_the_wall(oldest),
    )
    return dict(zip(_GAUGES, found, strict=True))


class _GaugesOfProcess(Collector):
    """Gauges whose values are read when Prometheus scrapes this process.

    :param begin: called first.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily(name, text) for name, (text, _) in _GAUGES.items()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self._begin()
        for name, value in _look().items():
            yield GaugeMetricFamily(name, _GAUGES[name][0], value=value)


class _Writer:
    """Writes the gauges of one process to the files of prometheus_client's multiprocess mode.

    A scrape is answered by any of the processes, which cannot ask the others: a thread of each
    process writes the values.
    """

    def __init__(self, gauges: dict[str, Gauge]) -> None:
        self._gauges = gauges
        self._events = greenlets.event_for_thread()
        self._errors = RepeatedError("the gauges could not be written")
        # If two threads start the thread, it has a second job, which begins if the first ends.
        self._thread: Workers[None] = Workers(self._run, 1, "wsgi_bg-prometheus")
        self._is_running = False
        self._is_idle = False  # True if no task has begun or ended since the last look

    def wake(self) -> None:
        """Let the thread look soon; without memory for a thread the next call tries again."""
        if self._is_idle:
            self._is_idle = False
            self._events.set()
        elif not self._is_running:
            self._thread.submit(None)

    def _run(self, job: None) -> None:
        generation = per_process.generation
        self._is_running = True
        while True:
            began = time.monotonic()
            self._events.clear()
            self._is_idle = True
            is_busy = self._write()
            time.sleep(max(INTERVAL, _SHARE * (time.monotonic() - began)))
            if not is_busy:
                self._events.wait(_IDLE_INTERVAL)
            if per_process.generation != generation:  # forked by a handler of logging
                return

    def _write(self) -> bool:
        """Write the gauges; True if something runs or waits."""
        try:
            found = _look()
            for name, value in found.items():
                self._gauges[name].set(value)
        except Exception as exc:  # a full disk, for instance
            self._errors.log(exc)
            return True
        return any(found[name] for name in _OF_WORK)
