"""Messages that a worker refuses: RabbitMQ keeps them for a worker that does not."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from kombu import Connection

from tests.support import wait_until
from tests.support.brokers import RabbitServer, RedisServer, waiting
from tests.support.celery import Shop, worker
from tests.support.celery_shop import hold, note
from wsgi_bg import registered_task
from wsgi_bg._tasks.registry import find


@registered_task(name="shop.newer")
def newer(secret: str) -> None:
    """A function that the worker does not know."""


@pytest.fixture(scope="session", params=["rabbitmq", "redis"])
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """A worker; on RabbitMQ the queue has a dead letter exchange."""
    folder = tmp_path_factory.mktemp("refused")
    server: RabbitServer | RedisServer = request.getfixturevalue(request.param)
    broker = server.fresh()
    if isinstance(server, RabbitServer):
        keep_dead_letters(server, broker.url)
    with worker(broker, folder, "--pool=solo") as started:
        yield Shop(broker, started, broker.runner())


def keep_dead_letters(server: RabbitServer, url: str) -> None:
    """Let RabbitMQ put the rejected messages of the queue ``celery`` into a queue ``dead``."""
    with Connection(url) as connection:
        connection.default_channel.queue_declare("dead", durable=True, auto_delete=False)
    policy = {"dead-letter-exchange": "", "dead-letter-routing-key": "dead"}
    vhost = urlsplit(url).path[1:]
    server.control("set_policy", "-p", vhost, "dead", "^celery$", json.dumps(policy))


def dead_letters(shop: Shop) -> int | None:
    """How many messages RabbitMQ has kept; None on Redis, which keeps none."""
    return waiting(shop.broker.url, "dead") if "amqp" in shop.broker.url else None


def refuse(shop: Shop, name: str, args: list[Any], path: Path, wanted: str) -> None:
    """Send a message, and assert that it is refused with ``wanted`` in the log, and kept."""
    before, marker = dead_letters(shop), f"{uuid.uuid4()}"
    headers = {"x-wsgi-bg-call": "encoded"}
    shop.forge(name, args, headers=headers, argsrepr="(...)", task_id=marker)
    logged = f"{name}[{marker}] raised unexpected: MessageError("
    assert wait_until(lambda: logged in shop.worker.log), shop.worker.log
    assert wanted in shop.worker.log.split(logged)[1].splitlines()[0]
    if before is not None:
        assert wait_until(lambda: dead_letters(shop) == before + 1)
    shop.works(path)
    assert "sec-ret" not in shop.worker.log
    assert waiting(shop.broker.url) == 0


def test_a_function_that_the_worker_does_not_know(shop: Shop, tmp_path: Path) -> None:
    before = dead_letters(shop)
    shop.send(newer, "sec-ret")
    assert wait_until(lambda: "unregistered task of type 'shop.newer'" in shop.worker.log)
    if before is not None:
        assert wait_until(lambda: dead_letters(shop) == before + 1)
    shop.works(tmp_path / "after")
    assert "sec-ret" not in shop.worker.log


@pytest.mark.parametrize("func", [note, hold])  # hold has acks_late
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[1,["{path}"],{"secret":"sec-ret","new":1}]', "does not take the arguments"),
        ('[2,["sec-ret"],{}]', "not wsgi_bg's, version 1"),
    ],
    ids=["another signature", "a newer message"],
)
def test_arguments_that_the_function_of_the_worker_does_not_take(
    shop: Shop, tmp_path: Path, func: Any, text: str, wanted: str
) -> None:
    registration = find(func)
    assert registration is not None
    path = tmp_path / "ran"
    if func is note and "{path}" in text:
        text = text.replace('"{path}"', "")  # note takes any keywords, but needs a path
    refuse(shop, registration.name, [text], tmp_path / "after", wanted)
    assert not path.exists()
