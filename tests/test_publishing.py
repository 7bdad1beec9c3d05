"""Sending to a broker: waiting messages, state, log records, and errors."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.signals import before_task_publish

from tests import registry_samples
from tests.celery_shop import local_calls, not_registered, note
from tests.celery_support import Broker, filesystem, messages, request, silent_broker
from tests.conftest import Log
from tests.recording_support import recording
from tests.support import TIMEOUT, Gate
from tests.test_encoding import written
from tests.test_examples import wait_until
from wsgi_bg import InlineRunner, background_tasks, registered_task
from wsgi_bg._messages import headers
from wsgi_bg._messages.codec import decode
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.celery import CeleryRunner, correlation_id, traceparent
from wsgi_bg.celery import publisher as publishing
from wsgi_bg.exceptions import ArgumentError, MessageError, OptionError, PublishError
from wsgi_bg.runners.pool import START_DELAY

NOTE = "tests.celery_shop.note"


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem(tmp_path)


# A broker that is slow, or away


def test_a_stop_while_a_message_is_sent_leaves_nothing_to_wait_for(log: Log) -> None:
    """Otherwise the exit of a stopped worker would wait for its whole drain_timeout."""
    with silent_broker() as silent:
        runner = silent.broker.runner(local="inline", publish_timeout=TIMEOUT)

        def stop() -> None:
            silent.was_asked.wait(TIMEOUT)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            request(runner, lambda: background_tasks.add_task(note, "path"))
        thread.join()
        began = time.monotonic()
        assert runner.drain(TIMEOUT) == []
        assert time.monotonic() - began < 1
        statistics = runner.statistics()
        assert (statistics.pending, statistics.running, statistics.discarded) == (0, 0, 1)


def test_tasks_that_were_named_as_left_undone_are_not_sent_later(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    runner = broker.runner()
    send = publishing.Publisher._send

    def late(*args: Any) -> None:
        gate.task()
        send(*args)

    monkeypatch.setattr(publishing.Publisher, "_send", late)

    def do() -> None:
        for name in ("first", "second"):
            background_tasks.add_task(note, name)

    request(runner, do, complete=False)
    assert gate.begun.wait(TIMEOUT)
    assert len(runner.abandon()) == 2
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert [message["body"][0][0] for message in messages(broker)] == ['[1,["first"],{}]']


span: ContextVar[str] = ContextVar("span", default="none")


def test_celerys_signals_see_the_context_in_which_the_task_was_added(broker: Broker) -> None:
    """Tracers, Sentry and loggers for Celery put values of this context into the headers."""
    seen: list[str] = []

    def look(**_: Any) -> None:
        seen.append(span.get())

    def do() -> None:
        span.set("of the request")
        background_tasks.add_task(note, "path")

    before_task_publish.connect(look)
    try:
        request(broker.runner(), do)
    finally:
        before_task_publish.disconnect(look)
    assert seen == ["of the request"]


def test_a_message_sent_in_the_moment_of_its_timeout_counts_as_sent(
    broker: Broker, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = broker.runner()._states.get().publisher

    class Late:
        """The wait times out although the message is sent."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock
            self.release = lock.release

        def acquire(self, timeout: float) -> bool:
            self.lock.acquire(timeout=TIMEOUT)
            return False

    class Job(publishing._Job):
        __slots__ = ()

        def __init__(self, message: Any) -> None:
            super().__init__(message)
            self.is_done = Late(self.is_done)  # type: ignore[assignment]

    monkeypatch.setattr(publishing, "_Job", Job)
    publisher.publish(publishing.Message(NOTE, "", {}, {}))
    assert len(messages(broker)) == 1
    assert log.warnings == []


@pytest.mark.usefixtures("no_collection")
def test_an_error_of_the_broker_is_freed_without_a_garbage_collection(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GoneError(Exception):
        """An error; the test sees when the error is freed."""

    def gone(*_: Any) -> None:
        raise GoneError

    publisher = broker.runner()._states.get().publisher
    monkeypatch.setattr(publishing.Publisher, "_send", gone)
    with pytest.raises(PublishError) as caught:
        publisher.publish(publishing.Message(NOTE, "", {}, {}))
    error = caught.value.__cause__
    assert error is not None
    freed = weakref.ref(error)
    del error, caught
    assert wait_until(lambda: freed() is None)


# Refused values


@pytest.mark.parametrize("value", [float("inf"), 1e12])
def test_a_time_that_no_lock_can_wait_is_refused(broker: Broker, value: float) -> None:
    with pytest.raises(OptionError, match="publish_timeout must be a bounded time"):
        broker.runner(publish_timeout=value)


def test_an_application_that_takes_whatever_comes_is_refused_with_the_reason() -> None:
    app = Celery("any", set_as_current=False)
    app.conf.accept_content = None
    with pytest.raises(OptionError, match="accept_content of celery_app must be a list with"):
        CeleryRunner(app)


def test_a_correlation_id_that_is_no_text_is_refused_by_add_task(
    broker: Broker,
) -> None:
    def do() -> None:
        correlation_id.set(7)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=r"wsgi_bg\.correlation_id must be a str or None"):
            background_tasks.add_task(note, "path")

    request(broker.runner(), do)


def test_the_name_of_an_argument_is_text_too() -> None:
    with pytest.raises(ArgumentError, match="half of a surrogate pair"):
        written(1, **{"\ud83d\ude00": 1})


# Connections, contexts, and kept state


def test_connections_are_used_again_and_never_by_two_at_the_same_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    publisher = broker.runner()._states.get().publisher
    connect, send = publishing.Publisher._connect, publishing.Publisher._send
    made: list[Any] = []
    used: list[Any] = []

    def counting(self: Any) -> Any:
        made.append(connect(self))
        return made[-1]

    def noting(self: Any, producer: Any, message: Any) -> None:
        used.append(producer)
        if message.text == "slow":
            gate.task()
        send(self, producer, message)

    monkeypatch.setattr(publishing.Publisher, "_connect", counting)
    monkeypatch.setattr(publishing.Publisher, "_send", noting)

    def publish(text: str) -> None:
        publisher.publish(publishing.Message(NOTE, text, {}, {}))

    publish("first")
    publish("second")
    assert len(made) == 1
    thread = threading.Thread(target=publish, args=("slow",))
    thread.start()
    assert gate.begun.wait(TIMEOUT)
    publish("beside")
    gate.open()
    thread.join(TIMEOUT)
    assert len(made) == 2
    assert used == [made[0], made[0], made[0], made[1]]
    assert made[0].connection.heartbeat == 0


def test_a_connection_that_has_failed_is_closed_and_not_used_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = broker.runner()._states.get().publisher
    made: list[Any] = []

    def fail(self: Any, producer: Any, message: Any) -> None:
        producer.connection.connect()
        made.append(producer)
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(publishing.Publisher, "_send", fail)
        with pytest.raises(PublishError):
            publisher.publish(publishing.Message(NOTE, "", {}, {}))
    assert publisher._idle == []
    assert wait_until(lambda: not made[0].connection.connected)


def test_an_answer_ends_the_time_in_which_the_broker_is_not_asked(
    broker: Broker, log: Log, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    publisher = broker.runner(publish_timeout=TIMEOUT)._states.get().publisher
    send = publishing.Publisher._send

    def late(*args: Any) -> None:
        gate.task()
        send(*args)

    message = publishing.Message(NOTE, "", {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(publishing.Publisher, "_send", late)
        patch.setattr(publisher, "_timeout", 0.05)
        with pytest.raises(PublishError, match="has not answered in"):
            publisher.publish(message)
    publisher._silent_until = time.monotonic() + 60
    gate.open()
    assert wait_until(lambda: publisher._silent_until == 0.0)
    publisher.publish(message)
    # The late message is logged by its thread, perhaps after the end of this test.
    assert wait_until(lambda: len(log.warnings) == 1)


@pytest.mark.usefixtures("no_collection")
def test_a_task_that_was_sent_is_freed_without_a_garbage_collection(broker: Broker) -> None:
    """The context of a task holds the batch, and so the task again."""
    tasks: list[Any] = []

    def do() -> None:
        background_tasks.add_task(note, "path")
        tasks.append(weakref.ref(background_tasks.tasks[0]))

    runner = broker.runner()
    request(runner, do)
    assert runner.drain(TIMEOUT) == []
    assert wait_until(lambda: tasks[0]() is None)


def test_a_sent_task_is_not_left_undone_while_a_local_task_waits(broker: Broker) -> None:
    """The task is not counted as running either."""
    taken: list[Batch] = []

    class Holds(InlineRunner):
        def submit(self, batch: Batch) -> None:
            taken.append(batch)

    def do() -> None:
        background_tasks.add_task(not_registered)
        background_tasks.add_task(note, "path")

    runner = broker.runner(local=Holds())
    request(runner, do)
    assert [task.func for task in taken[0].tasks] == [not_registered]
    assert runner.statistics().running == 0
    assert runner.statistics().succeeded == 1
    taken[0].run()
    assert len(local_calls) == 1
    local_calls.clear()


def test_in_a_test_with_the_pytest_plugin_nothing_is_sent(
    broker: Broker, tmp_path: Path
) -> None:
    with recording("run"):
        request(
            broker.runner(), lambda: background_tasks.add_task(note, str(tmp_path / "note"))
        )
    assert (tmp_path / "note").exists()
    assert messages(broker) == []


def test_a_retry_policy_of_the_task_holds(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[Any] = []
    runner = broker.runner()
    task = type(runner._app.tasks[NOTE])
    monkeypatch.setattr(
        task, "apply_async", lambda *args, **options: policies.append(options["retry_policy"])
    )

    def do() -> None:
        background_tasks.add_task(note, "path")
        own = background_tasks.using(celery={"retry_policy": {"max_retries": 7}})
        own.add_task(note, "path")

    request(runner, do)
    assert policies == [publishing._RETRY, {"max_retries": 7}]


def test_the_batch_of_an_incomplete_response_is_delayed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[float, float]] = []
    send = CeleryRunner._send_now

    def look(self: Any, batch: Any) -> None:
        begun.append((time.monotonic(), batch.not_before))
        send(self, batch)

    monkeypatch.setattr(CeleryRunner, "_send_now", look)
    runner = broker.runner()
    asked = time.monotonic()
    request(runner, lambda: background_tasks.add_task(note, "path"), complete=False)
    assert runner.drain(TIMEOUT) == []
    ((at, not_before),) = begun
    assert at >= not_before >= asked + START_DELAY


def test_batches_of_incomplete_responses_do_not_wait_for_each_other(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    send = publishing.Publisher._send

    def late(self: Any, producer: Any, message: Any) -> None:
        if "slow" in message.text:
            gate.task()
        send(self, producer, message)

    monkeypatch.setattr(publishing.Publisher, "_send", late)
    runner = broker.runner()
    request(runner, lambda: background_tasks.add_task(note, "slow"), complete=False)
    assert gate.begun.wait(TIMEOUT)
    request(runner, lambda: background_tasks.add_task(note, "quick"), complete=False)
    assert wait_until(lambda: len(messages(broker)) == 1)
    assert gate.passed == []  # the slow message still waits
    gate.open()
    assert runner.drain(TIMEOUT) == []


def stays_out() -> None:
    """Registered by a single test."""


def test_exceptions_that_are_not_to_be_tried_again_are_kept(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    try:
        registered_task(name="tests.stays_out", celery={"dont_autoretry_for": (KeyError,)})(
            stays_out
        )
        assert app.tasks["tests.stays_out"].dont_autoretry_for == (KeyError, MessageError)
    finally:
        registry._by_name.pop("tests.stays_out", None)
        registry._by_function.pop(stays_out, None)


def test_a_second_runner_on_an_application_listens_no_second_time(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    count = len(registry._listeners)
    CeleryRunner(app)
    assert len(registry._listeners) == count


def test_a_result_that_is_ignored_is_nothing_to_celery(broker: Broker) -> None:
    app = broker.app()
    CeleryRunner(app)
    name = f"{registry_samples.__name__}.plain"
    assert app.tasks[name].apply(args=("[1,[1],{}]",)).result is None


def test_a_forged_header_that_is_no_text_sets_nothing() -> None:
    context = copy_context()
    forged: dict[str, Any] = {"x-correlation-id": 7, "traceparent": ["a"]}
    headers.restore(context, forged.get)
    assert context[correlation_id] is None
    assert context[traceparent] is None


def test_of_opentelemetrys_headers_only_the_trace_travels(broker: Broker) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    state = trace.TraceState([("vendor", "secret")])
    context = trace.SpanContext(1, 2, False, trace.TraceFlags(1), state)

    def do() -> None:
        with trace.use_span(trace.NonRecordingSpan(context)):
            background_tasks.add_task(note, "path")

    request(broker.runner(), do)
    assert "tracestate" not in messages(broker)[0]["headers"]


def test_base64_with_invalid_letters_is_refused() -> None:
    with pytest.raises(MessageError):
        decode('[1,[{"$bytes":"AA==!"}],{}]')


def test_a_callable_that_cannot_be_hashed_runs_here(broker: Broker) -> None:
    ran: list[int] = []

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> None:
            ran.append(1)

    request(broker.runner(local="inline"), lambda: background_tasks.add_task(Unhashable()))
    assert ran == [1]
