"""Spans of tasks: attributes, links and parents, on all ways that a task may take."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import flask
import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import Context, attach
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Gate,
    Server,
    app_that,
    json_lines,
    make_server_environ,
    respond,
    run_python,
    traced_shop,
    wait_until,
)
from tests.support.celery import filesystem, worker
from tests.support.list_runner import ListRunner
from tests.support.traced_shop import as_dict, provider_for
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    PoolRunner,
    Retry,
    background_tasks,
)
from wsgi_bg._messages import headers
from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.flask import Background
from wsgi_bg.opentelemetry import OpenTelemetryHooks
from wsgi_bg.outbox import RetryLater, run_call

ROOT = Path(__file__).parents[2]
FLASK: Any = FlaskInstrumentor()
TEXT = "[1,[],{}]"


class Spans:
    """The spans of a test, and a tracer for the test's own spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = provider_for(self._exporter)
        self.tracer = self.provider.get_tracer("test")

    @property
    def all(self) -> list[dict[str, Any]]:
        return [as_dict(span) for span in self._exporter.get_finished_spans()]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The spans whose name ends with ``name``."""
        return [span for span in self.all if span["name"].endswith(name)]

    def one(self, name: str) -> dict[str, Any]:
        [span] = self.of(name)
        return span

    def wait_for(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        assert wait_until(lambda: len(self.of(name)) == count), self.all
        return self.of(name)


@pytest.fixture(autouse=True)
def no_carrier_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget at the end which tracers have added headers to messages."""
    monkeypatch.setattr(headers, "carriers", {})


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    found = Spans()
    monkeypatch.setattr(traced_shop, "provider", found.provider)
    return found


def place(span: dict[str, Any]) -> list[int]:
    return [span["trace"], span["span"]]


def succeed() -> None:
    pass


async def succeed_async() -> None:
    await asyncio.sleep(0)


def fail() -> None:
    raise ValueError("a bug")


async def fail_async() -> None:
    await asyncio.sleep(0)
    fail()


def request(
    spans: Spans, *functions: Any, parent: Any = "link", args: Any = (), **options: Any
) -> None:
    """Handle a request that adds tasks inside of the span "request"."""

    def add(environ: object) -> None:
        with spans.tracer.start_as_current_span("request"):
            for function in functions:
                background_tasks.add_task(function, *args)

    hooks = OpenTelemetryHooks(spans.provider, parent)
    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks, **options))


# Spans


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("function", [succeed, succeed_async, lambda: succeed_async()])
def test_a_task_has_a_span_that_is_linked_to_the_span_of_the_view(
    spans: Spans, function: Any, runner: Any
) -> None:
    request(spans, function, runner=runner)
    name = wsgi_bg.BackgroundTask(function).name
    [span] = spans.wait_for(name)
    assert span["name"] == f"process {name}"
    assert span["kind"] == "CONSUMER"
    assert span["links"] == [place(spans.one("request"))]
    assert span["parent"] is None
    assert span["status"] == "UNSET"


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("function", [succeed, succeed_async])
def test_the_span_of_a_task_is_a_child_by_choice(
    spans: Spans, function: Any, runner: Any
) -> None:
    request(spans, function, parent="child", runner=runner)
    [span] = spans.wait_for(function.__name__)
    outer = spans.one("request")
    assert [span["trace"], span["parent"]] == place(outer)
    assert span["links"] == []


def test_a_task_without_a_span_around_has_one_without_link(spans: Spans) -> None:
    hooks = OpenTelemetryHooks(spans.provider)
    app = app_that(lambda _: background_tasks.add_task(succeed))
    respond(BackgroundTasksMiddleware(app, hooks=hooks))
    [span] = spans.all
    assert (span["links"], span["parent"]) == ([], None)


def test_the_attributes_follow_the_conventions_and_have_no_arguments(spans: Spans) -> None:
    ids: list[str] = []

    def add(environ: object) -> None:
        ids.append(background_tasks.add_task(lambda secret: None, "sec-ret").id)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=OpenTelemetryHooks(spans.provider)))
    [span] = spans.all
    name = span["name"].removeprefix("process ")
    assert span["attributes"] == {
        "messaging.system": "wsgi_bg",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": ids[0],
        "messaging.destination.name": name,
        "code.function.name": name,
    }
    assert "sec-ret" not in json.dumps(span)


@pytest.mark.parametrize("function", [fail, fail_async])
def test_an_error_is_recorded(spans: Spans, function: Any) -> None:
    request(spans, function)
    span = spans.one(function.__name__)
    assert span["status"] == "ERROR"
    assert span["attributes"]["error.type"] == "ValueError"
    [[name, event]] = span["events"]
    assert name == "exception"
    assert event["exception.message"] == "a bug"
    assert "in fail\n" in event["exception.stacktrace"]


def test_an_error_without_a_text_is_recorded(spans: Spans, log: Log) -> None:
    class TextlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("a bug of the error")

    def fail_without_text() -> None:
        raise TextlessError

    request(spans, fail_without_text)
    span = spans.one("fail_without_text")
    assert span["status"] == "ERROR"
    [[_, event]] = span["events"]
    assert event["exception.type"] == span["attributes"]["error.type"]
    assert "in fail_without_text\n" in event["exception.stacktrace"]
    assert len(log.errors) == 1  # of the task, and none of its span


@pytest.mark.parametrize("function", [succeed, succeed_async, fail])
def test_the_span_is_current_in_the_task_only(spans: Spans, function: Any) -> None:
    async def inner_async() -> None:
        inner()

    def inner() -> None:
        spans.tracer.start_span("inner").end()
        background_tasks.add_task(after)

    def after() -> None:
        spans.tracer.start_span("after").end()

    request(spans, inner if function is not succeed_async else inner_async, function)
    [task] = [span for span in spans.all if ".inner" in span["name"]]
    inside = spans.one("inner") if function is succeed_async else spans.of("inner")[0]
    assert [inside["trace"], inside["parent"]] == place(task)
    [added] = [span for span in spans.all if span["name"].endswith(".after")]
    assert added["links"] == [place(task)]
    assert spans.of(function.__name__)[0]["links"] == [place(spans.one("request"))]


@pytest.mark.parametrize("function", [fail, fail_async])
def test_the_log_record_of_an_error_has_the_ids_of_the_span(
    spans: Spans, function: Any, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def note(record: logging.LogRecord) -> bool:
        if record.levelno == logging.ERROR:
            seen.append(trace.get_current_span().get_span_context().span_id)
        return True

    caplog.handler.addFilter(note)
    request(spans, function)
    assert seen == [spans.one(function.__name__)["span"]]


def test_each_attempt_has_a_span(spans: Spans) -> None:
    calls: list[None] = []

    def fail_once() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise ValueError

    def add(environ: object) -> None:
        with spans.tracer.start_as_current_span("request"):
            background_tasks.using(retry=Retry(2, first=0.01)).add_task(fail_once)

    hooks = OpenTelemetryHooks(spans.provider)
    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    first, second = spans.wait_for("fail_once", 2)
    assert (first["status"], second["status"]) == ("ERROR", "UNSET")
    assert "wsgi_bg.attempt" not in first["attributes"]
    assert second["attributes"]["wsgi_bg.attempt"] == 2
    ids = [span["attributes"]["messaging.message.id"] for span in (first, second)]
    assert ids[0] == ids[1]
    assert first["links"] == second["links"] == [place(spans.one("request"))]


def test_a_long_name_is_cut(spans: Spans) -> None:
    def function() -> None:
        pass

    function.__qualname__ = 1000 * "a"
    request(spans, function)
    assert max(len(span["name"]) for span in spans.all) == len("process ") + 250


def test_a_span_that_is_not_sampled_notes_nothing() -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    recording: list[bool] = []
    app = app_that(
        lambda _: background_tasks.add_task(
            lambda: recording.append(trace.get_current_span().is_recording())
        )
    )
    respond(BackgroundTasksMiddleware(app, hooks=OpenTelemetryHooks(provider)))
    assert recording == [False]


@pytest.mark.parametrize("parent", ["link", "child"])
@pytest.mark.parametrize("function", [succeed, succeed_async])
def test_without_an_sdk_a_task_keeps_the_trace_of_its_request(
    parent: Any, function: Any
) -> None:
    seen: list[trace.SpanContext] = []

    def look() -> Any:
        seen.append(trace.get_current_span().get_span_context())
        return function()

    context = trace.SpanContext(1, 2, is_remote=True)

    def add(environ: object) -> None:
        with trace.use_span(trace.NonRecordingSpan(context)):
            background_tasks.add_task(look)

    hooks = OpenTelemetryHooks(trace.NoOpTracerProvider(), parent)
    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    assert seen == [context]


@pytest.mark.parametrize("parent", ["link", "child"])
def test_a_processor_sees_the_baggage_of_the_request(spans: Spans, parent: Any) -> None:
    seen: list[object] = []

    class Seen(SpanProcessor):
        def on_start(self, span: trace.Span, parent_context: Context | None = None) -> None:
            seen.append(baggage.get_baggage("customer", parent_context))

    def add(environ: object) -> None:
        with spans.tracer.start_as_current_span("request"):
            background_tasks.add_task(succeed)
            attach(baggage.set_baggage("customer", "7"))
            background_tasks.add_task(succeed)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Seen())
    hooks = OpenTelemetryHooks(provider, parent)
    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    assert seen == [None, "7"]


@pytest.mark.parametrize("moment", ["on_start", "on_end"])
def test_an_error_of_a_processor_is_logged_and_the_task_runs(
    moment: str, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Context | None = None) -> None:
            if moment == "on_start":
                raise OSError("no collector")

        def on_end(self, span: ReadableSpan) -> None:
            raise OSError("no collector")

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken())
    ran: list[int] = []
    app = app_that(lambda _: background_tasks.add_task(ran.append, 1))
    respond(BackgroundTasksMiddleware(app, hooks=OpenTelemetryHooks(provider)))
    assert ran == [1]
    word = {"on_start": "begun", "on_end": "ended"}[moment]
    [error] = log.errors
    assert error == f"the span of list.append could not be {word}"
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert vars(record)["wsgi_bg_request"] == "GET /"


@pytest.mark.parametrize("function", [succeed, succeed_async])
def test_a_task_is_freed_without_the_garbage_collector(spans: Spans, function: Any) -> None:
    tasks: list[weakref.ref[Any]] = []

    def add(environ: object) -> None:
        tasks.append(weakref.ref(background_tasks.add_task(function)))

    gc.disable()
    try:
        respond(
            BackgroundTasksMiddleware(app_that(add), hooks=OpenTelemetryHooks(spans.provider))
        )
        assert [task() for task in tasks] == [None]
    finally:
        gc.enable()


def test_wrong_options_are_refused() -> None:
    wrong: Any = "both"
    with pytest.raises(OptionValueError, match="parent must be 'link' or 'child'"):
        OpenTelemetryHooks(parent=wrong)
    with pytest.raises(OptionTypeError, match="tracer_provider must be a TracerProvider"):
        OpenTelemetryHooks(wrong)


def test_a_missing_package_is_one_sentence_with_the_command() -> None:
    done = run_python(
        """
        import sys
        sys.modules["opentelemetry"] = None
        import wsgi_bg.opentelemetry
        """
    )
    assert done.stderr.splitlines()[-1] == (
        "wsgi_bg.exceptions.ExtraMissingError: wsgi_bg.opentelemetry needs a package that is "
        "not installed: pip install 'wsgi_bg[opentelemetry]'"
    )


# Instrumentations of the server's side


@pytest.mark.parametrize("parent", ["link", "child"])
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_task_belongs_to_the_server_span_of_flask(
    spans: Spans, runner: Any, parent: Any
) -> None:
    app = flask.Flask("shop")
    Background(app, runner=runner, hooks=OpenTelemetryHooks(spans.provider, parent))
    FLASK.instrument_app(app, tracer_provider=spans.provider)
    both = threading.Barrier(2)

    @app.get("/<number>")
    def view(number: str) -> str:
        both.wait(TIMEOUT)  # two requests at once
        background_tasks.add_task(named(spans, number, is_async=False))
        background_tasks.add_task(named(spans, number, is_async=True))
        return number

    in_threads(lambda number: Server().run(app, make_server_environ(PATH_INFO=f"/{number}")))
    check_requests(spans, parent)
    FLASK.uninstrument_app(app)


@pytest.mark.parametrize("parent", ["link", "child"])
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_task_belongs_to_the_server_span_of_wsgi(
    spans: Spans, runner: Any, parent: Any
) -> None:
    both = threading.Barrier(2)

    def add(environ: Any) -> None:
        both.wait(TIMEOUT)
        number = environ["PATH_INFO"][1:]
        background_tasks.add_task(named(spans, number, is_async=False))
        background_tasks.add_task(named(spans, number, is_async=True))

    hooks = OpenTelemetryHooks(spans.provider, parent)
    inner: Any = BackgroundTasksMiddleware(app_that(add), runner=runner, hooks=hooks)
    app: Any = OpenTelemetryMiddleware(inner, tracer_provider=spans.provider)
    in_threads(lambda number: Server().run(app, make_server_environ(PATH_INFO=f"/{number}")))
    check_requests(spans, parent)


def in_threads(serve: Any) -> None:
    threads = [threading.Thread(target=serve, args=(number,)) for number in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert wsgi_bg.wait(TIMEOUT) == []


def named(spans: Spans, number: str, *, is_async: bool) -> Any:
    """A task that makes a span with the number of its request."""

    def work() -> None:
        spans.tracer.start_span(f"work for {number}").end()

    async def work_async() -> None:
        await asyncio.sleep(0)
        work()

    return work_async if is_async else work


def is_of(span: dict[str, Any], number: str) -> bool:
    return str(span["attributes"].get("http.url")).endswith(f"/{number}")


def check_requests(spans: Spans, parent: str) -> None:
    """Each of two requests has two tasks, whose spans belong to the request's server span."""
    by_id = {span["span"]: span for span in spans.all}
    for number in "12":
        [server] = [span for span in spans.all if is_of(span, number)]
        assert server["kind"] == "SERVER"
        tasks = [by_id[span["parent"]] for span in spans.of(f"work for {number}")]
        assert len(tasks) == 2
        for task in tasks:
            assert task["kind"] == "CONSUMER"
            if parent == "link":
                assert task["links"] == [place(server)]
            else:
                assert [task["trace"], task["parent"]] == place(server)


def test_a_task_that_begins_after_the_response_belongs_to_the_server_span(
    spans: Spans, gate: Gate
) -> None:
    app = flask.Flask("shop")
    Background(app, runner=PoolRunner(), hooks=OpenTelemetryHooks(spans.provider, "child"))
    FLASK.instrument_app(app, tracer_provider=spans.provider)

    @app.get("/")
    def view() -> str:
        background_tasks.add_task(gate.task)
        return "ok"

    Server().run(app, make_server_environ())
    server = spans.one("GET /")  # has ended; the task has not
    gate.open()
    [task] = spans.wait_for("Gate.task")
    assert [task["trace"], task["parent"]] == place(server)
    FLASK.uninstrument_app(app)


# Other processes


def sent(spans: Spans, function: Any, parent: Any) -> tuple[ListRunner, Any]:
    """The runner, and the call that the request has sent."""
    runner = ListRunner()
    request(spans, function, parent=parent, runner=runner)
    assert wait_until(lambda: runner.sent)
    [[call]] = runner.sent
    return runner, call


@pytest.mark.parametrize("function", [traced_shop.work, traced_shop.work_async])
@pytest.mark.parametrize("parent", ["link", "child"])
def test_a_task_on_a_worker_continues_the_trace(
    spans: Spans, function: Any, parent: Any
) -> None:
    runner, call = sent(spans, function, parent)
    run_call(runner, call.name, call.text, call.headers, 1, call.id)
    task, outer = spans.one(function.__name__), spans.one("request")
    assert task["attributes"]["messaging.message.id"] == call.id
    if parent == "link":
        assert task["links"] == [place(outer)]
        assert task["trace"] != outer["trace"]
    else:
        assert [task["trace"], task["parent"]] == place(outer)


def test_without_an_sdk_a_task_on_a_worker_keeps_the_trace_of_its_request(
    spans: Spans,
) -> None:
    def add(environ: object) -> None:
        with spans.tracer.start_as_current_span("request"):
            background_tasks.add_task(traced_shop.work)

    runner = ListRunner()
    hooks = OpenTelemetryHooks(trace.NoOpTracerProvider())
    respond(BackgroundTasksMiddleware(app_that(add), runner=runner, hooks=hooks))
    assert wait_until(lambda: runner.sent)
    [[call]] = runner.sent
    run_call(runner, call.name, call.text, call.headers, 1, call.id)
    inside, outer = spans.one("inside"), spans.one("request")
    assert [inside["trace"], inside["parent"]] == place(outer)


def test_each_attempt_on_a_worker_continues_the_trace(spans: Spans, tmp_path: Path) -> None:
    runner = ListRunner()
    args = "sec-ret", str(tmp_path / "tried")
    request(spans, traced_shop.fail_once, args=args, parent="child", runner=runner)
    assert wait_until(lambda: runner.sent)
    [[call]] = runner.sent
    with pytest.raises(RetryLater):
        run_call(runner, call.name, call.text, call.headers, 1, call.id)
    run_call(runner, call.name, call.text, call.headers, 2, call.id)
    outer = spans.one("request")
    for span in spans.of("fail_once"):
        assert [span["trace"], span["parent"]] == place(outer)
        assert "sec-ret" not in json.dumps(span)
    assert len(spans.of("fail_once")) == 2


@pytest.mark.parametrize("parent", ["link", "child"])
@pytest.mark.parametrize("function", [traced_shop.add, traced_shop.add_local])
def test_a_task_that_a_task_on_a_worker_adds_belongs_to_that_task(
    spans: Spans, function: Any, parent: Any
) -> None:
    runner, call = sent(spans, function, parent)
    run_call(runner, call.name, call.text, call.headers, 1, call.id)
    for [added] in runner.sent[1:]:
        run_call(runner, added.name, added.text, added.headers, 1, added.id)
    adder, [task] = spans.one(function.__name__), spans.wait_for("work")
    if parent == "link":
        assert task["links"] == [place(adder)]
    else:
        assert [task["trace"], task["parent"]] == place(adder)
    assert task["kind"] == "CONSUMER"


def test_a_forged_trace_is_ignored(spans: Spans) -> None:
    runner, call = sent(spans, traced_shop.work, "child")
    forged = {"traceparent": "00-zz-1-01", "baggage": 7, "tracestate": "\n"}
    run_call(runner, call.name, call.text, forged, 1, call.id)
    task = spans.one("traced_shop.work")
    assert (task["links"], task["parent"]) == ([], None)


def test_the_span_of_an_engines_instrumentation_is_the_parent(spans: Spans) -> None:
    runner, call = sent(spans, traced_shop.work, "link")
    with spans.tracer.start_as_current_span("engine"):
        run_call(runner, call.name, call.text, call.headers, 1, call.id)
    task, engine = spans.one("traced_shop.work"), spans.one("engine")
    assert [task["trace"], task["parent"]] == place(engine)
    assert task["kind"] == "INTERNAL"
    assert task["links"] == []


def test_an_error_of_a_propagator_is_logged_and_the_task_is_sent(
    spans: Spans, log: Log
) -> None:
    def broken(carrier: dict[str, str]) -> None:
        raise OSError("no propagator")

    runner = ListRunner()
    hooks = OpenTelemetryHooks(spans.provider)
    headers.carriers["opentelemetry"] = broken
    app = app_that(lambda _: background_tasks.add_task(traced_shop.work))
    respond(BackgroundTasksMiddleware(app, hooks=hooks, runner=runner))
    assert wait_until(lambda: runner.sent)
    assert log.errors == ["the trace of opentelemetry could not be added to a message"]


def in_process(call: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from tests.support.traced_shop import *; {call}"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("parent", ["link", "child"])
def test_a_stored_task_of_a_process_that_was_killed_continues_the_trace(
    spans: Spans, parent: Any, tmp_path: Path
) -> None:
    before, folder = tmp_path / "spans", tmp_path / "tasks"
    killed = in_process(
        f"store_and_die({str(folder)!r})", TRACED_SPANS=str(before), TRACED_PARENT=parent
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [outer] = json_lines(before)
    hooks = OpenTelemetryHooks(spans.provider, parent)
    app = app_that(lambda _: None)
    runner = DurableRunner(folder)
    Server().run(
        BackgroundTasksMiddleware(app, runner=runner, hooks=hooks), make_server_environ()
    )
    [task] = spans.wait_for("traced_shop.work")
    if parent == "link":
        assert task["links"] == [place(outer)]
    else:
        assert [task["trace"], task["parent"]] == place(outer)


@pytest.mark.parametrize("instruments_celery", [False, True])
def test_a_message_to_a_worker_of_celery_continues_the_trace(
    tmp_path: Path, *, instruments_celery: bool
) -> None:
    broker = filesystem(tmp_path)
    there, here = tmp_path / "there", tmp_path / "here"
    environ = {"TRACED_CELERY": "1"} if instruments_celery else {}
    options = {"module": traced_shop.MODULE, "environ": {**environ, "TRACED_SPANS": str(there)}}
    with worker(broker, tmp_path, "--pool=solo", **options) as started:
        environ["SHOP_BROKER"] = json.dumps(broker)
        web = in_process("send()", TRACED_SPANS=str(here), **environ)
        assert web.returncode == 0, web.stderr
        count = 3 if instruments_celery else 2  # Celery's own comes last
        assert wait_until(lambda: len(json_lines(there)) == count, 30), started.log
    spans = {span["name"]: span for span in (*json_lines(there), *json_lines(here))}
    assert len({span["trace"] for span in spans.values()}) == 1
    task = spans["process tests.support.traced_shop.work"]
    expected = ["inside", "process tests.support.traced_shop.work", "request"]
    if instruments_celery:
        expected[2:2] = ["run/traced.work", "apply_async/traced.work"]
    by_id = {span["span"]: span for span in spans.values()}
    chain = [spans["inside"]]
    while chain[-1]["parent"]:
        chain.append(by_id[chain[-1]["parent"]])
    assert [span["name"] for span in chain] == expected
    assert task["kind"] == ("INTERNAL" if instruments_celery else "CONSUMER")
