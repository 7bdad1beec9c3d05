"""Messages for a broker: state, headers, and errors."""

from __future__ import annotations

import weakref
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.signals import before_task_publish

from tests.support import TIMEOUT, registry_samples, wait_until
from tests.support.celery import Broker, filesystem, messages, request
from tests.support.celery_shop import local_calls, not_registered, note
from tests.support.encoding import written
from tests.support.recording import recording
from wsgi_bg import InlineRunner, background_tasks, registered_task
from wsgi_bg._messages import headers
from wsgi_bg._messages.codec import decode
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.celery import CeleryRunner, correlation_id, traceparent
from wsgi_bg.exceptions import ArgumentError, MessageError, OptionError

pytestmark = pytest.mark.usefixtures("one_sender")

NOTE = "tests.support.celery_shop.note"


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem(tmp_path)


# A broker that is slow, or away


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
    assert runner.statistics().sent == 1
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
    headers.restore(context, forged)
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
