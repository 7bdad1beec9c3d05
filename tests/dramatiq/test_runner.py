"""``DramatiqRunner``: its actors and messages, with Dramatiq's worker in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import (
    AgeLimit,
    CurrentMessage,
    Retries,
    Shutdown,
    TimeLimitExceeded,
)

from tests.support import app_that, text_of, wait_until
from tests.support.brokers import RabbitServer, RedisServer
from tests.support.engine_shop import block, fail_twice, look, note_call, note_slowly
from tests.support.engines import TIMEOUT, Dramatiq, Worker, send, worker
from wsgi_bg import BackgroundTasksMiddleware, Retry, registered_task, wait
from wsgi_bg._messages import headers
from wsgi_bg.dramatiq import DramatiqRunner
from wsgi_bg.exceptions import MessageError, NameTakenError, OptionTypeError, OptionValueError
from wsgi_bg.hooks import Hooks, TaskRecord


def stub(**options: Any) -> StubBroker:
    return StubBroker(**options)


@contextmanager
def working(broker: dramatiq.Broker) -> Iterator[None]:
    started = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    started.start()
    try:
        yield
    finally:
        started.stop(timeout=int(1000 * TIMEOUT))


def test_a_stub_broker_and_a_worker_in_this_process_run_tasks(tmp_path: Path) -> None:
    broker = stub()
    runner = DramatiqRunner(broker, local="inline")
    with working(broker):
        send(runner, note_call, str(tmp_path / "call"), "sec-ret")
        send(runner, fail_twice, str(tmp_path / "attempts"), "sec-ret")
        assert wait_until((tmp_path / "call").exists)
        assert wait_until(lambda: len(text_of(tmp_path / "attempts").splitlines()) == 3)


def test_no_log_of_dramatiq_shows_arguments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="dramatiq")
    broker = stub()
    runner = DramatiqRunner(broker)
    with working(broker):
        send(runner, block, "sec-ret/not a path")  # cannot be written
        assert wait_until(lambda: "with unhandled exception" in caplog.text)
    assert "Failed to process message tests.support.engine_shop.block()" in caplog.text
    assert "sec-ret" not in "".join(record.getMessage() for record in caplog.records)


def test_a_message_without_a_call_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    broker = stub()
    DramatiqRunner(broker)
    actor: Any = broker.actors["tests.support.engine_shop.look"]
    with working(broker):
        actor.send_with_options(wsgi_bg=["only a text"])
        actor.send()
        actor.send("an argument")
        assert wait_until(lambda: len(broker.dead_letters) == 3)
    errors = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert errors == [MessageError, MessageError, TypeError]


def test_options_reach_the_message(redis: RedisServer) -> None:
    engine = Dramatiq(redis.fresh_url())
    runner = engine.runner()
    options = {"time_limit": 7, "max_age": 8, "queue_name": "slow"}
    task = send(runner, look, "", using={"engine": options})
    assert wait(TIMEOUT) == []
    client: Any = runner._broker.client  # type: ignore[attr-defined]
    (found,) = client.hvals("dramatiq:slow.msgs")
    message = dramatiq.Message.decode(found)
    assert message.message_id == task.id
    assert message.args == ()
    assert message.options["time_limit"] == 7
    assert message.options["max_age"] == 8


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"queue": "x"}, OptionValueError, "broker_priority, max_age, queue_name, time_limit"),
        ({"max_age": 1.5}, OptionTypeError, "a whole number of milliseconds"),
        ({"max_age": 0}, OptionValueError, "1 or more; got 0"),
        ({"time_limit": -1}, OptionValueError, "1 or more"),
        ({"broker_priority": 256}, OptionValueError, "must be 0 to 255; got 256"),
        ({"broker_priority": -1}, OptionValueError, "0 to 255"),
        ({"queue_name": "nobody's"}, OptionValueError, "one of default, slow; got"),
    ],
)
def test_a_wrong_option_raises_in_add_task(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        send(DramatiqRunner(stub()), look, "", using={"engine": options})


def test_a_message_keeps_the_trace_of_its_request_for_sentrys_integration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FromThread(dramatiq.Middleware):
        """Like Sentry's: takes the trace from the thread that sends."""

        def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
            message.options["_sentry_headers"] = {"sentry-trace": "of the thread"}

    broker = StubBroker(middleware=[FromThread(), Retries()])
    runner = DramatiqRunner(broker)

    def carry(found: dict[str, str]) -> None:
        found["sentry-trace"] = "of the request"

    send(runner, look, "")
    monkeypatch.setattr(headers, "carriers", {"sentry": carry})
    send(runner, look, "")
    assert wait(TIMEOUT) == []
    sent = [dramatiq.Message.decode(each) for each in broker.queues["default"].queue]
    traces = {message.options["_sentry_headers"]["sentry-trace"] for message in sent}
    assert traces == {"of the thread", "of the request"}


def test_an_own_actor_keeps_its_name() -> None:
    broker = stub()
    own = dramatiq.actor(actor_name="tests.support.engine_shop.look", broker=broker)(print)
    runner = DramatiqRunner(broker)
    assert broker.actors["tests.support.engine_shop.look"] is own
    with pytest.raises(NameTakenError, match="taken by an actor of the broker"):
        send(runner, look, "")


def test_two_runners_may_have_the_same_broker(tmp_path: Path) -> None:
    broker = stub()
    DramatiqRunner(broker)
    runner = DramatiqRunner(broker)
    with working(broker):
        send(runner, note_call, str(tmp_path / "call"))
        assert wait_until((tmp_path / "call").exists)
    assert [type(each) for each in broker.middleware].count(CurrentMessage) == 1


def test_a_worker_that_stops_gives_its_message_back() -> None:
    broker = stub()
    DramatiqRunner(broker)
    is_retried: Any = broker.actors["tests.support.engine_shop.look"].options["retry_when"]
    assert is_retried(0, Shutdown())
    assert not is_retried(0, KeyError())


@pytest.mark.parametrize(
    ("broker", "error", "match"),
    [
        ("redis://", OptionTypeError, r"a dramatiq\.Broker"),
        (stub(middleware=[AgeLimit()]), OptionValueError, "with the middleware Retries"),
    ],
    ids=["no broker", "no Retries"],
)
def test_a_broker_that_does_not_fit_is_refused(
    broker: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        DramatiqRunner(broker)


def test_pickle_is_refused() -> None:
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(dramatiq.PickleEncoder())
    try:
        with pytest.raises(OptionValueError, match="JSONEncoder"):
            DramatiqRunner(stub(middleware=[Retries()]))
    finally:
        dramatiq.set_encoder(before)


def test_the_representation_names_the_broker() -> None:
    runner = DramatiqRunner(stub(), local="inline")
    assert repr(runner).startswith("DramatiqRunner(<dramatiq.brokers.stub.StubBroker object")


def test_the_module_has_no_other_names() -> None:
    import wsgi_bg.dramatiq

    with pytest.raises(AttributeError, match="has no attribute 'Runner'"):
        getattr(wsgi_bg.dramatiq, "Runner")  # noqa: B009


@pytest.mark.slow
def test_the_message_of_a_killed_worker_goes_to_another(
    redis: RedisServer, tmp_path: Path
) -> None:
    engine = Dramatiq(redis.fresh_url(), heartbeat_timeout=3000, maintenance_chance=1_000_000)
    path = tmp_path / "path"
    first = Worker(engine, tmp_path)
    send(engine.runner(), block, str(path))
    first.wait_for_lines(path, 1)
    first.kill()
    with worker(engine, tmp_path) as second:
        assert second.wait_for_lines(path, 3)[2] == "done"


def test_a_function_may_have_a_queue_of_its_own(tmp_path: Path) -> None:
    broker, path = stub(), tmp_path / "path"
    with working(broker):
        send(DramatiqRunner(broker), note_slowly, str(path))
        assert wait_until(path.exists)
    assert broker.actors["tests.support.engine_shop.note_slowly"].queue_name == "slow"


def test_rabbitmq_confirms_messages(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    url = rabbitmq.fresh_url()
    with pytest.raises(OptionValueError, match="confirm_delivery=True"):
        DramatiqRunner(RabbitmqBroker(url=url))
    broker = RabbitmqBroker(url=url, confirm_delivery=True)
    runner = DramatiqRunner(broker)
    task = send(runner, note_call, str(tmp_path / "call"))
    assert task.id
    assert wait(TIMEOUT) == []
    assert runner.statistics().sent == 1
    assert wait_until(lambda: not broker.connections)
    with working(broker):
        assert wait_until((tmp_path / "call").exists, TIMEOUT)
    broker.close()


def test_a_message_that_rabbitmq_cannot_have_holds_up_no_other(rabbitmq: RabbitServer) -> None:
    class Refusing(dramatiq.Middleware):
        def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
            if "broker_priority" in message.options:
                message.options["broker_priority"] = 256

    broker = RabbitmqBroker(url=rabbitmq.fresh_url(), confirm_delivery=True)
    broker.add_middleware(Refusing())
    runner = DramatiqRunner(broker)
    send(runner, note_call, "", using={"engine": {"broker_priority": 9}})
    send(runner, note_call, "")
    assert wait(TIMEOUT) == []
    assert (runner.statistics().sent, runner.statistics().failed) == (1, 1)
    assert wait_until(lambda: not broker.connections)
    broker.close()


ended: list[str] = []
"""How each call of ``over_time`` has ended, as the hooks see it."""


class Ends(Hooks):
    def task_retried(self, record: TaskRecord) -> None:
        ended.append("retried")

    def task_failed(self, record: TaskRecord) -> None:
        ended.append("failed")

    def task_discarded(self, record: TaskRecord) -> None:
        ended.append("discarded")


@registered_task(name="dramatiq.over_time")
def over_time() -> None:
    raise TimeLimitExceeded  # as Dramatiq does, on the thread of the call


@pytest.mark.parametrize(
    ("retry", "ends"),
    [
        (None, ["failed"]),
        (Retry(2, first=0), ["failed"]),
        (Retry(2, first=0, on=(Exception, TimeLimitExceeded)), ["retried", "failed"]),
    ],
)
def test_a_task_over_its_time_limit_has_failed(retry: Retry | None, ends: list[str]) -> None:
    """It stops no worker."""
    ended.clear()
    broker = stub()
    runner = DramatiqRunner(broker)
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=Ends())
    with working(broker):
        send(runner, over_time, using={"retry": retry})
        assert wait_until(lambda: len(broker.dead_letters) == 1)
    assert ended == ends


def test_brokers_of_the_same_server_may_share_a_folder(tmp_path: Path) -> None:
    """An application factory makes a broker with each call."""
    folder, url = tmp_path / "tasks", "redis://127.0.0.1:1/1"
    runners = [DramatiqRunner(RedisBroker(url=url), outbox=folder) for _ in range(2)]
    for runner in runners:
        BackgroundTasksMiddleware(app_that(print), runner=runner)
    for other in (
        RedisBroker(url="redis://127.0.0.1:1/2"),
        RedisBroker(url=url, namespace="other"),
        RabbitmqBroker(url="amqp://127.0.0.1:1", confirm_delivery=True),
        stub(),
    ):
        with pytest.raises(OptionValueError, match="outbox must be another folder"):
            BackgroundTasksMiddleware(
                app_that(print), runner=DramatiqRunner(other, outbox=folder)
            )
