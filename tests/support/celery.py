"""Celery's filesystem transport, a broker that never answers, and workers."""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from tests.support import Server, app_that, make_server_environ, wait_until
from tests.support.brokers import Broker as Broker
from tests.support.brokers import RedisServer as RedisServer
from tests.support.brokers import redis_server as redis_server
from tests.support.celery_shop import MODULE, note
from tests.support.worker_process import WorkerProcess
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.celery import CeleryRunner

TIMEOUT = 30.0
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def filesystem(folder: Path) -> Broker:
    messages, control = folder / "messages", folder / "control"
    for each in (messages, control):
        each.mkdir(parents=True, exist_ok=True)
    return Broker(
        "filesystem://",
        {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
            "polling_interval": 0.02,
        },
    )


class Worker(WorkerProcess):
    """A Celery worker, started as the page about Celery says."""

    def __init__(
        self,
        broker: Broker,
        folder: Path,
        *arguments: str,
        module: str = MODULE,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "celery", "-A", module, "worker", "--loglevel=INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        given = {**(environ or {}), "SHOP_BROKER": json.dumps(broker)}
        super().__init__([*command, *quiet, *arguments], given, folder, " ready.")


@contextmanager
def worker(broker: Broker, folder: Path, *arguments: str, **options: Any) -> Iterator[Worker]:
    started = Worker(broker, folder, *arguments, **options)
    try:
        yield started
    finally:
        started.stop()


def wait_for(path: Path, worker: Worker) -> str:
    """Wait for a file that a task writes; return the text."""
    return worker.wait_for(path)


def messages(broker: Broker) -> list[dict[str, Any]]:
    """The messages in the folder of the filesystem transport, in order."""
    found = []
    for file in sorted(Path(broker.options["data_folder_out"]).glob("*.msg")):
        message = json.loads(file.read_text(encoding="utf-8"))
        message["body"] = json.loads(base64.b64decode(message["body"]))
        found.append(message)
    return found


class SilentBroker:
    """Accepts connections and never answers, until the test ends all connections."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.broker = Broker(f"redis://127.0.0.1:{self.port}/0", {})
        self._taken: list[socket.socket] = []
        self.was_asked = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self._taken.append(self._listener.accept()[0])
                self.was_asked.set()

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() would not
        self._listener.close()
        for connection in self._taken:
            connection.close()


@contextmanager
def silent_broker() -> Iterator[SilentBroker]:
    broker = SilentBroker()
    try:
        yield broker
    finally:
        with suppress(OSError):
            broker.end()


def request(
    runner: CeleryRunner, do: Callable[[], object], *, complete: bool = True, sends: bool = True
) -> None:
    """Handle a request in which ``do()`` adds tasks; the response is complete or not.

    :param sends: True to wait until the broker has got all tasks.
    """
    headers = [("Content-Length", "2")] if complete else []
    app = app_that(lambda environ: do(), headers=headers)
    wrapped = BackgroundTasksMiddleware(app, runner=runner)
    # Like the thread of a server: no request sees the variables of an earlier request.
    copy_context().run(Server().run, wrapped, make_server_environ())
    assert not sends or wait_until(lambda: not runner.ledger.unsent)


class Shop(NamedTuple):
    """A broker with a worker, and the runner that sends to the broker."""

    broker: Broker
    worker: Worker
    runner: CeleryRunner

    def send(self, func: Any, *args: Any, **kwargs: Any) -> None:
        request(self.runner, lambda: background_tasks.add_task(func, *args, **kwargs))

    def forge(self, name: str, args: Any = (), kwargs: Any = None, **more: Any) -> str:
        """Put a message into the broker with a plain Celery client, without a task."""
        client = Celery("forger", broker=self.broker.url, set_as_current=False)
        client.conf.broker_transport_options = self.broker.options
        with client.connection_for_write() as connection:
            client.send_task(name, args, kwargs or {}, connection=connection, **more)
        return name

    def works(self, path: Path) -> str:
        """Make the worker run a task: by then the worker has handled all earlier messages."""
        self.send(note, str(path))
        return wait_for(path, self.worker)
