"""Celery's own tasks in ``add_task``: sent after the response, as Celery itself would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, shared_task
from celery.signals import before_task_publish
from kombu import Exchange
from kombu.exceptions import EncodeError

from tests.brokers import Broker
from tests.celery_support import filesystem, messages, request
from tests.support import TIMEOUT, Server, app_that, make_server_environ
from tests.test_examples import wait_until
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg.celery import CeleryRunner
from wsgi_bg.celery.captured import Published
from wsgi_bg.exceptions import MessageError, OptionError, RegistrationError
from wsgi_bg.outbox import Message

pytestmark = pytest.mark.usefixtures("one_sender")

ran: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    ran.clear()


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem(tmp_path)


@pytest.fixture
def app(broker: Broker) -> Celery:
    return broker.app()


@pytest.fixture
def runner(app: Celery) -> CeleryRunner:
    return CeleryRunner(app, local="inline")


@shared_task(name="own.shared", ignore_result=True)  # type: ignore[untyped-decorator]
def shared(value: Any) -> None:
    ran.append(value)


def handle(runner: Any, view: Any) -> None:
    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    Server().run(app, make_server_environ())


def of(app: Celery, **options: Any) -> Any:
    @app.task(name="own.add", shared=False, **options)  # type: ignore[untyped-decorator]
    def own(*values: Any) -> None:
        ran.append(values)

    return own


def bodies(broker: Broker) -> list[Any]:
    return [message["body"][:2] for message in messages(broker)]


def test_a_task_of_the_application_is_sent_with_its_own_options(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    app.conf.task_routes = {"own.add": {"queue": "slow", "priority": 3}}
    own = of(app, ignore_result=False)
    ids: list[str] = []

    def do() -> None:
        ids.append(background_tasks.add_task(own, 1, "a").id)
        urgent = background_tasks.using(celery={"queue": "urgent"})
        ids.append(urgent.add_task(own, 2).id)

    request(runner, do)
    first, second = messages(broker)
    assert bodies(broker) == [[[1, "a"], {}], [[2], {}]]
    assert first["headers"]["task"] == "own.add"
    assert [each["headers"]["id"] for each in (first, second)] == ids
    assert first["properties"]["delivery_info"]["routing_key"] == "slow"
    assert second["properties"]["delivery_info"]["routing_key"] == "urgent"
    assert first["properties"]["priority"] == 3
    assert first["headers"]["ignore_result"] is False
    assert app.AsyncResult(ids[0]).id == ids[0]
    assert ran == []


def test_a_shared_task_is_sent_to_the_runners_application(
    runner: CeleryRunner, broker: Broker
) -> None:
    request(runner, lambda: background_tasks.add_task(shared, 1))
    assert messages(broker)[0]["headers"]["task"] == "own.shared"


def test_delay_and_signatures_are_sent_too(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    own = of(app)

    def do() -> None:
        background_tasks.add_task(own.delay, 1)
        background_tasks.add_task(own.s(2), 0)
        background_tasks.add_task(own.si(3))
        background_tasks.add_task(own.s(4).set(queue="slow").delay)

    request(runner, do)
    assert bodies(broker) == [[[1], {}], [[0, 2], {}], [[3], {}], [[4], {}]]
    keys = [each["properties"]["delivery_info"]["routing_key"] for each in messages(broker)]
    assert keys == ["celery", "celery", "celery", "slow"]


def test_a_chain_is_sent_as_its_first_message(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    own = of(app)
    ids: list[str] = []
    request(runner, lambda: ids.append(background_tasks.add_task(chain(own.s(1), own.s(2))).id))
    (message,) = messages(broker)
    (then,) = message["body"][2]["chain"]
    assert then["options"]["task_id"] == ids[0]  # the id of a chain is its last task's
    assert message["body"][0] == [1]


def test_several_tasks_at_once_are_refused(app: Celery, runner: CeleryRunner) -> None:
    own = of(app)

    def view(environ: Any) -> None:
        for several in (group(own.s(1), own.s(2)), chord([own.s(1)], own.s())):
            with pytest.raises(RegistrationError, match="is several tasks at once"):
                background_tasks.add_task(several)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_a_task_of_another_application_is_refused(runner: CeleryRunner) -> None:
    other = Celery("other", set_as_current=False)
    own = of(other)

    def view(environ: Any) -> None:
        with pytest.raises(RegistrationError, match="is no task of <Celery shop"):
            background_tasks.add_task(own, 1)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_another_runner_calls_the_task_directly(app: Celery) -> None:
    own = of(app)
    runner = PoolRunner()

    def view(environ: Any) -> None:
        background_tasks.add_task(own, 1)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )
    assert runner.drain(TIMEOUT) == []
    assert ran == [(1,)]


def test_celerys_eager_mode_runs_the_task_after_the_response(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    app.conf.task_always_eager = True
    own = of(app)
    seen: list[int] = []

    def do() -> None:
        background_tasks.add_task(own, 1)
        seen.append(len(ran))

    request(runner, do)
    assert seen == [0]
    assert wait_until(lambda: ran == [(1,)])
    assert messages(broker) == []


def test_the_message_is_made_in_the_request(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    """Signals, an own ``apply_async`` and times: all see the moment of ``add_task``."""
    seen: list[Any] = []

    class Own(app.Task):  # type: ignore[misc]
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> Any:
            seen.append("own")
            return super().apply_async(*args, **options)

    own = of(app, base=Own)

    def look(**_: Any) -> None:
        seen.append("signal")

    def view(environ: Any) -> None:
        background_tasks.using(delay=60).add_task(own, 1)
        background_tasks.using(celery={"expires": 30}).add_task(own, 2)
        seen.append("answer")

    before = datetime.now(UTC)
    before_task_publish.connect(look)
    try:
        request(runner, lambda: view({}))
    finally:
        before_task_publish.disconnect(look)
    assert seen == ["own", "signal", "own", "signal", "answer"]
    delayed, expires = (message["headers"] for message in messages(broker))
    eta = datetime.fromisoformat(delayed["eta"])
    assert 59 < (eta - before).total_seconds() < 90
    assert 29 < (datetime.fromisoformat(expires["expires"]) - before).total_seconds() < 60


def test_wrong_arguments_are_refused_in_the_view(app: Celery, runner: CeleryRunner) -> None:
    def view(environ: Any) -> None:
        with pytest.raises(TypeError):
            background_tasks.add_task(shared)
        with pytest.raises(EncodeError, match="not JSON serializable"):  # kombu's own
            background_tasks.add_task(shared, object())

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_a_bound_task_never_runs_here(app: Celery, broker: Broker) -> None:
    @app.task(name="own.bound", bind=True, shared=False)  # type: ignore[untyped-decorator]
    def bound(self: Any) -> None:
        raise NotImplementedError

    own = of(app)
    runner = CeleryRunner(app, when_unsent="local")
    found: list[str] = []

    def do() -> None:
        found.extend(
            background_tasks.add_task(each).message.message.when_unsent
            for each in (bound, own, chain(own.si(), own.si()), own.si())
        )
        with pytest.raises(OptionError, match="bind=True cannot run in this process"):
            background_tasks.using(when_unsent="local").add_task(bound)

    request(runner, do)
    assert found == ["hold", "local", "hold", "local"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_stored_messages_are_those_that_celery_makes(
    app: Celery, broker: Broker, tmp_path: Path
) -> None:
    app.conf.task_compression = "zlib"
    own = of(app)
    runner = CeleryRunner(app, outbox=tmp_path / "tasks")
    child = os.fork()
    if child == 0:  # a process that dies after the response, without a broker
        try:
            runner.connect = None  # type: ignore[assignment, method-assign]
            request(runner, lambda: background_tasks.add_task(own, 1), sends=False)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert messages(broker) == []
    request(runner, lambda: background_tasks.add_task(own, 2))
    assert wait_until(lambda: len(list(Path(broker.options["data_folder_out"]).iterdir())) == 2)
    assert wait_until(lambda: runner.statistics().sent == 2)


def test_celerys_event_of_a_task_is_sent_with_it(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    app.conf.task_send_sent_event = True
    own = of(app)
    parts: list[Any] = []
    request(
        runner, lambda: parts.extend(background_tasks.add_task(own, 1).message.message.data)
    )
    assert [part.options["routing_key"] for part in parts] == ["celery", "task.sent"]
    assert runner.statistics().sent == 1


def test_a_stored_message_is_for_the_task_of_its_row(app: Celery, tmp_path: Path) -> None:
    runner = CeleryRunner(app, outbox=tmp_path / "tasks")
    of(app)
    headers = {"task": "own.add", "id": "1"}
    part = Published(b"[]", {"headers": headers, "exchange": Exchange("e"), "routing_key": ""})
    text = runner.dump(Message("own.add", [part]))
    (read,) = runner.load("own.add", text)
    assert read.body == b"[]"
    assert read.options["exchange"] == "e"
    with pytest.raises(MessageError, match="the message is for another task"):
        runner.load("own.other", text)
