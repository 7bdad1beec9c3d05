"""A runner for an engine of the tests, by ``wsgi_bg.outbox``, and its tasks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, background_tasks, registered_task
from wsgi_bg._tasks import registry
from wsgi_bg.outbox import Message, OutboxRunner

here: list[Any] = []
"""Arguments of the calls in this process."""

under_way: list[Connection] = []
"""Connections that are sending."""


@registered_task(name="post.send")
def send(value: Any = None) -> None:
    """A task that the engine runs."""
    here.append(value)


@registered_task(name="post.local", when_unsent="local")
def send_or_run(value: Any = None) -> None:
    """A task that runs here if it cannot be sent."""
    here.append(value)


class AwayError(OSError):
    """The engine is away."""


class Post(OutboxRunner):
    """The engine gets the first argument of each registered function."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.is_up = True
        self.got: list[Any] = []
        self.connections: list[Connection] = []
        self.before: Callable[[Any], object] = lambda value: None

    def message(self, task: BackgroundTask) -> Message | None:
        registration = registry.find(task.func)
        if registration is None:
            return None
        return Message(registration.name, [*task.args])

    def load(self, name: str, text: str) -> Any:
        return json.loads(text)

    def connect(self) -> Connection:
        if not self.is_up:
            raise AwayError
        self.connections.append(Connection(self))
        return self.connections[-1]

    def deliver(self, value: Any) -> None:
        self.before(value)
        if not self.is_up:
            raise AwayError
        if value == "refused":
            raise ValueError("the engine does not like it")
        self.got.append(value)


class Connection:
    def __init__(self, post: Post) -> None:
        self._post = post
        self.is_closed = threading.Event()
        self.sizes: list[int] = []

    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        self.sizes.append(len(messages))
        under_way.append(self)
        try:
            for index, message in enumerate(messages):
                self._post.deliver(message.data[0])
                confirmed(index)
        finally:
            under_way.remove(self)

    def is_lost(self, exc: Exception) -> bool:
        return isinstance(exc, OSError)

    def close(self) -> None:
        self.is_closed.set()


class FilePost(Post):
    """An engine that further processes see.

    A message is a line of the file ``sent``. The engine is away without a file ``is_up``.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(outbox=folder / "tasks", **options)
        self._engine = folder

    def connect(self) -> Connection:
        self.is_up = (self._engine / "is_up").exists()
        return super().connect()

    def deliver(self, value: Any) -> None:
        super().deliver(value)
        with (self._engine / "sent").open("a", encoding="utf-8") as file:
            file.write(f"{value}\n")


def request(runner: Any, do: Callable[[], object], **options: Any) -> None:
    """Handle a request in which ``do()`` adds tasks."""
    app = BackgroundTasksMiddleware(app_that(lambda environ: do()), runner=runner, **options)
    copy_context().run(Server().run, app, make_server_environ())


def add(func: Any, *values: Any) -> Callable[[], None]:
    """A function that adds a call for each of ``values``."""

    def do() -> None:
        for value in values:
            background_tasks.add_task(func, value)

    return do
