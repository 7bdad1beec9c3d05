"""``CeleryRunner`` in the process that serves: its checks, its messages, its state."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, current_task

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Clock,
    Gate,
    app_that,
    celery_shop,
    events,
    free_port,
    no_threads,
    respond,
    run_python,
    wait_until,
)
from tests.support.celery import PARENT, Broker, filesystem, messages, request
from tests.support.celery_shop import (
    local_calls,
    not_registered,
    note,
    note_on_other_queue,
    stand_still,
)
from wsgi_bg import (
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    registered_task,
)
from wsgi_bg._messages import retries
from wsgi_bg._messages.codec import decode
from wsgi_bg._outbox.outbox import Outbox
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.celery import CeleryRunner, correlation_id, traceparent
from wsgi_bg.celery import messages as celery_messages
from wsgi_bg.exceptions import (
    ArgumentError,
    MessageError,
    NameTakenError,
    OptionError,
    RegistrationError,
    UnsafeCeleryError,
)
from wsgi_bg.runners import Statistics

pytestmark = pytest.mark.usefixtures("one_sender")

NOTE = "tests.support.celery_shop.note"

here: list[int] = []
"""Process ids of the calls of the next two functions."""


@registered_task
def note_here() -> None:
    here.append(os.getpid())


@registered_task
async def note_here_async() -> None:
    here.append(os.getpid())


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem(tmp_path)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    local_calls.clear()


def add(func: Any, *args: Any, **kwargs: Any) -> Any:
    return lambda: background_tasks.add_task(func, *args, **kwargs)


def test_a_registered_task_is_sent_by_its_name(broker: Broker) -> None:
    request(broker.runner(), add(note, "path", 1, x=b"y"))
    (message,) = messages(broker)
    assert message["headers"]["task"] == NOTE
    assert message["content-type"] == "application/json"
    args, kwargs, _ = message["body"]
    assert args == ['[1,["path",1],{"x":{"$bytes":"eQ=="}}]']
    assert kwargs == {}


def test_the_arguments_are_not_shown_in_headers(broker: Broker) -> None:
    request(broker.runner(), add(note, "secret"))
    (message,) = messages(broker)
    assert message["headers"]["argsrepr"] == message["headers"]["kwargsrepr"] == "(...)"
    assert "secret" not in str(message["headers"])


def test_a_mixed_batch_goes_two_ways(broker: Broker) -> None:
    runner = broker.runner(local="inline")

    def do() -> None:
        background_tasks.add_task(not_registered)
        background_tasks.add_task(note, "a")
        background_tasks.add_task(not_registered)
        background_tasks.add_task(note, "b")

    request(runner, do)
    assert len(local_calls) == 2
    sent = sorted(message["body"][0][0] for message in messages(broker))
    assert sent == ['[1,["a"],{}]', '[1,["b"],{}]']
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.sent, statistics.pending) == (2, 2, 0)


def test_changes_after_add_task_are_not_sent(broker: Broker) -> None:
    items, app = [1], broker.runner()

    def do() -> None:
        background_tasks.add_task(note, "path", items)
        items.append(2)

    request(app, do)
    assert messages(broker)[0]["body"][0] == ['[1,["path",[1]],{}]']


def test_an_argument_that_is_not_carried_is_refused_in_the_view(broker: Broker) -> None:
    def view(environ: Any) -> None:
        with pytest.raises(ArgumentError, match=r"argument args\[0\]\['x'\] cannot be sent"):
            background_tasks.add_task(note, "path", {"x": (1,)})

    respond(BackgroundTasksMiddleware(app_that(view), runner=broker.runner()))
    assert messages(broker) == []


def test_a_function_that_is_not_registered_takes_any_argument(broker: Broker) -> None:
    request(broker.runner(local="inline"), add(not_registered, ""))
    assert local_calls == [("",)]


def test_without_a_local_runner_unregistered_tasks_run_on_the_shared_pool(
    broker: Broker,
) -> None:
    runner = broker.runner()
    threads: list[str] = []
    done = events(1)[0]

    def here() -> None:
        threads.append(threading.current_thread().name)
        done.set()

    request(runner, add(here))
    assert done.wait(TIMEOUT)
    assert threads[0].startswith("wsgi_bg-pool")


def test_tasks_that_a_running_task_adds_are_sent_too(broker: Broker) -> None:
    runner = broker.runner(local="inline")
    request(runner, add(add(note, "later")))
    assert messages(broker)[0]["body"][0] == ['[1,["later"],{}]']


def test_tasks_that_an_async_task_adds_are_sent_too(broker: Broker) -> None:
    runner = broker.runner()

    async def adds() -> None:
        background_tasks.add_task(celery_shop.note_loop, "later")

    request(runner, add(adds))
    assert runner.drain(TIMEOUT) == []
    assert messages(broker)[0]["body"][0] == ['[1,["later"],{}]']


def test_run_on_holds_for_tasks_to_send(broker: Broker, log: Log) -> None:
    def view(environ: Any) -> None:
        background_tasks.add_task(note, "success")
        background_tasks.using(run_on="error").add_task(note, "error")

    runner = broker.runner()
    app = app_that(view, status="500 Oh")
    respond(BackgroundTasksMiddleware(app, runner=runner))
    assert runner.drain(TIMEOUT) == []
    assert [message["body"][0][0] for message in messages(broker)] == ['[1,["error"],{}]']
    assert log.warnings == [
        f"background task {NOTE} was not run: the request failed with 500, and run_on is "
        "'success'"
    ]


def test_options_of_the_function_and_of_a_single_message(broker: Broker) -> None:
    runner = broker.runner()
    eta = datetime(2040, 1, 1, tzinfo=UTC)

    def do() -> None:
        background_tasks.add_task(note_on_other_queue, "path")
        urgent = background_tasks.using(celery={"queue": "urgent", "eta": eta, "priority": 7})
        urgent.add_task(note_on_other_queue, "path")

    request(runner, do)
    first, second = messages(broker)
    assert first["headers"]["task"] == "shop.again"
    assert first["properties"]["delivery_info"]["routing_key"] == "other"
    assert first["headers"]["eta"] is None
    assert second["properties"]["delivery_info"]["routing_key"] == "urgent"
    assert second["headers"]["eta"] == eta.isoformat()
    assert second["properties"]["priority"] == 7


@registered_task(
    name="tests.limited", celery={"queue": "slow", "soft_time_limit": 9, "countdown": 60}
)
def limited() -> None:
    raise NotImplementedError


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_time_of_the_message_replaces_that_of_the_function(
    broker: Broker, *, is_plain: bool
) -> None:
    app = broker.app()
    runner = CeleryRunner(app, plain_calls=True)
    eta = datetime(2040, 1, 1, tzinfo=UTC)

    def do() -> None:
        if is_plain:
            app.tasks["tests.limited"].apply_async(eta=eta)
        else:
            background_tasks.using(celery={"eta": eta}).add_task(limited)

    request(runner, do)
    [message] = messages(broker)
    assert message["headers"]["eta"] == eta.isoformat()
    assert message["headers"]["timelimit"] == [None, 9]


def test_options_for_messages_hold_for_plain_calls(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app, plain_calls=True)
    task = app.tasks["tests.limited"]
    task.delay()
    task.apply_async(queue="urgent", soft_time_limit=3)
    limits = {
        each["properties"]["delivery_info"]["routing_key"]: each["headers"]["timelimit"]
        for each in messages(broker)
    }
    assert limits == {"slow": [None, 9], "urgent": [None, 3]}


def test_options_of_the_function_are_those_of_celerys_task(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    task = app.tasks["tests.support.celery_shop.hold"]
    assert task.acks_late is True
    assert task.ignore_result is True
    assert app.tasks[NOTE].acks_late is False


def test_options_for_a_function_that_is_not_registered_are_refused(broker: Broker) -> None:
    def view(environ: Any) -> None:
        tasks = background_tasks.using(celery={"queue": "slow"})
        with pytest.raises(RegistrationError, match="not_registered has options for Celery"):
            tasks.add_task(not_registered)

    respond(BackgroundTasksMiddleware(app_that(view), runner=broker.runner()))


def test_correlation_id_and_trace_travel_in_headers_when_they_are_set(broker: Broker) -> None:
    runner = broker.runner()
    request(runner, add(note, "path"))

    def do() -> None:
        correlation_id.set("request-1")
        traceparent.set(PARENT)
        background_tasks.add_task(note, "path")

    request(runner, do)
    without, with_both = [message["headers"] for message in messages(broker)]
    assert not {"x-correlation-id", "traceparent"} & set(without)
    assert with_both["x-correlation-id"] == "request-1"
    assert with_both["traceparent"] == PARENT


def test_the_trace_of_opentelemetry_travels(broker: Broker) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    span = trace.NonRecordingSpan(trace.SpanContext(1, 2, False, trace.TraceFlags(1)))

    def do() -> None:
        traceparent.set(PARENT)
        with trace.use_span(span):
            background_tasks.add_task(note, "path")

    request(broker.runner(), do)
    (message,) = messages(broker)
    assert message["headers"]["traceparent"] == f"00-{1:032x}-{2:016x}-01"


def test_without_opentelemetry_a_message_has_no_trace(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    request(broker.runner(), add(note, "path"))
    assert "traceparent" not in messages(broker)[0]["headers"]


def test_celerys_eager_mode_runs_all_here(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Outbox, "put")
    runner = broker.runner(local="inline")
    runner._app.conf.task_always_eager = True
    request(runner, add(note, str(tmp_path / "note"), 1))
    assert ", (1,), {})" in (tmp_path / "note").read_text(encoding="utf-8")
    assert messages(broker) == []


def test_sent_tasks_are_not_counted_by_the_local_runner(broker: Broker) -> None:
    local = PoolRunner()
    runner = broker.runner(local=local)
    request(runner, add(note, "path"))
    request(runner, add(note, "path"), complete=False)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().sent == 2
    assert local.statistics().succeeded == 0


def test_messages_are_json_whatever_else_the_application_sends(broker: Broker) -> None:
    app = broker.app()
    app.conf.update(task_serializer="yaml", accept_content=["json", "yaml"])
    request(CeleryRunner(app), add(note, "path"))
    assert messages(broker)[0]["content-type"] == "application/json"


def test_an_incomplete_response_is_sent_on_a_thread_of_the_runner(broker: Broker) -> None:
    runner = broker.runner()
    threads: list[str] = []

    def here() -> None:
        threads.append(threading.current_thread().name)

    def do() -> None:
        background_tasks.add_task(here)
        background_tasks.add_task(note, "path")

    request(runner, do, complete=False)
    assert runner.drain(TIMEOUT) == []
    assert len(messages(broker)) == 1
    assert threads[0].startswith("wsgi_bg-pool")


def test_tasks_wait_for_the_next_task_if_no_thread_can_start(broker: Broker) -> None:
    runner = broker.runner()
    with no_threads():
        request(runner, add(note, "a"), sends=False)
        request(runner, add(note, "b"), complete=False, sends=False)
    assert messages(broker) == []
    request(runner, add(note, "c"))
    assert len(messages(broker)) == 3


def test_a_drained_runner_still_sends(broker: Broker) -> None:
    runner = broker.runner()
    assert runner.drain(0) == []
    request(runner, add(note, "path"), complete=False)
    assert len(messages(broker)) == 1


def test_a_local_runner_that_does_not_take_a_batch_loses_no_task(
    broker: Broker, log: Log
) -> None:
    class Broken(InlineRunner):
        def submit(self, batch: Batch) -> None:
            raise ZeroDivisionError

    runner = broker.runner(local=Broken())

    def do() -> None:
        background_tasks.add_task(note, "path")
        background_tasks.add_task(not_registered)

    request(runner, do)
    request(runner, do, complete=False)
    assert runner.drain(TIMEOUT) == []
    assert len(local_calls) == 2
    assert len(messages(broker)) == 2
    assert len(log.errors) == 2
    assert all("which run in this process" in error for error in log.errors)


def test_drain_waits_and_abandon_names_the_tasks_left(broker: Broker, gate: Gate) -> None:
    runner = broker.runner()
    request(runner, add(gate.task))
    assert gate.begun.wait(TIMEOUT)
    assert [task.func for task in runner.drain(0)] == [gate.task]
    assert runner.statistics().running == 1
    assert [task.func for task in runner.abandon()] == [gate.task]
    gate.open()
    assert runner.drain(TIMEOUT) == []


def test_functions_registered_after_the_runner_are_tasks_too(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    assert NOTE in app.tasks
    try:
        registered_task(name="tests.later")(later)
        assert app.tasks["tests.later"].name == "tests.later"
        registered_task(name="tests.later")(later)  # as a reloaded module would
    finally:
        registry._by_name.pop("tests.later", None)
        registry._by_function.pop(later, None)


def later() -> None:
    pass


def test_two_runners_may_have_the_same_application(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    request(CeleryRunner(app, publish_timeout=1), add(note, "path"))
    assert len(messages(broker)) == 1


@pytest.mark.filterwarnings("ignore:Task name .*stand_still'")  # Celery's own
def test_a_name_that_a_task_of_celery_has_is_refused(broker: Broker) -> None:
    app = broker.app()

    @app.task(name="tests.support.celery_shop.stand_still", shared=False)  # type: ignore[untyped-decorator]
    def other() -> None:
        pass

    runner = CeleryRunner(app)

    def view(environ: Any) -> None:
        with pytest.raises(NameTakenError, match=r"stand_still' is taken by a task of <Celery"):
            background_tasks.add_task(stand_still, "path")

    respond(BackgroundTasksMiddleware(app_that(view), runner=runner))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("task_serializer", "pickle"),
        ("result_serializer", "pickle"),
        ("event_serializer", "pickle"),
        ("accept_content", ["json", "pickle"]),
        ("accept_content", {"json", "application/x-python-serialize"}),
        ("result_accept_content", ["json", "PICKLE"]),
        ("worker_pool_restarts", True),
    ],
)
def test_an_application_by_which_a_message_could_run_code_is_refused(
    setting: str, value: Any
) -> None:
    app = Celery("unsafe", set_as_current=False)
    app.conf[setting] = value
    with pytest.raises(UnsafeCeleryError, match=f"the Celery setting {setting} is") as caught:
        CeleryRunner(app)
    assert caught.value.setting == setting
    assert isinstance(caught.value, ValueError)


def test_an_application_that_takes_no_json_is_refused() -> None:
    app = Celery("no-json", set_as_current=False)
    app.conf.accept_content = ["msgpack"]
    with pytest.raises(OptionError, match="accept_content of celery_app must be a list with"):
        CeleryRunner(app)


def test_an_application_that_takes_json_and_yaml_is_accepted() -> None:
    app = Celery("yaml", set_as_current=False)
    app.conf.accept_content = ["application/json", "yaml"]
    CeleryRunner(app)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"publish_timeout": 0}, "publish_timeout must be more than 0 seconds; got 0"),
        ({"publish_timeout": float("nan")}, "publish_timeout must be more than 0 seconds"),
        ({"publish_timeout": None}, "publish_timeout must be a number of seconds; got None"),
        ({"publish_timeout": True}, "publish_timeout must be a number of seconds; got True"),
        ({"publish_timeout": float("inf")}, "publish_timeout must be a bounded time; got inf"),
        ({"drain_timeout": False}, "drain_timeout must be a number of seconds; got False"),
        ({"drain_timeout": -1}, "drain_timeout must be 0 seconds or more; got -1"),
        ({"drain_timeout": "1"}, "drain_timeout must be a number of seconds; got '1'"),
        ({"on_publish_error": "lose"}, "on_publish_error must be 'local' or 'discard'"),
        (
            {"on_publish_error": "local", "when_unsent": "discard"},
            "on_publish_error must be None beside when_unsent; got 'local'",
        ),
        ({"when_unsent": "lose"}, "when_unsent must be 'hold', 'local' or 'discard'"),
        ({"when_unsent": None}, "when_unsent must be 'hold', 'local' or 'discard'; got None"),
        ({"hold_for": 0}, "hold_for must be more than 0 seconds; got 0"),
        ({"max_unsent": 0}, "max_unsent must be 1 or more; got 0"),
        ({"outbox": 7}, "outbox must be the path of a folder; got 7"),
        ({"local": "celery"}, "local must be 'inline', 'pool' or a runner object"),
    ],
)
def test_options_out_of_range_are_refused(
    broker: Broker, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        broker.runner(**options)


@pytest.mark.parametrize("app", [None, "redis://localhost", Celery])
def test_a_runner_without_an_application_is_refused(app: Any) -> None:
    with pytest.raises(OptionError, match=r"celery_app must be a celery\.Celery application"):
        CeleryRunner(app)


def test_the_repr_of_a_runner_shows_its_application(broker: Broker) -> None:
    assert repr(broker.runner(local="inline")) == "CeleryRunner('shop', local=InlineRunner())"


def test_a_worker_calls_the_function_with_the_decoded_arguments(
    broker: Broker, tmp_path: Path
) -> None:
    app = broker.app()
    CeleryRunner(app)
    text = json.dumps([1, [str(tmp_path / "note"), {"$bytes": "eA=="}], {"a": 1.5}])
    assert app.tasks[NOTE].apply(args=(text,)).result is None
    written = (tmp_path / "note").read_text(encoding="utf-8")
    assert written == f"({os.getpid()}, (b'x',), {{'a': 1.5}})"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), (("[1,[],{}]", 1), {}), (("[1,[],{}]",), {"path": "x"}), (("x",), {})],
)
def test_a_worker_refuses_foreign_messages(broker: Broker, args: Any, kwargs: Any) -> None:
    app = broker.app()
    CeleryRunner(app)
    result = app.tasks[NOTE].apply(args=args, kwargs=kwargs)
    assert isinstance(result.result, MessageError)


def test_a_foreign_message_is_not_tried_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    def read(text: object) -> Any:
        tries.append(text)
        return decode(text)

    monkeypatch.setattr(celery_messages, "decode", read)
    app = broker.app()
    CeleryRunner(app)
    task = app.tasks["tests.support.celery_shop.fail_once"]
    assert ValueError in task.autoretry_for
    assert task.apply(args=("x",)).state == "FAILURE"
    assert tries == ["x"]


def test_the_result_is_for_celery_unless_results_are_ignored(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    assert app.tasks["shop.result"].apply(args=("[1,[4],{}]",)).result == 8


def test_celerys_own_task_class_of_the_application_is_used(
    broker: Broker, tmp_path: Path
) -> None:
    """Flask's documentation has a task class that enters the application's context."""
    entered: list[str] = []

    class Entering(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            entered.append(self.name)
            return self.run(*args, **kwargs)

    app = Celery("entering", task_cls=Entering, set_as_current=False)
    CeleryRunner(app)
    app.tasks[NOTE].apply(args=(json.dumps([1, [str(tmp_path / "note")], {}]),))
    assert entered == [NOTE]


def test_other_records_of_celerys_consumer_stay(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    CeleryRunner(broker.app())
    logger = logging.getLogger("celery.worker.consumer.consumer")
    logger.error("%s %s", "a", {"argsrepr": "('b',)"})
    assert caplog.messages == ["a {'argsrepr': \"('b',)\"}"]


def test_the_package_imports_no_celery() -> None:
    done = run_python(
        """
        import sys, wsgi_bg
        print(sorted({"celery", "kombu"} & set(sys.modules)))
        """
    )
    assert done.stdout == "[]\n", done.stderr


def test_without_celery_the_error_names_the_package_to_install() -> None:
    done = run_python(
        """
        import sys
        sys.modules["celery"] = None
        try: from wsgi_bg.celery import CeleryRunner
        except ImportError as exc: print(exc)
        """
    )
    assert done.stdout == (
        "wsgi_bg.celery needs a package that is not installed: pip install 'wsgi_bg[celery]'\n"
    )


def test_a_partial_of_a_registered_function_runs_here(broker: Broker, tmp_path: Path) -> None:
    partial = functools.partial(note, str(tmp_path / "note"))
    request(broker.runner(local="inline"), add(partial))
    assert (tmp_path / "note").exists()
    assert messages(broker) == []


def test_a_delay_goes_into_the_message_in_place_of_the_functions_time(
    broker: Broker, clock: Clock
) -> None:
    runner = broker.runner()

    def do() -> None:
        background_tasks.using(delay=60).add_task(note, "later")
        background_tasks.using(delay=60).add_task(note_tomorrow, "sooner")
        background_tasks.add_task(note_tomorrow, "tomorrow")
        background_tasks.add_task(note, "now")

    before = datetime.now(UTC)
    request(runner, do)
    times = [message["headers"]["eta"] for message in messages(broker)]
    seconds = [
        each and (datetime.fromisoformat(each) - before).total_seconds() for each in times
    ]
    assert seconds[3] is None
    assert [round(each) // 10 for each in seconds[:3]] == [6, 6, 8640]
    assert runner.statistics() == Statistics(0, 0, 0, 0, 0, sent=4)


@registered_task(celery={"countdown": 86400})
def note_tomorrow(path: str) -> None:
    """A function with a time of its own."""


def test_a_function_that_is_not_registered_waits_here(broker: Broker, clock: Clock) -> None:
    runner = broker.runner()
    local_calls.clear()

    def do() -> None:
        background_tasks.using(delay=60).add_task(not_registered)

    request(runner, do)
    assert wait_until(lambda: runner.statistics().waiting == 1)
    assert not messages(broker)
    clock.advance(60)
    assert wait_until(lambda: local_calls == [("",)])


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("func", [note_here, note_here_async])
def test_a_task_with_a_delay_never_runs_here_because_the_broker_is_away(
    log: Log, complete: bool, func: Any
) -> None:
    broker = Broker(f"redis://127.0.0.1:{free_port()}/0", {})
    runner = broker.runner(local="pool", when_unsent="local", publish_timeout=0.1)
    here.clear()

    def add() -> None:
        background_tasks.using(delay=60).add_task(func)
        background_tasks.using(celery={"countdown": 60}).add_task(func)
        background_tasks.using(retry=Retry()).add_task(func)
        background_tasks.add_task(func)

    def do() -> None:
        add()
        background_tasks.add_task(add)  # sent at its turn, and not with the others

    request(runner, do, complete=complete, sends=False)
    assert wait_until(lambda: len(here) == 2)  # those that wait for nothing
    assert runner.statistics().waiting == 6
    assert len(runner.ledger.abandon_unsent()) == 6


def test_a_task_that_is_given_up_is_not_tried_again(clock: Clock, log: Log) -> None:
    broker = Broker(f"redis://127.0.0.1:{free_port()}/0", {})
    runner = broker.runner(when_unsent="discard", publish_timeout=0.1)
    request(runner, lambda: background_tasks.using(retry=Retry()).add_task(note_here))
    assert runner.statistics() == Statistics(0, 0, 0, 1, 0)
    assert "raised PublishError" in log.errors[0]


def test_a_forged_retry_is_ignored() -> None:
    own = Retry(7)
    deep = "[" * 100_000
    for header in (None, 5, "", "[]", deep, '{"on": 1}', "null", retries.to_text(own)[:-1]):
        assert retries.find(header, own) is own
    forged = retries.to_text(own).replace("7", "-7")
    assert retries.find(forged, own) is own
    assert retries.find(forged, None) is None
    found = retries.find(retries.to_text(Retry(5, on=LookupError)), own)
    assert found is not None
    assert found.allows(4, KeyError("x"))
    assert not found.allows(5, KeyError("x"))
    assert not found.allows(4, ValueError("x"))


def test_a_retry_of_celerys_own_passes(broker: Broker, log: Log) -> None:
    app = broker.app()
    CeleryRunner(app)
    tries.clear()
    task = app.tasks["shop.by_celery"]
    assert task.apply(args=("[1,[],{}]",)).state == "SUCCESS"
    assert tries == [0, 1, 2]
    assert not log.warnings  # and no retry of the package's for the exception of Celery's


tries: list[int] = []


@registered_task(name="shop.by_celery", retry=Retry(2))
def retried_by_celery() -> None:
    tries.append(current_task.request.retries)
    if len(tries) < 3:
        raise current_task.retry(countdown=0)


def test_a_worker_repeats_a_task_as_its_retry_says(broker: Broker, log: Log) -> None:
    app = broker.app()
    CeleryRunner(app)
    tries.clear()
    task = app.tasks["shop.fails"]
    assert task.apply(args=("[1,[],{}]",)).state == "FAILURE"
    assert tries == [0, 1, 2]
    assert [message.partition(" in ")[2] for message in log.warnings] == [
        "attempt 1 of 3, and is called again in 0 seconds",
        "attempt 2 of 3, and is called again in 0 seconds",
    ]


@registered_task(name="shop.fails", retry=Retry(3, first=0, on=LookupError))
def fails() -> None:
    tries.append(current_task.request.retries)
    raise KeyError
