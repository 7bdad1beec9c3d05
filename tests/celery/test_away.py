"""Registered tasks while the broker is away, hangs, or does not like a message."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    app_that,
    celery_site,
    client,
    free_port,
    text_of,
    wait_until,
    waitress,
)
from tests.support.brokers import (
    Broker,
    BrokerServer,
    RabbitServer,
    RedisServer,
    proxy_to,
    waiting,
)
from tests.support.celery import request, worker
from tests.support.celery_shop import note, note_line_late
from wsgi_bg import BackgroundTasksMiddleware, background_tasks, wait
from wsgi_bg._outbox import outbox as sending
from wsgi_bg.celery import CeleryRunner, connection
from wsgi_bg.celery.connection import BrokerConnection
from wsgi_bg.exceptions import PublishError

NOTE = "tests.support.celery_shop.note"


@pytest.fixture(params=["rabbitmq", "redis"])
def server(request: pytest.FixtureRequest) -> BrokerServer:
    server: BrokerServer = request.getfixturevalue(request.param)
    return server


def add(*arguments: Any) -> Any:
    return lambda: background_tasks.add_task(note, *arguments)


def test_no_thread_of_the_server_waits_for_a_broker_that_hangs(
    server: BrokerServer, tmp_path: Path
) -> None:
    """With a timeout of a minute, any thread that waited would stop the test."""
    broker = server.fresh()
    runner = broker.runner(publish_timeout=60, local="inline")

    def view(environ: Any) -> None:
        if environ["PATH_INFO"] != "/idle":
            background_tasks.add_task(note, environ["PATH_INFO"])

    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    with waitress(app, threads=2) as port:
        assert client.ask(port, path="/first").status == 200
        assert wait_until(lambda: runner.statistics().sent == 1)
        with server.hung():
            for number in range(20):
                assert client.ask(port, path=f"/{number}").status == 200
                assert client.ask(port, path="/idle").status == 200
            assert wait_until(lambda: runner.statistics().waiting == 20)
        assert wait(TIMEOUT) == []
    assert waiting(broker.url) == 21
    assert runner.statistics().sent == 21


@pytest.mark.slow
def test_tasks_added_while_the_broker_is_away_are_sent_when_it_is_back(
    server: BrokerServer, log: Log
) -> None:
    broker = server.fresh()
    runner = broker.runner()
    request(runner, add("before"))
    with server.away():
        for number in range(5):
            request(runner, add(number), sends=False)
        assert wait_until(lambda: bool(log.warnings))
        assert runner.statistics().waiting == 5
    assert wait(60) == []
    assert waiting(broker.url) == 6
    assert "could not be reached" in log.warnings[0]


def test_the_record_of_a_redis_that_takes_nothing_names_the_reason(
    redis: RedisServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kombu's own error says that a batch has failed, and no more."""
    monkeypatch.setattr(sending, "_PAUSES", (0.05, 0.05))
    broker = redis.fresh()
    runner = broker.runner()
    request(runner, add("connects"))
    with Connection(broker.url) as connection:
        client = connection.default_channel.client
        client.config_set("maxmemory", 1)
        try:
            request(runner, add("held"), sends=False)
            assert wait_until(lambda: log.warnings, TIMEOUT)
        finally:
            client.config_set("maxmemory", 0)
    assert wait(TIMEOUT) == []
    assert "OutOfMemoryError: " in log.warnings[0]
    assert waiting(broker.url) == 2


def test_an_idle_connection_that_the_network_has_dropped_costs_no_task_its_time(
    server: BrokerServer, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(sending, "IDLE", 0.0)
    broker = server.fresh()
    with proxy_to(server) as proxy:
        runner = proxy.broker(broker).runner(publish_timeout=60)
        request(runner, add("first"))
        proxy.drop()
        request(runner, add("second"))
        assert waiting(broker.url) == 2
        assert log.warnings == []
        proxy.cut()


def test_a_batch_of_messages_is_confirmed_together(server: BrokerServer) -> None:
    broker = server.fresh()
    with proxy_to(server) as proxy:
        runner = proxy.broker(broker).runner(publish_timeout=60)
        request(runner, add("connects"))
        proxy.delay = 0.05  # a round trip for each message would take 10 seconds
        request(runner, lambda: [add(number)() for number in range(100)])
        assert runner.statistics().sent == 101
    assert waiting(broker.url) == 101


def test_an_apply_async_that_sends_nothing_holds_up_no_confirm(server: BrokerServer) -> None:
    broker = server.fresh()
    runner = broker.runner(publish_timeout=60)
    celery_app: Any = runner._app
    base: Any = celery_app.Task

    class Once(base):  # type: ignore[misc]
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> None:
            """Send nothing."""

    once = celery_app.task(name="once", base=Once, shared=False)(add)
    request(runner, lambda: [add("first")(), background_tasks.add_task(once), add("last")()])
    assert waiting(broker.url) == 2
    assert runner.statistics().sent == 3


def test_a_queue_that_is_deleted_under_a_connection_is_declared_again(
    rabbitmq: RabbitServer, log: Log
) -> None:
    broker = rabbitmq.fresh()
    runner = broker.runner()
    request(runner, add("declares"))
    with Connection(broker.url) as connection:
        connection.default_channel.queue_delete("celery")
    request(runner, lambda: [add(f"{number}")() for number in range(3)])
    request(runner, lambda: [add(f"{number}")() for number in range(3)])
    assert waiting(broker.url) == 6
    assert runner.statistics().sent == 7
    assert log.warnings == []


def test_a_message_that_no_queue_gets_is_sent_as_celery_sends_it(
    rabbitmq: RabbitServer, log: Log
) -> None:
    runner = rabbitmq.fresh().runner()
    with Connection(runner._app.conf.broker_url) as connection:
        Exchange("nobody", "fanout")(connection.default_channel).declare()
        nobody = {"exchange": "nobody", "routing_key": "x"}
        request(runner, lambda: background_tasks.using(celery=nobody).add_task(note, "path"))
    assert runner.statistics().sent == 1
    assert log.warnings == []


def test_a_message_that_rabbitmq_refuses_holds_up_no_other_and_sends_none_twice(
    rabbitmq: RabbitServer, log: Log
) -> None:
    broker = rabbitmq.fresh()
    failed: list[Any] = []
    runner = broker.runner()

    def do() -> None:
        for number in range(40):
            background_tasks.add_task(note, f"{number}")
        wrong = {"exchange": "not there", "routing_key": "x"}
        tasks = background_tasks.using(
            celery=wrong, on_error=lambda task, exc: failed.append(exc)
        )
        tasks.add_task(note, "wrong")
        background_tasks.add_task(note, "last")

    request(runner, do)
    assert waiting(broker.url) == 41  # none twice
    assert isinstance(failed[0], PublishError)
    assert runner.statistics().sent == 41
    assert log.errors == [f"background task {NOTE} raised PublishError"]


@pytest.mark.parametrize(
    "given",
    [{"priority": 256}, {"priority": -1}, {"delivery_mode": 700}, {"headers": {"x": {1}}}],
)
def test_a_message_that_amqp_cannot_write_holds_up_no_other(
    rabbitmq: RabbitServer, log: Log, given: dict[str, Any]
) -> None:
    """struct.error and a connection error of py-amqp: the broker was taken for away."""
    broker = rabbitmq.fresh()
    runner = broker.runner()
    celery_app: Any = runner._app
    own = celery_app.task(name="own", shared=False)(add)

    def do() -> None:
        background_tasks.add_task(note, "first")
        background_tasks.add_task(own.apply_async, ("wrong",), **given)
        background_tasks.add_task(note, "last")

    request(runner, do)
    assert waiting(broker.url) == 2  # none twice: the first was confirmed nevertheless
    assert runner.statistics().sent == 2
    assert log.errors == ["background task own raised PublishError"]
    assert log.warnings == []


def test_a_connection_that_is_lost_while_messages_are_written_loses_none(
    rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, errors = BrokerConnection._publish, [ConnectionResetError()]

    def cut_once(*arguments: Any) -> None:
        if errors:
            raise errors.pop()
        publish(*arguments)

    monkeypatch.setattr(BrokerConnection, "_publish", cut_once)
    monkeypatch.setattr(sending, "_PAUSES", (0.01, 0.02))
    broker = rabbitmq.fresh()
    runner = broker.runner()
    request(runner, lambda: [add("first")(), add("last")()])
    assert waiting(broker.url) == 2
    assert runner.statistics().sent == 2


def test_a_queue_that_redis_cannot_use_holds_up_no_other(redis: RedisServer, log: Log) -> None:
    broker = redis.fresh()
    with Connection(broker.url) as connection:
        connection.default_channel.client.set("broken", "no list")
    runner = broker.runner()

    def do() -> None:
        background_tasks.add_task(note, "first")
        background_tasks.using(celery={"queue": "broken"}).add_task(note, "wrong")
        background_tasks.add_task(note, "last")

    request(runner, do)
    assert waiting(broker.url) >= 2  # a message that was cut short may come twice
    assert runner.statistics().sent == 2
    assert log.errors == [f"background task {NOTE} raised PublishError"]
    assert log.warnings == []


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_task_runs_here_if_asked_for_and_the_connection_is_refused(
    tmp_path: Path, log: Log, scheme: str
) -> None:
    broker = Broker(f"{scheme}://127.0.0.1:{free_port()}/0", {})
    runner = broker.runner(local="inline", when_unsent="local", publish_timeout=0.1)
    request(runner, add(str(tmp_path / "note"), "secret"))
    assert wait_until(lambda: text_of(tmp_path / "note").startswith(f"({os.getpid()}, "))
    assert wait_until(lambda: bool(log.warnings))
    assert not any("secret" in warning for warning in log.warnings)
    assert runner.statistics().succeeded == 1


def test_the_former_option_goes_on_working(tmp_path: Path, log: Log) -> None:
    broker = Broker(f"redis://127.0.0.1:{free_port()}/0", {})
    with pytest.warns(DeprecationWarning, match="on_publish_error is called when_unsent now"):
        runner = broker.runner(on_publish_error="discard", publish_timeout=0.1)
    request(runner, add("path"))
    assert runner.statistics().failed == 1


def test_a_task_reaches_the_last_of_several_hosts(redis: RedisServer) -> None:
    """Celery's own ``delay`` does, too: the connections to the others are refused."""
    url = redis.fresh_url()
    refusing = [f"redis://127.0.0.1:{free_port()}/0" for _ in range(3)]
    runner = Broker(";".join([*refusing, url]), {}).runner(publish_timeout=60)
    request(runner, add("path"))
    assert waiting(url) == 1


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}/0", "amqp://127.0.0.1:{}//"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_connection_asks_each_host_once_and_waits_for_none(
    monkeypatch: pytest.MonkeyPatch, url: str, hosts: int
) -> None:
    """kombu would sleep for 2 seconds, though the outbox asks again after half a second."""
    waits: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", waits.append)
    urls = ";".join(url.format(free_port()) for _ in range(hosts))
    with pytest.raises(Exception, match="refused"):
        Broker(urls, {}).runner().connect()
    assert waits == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, in kombu
def test_a_transport_that_knows_no_options_of_ours_sends(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    broker = Broker(f"sqla+sqlite:///{tmp_path}/broker.sqlite", {})
    runner = broker.runner()
    request(runner, add("path"))
    assert runner.statistics().sent == 1


def test_each_transport_gets_the_timeouts_that_free_a_thread_from_a_silent_broker(
    server: BrokerServer,
) -> None:
    broker = server.fresh()
    name = "socket_connect_timeout" if server.name == "redis" else "read_timeout"
    app = broker.app()
    connection = BrokerConnection(app, 3.0)
    assert connection.options[name] == 3.0
    connection.close()
    app.conf.broker_transport_options = {name: 77, "confirm_publish": True}
    connection = BrokerConnection(app, 3.0)
    assert connection.options[name] == 77
    assert not (server.name == "rabbitmq" and connection.options["confirm_publish"])
    connection.close()


def test_a_web_process_that_is_killed_loses_no_message_with_an_outbox_in_a_folder(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    folder = str(tmp_path / "tasks")
    with server.hung(), celery_site.site(broker, tmp_path, path, outbox=folder) as first:
        first.order(range(20))
        first.kill()
    assert waiting(broker.url) == 0
    with celery_site.site(broker, tmp_path, path, outbox=folder) as second:
        second.order([20])  # a process takes over with its first request
        assert wait_until(lambda: waiting(broker.url) >= 21), second.log
        second.stop()


def test_connections_to_a_hung_broker_end_with_the_timeout(
    server: BrokerServer, log: Log
) -> None:
    broker = server.fresh()
    runner = broker.runner(publish_timeout=0.3)
    request(runner, add("first"))
    with server.hung():
        request(runner, add("second"), sends=False)
        assert wait_until(lambda: bool(log.warnings), TIMEOUT)
    assert wait(60) == []
    assert waiting(broker.url) >= 2


def make_celery() -> Celery:
    return Celery("shop", set_as_current=False)


def test_a_runner_whose_application_is_configured_later_sends(server: BrokerServer) -> None:
    app = make_celery()
    runner = CeleryRunner(app)
    broker = server.fresh()
    app.conf.broker_url = broker.url
    request(runner, add("path"))
    assert waiting(broker.url) == 1


@pytest.mark.slow
def test_a_long_delay_is_not_delivered_twice_by_a_broker_with_a_short_limit(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit here is a second, and the delay three: the worker gets no message before."""
    monkeypatch.setattr("wsgi_bg._outbox.runner._LONG", 0.5)
    broker, path = redis.fresh(visibility_timeout=1), tmp_path / "numbers"
    runner = broker.runner(outbox=tmp_path / "tasks")

    def do() -> None:
        background_tasks.using(delay=3).add_task(note_line_late, str(path), 1, "")
        background_tasks.using(delay=6).add_task(note_line_late, str(path), 2, "")

    with worker(broker, tmp_path, "--pool=solo") as started:
        request(runner, do)
        assert wait_until(lambda: "2" in text_of(path).split(), 30), started.log
        started.kill()
    assert text_of(path).split() == ["1", "2"]


def test_no_message_is_sent_twice_while_rabbitmq_blocks_its_senders(
    rabbitmq: RabbitServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ reads what a blocked sender has written when there is room again."""
    broker = rabbitmq.fresh()
    timeouts: list[str] = []

    def current_thread() -> threading.Thread:
        timeouts.append("while blocked")
        return threading.current_thread()

    monkeypatch.setattr(connection, "current_thread", current_thread)
    runner = broker.runner(publish_timeout=0.5)
    rabbitmq.control("set_disk_free_limit", "9000GB")
    try:
        request(runner, lambda: [add("first")(), add("second")()], sends=False)
        assert wait_until(lambda: len(timeouts) >= 2, TIMEOUT)
        [warning] = set(log.warnings)  # a record for each connection: two may send the two
        assert "RabbitMQ takes no messages at present" in warning
    finally:
        rabbitmq.control("set_disk_free_limit", "1MB")
    assert wait(TIMEOUT) == []
    assert waiting(broker.url) == 2
    assert runner.statistics().sent == 2


def add_delayed(seconds: int) -> None:
    background_tasks.using(celery={"countdown": seconds}).add_task(note, "path")


def test_a_delay_that_rabbitmq_counts_is_what_is_left_of_it(
    rabbitmq: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery writes the delay of a message to a quorum queue into the routing key."""
    broker = rabbitmq.fresh()
    app = broker.app()
    shop = Exchange("shop", "topic")
    kind = {"x-queue-type": "quorum"}
    app.conf.task_queues = [Queue("celery", shop, "celery", queue_arguments=kind)]
    runner = CeleryRunner(app)
    clock = SimpleNamespace(time=lambda: time.time() + 40, monotonic=time.monotonic)
    monkeypatch.setattr(connection, "time", clock)  # of the thread that sends
    with Connection(broker.url) as reader, reader.channel() as channel:
        delaying = Queue("delayed", Exchange("celery_delayed_27", "topic"), "#")
        delaying(channel).declare()
        for seconds in (100, 20):
            request(runner, partial(add_delayed, seconds))
        keys = [delaying(channel).get().delivery_info["routing_key"] for _ in range(2)]
    digits = [key.removesuffix(".celery").replace(".", "") for key in keys]
    assert [len(each) for each in digits] == [28, 28]
    assert 55 <= int(digits[0], 2) <= 60
    assert int(digits[1], 2) == 0


def test_a_message_that_rabbitmq_cannot_keep_is_sent_again_and_holds_up_no_other(
    rabbitmq: RabbitServer, log: Log
) -> None:
    """A queue that is full answers with basic.nack."""
    broker = rabbitmq.fresh()
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with Connection(broker.url) as connection:
        queue = Queue("full", queue_arguments=arguments)(connection.default_channel)
        queue.declare()
        runner = broker.runner()
        runner._app.conf.task_queues = [
            Queue("full", queue_arguments=arguments),
            Queue("other"),
        ]

        def do() -> None:
            background_tasks.using(celery={"queue": "full"}).add_task(note, "path")

        def do_others() -> None:
            for _ in range(200):
                background_tasks.using(celery={"queue": "other"}).add_task(note, "path")

        request(runner, do, sends=False)
        request(runner, do, sends=False)
        assert wait_until(lambda: any("basic.nack" in each for each in log.warnings))
        request(runner, do_others, sends=False)
        assert wait_until(lambda: runner.statistics().sent == 201, TIMEOUT)
        assert runner.statistics().waiting == 1
        queue.purge()
        assert wait(TIMEOUT) == []
    assert runner.statistics().sent == 202
    assert waiting(broker.url, "other") == 200
