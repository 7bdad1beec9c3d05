"""Metrics for Prometheus; tests/servers/test_prometheus.py has gunicorn's multiprocess mode."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.samples import Sample

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Clock,
    Gate,
    app_that,
    make_server_environ,
    post,
    run_python,
    wait_until,
)
from tests.support import Server as FakeServer
from tests.support.post import Post, send
from wsgi_bg import (
    BackgroundTasksMiddleware,
    PoolRunner,
    Retry,
    background_tasks,
    gunicorn,
)
from wsgi_bg.exceptions import ExtraMissingError
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.outbox import run_call
from wsgi_bg.prometheus import BUCKETS, PrometheusHooks
from wsgi_bg.prometheus import hooks as hooks_module

DASHBOARD = Path(__file__).parents[2] / "examples/grafana.json"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def request(hooks: Hooks | list[Hooks], do: Callable[[], object], **options: Any) -> None:
    """Handle a request in which ``do()`` adds tasks."""
    app = BackgroundTasksMiddleware(app_that(lambda environ: do()), hooks=hooks, **options)
    FakeServer().run(app, make_server_environ())


def samples(registry: CollectorRegistry) -> Iterator[Sample]:
    """The samples of a scrape, as a parser reads them."""
    for family in parse(generate_latest(registry).decode()):
        yield from family.samples


def counted(registry: CollectorRegistry, name: str = "wsgi_bg_tasks_total") -> dict[Any, Any]:
    """The values above 0 of a metric, by the labels."""
    return {
        tuple(each.labels.values()): each.value
        for each in samples(registry)
        if each.name == name and each.value
    }


def gauge(registry: CollectorRegistry, name: str) -> float:
    [found] = [each.value for each in samples(registry) if each.name == f"wsgi_bg_{name}"]
    return found


def fine() -> None:
    pass


def failing() -> None:
    raise ValueError


NAMES = {each: f"tests.prometheus.test_hooks.{each.__name__}" for each in (fine, failing)}


# Counters and histograms


def test_tasks_are_counted_by_name_and_outcome(registry: CollectorRegistry) -> None:
    hooks = PrometheusHooks(registry)

    def do() -> None:
        background_tasks.add_task(fine)
        background_tasks.add_task(fine)
        background_tasks.add_task(failing)
        background_tasks.using(run_on="error").add_task(fine)

    request(hooks, do)
    assert counted(registry) == {
        (NAMES[fine], "succeeded"): 2,
        (NAMES[fine], "discarded"): 1,
        (NAMES[failing], "failed"): 1,
    }


def test_each_name_has_all_outcomes_from_the_start(registry: CollectorRegistry) -> None:
    """``rate()`` does not see that a counter has appeared with a value of 1."""
    request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine))
    of_fine = [each for each in samples(registry) if each.name == "wsgi_bg_tasks_total"]
    assert sorted(each.labels["outcome"] for each in of_fine) == [
        *("discarded", "failed", "retried", "sent", "succeeded"),
    ]


def test_wait_and_run_are_observed_of_each_call(registry: CollectorRegistry) -> None:
    def do() -> None:
        background_tasks.add_task(fine)
        background_tasks.add_task(failing)
        background_tasks.using(run_on="error").add_task(fine)

    request(PrometheusHooks(registry), do)
    for metric in ("wsgi_bg_task_wait_seconds", "wsgi_bg_task_run_seconds"):
        assert counted(registry, f"{metric}_count") == {(name,): 1 for name in NAMES.values()}
        sums = counted(registry, f"{metric}_sum")
        assert all(0 < seconds < TIMEOUT for seconds in sums.values())
    bounds = [
        float(each.labels["le"])
        for each in samples(registry)
        if each.name == "wsgi_bg_task_run_seconds_bucket"
        and NAMES[fine] in each.labels.values()
    ]
    assert tuple(bounds) == (*BUCKETS, math.inf)


def test_an_attempt_that_is_repeated_is_counted_and_measured(
    registry: CollectorRegistry, clock: Clock
) -> None:
    errors = [ValueError()]

    def fails_once() -> None:
        if errors:
            raise errors.pop()

    retry = Retry(first=60, jitter=False)
    hooks = PrometheusHooks(registry)
    request(hooks, lambda: background_tasks.using(retry=retry).add_task(fails_once))
    assert gauge(registry, "delayed_tasks") == 1
    clock.advance(61)
    assert wait_until(lambda: len(counted(registry)) == 2)
    outcomes = {outcome: value for (_, outcome), value in counted(registry).items()}
    assert outcomes == {"retried": 1, "succeeded": 1}
    [runs] = counted(registry, "wsgi_bg_task_run_seconds_count").values()
    [waits] = counted(registry, "wsgi_bg_task_wait_seconds_count").values()
    assert (runs, waits) == (2, 2)
    assert gauge(registry, "delayed_tasks") == 0


def test_tasks_are_counted_as_unsent_until_they_are_sent(
    registry: CollectorRegistry, gate: Gate
) -> None:
    runner = Post()
    runner.before = lambda value: gate.task()
    request(
        PrometheusHooks(registry), lambda: background_tasks.add_task(send, 1), runner=runner
    )
    assert gate.begun.wait(TIMEOUT)
    assert gauge(registry, "unsent_tasks") == 1
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    assert gauge(registry, "unsent_tasks") == 0
    assert counted(registry) == {("tests.support.post.send", "sent"): 1}
    assert counted(registry, "wsgi_bg_task_wait_seconds_count") == {}
    assert post.here == []


def test_a_task_that_could_not_be_sent_has_failed_without_a_call(
    registry: CollectorRegistry, log: Log
) -> None:
    hooks = PrometheusHooks(registry)
    request(hooks, lambda: background_tasks.add_task(send, "refused"), runner=Post())
    assert wsgi_bg.wait(TIMEOUT) == []
    assert counted(registry) == {("tests.support.post.send", "failed"): 1}
    assert counted(registry, "wsgi_bg_task_run_seconds_count") == {}
    assert not any("PrometheusHooks" in message for message in log.errors)


def test_a_call_on_a_worker_has_no_wait(registry: CollectorRegistry, log: Log) -> None:
    """The worker does not know when the request has ended."""
    runner = Post()
    app = app_that(lambda environ: None)
    BackgroundTasksMiddleware(app, runner=runner, hooks=PrometheusHooks(registry))
    try:
        run_call(runner, "post.send", "[1, [], {}]", {})
    finally:
        post.here.clear()
    assert counted(registry) == {("tests.support.post.send", "succeeded"): 1}
    assert counted(registry, "wsgi_bg_task_wait_seconds_count") == {}
    assert counted(registry, "wsgi_bg_task_run_seconds_count") == {
        ("tests.support.post.send",): 1
    }
    assert log.errors == []


# Names


def make_tasks(count: int) -> Iterator[Callable[[], None]]:
    for number in range(count):

        def task() -> None:
            pass

        task.__qualname__ = f"task_{number}"
        yield task


def test_a_name_that_is_no_text_fails_no_scrape(registry: CollectorRegistry) -> None:
    def task() -> None:
        pass

    task.__qualname__ = "task_\udcff"  # half of a surrogate pair
    request(PrometheusHooks(registry), lambda: background_tasks.add_task(task))
    [(name, _)] = counted(registry)
    assert name == f"{__name__}.task_\\udcff"


def test_the_names_beyond_the_limit_are_counted_as_other(registry: CollectorRegistry) -> None:
    tasks = [*make_tasks(10)]

    def do() -> None:
        for task in (*tasks, *tasks):
            background_tasks.add_task(task)

    request(PrometheusHooks(registry, max_names=3), do)
    named = {f"{__name__}.task_{number}": 2 for number in range(3)}
    expected = {(name, "succeeded"): value for name, value in {**named, "other": 14}.items()}
    assert counted(registry) == expected
    runs = counted(registry, "wsgi_bg_task_run_seconds_count")
    assert {name: value for (name,), value in runs.items()} == {**named, "other": 14}


def test_threads_that_add_names_at_once_keep_to_the_limit(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers, other_makes = ["first", "second"], threading.Event()

    def slowly(*args: Any) -> Any:
        # The second thread gets here while the first is here, unless a lock keeps it out.
        other_makes.wait(0.2) if makers.pop(0) == "first" else other_makes.set()
        return make(*args)

    make = hooks_module._Series
    monkeypatch.setattr(hooks_module, "_Series", slowly)
    hooks = PrometheusHooks(registry, max_names=1)

    def add(task: Callable[[], None]) -> None:
        request(hooks, lambda: background_tasks.add_task(task))

    threads = [threading.Thread(target=add, args=(task,)) for task in make_tasks(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    names = {name for name, _ in counted(registry)}
    assert len(names) == 2
    assert "other" in names


def test_with_no_names_all_tasks_are_counted_as_other(registry: CollectorRegistry) -> None:
    request(PrometheusHooks(registry, max_names=0), lambda: background_tasks.add_task(fine))
    assert counted(registry) == {("other", "succeeded"): 1}


# Options


def test_hooks_of_one_registry_share_its_metrics(registry: CollectorRegistry) -> None:
    for _ in range(2):
        request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine))
    assert counted(registry) == {(NAMES[fine], "succeeded"): 2}


def test_without_a_registry_the_metrics_are_in_the_librarys() -> None:
    done = run_python(
        """
        from prometheus_client import REGISTRY, generate_latest
        from wsgi_bg.prometheus import PrometheusHooks
        PrometheusHooks(), PrometheusHooks()
        print("wsgi_bg_running_tasks 0.0" in generate_latest(REGISTRY).decode())
        """
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_names": 9}, "max_names must be 100, as for the first PrometheusHooks"),
        ({"buckets": [1, 2]}, r"buckets must be \(0.005, .*, as for the first PrometheusHooks"),
    ],
)
def test_other_options_for_a_registry_in_use_are_refused(
    registry: CollectorRegistry, options: Any, message: str
) -> None:
    PrometheusHooks(registry)
    with pytest.raises(ValueError, match=message):
        PrometheusHooks(registry, **options)


def test_a_metric_of_the_same_name_is_refused(registry: CollectorRegistry) -> None:
    Counter("wsgi_bg_tasks_total", "another", registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusHooks(registry)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"registry": "mine"}, TypeError, "registry must be a prometheus_client.Coll"),
        ({"max_names": "9"}, TypeError, "max_names must be a whole number"),
        ({"max_names": -1}, ValueError, "max_names must be 0 or more"),
        ({"buckets": 5}, TypeError, "buckets must be a sequence of seconds; got 5"),
        ({"buckets": ["x"]}, TypeError, "buckets must be a sequence of seconds"),
        ({"buckets": [10**400]}, TypeError, "buckets must be a sequence of seconds"),
        ({"buckets": []}, ValueError, "buckets must be seconds above 0, in ascending"),
        ({"buckets": [0, 1]}, ValueError, "buckets must be seconds above 0"),
        ({"buckets": [1, 1]}, ValueError, "buckets must be seconds above 0"),
        ({"buckets": [math.nan]}, ValueError, "buckets must be seconds above 0"),
    ],
)
def test_wrong_options_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrometheusHooks(**options)


def test_a_metric_is_freed_with_its_registry() -> None:
    done = run_python(
        """
        import gc
        from prometheus_client import CollectorRegistry
        from wsgi_bg.prometheus import hooks as prometheus
        for _ in range(3):
            prometheus.PrometheusHooks(CollectorRegistry())
        gc.collect()
        print(len(prometheus._shared))
        """
    )
    assert done.stdout == "0\n", done.stderr


def test_without_the_library_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for name in ("wsgi_bg.prometheus", "wsgi_bg.prometheus.hooks"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=re.escape("pip install 'wsgi_bg[prometheus]'")
    ) as info:
        import wsgi_bg.prometheus  # noqa: F401
    assert isinstance(info.value, ExtraMissingError)
    assert info.value.extra == "prometheus"


# Gauges


def test_gauges_show_what_runs_and_waits(registry: CollectorRegistry, gate: Gate) -> None:
    pool = PoolRunner(threads=1, max_pending=7)
    hooks = PrometheusHooks(registry)
    before = {name: gauge(registry, name) for name in ("pending_batches", "busy_threads")}
    assert gauge(registry, "oldest_waiting_task_timestamp_seconds") == 0
    request(hooks, lambda: background_tasks.add_task(gate.task), runner=pool)
    assert gate.begun.wait(TIMEOUT)
    assert gauge(registry, "waiting_tasks") == 0
    began = time.time()
    for _ in range(2):
        request(hooks, lambda: [background_tasks.add_task(fine) for _ in "12"], runner=pool)
        ended = time.time()
    assert gauge(registry, "running_tasks") == 1
    assert gauge(registry, "waiting_tasks") == 4
    assert gauge(registry, "pending_batches") == before["pending_batches"] + 3
    assert gauge(registry, "busy_threads") == before["busy_threads"] + 1
    assert gauge(registry, "max_threads") >= 1
    assert gauge(registry, "max_pending_batches") >= 7
    oldest = gauge(registry, "oldest_waiting_task_timestamp_seconds")
    assert began - 0.1 < oldest < ended + 0.1  # the clock on the wall may be adjusted
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    names = ("running_tasks", "waiting_tasks", "oldest_waiting_task_timestamp_seconds")
    assert [gauge(registry, name) for name in names] == [0, 0, 0]
    assert wait_until(lambda: gauge(registry, "busy_threads") == before["busy_threads"])
    assert gauge(registry, "idle_threads") >= 1


def test_a_pool_without_limit_has_an_infinite_limit(
    registry: CollectorRegistry, gate: Gate
) -> None:
    pool = PoolRunner(max_pending=None)
    request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine), runner=pool)
    assert gauge(registry, "max_pending_batches") == math.inf


def test_tasks_without_hooks_are_in_the_gauges_without_a_time(
    registry: CollectorRegistry, gate: Gate
) -> None:
    PrometheusHooks(registry)
    pool = PoolRunner(threads=1)
    request([], lambda: background_tasks.add_task(gate.task), runner=pool)
    request([], lambda: background_tasks.add_task(fine), runner=pool)
    assert gate.begun.wait(TIMEOUT)
    assert gauge(registry, "waiting_tasks") == 1
    assert gauge(registry, "oldest_waiting_task_timestamp_seconds") == 0
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []


# Forks

CHILD = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.prometheus import PrometheusHooks

def request(registry):
    app = app_that(lambda environ: background_tasks.add_task(int))
    app = BackgroundTasksMiddleware(app, hooks=PrometheusHooks(registry))
    Server().run(app, make_server_environ())

def counted(registry):
    lines = generate_latest(registry).decode().splitlines()
    ends = 'outcome="succeeded"}'
    return [line.split()[1] for line in lines if "_total" in line and ends in line]

def in_child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)

def say(*words):
    os.write(1, f"{words}\\n".encode())
"""


def test_a_forked_child_counts_from_zero() -> None:
    done = run_python(
        CHILD
        + """
registry = CollectorRegistry()
request(registry)
request(registry)

def child():
    say(counted(registry))
    request(registry)
    say(counted(registry))

in_child(child)
in_child(lambda: (request(registry), say(counted(registry))))
request(registry)
say(counted(registry))
"""
    )
    lines = "([],)\n(['1.0'],)\n(['1.0'],)\n(['3.0'],)\n"
    assert done.stdout == lines, done.stderr


MULTIPROCESS = (
    CHILD
    + """
import threading
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from wsgi_bg import PoolRunner, wait

def scraped():
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry).decode()

def value(name):
    lines = [line for line in scraped().splitlines() if line.startswith(name)]
    return sum(float(line.split()[1]) for line in lines)

def comes(condition):
    for _ in range(1000):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False
"""
)


def run_multiprocess(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    done = run_python(MULTIPROCESS + code)
    assert done.returncode == 0, done.stderr
    assert (
        "UserWarning" not in done.stderr
    )  # the library's, of calls that the mode does not have
    return done.stdout.splitlines()


def test_in_multiprocess_mode_a_fork_counts_no_task_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
registry = CollectorRegistry()
request(registry)
request(registry)
in_child(lambda: request(registry))
request(registry)
say(sum(map(float, counted(registry))), value("wsgi_bg_tasks_total"))
"""
    assert run_multiprocess(tmp_path, code, monkeypatch) == ["(3.0, 4.0)"]


def test_in_multiprocess_mode_a_thread_writes_the_gauges_of_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from tests.support import Gate
from wsgi_bg.prometheus import hooks as prometheus
prometheus.INTERVAL = 0.01

def hold(registry):
    gate = Gate()
    app = app_that(lambda environ: background_tasks.add_task(gate.task))
    pool = PoolRunner(threads=2)
    app = BackgroundTasksMiddleware(app, hooks=PrometheusHooks(registry), runner=pool)
    Server().run(app, make_server_environ())
    gate.begun.wait(10)
    return gate

registry = CollectorRegistry()
gates = [hold(registry)]
say(comes(lambda: value("wsgi_bg_running_tasks") == 1))
say(comes(lambda: value("wsgi_bg_busy_threads") == 1))

def child():
    gates.append(hold(registry))
    say(comes(lambda: value("wsgi_bg_running_tasks") == 2))

in_child(child)
say(value("wsgi_bg_running_tasks"))
for name in os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"]):
    pid = int(name.split("_")[-1].partition(".")[0])
    if pid != os.getpid():
        mark_process_dead(pid)
say(value("wsgi_bg_running_tasks"))
gates[0].open()
say(comes(lambda: value("wsgi_bg_running_tasks") == 0))

# The thread waits for longer now, unless it is woken.
say(comes(lambda: prometheus_writer()._is_idle))
gate = hold(registry)
say(comes(lambda: value("wsgi_bg_running_tasks") == 1))
gate.open()
"""
    helper = """
def prometheus_writer():
    [metrics] = prometheus._shared.values()
    return metrics._writers.get()
"""
    lines = run_multiprocess(tmp_path, helper + code, monkeypatch)
    expected = ["True", "True", "True", "2.0", "1.0", "True", "True", "True"]
    assert lines == [f"({each},)" for each in expected]


def test_gauges_that_cannot_be_written_are_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import logging
from wsgi_bg.prometheus import hooks as prometheus
prometheus.INTERVAL = 0.01
logged = threading.Event()

class Handler(logging.Handler):
    def emit(self, record):
        say(record.getMessage())
        prometheus._look = look
        logged.set()

def broken():
    raise OSError(28, "No space left on device")

logging.getLogger("wsgi_bg").addHandler(Handler())
look, prometheus._look = prometheus._look, broken
registry = CollectorRegistry()
request(registry)
logged.wait(10)
say(comes(lambda: value("wsgi_bg_max_threads") == 40))
"""
    expected = ["('the gauges could not be written',)", "(True,)"]
    assert run_multiprocess(tmp_path, code, monkeypatch) == expected


# Exemplars


class Spans(Hooks):
    """Makes a span of each task, as a tracer does, and keeps the span for other hooks."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def task_started(self, record: TaskRecord) -> None:
        record.data["other"] = "no span"
        record.data[self] = self._tracer.start_span("task")


def exemplars(registry: CollectorRegistry) -> list[tuple[str, dict[str, str]]]:
    """The name of each sample with an exemplar, and the labels of the exemplar."""
    text = openmetrics.generate_latest(registry).decode()
    return [
        (each.name, each.exemplar.labels)
        for family in parse_open(text)
        for each in family.samples
        if each.exemplar is not None
    ]


def ids_of(span: trace.Span) -> dict[str, str]:
    context = span.get_span_context()
    return {
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
    }


def test_exemplars_have_the_ids_of_the_requests_span(registry: CollectorRegistry) -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("request") as span:
        request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine))
    assert dict(exemplars(registry)) == dict.fromkeys(
        (
            "wsgi_bg_tasks_total",
            "wsgi_bg_task_wait_seconds_bucket",
            "wsgi_bg_task_run_seconds_bucket",
        ),
        ids_of(span),
    )


def test_exemplars_have_the_ids_of_a_span_that_another_hook_keeps(
    registry: CollectorRegistry,
) -> None:
    made: list[trace.Span] = []

    class Tracer(trace.NoOpTracer):
        def start_span(self, *args: Any, **kwargs: Any) -> trace.Span:
            made.append(TracerProvider().get_tracer("test").start_span(*args, **kwargs))
            return made[0]

    hooks = [Spans(Tracer()), PrometheusHooks(registry)]
    request(hooks, lambda: background_tasks.add_task(fine))
    assert dict(exemplars(registry))["wsgi_bg_task_run_seconds_bucket"] == ids_of(made[0])


def exemplars_of_two(registry: CollectorRegistry, second: Callable[[], None]) -> list[str]:
    """The metrics whose exemplar is of the second of two requests, which calls ``second``."""
    hooks = PrometheusHooks(registry)
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("first"):
        request(hooks, lambda: background_tasks.add_task(fine))
        request(hooks, lambda: background_tasks.add_task(failing))
    with tracer.start_as_current_span("second") as span:
        request(hooks, lambda: background_tasks.add_task(second))
    return sorted(name for name, ids in exemplars(registry) if ids == ids_of(span))


METRICS = [
    "wsgi_bg_task_run_seconds_bucket",
    "wsgi_bg_task_wait_seconds_bucket",
    "wsgi_bg_tasks_total",
]


@pytest.mark.parametrize(
    ("limit", "task", "found"),
    [(1e9, fine, []), (1e9, failing, [METRICS[0], METRICS[2]]), (0, fine, METRICS)],
)
def test_exemplars_are_of_slow_and_failed_tasks_and_now_and_then_of_others(
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    task: Callable[[], None],
    found: list[str],
) -> None:
    monkeypatch.setattr("wsgi_bg.prometheus.hooks.SLOW", limit)
    monkeypatch.setattr("wsgi_bg.prometheus.hooks.EXEMPLAR_INTERVAL", 1e9)
    assert exemplars_of_two(registry, task) == found


@pytest.mark.parametrize("sampler", [None, ALWAYS_OFF])
def test_a_span_that_is_not_recorded_gives_no_exemplar(
    registry: CollectorRegistry, sampler: Any
) -> None:
    hooks = PrometheusHooks(registry)
    if sampler is None:
        request(hooks, lambda: background_tasks.add_task(fine))
    else:
        tracer = TracerProvider(sampler=sampler).get_tracer("test")
        with tracer.start_as_current_span("request"):
            request(hooks, lambda: background_tasks.add_task(fine))
    assert exemplars(registry) == []


def test_opentelemetry_is_not_imported() -> None:
    done = run_python(
        CHILD
        + """
import sys
from prometheus_client.openmetrics import exposition
registry = CollectorRegistry()
request(registry)
text = exposition.generate_latest(registry).decode()
print(text.count("trace_id"), [name for name in sys.modules if "opentelemetry" in name])
"""
    )
    assert done.stdout == "0 []\n", done.stderr


# gunicorn's arbiter


def test_the_arbiter_imports_the_library_only_in_multiprocess_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    done = run_python(
        """
        import sys
        from types import SimpleNamespace
        from wsgi_bg import gunicorn
        gunicorn.child_exit(None, SimpleNamespace(pid=1))
        print("prometheus_client" in sys.modules)
        """
    )
    assert done.stdout == "False\n", done.stderr


def test_the_arbiter_drops_the_gauges_of_the_worker_and_keeps_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    names = ("counter_5.db", "gauge_liveall_5.db", "gauge_livesum_5.db", "gauge_livesum_6.db")
    for name in names:
        (tmp_path / name).touch()
    gunicorn.child_exit(None, SimpleNamespace(pid=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[3]]


def test_the_arbiter_goes_on_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_client.multiprocess", None)
    gunicorn.child_exit(None, SimpleNamespace(pid=5))


def test_the_arbiter_goes_on_if_a_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "gauge_livesum_5.db").mkdir()
    gunicorn.child_exit(None, SimpleNamespace(pid=5))
    assert log.errors == ["the gauges of worker 5 could not be dropped"]


# The dashboard


def expressions() -> list[str]:
    """The queries of the dashboard, of its panels and its variables."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    of_panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables: Iterable[Any] = dashboard["templating"]["list"]
    of_variables = [str(each["query"]) for each in variables if each["type"] == "query"]
    return of_panels + of_variables


def test_each_metric_of_the_dashboard_exists(registry: CollectorRegistry) -> None:
    request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine))
    labels = {each.name: set(each.labels) for each in samples(registry)}
    asked = {name for text in expressions() for name in re.findall(r"wsgi_bg_\w+", text)}
    assert asked <= labels.keys()
    for text in expressions():
        known = {label for name in asked if name in text for label in labels[name]}
        by = {word for group in re.findall(r"by \((.*?)\)", text) for word in group.split(", ")}
        matched = set(re.findall(r"(\w+)=~?\"", text))
        assert by | matched <= known | {"job", "instance"}, text


def test_the_dashboard_shows_each_metric(registry: CollectorRegistry) -> None:
    request(PrometheusHooks(registry), lambda: background_tasks.add_task(fine))
    text = "\n".join(expressions())
    families = {family.name for family in parse(generate_latest(registry).decode())}
    shown = {name for name in families if name in text}
    assert {name for name in families - shown if not name.endswith("_created")} == set()
