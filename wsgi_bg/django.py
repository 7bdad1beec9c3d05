"""``get_wsgi_application()``: Django's application, with background tasks.

The function replaces Django's function of the same name in ``wsgi.py``. Django's test client
calls no WSGI application. To give its requests background tasks too, import this module or
put ``"wsgi_bg.django"`` into ``INSTALLED_APPS``.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import Token, copy_context
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._process import log
from wsgi_bg._request.layer import make_configured
from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg._tasks.background_tasks import BackgroundTasks, View
from wsgi_bg._tasks.callables import name_of
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg._tasks.task import current
from wsgi_bg.exceptions import ExtraMissingError

try:
    from asgiref.sync import SyncToAsync
    from django.conf import settings
    from django.core import signals, wsgi
    from django.core.cache import caches
    from django.db import close_old_connections, connections
    from django.http.response import HttpResponseBase
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("django", "wsgi_bg.django") from _exc

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_bg._tasks.options import OnError, Options
    from wsgi_bg._tasks.task import BackgroundTask, RunOn
    from wsgi_bg.hooks import Hooks
    from wsgi_bg.runners import Runner

P = ParamSpec("P")

# The options of the latest application; requests of the test client have the same options.
_options: dict[str, Any] = dict.fromkeys(
    (
        "runner",
        "run_on",
        "failed_from",
        "on_error",
        "stop_on_error",
        "hooks",
        "request_label",
        "slow_after",
        "status",
        "status_path",
    )
)


def get_wsgi_application(
    runner: Runner | Literal["inline", "pool"] | None = None,
    *,
    run_on: RunOn | None = None,
    failed_from: int | None = None,
    on_error: OnError | None = None,
    stop_on_error: bool | None = None,
    hooks: Hooks | Sequence[Hooks] | None = None,
    request_label: Callable[[WSGIEnvironment], str] | None = None,
    slow_after: float | None = None,
    status: bool | None = None,
    status_path: str | os.PathLike[str] | None = None,
) -> BackgroundTasksMiddleware:
    """Call ``django.setup()``; return Django's WSGI application inside the middleware.

    A task has the language and the time zone of the code that added the task. Django's
    ``close_old_connections()`` is called before and after each task, on the thread that runs
    the task, and for an ``async def`` task on the thread of ``sync_to_async``. A thread keeps
    a connection only for ``CONN_MAX_AGE`` seconds, by default not at all.

    The options are those of :class:`~wsgi_bg.BackgroundTasksMiddleware`. Django's settings
    override them: ``WSGI_BG_RUNNER``, ``WSGI_BG_RUN_ON``, ``WSGI_BG_FAILED_FROM`` and so on,
    each option's name in capitals with the prefix ``WSGI_BG_``.

    :raises TypeError: if an option has the wrong type.
    :raises ValueError: if an option is an unknown word, or a number out of range.
    """
    application = wsgi.get_wsgi_application()
    _options.update(
        runner=runner,
        run_on=run_on,
        failed_from=failed_from,
        on_error=on_error,
        stop_on_error=stop_on_error,
        hooks=hooks,
        request_label=request_label,
        slow_after=slow_after,
        status=status,
        status_path=status_path,
    )
    return _configured(partial(_Middleware, application))


def _configured(make: Callable[..., BackgroundTasksMiddleware]) -> BackgroundTasksMiddleware:
    return make_configured(make, _options, lambda key: getattr(settings, key, None))


class _Around:
    """Closes database connections before and after each task, on the task's thread."""

    @staticmethod
    def added(task: BackgroundTask) -> None:
        """Separate the task's language from the view's, which asgiref 3.8 shares."""
        task.context = detached(copy_context())

    def __enter__(self) -> None:
        self._close_connections()

    def __exit__(self, *exc_info: object) -> None:
        self._close_connections()
        _call_safely(caches.close_all)  # the task's own caches

    def _close_connections(self) -> None:
        if _is_on_a_loop():
            _call_on_asgirefs_thread(close_old_connections)
        else:
            _call_safely(close_old_connections)
            # A plain task may use asyncio.run(). Without a thread there is no connection.
            if SyncToAsync.single_thread_executor._threads:  # noqa: SLF001
                _call_on_asgirefs_thread(close_old_connections)


class _AroundInTests(_Around):
    """For the test client: the test's thread keeps its connections and transaction."""

    def _close_connections(self) -> None:
        if _is_on_a_loop():
            _call_on_asgirefs_thread(connections.close_all)


def _is_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _call_on_asgirefs_thread(close: Callable[[], object]) -> None:
    """Queue ``close`` before or after the queries of an async task; does not block.

    ``sync_to_async`` makes the queries on asgiref's thread, which makes its calls in order.
    """
    with suppress(RuntimeError):  # the interpreter exits, and the thread has ended
        SyncToAsync.single_thread_executor.submit(_call_safely, close)


def _call_safely(close: Callable[[], object]) -> None:
    try:
        close()
    except Exception as exc:
        log.error("%s raised", name_of(close), exc_info=exc)


class _Middleware(BackgroundTasksMiddleware):
    """The middleware around Django's application."""

    _around = _Around


# The test client makes an environ, sends request_started and request_finished as a server
# would, and calls Django's handler itself. Between the two signals a _Visit is open.


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

    def add_task(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        if not self.has_ended or not _awaits_commit():
            return super().add_task(func, *args, **kwargs)
        added = []

        def add(tasks: BackgroundTasks) -> None:
            added.append(View(tasks, self.options).add_task(func, *args, **kwargs))

        _ClientRequest(self.visit.environ, add).finish(self.visit.status)
        return added[0]

    def using(self, **options: Any) -> BackgroundTasks:
        view = super().using(**options)
        return _ClientTasks(self.visit, self, view.options)


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
        # A response to HEAD may be closed before it is read, but this response must stay open.
        self.environ = {**environ, "REQUEST_METHOD": "GET"}
        self.environ.pop(ENVIRON_KEY, None)

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
            enter(environ[ENVIRON_KEY])
            return self._respond(start_response)

        middleware = _configured(partial(_MiddlewareInTests, app))
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
        if outer is not None and outer.tasks.has_ended:
            outer.leave()
        self.has_left = False
        self.token: Token[BackgroundTasks] = current.set(self.tasks)
        environ[ENVIRON_KEY] = self.tasks
        environ[self.KEY] = self

    def finish(self, status: str) -> None:
        if not _awaits_commit():
            self.leave()
        super().finish(status)

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
    visit = getattr(request, "environ", {}).pop(_Visit.KEY, None)
    if visit is None:
        return
    try:
        visit.finish(status)
    except BaseException:  # an error that the pytest fixture raises
        # The test client disconnects this receiver and connects it again after close(), unless
        # close() raises.
        signals.request_finished.connect(close_old_connections)
        raise


signals.request_started.connect(_on_started)
signals.request_finished.connect(_on_finished)
signals.got_request_exception.connect(_on_exception)
