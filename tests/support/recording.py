"""Applications that add tasks, and test clients, for the tests of the pytest plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from flask import Flask
from webtest import TestApp
from werkzeug.test import Client

from tests.support import Environ, app_that
from wsgi_bg import BackgroundTasksMiddleware, _testing, get_background_tasks
from wsgi_bg.pytest_plugin import TaskRecorder

done: list[Any] = []
"""Results of tasks and closed bodies; a fixture clears the list before each test."""


def recording(mode: Any = "record") -> AbstractContextManager[TaskRecorder]:
    """The fixture, for a part of a test."""
    return _testing.recording(mode)


def send(to: str, *, copies: int = 1) -> None:
    done.append((to, copies) if copies > 1 else to)


async def send_async(to: str) -> None:
    done.append(to)


def fail(word: str = "boom") -> None:
    raise ValueError(word)


def add(*calls: Any, **options: Any) -> Callable[[Environ], None]:
    """Adds functions, or tuples of a function and its arguments, to a request."""

    def do(environ: Environ) -> None:
        for call in calls:
            func, *args = call if isinstance(call, tuple) else (call,)
            get_background_tasks(environ).using(**options).add_task(func, *args)

    return do


TYPE = [("Content-Type", "text/plain")]
LENGTH = [*TYPE, ("Content-Length", "2")]


def whole(*calls: Any, runner: Any = None, status: str = "200 OK") -> Any:
    """An application that answers "ok" with a Content-Length."""
    app = app_that(add(*calls), headers=LENGTH, status=status)
    return BackgroundTasksMiddleware(app, runner=runner)


def stream(*calls: Any, runner: Any = None) -> Any:
    """An application that answers "o", "k", a body of unknown length."""
    app = app_that(add(*calls), headers=TYPE, body=lambda: iter([b"o", b"k"]))
    return BackgroundTasksMiddleware(app, runner=runner)


def late(*calls: Any, runner: Any = None, headers: Any = TYPE) -> Any:
    """An application as a generator, which adds the tasks between the two chunks."""

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", list(headers))
        yield b"o"
        add(*calls)(environ)
        yield b"k"

    return BackgroundTasksMiddleware(app, runner=runner)


def late_whole(*calls: Any, runner: Any = None) -> Any:
    return late(*calls, runner=runner, headers=LENGTH)


apps = pytest.mark.parametrize("app", [whole, stream, late, late_whole])


def by_flask(app: Any) -> Any:
    flask = Flask(__name__)
    flask.wsgi_app = app  # type: ignore[method-assign]
    return flask.test_client().get("/")


def by_werkzeug(app: Any) -> Any:
    return Client(app).get("/")


def by_webtest(app: Any) -> Any:
    return TestApp(app).get("/")


def body_of(response: Any) -> bytes:
    body: bytes = response.body if hasattr(response, "body") else response.data
    return body


clients = pytest.mark.parametrize("client", [by_flask, by_werkzeug, by_webtest])
