"""Tasks in Sentry: scopes, transactions, errors and traces."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk

from tests.conftest import Log
from tests.support import (
    Server,
    app_that,
    json_lines,
    make_server_environ,
    respond,
    run_python,
    sentry_shop,
    wait_until,
)
from tests.support.brokers import RedisServer
from tests.support.celery import filesystem, worker
from tests.support.list_runner import ListRunner
from tests.support.sentry_shop import DSN, Recorder
from wsgi_bg import BackgroundTasksMiddleware, DurableRunner, background_tasks
from wsgi_bg._messages import headers
from wsgi_bg.exceptions import OptionTypeError
from wsgi_bg.outbox import run_call
from wsgi_bg.sentry import SentryHooks

ROOT = Path(__file__).parents[2]

Item = dict[str, Any]


def in_process(call: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from tests.support.sentry_shop import *; {call}"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def of_type(kind: str, items: list[Item], name: str = "") -> list[Item]:
    found = [item for item in items if item["type"] == kind]
    return [item for item in found if str(item.get("transaction")).endswith(name)]


def trace_of(item: Item) -> Item:
    trace: Item = item["contexts"]["trace"]
    return trace


def continues(item: Item, before: Item) -> bool:
    """True if ``item`` is of the same trace as ``before``, and a child of it."""
    mine, others = trace_of(item), trace_of(before)
    same = mine["trace_id"] == others["trace_id"]
    return bool(same and mine["parent_span_id"] == others["span_id"])


# With Flask's integration and Sentry's defaults, in a process of its own


@pytest.fixture(scope="module", params=["inline", "pool"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The items of a process that handles requests with tasks."""
    path = tmp_path_factory.mktemp("sentry") / "items"
    done = in_process(f"run_flask({request.param!r})", SENTRY_ITEMS=str(path))
    assert done.returncode == 0, done.stderr
    return json_lines(path)


def test_the_tags_of_a_task_are_in_no_other_task_and_not_in_the_request(shop: Any) -> None:
    [one] = of_type("transaction", shop, ".set_one")
    [two] = of_type("transaction", shop, ".set_two")
    [request] = of_type("transaction", shop, "good")
    assert one["tags"] == {"request": "1", "one": "1"}
    assert two["tags"] == {"request": "1", "two": "1"}
    assert not {"one", "two"} & request["tags"].keys()


def test_a_task_is_a_transaction_that_continues_the_trace_of_the_request(shop: Any) -> None:
    [request] = of_type("transaction", shop, "good")
    for name, op in (("set_one", "db"), ("set_two", "http")):
        [task] = of_type("transaction", shop, f".{name}")
        assert continues(task, request)
        assert trace_of(task)["op"] == "queue.task.wsgi_bg"
        assert trace_of(task)["origin"] == "auto.queue.wsgi_bg"
        assert task["transaction_info"]["source"] == "task"
        assert [span["op"] for span in task["spans"]] == [op]
        context = task["contexts"]["background task"]
        assert context["name"] == task["transaction"]
        assert context["request"] == "GET /good"


def test_an_error_is_one_event_that_nothing_has_handled(shop: Any) -> None:
    ids = {
        task["contexts"]["background task"]["id"]: task
        for task in of_type("transaction", shop)
        if trace_of(task).get("status") == "internal_error"
    }
    events = [event for event in of_type("event", shop) if event.get("logger") != "wsgi_bg"]
    assert len(events) == len(ids) == 3
    for event in events:
        [error] = event["exception"]["values"]
        assert error["mechanism"] == {"type": "wsgi_bg", "handled": False}
        assert error["value"] in ("a bug", "'a bug'")
        assert event["tags"] == {"failed": "1"}
        context = event["contexts"]["background task"]
        assert event["transaction"] == context["name"]
        assert trace_of(event)["trace_id"] == trace_of(ids[context["id"]])["trace_id"]


def test_the_log_record_of_a_task_without_hooks_is_an_event(shop: Any) -> None:
    events = [event for event in of_type("event", shop) if event.get("logger") == "wsgi_bg"]
    assert [event["logentry"]["params"] for event in events] == [["builtins.int", "ValueError"]]


def test_an_attempt_that_is_repeated_is_a_transaction_and_no_event(shop: Any) -> None:
    attempts = [
        task["contexts"]["background task"]["attempt"]
        for task in of_type("transaction", shop, ".fail")
    ]
    assert sorted(attempts) == [1, 1, 2]
    events = of_type("event", shop, ".fail")
    assert [e["contexts"]["background task"]["attempt"] for e in events] == [1, 2]


def test_events_have_no_arguments(shop: Any) -> None:
    assert sentry_shop.SECRET not in json.dumps(shop)


def test_spans_that_are_streamed_continue_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "items"
    call = 'run_flask(trace_lifecycle="stream")'
    done = in_process(call, SENTRY_ITEMS=str(path))
    assert done.returncode == 0, done.stderr
    items = json_lines(path)
    spans = {span["name"]: span for item in of_type("span", items) for span in item["items"]}
    task = spans["tests.support.sentry_shop.set_two"]
    assert task["trace_id"] == spans["good"]["trace_id"]
    assert task["parent_span_id"] == spans["good"]["span_id"]
    assert len(of_type("event", items)) == 4  # of which a log record is one


def test_a_worker_with_sentrys_own_integration_keeps_to_it(tmp_path: Path) -> None:
    broker = filesystem(tmp_path)
    there, here = tmp_path / "there", tmp_path / "here"
    environ = {"SHOP_BROKER": json.dumps(broker)}
    options = {"module": sentry_shop.MODULE, "environ": {"SENTRY_ITEMS": str(there)}}
    with worker(broker, tmp_path, "--pool=solo", **options) as started:
        web = in_process("send()", SENTRY_ITEMS=str(here), **environ)
        assert web.returncode == 0, web.stderr
        assert wait_until(lambda: len(json_lines(there)) >= 3, 30), started.log
    [request] = of_type("transaction", json_lines(here))
    items = json_lines(there)
    tasks = of_type("transaction", items)
    assert sorted(task["transaction"] for task in tasks) == ["sentry.fail", "sentry.work"]
    for task in tasks:
        assert trace_of(task)["trace_id"] == trace_of(request)["trace_id"]
        assert trace_of(task)["op"] == "queue.task.celery"
    [event] = of_type("event", items)
    assert event["exception"]["values"][0]["mechanism"]["type"] == "celery"


def test_a_worker_of_rq_with_sentrys_integration_continues_the_trace(
    redis: RedisServer, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    environ = {"SHOP_REDIS": redis.fresh_url()}
    web = in_process("send()", SENTRY_ITEMS=str(here), **environ)
    assert web.returncode == 0, web.stderr
    worker = [sys.executable, "-m", "rq.cli", "worker", "--burst", "-c", sentry_shop.MODULE]
    serializer = ["--serializer", "rq.serializers.JSONSerializer"]
    done = subprocess.run(
        [*worker, *serializer, "--url", environ["SHOP_REDIS"], "shop"],
        env={**os.environ, **environ, "SENTRY_ITEMS": str(there)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    items = json_lines(there)
    [event] = of_type("event", items)
    assert event["exception"]["values"][0]["mechanism"]["type"] == "rq", done.stderr
    [request] = of_type("transaction", json_lines(here))
    tasks = of_type("transaction", items)
    assert all(continues(task, request) for task in tasks)
    assert {trace_of(task)["op"] for task in tasks} == {"queue.task.rq"}
    names = sorted(item["transaction"].rpartition(".")[2] for item in items)
    assert names == ["fail_there", "fail_there", "work"]


def test_an_error_that_an_engine_logs_is_one_event(tmp_path: Path) -> None:
    path = tmp_path / "items"
    done = in_process("run_dramatiq(fail_there)", SENTRY_ITEMS=str(path))
    assert done.returncode == 0, done.stderr
    assert "with unhandled exception" in done.stderr
    [event] = of_type("event", json_lines(path))
    assert event["exception"]["values"][0]["mechanism"]["type"] == "wsgi_bg"


@pytest.mark.parametrize("delay", [None, 0.001])
def test_a_worker_of_dramatiq_with_sentrys_integration_continues_the_trace(
    tmp_path: Path, delay: float | None
) -> None:
    path = tmp_path / "items"
    integration = "from sentry_sdk.integrations.dramatiq import DramatiqIntegration"
    call = f"run_dramatiq(work, integrations=[DramatiqIntegration()], delay={delay})"
    done = in_process(f"{integration}; {call}", SENTRY_ITEMS=str(path))
    assert done.returncode == 0, done.stderr
    request, task = of_type("transaction", json_lines(path))
    assert trace_of(task)["op"] == "queue.task.dramatiq"
    assert continues(task, request)


# A client without integrations


@pytest.fixture(autouse=True)
def no_carrier_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget at the end which tracers have added headers to messages."""
    monkeypatch.setattr(headers, "carriers", {})


@pytest.fixture
def options() -> dict[str, Any]:
    """Options of the client."""
    return {}


@pytest.fixture
def items(options: dict[str, Any]) -> Iterator[list[Item]]:
    """The items of a client of this process, which patches nothing."""
    client = sentry_sdk.Client(
        dsn=DSN,
        transport=Recorder,
        traces_sample_rate=1.0,
        default_integrations=False,
        auto_enabling_integrations=False,
        auto_session_tracking=False,
        **options,
    )
    sentry_sdk.get_global_scope().set_client(client)
    transport: Any = client.transport
    yield transport.items
    sentry_sdk.get_global_scope().set_client(None)
    client.close(0)


def run(*functions: Any, hooks: SentryHooks | None = None, args: Any = ()) -> None:
    def add(environ: object) -> None:
        for function in functions:
            background_tasks.add_task(function, *args)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks or SentryHooks()))


def test_an_error_is_an_event_without_the_logging_integration(items: list[Item]) -> None:
    run(sentry_shop.fail, sentry_shop.fail_async, args=["secret"])
    events = of_type("event", items)
    mechanisms = [event["exception"]["values"][0]["mechanism"] for event in events]
    assert mechanisms == [{"type": "wsgi_bg", "handled": False}] * 2


def test_arguments_are_shown_by_choice(items: list[Item]) -> None:
    run(sentry_shop.fail, hooks=SentryHooks(show_arguments=True), args=[sentry_shop.SECRET])
    assert sentry_shop.SECRET in json.dumps(of_type("event", items))


def test_without_a_client_the_hooks_do_nothing() -> None:
    ran: list[str] = []
    run(ran.append, int, args=["one"])
    assert ran == ["one"]


def test_a_long_name_is_cut(items: list[Item]) -> None:
    def function() -> None:
        raise ValueError

    function.__qualname__ = 1000 * "a"
    run(function)
    assert {len(item["transaction"]) for item in items} == {250}


@pytest.mark.parametrize("function", [sentry_shop.set_one, sentry_shop.set_two])
def test_a_task_is_freed_without_the_garbage_collector(
    items: list[Item], function: Any
) -> None:
    tasks: list[weakref.ref[Any]] = []

    def add(environ: object) -> None:
        tasks.append(weakref.ref(background_tasks.add_task(function)))

    gc.disable()
    try:
        respond(BackgroundTasksMiddleware(app_that(add), hooks=SentryHooks()))
        assert [task() for task in tasks] == [None]
    finally:
        gc.enable()


def sent(*functions: Any, runner: Any) -> list[Any]:
    sentry_shop.request(runner, *functions)
    assert wait_until(lambda: sum(map(len, runner.sent)) == len(functions))
    return sorted(call for batch in runner.sent for call in batch)


def test_a_task_on_a_worker_continues_the_trace(items: list[Item]) -> None:
    runner = ListRunner()
    fail, work = sent(sentry_shop.work, sentry_shop.fail_there, runner=runner)
    run_call(runner, work.name, work.text, work.headers, 1, work.id)
    with pytest.raises(ValueError, match="a bug"):
        run_call(runner, fail.name, fail.text, fail.headers, 1, fail.id)
    [request] = of_type("transaction", items, "request")
    tasks = [*of_type("transaction", items, ".work"), *of_type("event", items, ".fail_there")]
    assert len(tasks) == 2
    for task, call in zip(tasks, (work, fail), strict=True):
        assert continues(task, request)
        assert task["contexts"]["background task"]["id"] == call.id


@pytest.mark.parametrize("given", [{}, {"sentry-trace": "no trace", "baggage": "%%;=,"}])
def test_a_task_whose_message_has_no_trace_begins_one(
    items: list[Item], given: dict[str, str]
) -> None:
    runner = ListRunner()
    [work] = sent(sentry_shop.work, runner=runner)
    run_call(runner, work.name, work.text, given, 1, work.id)
    [request] = of_type("transaction", items, "request")
    [task] = of_type("transaction", items, ".work")
    assert trace_of(task)["trace_id"] != trace_of(request)["trace_id"]


def test_what_on_error_does_belongs_to_the_task_that_has_failed(items: list[Item]) -> None:
    def on_error(task: object, exc: BaseException) -> None:
        sentry_sdk.set_tag("on_error", "1")
        sentry_sdk.capture_message("noted")

    def fail() -> None:
        raise ValueError("a bug")

    def add(environ: object) -> None:
        background_tasks.add_task(fail)
        background_tasks.add_task(sentry_shop.work, "x")

    app = app_that(add)
    respond(BackgroundTasksMiddleware(app, hooks=SentryHooks(), on_error=on_error))
    [failed] = of_type("transaction", items, ".fail")
    [noted] = [item for item in of_type("event", items) if item.get("message") == "noted"]
    assert trace_of(noted)["trace_id"] == trace_of(failed)["trace_id"]
    name = "background task"
    assert noted["contexts"][name] == failed["contexts"][name]
    [after] = of_type("transaction", items, ".work")
    assert "on_error" not in after.get("tags", {})


def test_an_extra_call_and_the_run_by_the_request_continue_its_trace(items: list[Item]) -> None:
    def add(environ: object) -> None:
        with sentry_sdk.start_transaction(name="request"):
            background_tasks.add_task(sentry_shop.work, "x")()

    respond(BackgroundTasksMiddleware(app_that(add), hooks=SentryHooks()))
    [request] = of_type("transaction", items, "request")
    calls = of_type("transaction", items, ".work")
    assert [continues(call, request) for call in calls] == [True, True]


def test_the_baggage_of_another_tracer_travels_too(items: list[Item]) -> None:
    runner = ListRunner()
    hooks = SentryHooks()
    headers.carriers["a"] = lambda carrier: carrier.update(baggage="tenant=7")
    headers.carriers["sentry"] = headers.carriers.pop("sentry")  # after the other
    app = app_that(lambda _: background_tasks.add_task(sentry_shop.work, "x"))
    respond(BackgroundTasksMiddleware(app, hooks=hooks, runner=runner))
    assert wait_until(lambda: runner.sent)
    baggage = runner.sent[0][0].headers["baggage"]
    assert baggage.startswith("tenant=7,sentry-")


def test_a_transaction_of_the_engines_integration_is_kept(items: list[Item]) -> None:
    runner = ListRunner()
    fail, work = sent(sentry_shop.work, sentry_shop.fail_there, runner=runner)
    with sentry_sdk.start_transaction(name="engine", op="queue.task.rq"):
        run_call(runner, work.name, work.text, work.headers, 1, work.id)
        with pytest.raises(ValueError, match="a bug"):
            run_call(runner, fail.name, fail.text, fail.headers, 1, fail.id)
    names = [item["transaction"] for item in items]
    assert names == ["request", "engine"]


@pytest.mark.parametrize("options", [{"trace_lifecycle": "stream"}])
@pytest.mark.parametrize("is_of_engine", [True, False])
def test_a_streamed_span_of_the_engines_integration_is_kept(
    items: list[Item], *, is_of_engine: bool
) -> None:
    runner = ListRunner()
    hooks = SentryHooks()
    app = app_that(lambda _: background_tasks.add_task(sentry_shop.fail_there, "x"))
    respond(BackgroundTasksMiddleware(app, hooks=hooks, runner=runner))
    assert wait_until(lambda: runner.sent)
    [[call]] = runner.sent
    with ExitStack() as stack:
        if is_of_engine:
            attributes: dict[str, Any] = {"sentry.op": "queue.task.rq"}
            span = sentry_sdk.traces.start_span("engine", attributes, parent_span=None)
            stack.enter_context(span)
        with pytest.raises(ValueError, match="a bug"):
            run_call(runner, call.name, call.text, call.headers, 1, call.id)
    assert len(of_type("event", items)) == (not is_of_engine)


@pytest.mark.parametrize("options", [{"trace_lifecycle": "stream"}])
def test_a_streamed_span_with_the_name_of_the_packages_function_gets_the_tasks(
    items: list[Item],
) -> None:
    runner = ListRunner()
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=SentryHooks())
    attributes: dict[str, Any] = {"sentry.op": "queue.task.rq"}
    entry = "wsgi_bg.rq.worker.run"
    span = sentry_sdk.traces.start_span(entry, attributes, parent_span=None)
    with span, pytest.raises(ValueError, match="a bug"):
        run_call(runner, "sentry.fail", '[1,["x"],{}]', {})
    assert span.name == "tests.support.sentry_shop.fail_there"


def test_a_stored_task_of_a_process_that_was_killed_continues_the_trace(
    items: list[Item], tmp_path: Path
) -> None:
    before, folder = tmp_path / "items", tmp_path / "tasks"
    killed = in_process(f"store_and_die({str(folder)!r})", SENTRY_ITEMS=str(before))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [request] = of_type("transaction", json_lines(before))
    app = BackgroundTasksMiddleware(
        app_that(lambda _: None), runner=DurableRunner(folder), hooks=SentryHooks()
    )
    Server().run(app, make_server_environ())
    assert wait_until(lambda: of_type("transaction", items))
    [task] = of_type("transaction", items)
    assert continues(task, request)


@pytest.mark.parametrize("moment", ["get_isolation_scope", "continue_trace"])
def test_an_error_of_sentry_is_logged_and_the_task_runs(
    items: list[Item], log: Log, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(sentry_sdk, moment, broken)
    ran: list[int] = []
    run(ran.append, args=[1])
    assert ran == [1]
    missing = {"get_isolation_scope": "scope", "continue_trace": "transaction"}[moment]
    assert log.errors == [f"Sentry has no {missing} for list.append"]
    run(sentry_shop.fail, args=["x"])
    assert items == []


def test_an_error_at_the_end_of_a_transaction_is_logged(
    items: list[Item],
    log: Log,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr("sentry_sdk.tracing.Transaction.__exit__", broken)
    run(int)
    assert log.errors == ["Sentry could not end builtins.int"]
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    fields = {name: vars(record)[f"wsgi_bg_{name}"] for name in ("task", "attempt", "request")}
    assert fields == {"task": "builtins.int", "attempt": 1, "request": "GET /"}


def test_a_wrong_option_is_refused() -> None:
    wrong: Any = "yes"
    with pytest.raises(OptionTypeError, match="show_arguments must be True or False"):
        SentryHooks(show_arguments=wrong)


def test_a_missing_package_is_one_sentence_with_the_command() -> None:
    done = run_python(
        """
        import sys
        sys.modules["sentry_sdk"] = None
        import wsgi_bg.sentry
        """
    )
    assert done.stderr.splitlines()[-1] == (
        "wsgi_bg.exceptions.ExtraMissingError: wsgi_bg.sentry needs a package that is not "
        "installed: pip install 'wsgi_bg[sentry]'"
    )
