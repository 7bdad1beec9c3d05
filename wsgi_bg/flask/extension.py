"""``Background``: the Flask extension.

``Background`` wraps ``app.wsgi_app`` in the middleware, injects the request's
``BackgroundTasks`` into the views that ask for it, and runs each task in a fresh application
context.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from wsgi_bg._request.layer import make_configured
from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg.exceptions import (
    ExtraMissingError,
    InstalledTwiceError,
    OptionTypeError,
    OptionValueError,
)

try:
    from flask import Flask, has_app_context
    from flask.globals import app_ctx
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("flask", "wsgi_bg.flask") from _exc

from wsgi_bg.flask.views import inject_views

if TYPE_CHECKING:
    from contextvars import Context

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask.ctx import AppContext

    from wsgi_bg._tasks.options import OnError
    from wsgi_bg._tasks.task import RunOn
    from wsgi_bg.hooks import Hooks
    from wsgi_bg.monitor import Monitor
    from wsgi_bg.runners import Runner

# The extension's key in app.extensions.
_NAME = "wsgi_bg"


class Background:
    """Background tasks for a Flask application, without further middleware or setup.

    A view parameter annotated ``BackgroundTasks`` receives the request's object, whatever
    the parameter's name. A task runs in a fresh application context: ``current_app`` works,
    ``g`` is the task's own, and ``teardown_appcontext`` functions are called when the task
    ends, on the thread that runs the task.

    The options are those of :class:`~wsgi_bg.BackgroundTasksMiddleware`, and ``monitor`` and
    ``monitor_at``. :meth:`init_app` also reads each option from ``app.config``, under the
    option's name in capitals with the prefix ``WSGI_BG_``: ``WSGI_BG_RUNNER``,
    ``WSGI_BG_RUN_ON``. The configuration overrides the code.

    :param app: the application; if omitted, call :meth:`init_app` for each application.
    :param monitor: a :class:`~wsgi_bg.monitor.Monitor`, a page that shows the tasks; implies
        ``status=True``, or ``status_path`` if the monitor has a path.
    :param monitor_at: the path of the page (default ``"/background-tasks"``).
    :raises TypeError: if ``app`` is no Flask application, or an option has the wrong type.
    :raises ValueError: if an option is an unknown word, or a number out of range.
    :raises RuntimeError: if ``app`` has the extension already.
    """

    def __init__(
        self,
        app: Flask | None = None,
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
        monitor: Monitor | None = None,
        monitor_at: str | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "runner": runner,
            "run_on": run_on,
            "failed_from": failed_from,
            "on_error": on_error,
            "stop_on_error": stop_on_error,
            "hooks": hooks,
            "request_label": request_label,
            "slow_after": slow_after,
            "status": status,
            "status_path": status_path,
            "monitor": monitor,
            "monitor_at": monitor_at,
        }
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Install the middleware around ``app.wsgi_app``; call it before the first request.

        Middleware that wraps ``app.wsgi_app`` later is further out: see
        ``docs/reference/rules.md``.

        :raises TypeError: as the constructor does.
        :raises ValueError: as the constructor does.
        :raises RuntimeError: if ``app`` has the extension already.
        """
        if not isinstance(app, Flask):
            raise OptionTypeError("app", app, "a Flask application")
        if _NAME in app.extensions:
            raise InstalledTwiceError(app.name)
        wrapped: Any = make_configured(partial(_wrap, app), self._options, app.config.get)
        app.wsgi_app = wrapped  # type: ignore[method-assign]
        app.extensions[_NAME] = self

    def __repr__(self) -> str:
        given = (
            f"{name}={value!r}" for name, value in self._options.items() if value is not None
        )
        return f"{type(self).__name__}({', '.join(given)})"


def _wrap(app: Flask, *, monitor: Any, monitor_at: Any, **options: Any) -> WSGIApplication:
    """Return the application in its middleware, with the monitor if there is one."""
    if monitor is None:
        if monitor_at is not None:
            wanted = "given together with monitor, a wsgi_bg.monitor.Monitor"
            raise OptionValueError("monitor_at", monitor_at, wanted)
        return _Middleware(app, app.wsgi_app, **options)
    from wsgi_bg.monitor import Monitor
    from wsgi_bg.monitor.mount import DEFAULT, Mount, check_path

    if not isinstance(monitor, Monitor):
        raise OptionTypeError("monitor", monitor, "a wsgi_bg.monitor.Monitor")
    at = check_path(DEFAULT if monitor_at is None else monitor_at)
    if options["status_path"] is None:
        options["status_path"] = monitor.path
    if options["status"] is None:
        options["status"] = True
    # Inside: also a request for the page lets a durable runner take tasks over.
    return _Middleware(app, Mount(app.wsgi_app, monitor, at), **options)


class _AppContexts:
    """Makes the application context of each task."""

    def __init__(self, app: Flask) -> None:
        self._app = app

    def __call__(self) -> AppContext:
        return self._app.app_context()

    @staticmethod
    def is_entered(before: Context) -> bool:
        """True if an application context was entered after ``before`` was copied.

        For a worker, whose own task class may enter the context.
        """
        return _active() is not before.run(_active)


def _active() -> AppContext | None:
    if not has_app_context():
        return None
    context: AppContext = app_ctx._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001
    return context


class _Middleware(BackgroundTasksMiddleware):
    """The middleware of a Flask application; tasks run in the application's contexts."""

    def __init__(self, app: Flask, wsgi_app: WSGIApplication, **options: Any) -> None:
        self._around = _AppContexts(app)
        self._flask_app = app
        self._views_lock = threading.Lock()
        self._views_are_ready = False
        super().__init__(wsgi_app, **options)

    def _handle_first(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        # Flask accepts no more views after the first request has begun.
        with self._views_lock:
            if not self._views_are_ready:
                inject_views(self._flask_app)
                self._views_are_ready = True
        return super()._handle_first(environ, start_response)
