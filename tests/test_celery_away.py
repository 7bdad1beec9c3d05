"""Registered tasks while the broker is away: who runs them, and who waits for the broker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import client
from tests.celery_shop import local_calls, not_registered, note
from tests.celery_support import (
    Broker,
    RedisServer,
    SilentBroker,
    filesystem,
    messages,
    redis_server,
    request,
    silent_broker,
)
from tests.conftest import Log
from tests.support import TIMEOUT, Gate, app_that, free_port, respond, waitress
from tests.test_examples import text_of, wait_until
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.celery import publisher as publishing
from wsgi_bg.exceptions import PublishError

NOTE = "tests.celery_shop.note"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def silent() -> Iterator[SilentBroker]:
    with silent_broker() as broker:
        yield broker


def refusing() -> Broker:
    """A broker at a port without a listener."""
    return Broker(f"redis://127.0.0.1:{free_port()}/0", {})


def of_this_process(path: Path) -> bool:
    return text_of(path).startswith(f"({os.getpid()}, ")


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_task_runs_here_if_the_connection_is_refused(
    tmp_path: Path, log: Log, scheme: str
) -> None:
    url = refusing().url.replace("redis", scheme)
    runner = Broker(url, {}).runner(local="inline")
    request(runner, lambda: background_tasks.add_task(note, str(tmp_path / "note"), "secret"))
    assert of_this_process(tmp_path / "note")
    (warning,) = log.warnings
    assert warning.startswith(
        f"background task {NOTE} runs in this process: {NOTE} was not sent: OperationalError: "
    )
    assert "refused" in warning
    assert "secret" not in warning
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.failed) == (1, 0)


def test_a_task_runs_here_if_no_connection_can_be_made(tmp_path: Path, log: Log) -> None:
    runner = Broker("no-such-transport://", {}).runner(local="inline")
    request(runner, lambda: background_tasks.add_task(note, str(tmp_path / "note")))
    assert of_this_process(tmp_path / "note")
    assert len(log.warnings) == 1


def test_with_the_option_discard_a_task_that_cannot_be_sent_is_an_error(
    tmp_path: Path, log: Log
) -> None:
    told: list[tuple[str, BaseException]] = []
    runner = refusing().runner(on_publish_error="discard", local="inline")

    def view(environ: Any) -> None:
        background_tasks.add_task(note, str(tmp_path / "note"))
        background_tasks.add_task(not_registered)

    app = app_that(view)
    wrapped = BackgroundTasksMiddleware(
        app, runner=runner, on_error=lambda task, exc: told.append((task.name, exc))
    )
    respond(wrapped)
    assert not (tmp_path / "note").exists()
    assert log.errors == [f"background task {NOTE} raised PublishError"]
    ((name, error),) = told
    assert name == NOTE
    assert isinstance(error, PublishError)
    assert isinstance(error, ConnectionError)
    assert error.name == NOTE
    assert len(local_calls) == 1
    local_calls.clear()
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.failed) == (1, 1)


def test_a_silent_broker_is_waited_for_no_longer_than_publish_timeout(
    silent: SilentBroker, tmp_path: Path, log: Log
) -> None:
    runner = silent.broker.runner(local="inline", publish_timeout=0.2)

    def do() -> None:
        for number in range(3):
            background_tasks.add_task(note, str(tmp_path / f"{number}"))

    request(runner, do)
    assert all(of_this_process(tmp_path / f"{number}") for number in range(3))
    first, *others = log.warnings
    assert first.endswith(f"{NOTE} was not sent: the broker has not answered in 0.2 seconds")
    # Only the first message has waited.
    assert [line.rsplit(": ", 1)[1] for line in others] == [
        "the broker has not answered others in time"
    ] * 2


def test_a_broker_that_did_not_answer_is_asked_again_after_as_long(
    silent: SilentBroker, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = silent.broker.runner(local="inline", publish_timeout=0.1)
    clock = [0.0]
    monkeypatch.setattr(publishing, "monotonic", lambda: clock[0])
    publisher = runner._states.get().publisher
    message = publishing.Message(NOTE, "", {}, {})
    reasons = []
    for now in (0.0, 0.05, 0.15):
        clock[0] = now
        with pytest.raises(PublishError) as caught:
            publisher.publish(message)
        reasons.append(str(caught.value).rsplit(": ", 1)[1])
    asked = "the broker has not answered in 0.1 seconds"
    spared = "the broker has not answered others in time"
    assert reasons == [asked, spared, asked]


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        ("200 OK", [], lambda: iter([b"a", b"b"])),
        ("204 No Content", [], list),
        ("200 OK", [("Content-Length", "0")], list),
        ("200 OK", [("Content-Length", "2")], lambda: [b"ok"]),
    ],
    ids=["stream", "204", "empty", "complete"],
)
def test_no_response_waits_for_the_broker(
    silent: SilentBroker, tmp_path: Path, status: str, headers: Any, body: Any
) -> None:
    """The broker is the gate: it answers after the client has the whole response."""
    runner = silent.broker.runner(publish_timeout=60)
    path = tmp_path / "note"
    app = app_that(
        lambda environ: background_tasks.add_task(note, str(path)),
        status=status,
        headers=headers,
        body=body,
    )
    with waitress(BackgroundTasksMiddleware(app, runner=runner)) as port:
        answer = client.ask(port)
        assert answer.status == int(status[:3])
        assert silent.was_asked.wait(TIMEOUT)
        assert not path.exists()
        silent.end()
        assert wait_until(path.exists)
    assert of_this_process(path)


def test_redis_stops_between_the_request_and_close(
    redis: RedisServer, tmp_path: Path, log: Log
) -> None:
    runner = redis.broker(0).runner()
    sent, local = tmp_path / "sent", tmp_path / "local"

    def view(environ: Any) -> None:
        if environ["PATH_INFO"] == "/stop":
            background_tasks.add_task(note, str(local))
            redis.stop()
        else:
            background_tasks.add_task(note, str(sent))

    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    with waitress(app) as port, client.connect(port) as connection:
        assert connection.ask().body == b"ok"
        assert wait_until(lambda: runner.statistics().succeeded == 1)
        assert log.warnings == []
        assert connection.ask(path="/stop").body == b"ok"
        assert wait_until(lambda: of_this_process(local))
    assert not sent.exists()
    assert "runs in this process" in log.warnings[0]


def test_a_broker_that_was_restarted_is_reached_again(
    redis: RedisServer, tmp_path: Path, log: Log
) -> None:
    """The kept connection is dead after the restart, which does not count as a failure."""
    runner = redis.broker(0).runner()
    request(runner, lambda: background_tasks.add_task(note, "path"))
    assert redis.waiting(0) == 1
    redis.stop()
    redis.start()
    request(runner, lambda: background_tasks.add_task(note, "path"))
    assert redis.waiting(0) == 1
    assert log.warnings == []


def test_a_forked_child_sends_on_new_connections(
    redis: RedisServer, tmp_path: Path, log: Log
) -> None:
    runner = redis.broker(0).runner()
    done = tmp_path / "done"

    def send() -> None:
        request(runner, lambda: background_tasks.add_task(note, "path"))

    send()
    child = os.fork()
    if child == 0:  # no assertion in the child: pytest would go on there
        try:
            send()
            done.write_text(f"{runner.statistics().succeeded}", encoding="utf-8")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert text_of(done) == "1"
    send()
    assert redis.waiting(0) == 3
    assert log.warnings == []


def test_a_task_sent_after_its_timeout_is_named_since_it_may_run_twice(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    broker = filesystem(tmp_path)
    runner = broker.runner(local="inline", publish_timeout=0.05)
    send = publishing.Publisher._send

    def late(*args: Any) -> None:
        gate.task()
        send(*args)

    monkeypatch.setattr(publishing.Publisher, "_send", late)
    request(runner, lambda: background_tasks.add_task(note, str(tmp_path / "note")))
    assert of_this_process(tmp_path / "note")
    assert messages(broker) == []
    gate.open()
    assert wait_until(lambda: len(log.warnings) == 2)
    assert log.warnings[1] == (
        f"background task {NOTE} was sent after its time was up: it may run twice"
    )
    assert len(messages(broker)) == 1


def test_a_message_that_no_thread_takes_in_time_is_not_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    monkeypatch.setattr(publishing, "CONNECTIONS", 1)
    broker = filesystem(tmp_path)
    runner = broker.runner(local="inline", publish_timeout=0.05)
    send, begun = publishing.Publisher._send, threading.Event()
    publisher = runner._states.get().publisher

    def late(*args: Any) -> None:
        begun.set()
        gate.task()
        send(*args)

    monkeypatch.setattr(publishing.Publisher, "_send", late)
    for _ in range(2):
        publisher._silent_until = 0.0
        with pytest.raises(PublishError, match="has not answered in"):
            publisher.publish(publishing.Message(NOTE, "", {}, {}))
    gate.open()
    monkeypatch.undo()
    publisher._silent_until = 0.0
    publisher._timeout = TIMEOUT
    publisher.publish(publishing.Message(NOTE, "last", {}, {}))
    assert [message["body"][0] for message in messages(broker)] == [[""], ["last"]]


def test_each_transport_gets_the_timeouts_that_free_a_thread_from_a_silent_broker() -> None:
    timeouts = {
        name: set(publishing._for_transport(name, 3.0)) for name in ("redis", "amqp", "memory")
    }
    assert timeouts == {
        "redis": {"socket_timeout", "socket_connect_timeout"},
        "amqp": {"confirm_publish", "read_timeout", "write_timeout"},
        "memory": set(),
    }


def test_the_applications_options_for_its_broker_stay(tmp_path: Path) -> None:
    broker = Broker("redis://127.0.0.1/0", {"socket_timeout": 77, "max_retries": 5})
    runner = broker.runner(publish_timeout=2)
    options = runner._states.get().publisher._connect().connection.transport_options
    assert options["socket_timeout"] == 77
    assert options["max_retries"] == 5
    assert options["socket_connect_timeout"] == 4
    assert options["connect_retries_timeout"] == 2
