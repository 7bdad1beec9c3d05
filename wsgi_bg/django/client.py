"""The requests of Django's test client, which calls no WSGI application.

The test client makes an environ, sends ``request_started`` and ``request_finished`` as a server
would, and calls Django's handler itself. Between the two signals a ``_Visit`` is open.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Token
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec

from django.conf import settings
from django.core import signals
from django.db import close_old_connections, connections
from django.http.response import HttpResponseBase

from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg._tasks.background_tasks import ENDED, BackgroundTasks, View
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg._tasks.task import current
from wsgi_bg.django.application import (
    Around,
    call_on_asgirefs_thread,
    configured,
    is_on_a_loop,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_bg._tasks.options import Options
    from wsgi_bg._tasks.task import BackgroundTask

P = ParamSpec("P")


class _AroundInTests(Around):
    """For the test client: the test's thread keeps its connections and transaction."""

    def close_connections(self) -> None:
        if is_on_a_loop():
            call_on_asgirefs_thread(connections.close_all)


class _MiddlewareInTests(BackgroundTasksMiddleware):
    """The middleware around a request of the test client, whose thread runs the tasks."""

    _around = _AroundInTests

    def __init__(self, app: WSGIApplication, **options: Any) -> None:
        super().__init__(app, **{**options, "runner": "inline"})


class _ClientTasks(View):
    """The tasks of a request of the test client.

    ``TestCase.captureOnCommitCallbacks(execute=True)`` calls the ``on_commit`` callbacks
    after the response has been closed and the tasks have run. A task that such a callback
    adds runs at once.
    """

    __slots__ = ("visit",)

    def __init__(self, visit: _Visit, origin: BackgroundTasks, options: Options) -> None:
        super().__init__(origin, options)
        self.visit = visit

    @property
    def has_ended(self) -> bool:
        return self.phase == ENDED and not _awaits_commit()

    def add_task(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        if self.phase != ENDED or self.has_ended:
            return super().add_task(func, *args, **kwargs)
        added = []

        def add(tasks: BackgroundTasks) -> None:
            added.append(View(tasks, self.options).add_task(func, *args, **kwargs))

        _ClientRequest(self.visit.environ, add).finish(self.visit.status)
        return added[0]

    def using(self, **options: Any) -> BackgroundTasks:
        view = super().using(**options)
        return _ClientTasks(self.visit, self, view.options)


@contextmanager
def _outside_of_loop() -> Iterator[None]:
    """Let plain tasks use Django's ORM, which refuses to run inside of an event loop.

    The response of an async stream is closed inside of a loop that runs only for the stream.
    """
    loop = asyncio._get_running_loop()  # noqa: SLF001  # for libraries that run loops
    asyncio._set_running_loop(None)  # noqa: SLF001
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)  # noqa: SLF001


class _RaisedError(Exception):
    """Stands for an error of the application, which the test gets from Django's client."""


class _ClientRequest:
    """A request to a middleware whose application is Django's test client.

    :param environ: the test client's environ.
    :param enter: the application calls it with the request's tasks.
    """

    def __init__(
        self, environ: WSGIEnvironment, enter: Callable[[BackgroundTasks], object]
    ) -> None:
        self.environ = {**environ}
        self.environ.pop(ENVIRON_KEY, None)

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
            enter(environ[ENVIRON_KEY])
            return self._respond(start_response)

        middleware = configured(partial(_MiddlewareInTests, app))
        self._body = middleware(self.environ, lambda *args: lambda data: None)

    def _respond(self, start_response: StartResponse) -> Iterator[bytes]:
        if not self.status:
            raise _RaisedError
        start_response(self.status, [])
        yield b""

    def finish(self, status: str) -> None:
        """End the request and run its tasks on this thread, which is the test's.

        :param status: the status of the response; empty if the application has raised.
        """
        self.status = status
        with _outside_of_loop():
            try:
                with suppress(_RaisedError):
                    list(self._body)
            finally:
                self._body.close()  # type: ignore[attr-defined]


class _Visit(_ClientRequest):
    """A request of the test client, in progress."""

    KEY = "wsgi_bg.django"

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ, lambda tasks: None)
        root = self.environ[ENVIRON_KEY]
        self.tasks = _ClientTasks(self, root, root.options)
        outer = _latest_visit()
        if outer is not None and outer.tasks.phase == ENDED:
            outer.leave()
        self.has_left = False
        self.token: Token[BackgroundTasks] = current.set(self.tasks)
        environ[ENVIRON_KEY] = self.tasks
        environ[self.KEY] = self

    def finish(self, status: str) -> None:
        try:
            super().finish(status)
        finally:
            if not _awaits_commit():  # a task may have added a callback, too
                self.leave()

    def leave(self) -> None:
        """Give ``background_tasks`` the value from before the request."""
        self.has_left = True
        with suppress(ValueError):  # the response was closed in a copied context
            # Streams may be closed in the order of their requests.
            while (latest := _latest_visit()) is not None and latest.has_left:
                current.reset(latest.token)


def _latest_visit() -> _Visit | None:
    tasks = current.get(None)
    return tasks.visit if isinstance(tasks, _ClientTasks) else None


def _awaits_commit() -> bool:
    """True if the current transaction has ``on_commit`` callbacks."""
    return any(each.run_on_commit for each in connections.all(initialized_only=True))


def _on_started(sender: Any, environ: WSGIEnvironment | None = None, **_: object) -> None:
    client = sys.modules.get("django.test.client")
    if (
        client is not None
        and environ is not None
        and isinstance(sender, type)
        and issubclass(sender, client.ClientHandler)
    ):
        _Visit(environ)


def _on_exception(request: Any, **_: object) -> None:
    if settings.DEBUG_PROPAGATE_EXCEPTIONS:  # else Django makes a response and closes it
        _finish(request, "")


def _on_finished(sender: Any, **_: object) -> None:
    if sender is not None:  # sent by a server's handler, whose responses have the middleware
        return
    # The signal does not carry the response, but the response's own method sends the signal.
    frame = inspect.currentframe()
    while frame is not None:
        response = frame.f_locals.get("self")
        if isinstance(response, HttpResponseBase):
            request = getattr(response, "wsgi_request", None)
            status = f"{response.status_code} {response.reason_phrase}"
            _finish(request, "" if _raises_through(frame.f_back) else status)
            return
        frame = frame.f_back


def _raises_through(frame: FrameType | None) -> bool:
    """True if an error passes through ``frame``, which iterates over a stream and closes it."""
    error = sys.exc_info()[1]
    traceback = error.__traceback__ if isinstance(error, Exception) else None
    while traceback is not None:
        if traceback.tb_frame is frame:
            return True
        traceback = traceback.tb_next
    return False


def _finish(request: Any, status: str) -> None:
    environ = getattr(request, "environ", {})
    visit = environ.pop(_Visit.KEY, None)
    if visit is None:
        return
    # For request_label, which on a server gets the environ that the view has changed.
    visit.environ.update({**environ, ENVIRON_KEY: visit.environ[ENVIRON_KEY]})
    try:
        visit.finish(status)
    except BaseException:  # an error that the pytest fixture raises
        # The test client disconnects this receiver and connects it again after close(), unless
        # close() raises.
        signals.request_finished.connect(close_old_connections)
        raise


def follow_test_clients() -> None:
    """Give the requests of Django's test client background tasks, by Django's signals."""
    signals.request_started.connect(_on_started)
    signals.request_finished.connect(_on_finished)
    signals.got_request_exception.connect(_on_exception)
