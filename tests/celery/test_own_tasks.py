"""Celery's own tasks in ``add_task``: sent after the response, as Celery itself would."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group, shared_task
from celery.signals import before_task_publish
from kombu import Exchange
from kombu.exceptions import EncodeError

from tests.conftest import Log
from tests.support import TIMEOUT, Server, app_that, make_server_environ, wait_until
from tests.support.brokers import Broker
from tests.support.celery import filesystem, messages, request
from tests.support.post import Post
from tests.support.recording import recording
from wsgi_bg import (
    BackgroundTasksMiddleware,
    PoolRunner,
    Retry,
    background_tasks,
    registered_task,
)
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


@registered_task(name="own.repeated", celery={"autoretry_for": (OSError,)})
def repeated() -> None:
    raise NotImplementedError


@registered_task(name="own.tried", retry=Retry(2))
def tried() -> None:
    raise NotImplementedError


@registered_task(name="own.plain")
def plain() -> None:
    raise NotImplementedError


def handle(runner: Any, view: Any) -> None:
    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    Server().run(app, make_server_environ())


def of(app: Celery, **options: Any) -> Any:
    @app.task(name="own.add", shared=False, **options)  # type: ignore[untyped-decorator]
    def own(*values: Any, tasks: Any = None) -> None:
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
        background_tasks.add_task(own.si(3, tasks=[]))
        background_tasks.add_task(own.s(4).set(queue="slow").delay)

    request(runner, do)
    assert bodies(broker) == [[[1], {}], [[0, 2], {}], [[3], {"tasks": []}], [[4], {}]]
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


def test_nothing_of_a_chain_is_sent_before_the_response(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    own = of(app)
    inner = own.s(1) | own.s(2)
    seen: list[Any] = []

    def do() -> None:
        for each in (inner, inner.delay, type(inner)(inner, own.s(3))):
            background_tasks.add_task(each)
        seen.extend(messages(broker))

    request(runner, do)
    assert seen == []
    assert [body[0] for body in bodies(broker)] == [[1], [1], [1]]


def test_apply_async_as_the_function_has_its_options(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    own = of(app)
    ids: list[str] = []

    def do() -> None:
        of_task = background_tasks.using(delay=60).add_task(
            own.apply_async, (1,), queue="slow", task_id="mine", countdown=9000
        )
        of_signature = background_tasks.add_task(own.s(2).apply_async, args=(0,), priority=3)
        ids.extend((of_task.id, of_signature.id))

    before = datetime.now(UTC)
    request(runner, do)
    first, second = messages(broker)
    assert bodies(broker) == [[[1], {}], [[0, 2], {}]]
    assert [each["headers"]["id"] for each in (first, second)] == ids
    assert ids[0] == "mine"
    assert first["properties"]["delivery_info"]["routing_key"] == "slow"
    assert second["properties"]["priority"] == 3
    assert (datetime.fromisoformat(first["headers"]["eta"]) - before).total_seconds() < 90


def test_an_id_that_the_user_has_given_is_that_of_the_task(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    class Numbered(app.Task):  # type: ignore[misc]
        abstract = True

        def apply_async(self, *args: Any, task_id: str = "", **options: Any) -> Any:
            return super().apply_async(*args, task_id="numbered", **options)

    own = of(app)
    numbered = app.task(name="own.numbered", base=Numbered, shared=False)(repeated)
    frozen = chain(own.s(1), own.s(2))
    last = frozen.freeze().id
    ids: list[str] = []

    def do() -> None:
        given = own.s(1).set(task_id="given")
        ids.extend(background_tasks.add_task(each).id for each in (numbered, given, frozen))

    request(runner, do)
    assert ids == ["numbered", "given", last]
    first, second, _ = (message["headers"]["id"] for message in messages(broker))
    assert [first, second] == ids[:2]


def test_an_apply_async_that_sends_nothing_holds_up_no_task(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    class Once(app.Task):  # type: ignore[misc]
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> Any:
            return app.AsyncResult("running")

    own = of(app, base=Once)
    ids: list[str] = []
    request(runner, lambda: ids.append(background_tasks.add_task(own).id))
    assert ids == ["running"]
    assert messages(broker) == []
    assert runner.statistics().sent == 1


def test_the_time_of_using_replaces_both_times_of_a_signature(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    own, eta = of(app), datetime.now(UTC) + timedelta(hours=2)

    def do() -> None:
        tasks = background_tasks.using(celery={"eta": eta})
        tasks.add_task(own.s(1).set(countdown=5))
        tasks.add_task(own.s(2).set(countdown=5) | own.s())
        tasks.add_task(own.apply_async, (3,), countdown=5)

    request(runner, do)
    assert [each["headers"]["eta"] for each in messages(broker)] == [eta.isoformat()] * 3


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_time_without_a_zone_is_utc_as_on_the_worker(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        app.conf.task_protocol = protocol
        runner = CeleryRunner(app, outbox=tmp_path / "tasks")
        eta = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=2)
        own = of(app)
        found: list[float] = []

        def do() -> None:
            task = background_tasks.using(celery={"eta": eta}).add_task(own)
            found.append(task.message.message.due)

        request(runner, do)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert 7100 < found[0] - time.time() <= 7200


def test_several_tasks_at_once_are_refused(app: Celery, runner: CeleryRunner) -> None:
    own = of(app)

    def view(environ: Any) -> None:
        both = group(own.s(1), own.s(2))
        several_tasks = both, chord([own.s(1)], own.s()), own.chunks([], 2)
        chains = chain(own.s(0), chain(own.s(1), both)), chain(own.s(0), both, own.s(3))
        for several in (*several_tasks, *chains):
            with pytest.raises(RegistrationError, match="is several tasks at once"):
                background_tasks.add_task(several)
        with pytest.raises(RegistrationError, match="is a chain without tasks"):
            background_tasks.add_task(chain())

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_a_delay_of_the_users_own_is_called(
    app: Celery, runner: CeleryRunner, broker: Broker
) -> None:
    class Late(Task):  # type: ignore[misc]
        def delay(self, *args: Any) -> None:
            self.apply_async(args, queue="late")

    own = of(app, base=Late)
    request(runner, lambda: background_tasks.add_task(own.delay, 1))
    assert messages(broker)[0]["properties"]["delivery_info"]["routing_key"] == "late"


def test_what_only_makes_a_signature_is_refused(app: Celery, runner: CeleryRunner) -> None:
    own = of(app)

    class Users:
        def s(self, value: int) -> None:  # named as Celery's method
            ran.append(value)

    def view(environ: Any) -> None:
        methods = own.s, own.si, own.signature, own.subtask, own.map, own.starmap, own.chunks
        for makes_a_signature in (*methods, chain, group, chord):
            with pytest.raises(RegistrationError, match="only makes a signature"):
                background_tasks.add_task(makes_a_signature, 1)
        background_tasks.add_task(Users().s, 1)

    handle(runner, view)
    assert ran == [1]


def test_a_task_of_another_application_is_refused(runner: CeleryRunner) -> None:
    other = Celery("other", set_as_current=False)
    own = of(other)

    def view(environ: Any) -> None:
        with pytest.raises(RegistrationError, match="is no task of <Celery shop"):
            background_tasks.add_task(own, 1)
        with pytest.raises(RegistrationError, match=r"^other\.name is no task of <Celery shop"):
            background_tasks.add_task(other.signature("other.name"), 1)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_a_method_whose_function_has_no_name_runs_here(runner: CeleryRunner) -> None:
    class Nameless:
        def __call__(self, *args: Any) -> None:
            ran.append(args)

    method = MethodType(Nameless(), "self")  # as a decorator with its own __get__ makes it
    handle(runner, lambda environ: background_tasks.add_task(method, 1))
    assert ran == [("self", 1)]


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


def test_in_eager_mode_celery_makes_the_call(
    app: Celery, runner: CeleryRunner, broker: Broker, log: Log
) -> None:
    app.conf.task_always_eager = True
    own = of(app)
    seen: list[Any] = []

    @app.task(name="own.again", bind=True, max_retries=1, shared=False)  # type: ignore[untyped-decorator]
    def again(self: Any) -> None:
        seen.append((self.request.id, self.request.retries))
        raise self.retry(exc=KeyError("again"), countdown=0)

    ids: list[str] = []
    errors: list[BaseException] = []

    def do() -> None:
        tasks = background_tasks.using(on_error=lambda task, exc: errors.append(exc))
        ids.append(tasks.add_task(again).id)
        linked = own.s(1).set(link=own.si(2), task_id="mine")
        ids.append(tasks.add_task(linked).id)
        tasks.add_task(own.s(3) | own.s(4))
        tasks.add_task(own.apply_async, (5,), countdown=3600)

    request(runner, do)
    assert wait_until(lambda: len(ran) == 5)
    assert seen == [(ids[0], 0), (ids[0], 1)]
    assert ids[1] == "mine"
    assert [type(each) for each in errors] == [KeyError]
    assert ran == [(1,), (2,), (3,), (None, 4), (5,)]
    assert messages(broker) == []
    assert log.errors == ["background task own.again raised KeyError"]


def test_an_own_apply_async_in_eager_mode_may_return_nothing(
    app: Celery, runner: CeleryRunner
) -> None:
    app.conf.task_always_eager = True

    class Silent(app.Task):  # type: ignore[misc]
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> None:
            ran.append("silent")

    request(runner, lambda: background_tasks.add_task(of(app, base=Silent)))
    assert wait_until(lambda: ran == ["silent"])


def test_in_a_test_that_runs_tasks_no_function_of_celery_sends(
    app: Celery, broker: Broker
) -> None:
    own = of(app)
    runner = CeleryRunner(app)

    def view(environ: Any) -> None:
        background_tasks.add_task(own.delay, 1)
        background_tasks.add_task(own.apply_async, args=(2,), countdown=3600)
        background_tasks.add_task(own.s(3) | own.s(4))
        background_tasks.add_task(own.s(5).delay, 6)
        background_tasks.add_task(own.s(7).apply_async)

    with recording("run") as recorded:
        Server().run(
            BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
        )
        assert recorded.tasks[0].func == own.delay
    assert ran == [(1,), (2,), (3,), (None, 4), (6, 5), (7,)]
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


def test_a_retry_that_the_worker_would_not_know_is_refused(
    app: Celery, runner: CeleryRunner
) -> None:
    own = of(app)

    def do() -> None:
        with pytest.raises(OptionError, match=r"None for own\.add, whose retries are Celery's"):
            background_tasks.using(retry=Retry(2)).add_task(own)
        with pytest.raises(ValueError, match=r"None for own\.repeated, which has autoretry"):
            background_tasks.using(retry=Retry(2)).add_task(repeated)

    request(runner, do)


def test_wrong_arguments_are_refused_in_the_view(app: Celery, runner: CeleryRunner) -> None:
    def view(environ: Any) -> None:
        with pytest.raises(TypeError):
            background_tasks.add_task(shared)
        with pytest.raises(EncodeError, match="not JSON serializable"):  # kombu's own
            background_tasks.add_task(shared, object())

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )


def test_logs_name_a_task_as_celery_does(app: Celery, runner: CeleryRunner) -> None:
    own = of(app)
    names: list[str] = []

    def do() -> None:
        for each in (own, own.delay, own.s(), own.si() | own.si(), own.apply_async):
            names.append(background_tasks.add_task(each).name)

    request(runner, do)
    assert names == ["own.add"] * 5


def test_a_task_that_runs_here_in_place_of_celerys_has_its_name(app: Celery, log: Log) -> None:
    app.conf.broker_url = "redis://127.0.0.1:1"
    runner = CeleryRunner(app, local="inline", when_unsent="local", publish_timeout=0.05)
    own = of(app)
    request(runner, lambda: background_tasks.add_task(own.delay, 1), sends=False)
    assert wait_until(lambda: ran == [(1,)])
    assert any("task own.add runs in this process" in each for each in log.warnings)


def test_celerys_times_are_those_of_the_message(app: Celery, runner: CeleryRunner) -> None:
    own = of(app)
    found: list[Any] = []

    def do() -> None:
        tasks = background_tasks.using(celery={"expires": 60})
        found.append(tasks.add_task(own).message.message)
        found.append(background_tasks.add_task(own).message.message)

    before = time.time()
    request(runner, do)
    assert 59 < found[0].expires - before < 90
    assert found[1].expires == math.inf


def test_a_task_that_needs_celery_never_runs_here(app: Celery, broker: Broker) -> None:
    @app.task(name="own.bound", bind=True, shared=False)  # type: ignore[untyped-decorator]
    def bound(self: Any) -> None:
        raise NotImplementedError

    @app.task(name="own.retried", autoretry_for=(OSError,), shared=False)  # type: ignore[untyped-decorator]
    def retried() -> None:
        raise NotImplementedError

    own = of(app)
    runner = CeleryRunner(app, when_unsent="local")
    found: list[str] = []

    def do() -> None:
        found.extend(
            background_tasks.add_task(each).message.message.when_unsent
            for each in (bound, own, chain(own.si(), own.si()), own.si(), retried, own.delay)
        )
        linked = own.si()
        linked.link(own.si())
        found.append(background_tasks.add_task(linked).message.message.when_unsent)
        watched = background_tasks.add_task(own.apply_async, link_error=own.si())
        found.append(watched.message.message.when_unsent)
        with pytest.raises(OptionError, match="bind=True cannot run in this process"):
            background_tasks.using(when_unsent="local").add_task(bound)
        assert background_tasks.add_task(repeated).message.message.when_unsent == "hold"

    request(runner, do)
    assert found == ["hold", "local", "hold", "local", "hold", "local", "hold", "hold"]


def test_the_retries_of_the_applications_task_class_hold_for_registered_tasks(
    app: Celery,
) -> None:
    class Repeated(Task):  # type: ignore[misc]
        autoretry_for = (OSError,)
        dont_autoretry_for = (FileNotFoundError,)

    app.task_cls = Repeated
    runner = CeleryRunner(app, when_unsent="local")

    def do() -> None:
        added: Any = background_tasks.add_task(plain)
        assert added.message.message.when_unsent == "hold"

    request(runner, do)
    never = app.tasks["own.plain"].dont_autoretry_for
    assert never == (FileNotFoundError, MessageError)
    assert not hasattr(app.tasks["own.tried"], "_orig_run")  # Celery would repeat it, too


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


def test_a_stored_message_declares_what_celery_declares(app: Celery, tmp_path: Path) -> None:
    """RabbitMQ refuses a message to an exchange that is not there."""
    app.conf.task_send_sent_event = True
    runner = CeleryRunner(app, outbox=tmp_path / "tasks")
    own = of(app)
    found: list[Any] = []
    request(runner, lambda: found.append(background_tasks.add_task(own).message.message))
    read = runner.load("own.add", runner.dump(found[0]))
    assert [each.options["declare"] for each in read] == [
        each.options["declare"] for each in found[0].data
    ]
    queue, exchange = (each.options["declare"][0] for each in read)
    assert (queue.name, exchange.name) == ("celery", "celeryev")


def test_runners_of_two_brokers_do_not_share_a_folder(app: Celery, tmp_path: Path) -> None:
    """Each would send the messages that the other one has left in the file."""
    folder = tmp_path / "tasks"
    first = CeleryRunner(app, outbox=folder)
    BackgroundTasksMiddleware(app_that(print), runner=first)
    BackgroundTasksMiddleware(app_that(print), runner=CeleryRunner(app, outbox=folder))
    elsewhere = Celery("elsewhere", broker="redis://127.0.0.1:1", set_as_current=False)
    for other in (CeleryRunner(elsewhere, outbox=folder), Post(outbox=folder)):
        with pytest.raises(OptionError, match="outbox must be another folder than that of C"):
            BackgroundTasksMiddleware(app_that(print), runner=other)


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
