"""``get_wsgi_application()``: Django's application, inside the middleware."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._process import log
from wsgi_bg._request.layer import make_configured
from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg._tasks.callables import name_of
from wsgi_bg.exceptions import ExtraMissingError

try:
    from asgiref.sync import AsyncToSync, SyncToAsync
    from django.conf import settings
    from django.core import wsgi
    from django.core.cache import caches
    from django.db import close_old_connections
except ModuleNotFoundError as _exc:
    raise ExtraMissingError("django", "wsgi_bg.django") from _exc

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.options import OnError
    from wsgi_bg._tasks.task import BackgroundTask, RunOn
    from wsgi_bg.hooks import Hooks
    from wsgi_bg.runners import Runner

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
    return configured(partial(_Middleware, application))


def configured(make: Callable[..., BackgroundTasksMiddleware]) -> BackgroundTasksMiddleware:
    return make_configured(make, _options, lambda key: getattr(settings, key, None))


class Around:
    """Closes database connections before and after each task, on the task's thread."""

    @staticmethod
    def added(task: BackgroundTask) -> None:
        """Separate the task's language from the view's, which asgiref 3.8 shares."""
        task.context = detached(copy_context())

    def __enter__(self) -> None:
        self.close_connections()

    def __exit__(self, *exc_info: object) -> None:
        self.close_connections()
        _call_safely(caches.close_all)  # the task's own caches

    def close_connections(self) -> None:
        if is_on_a_loop():
            call_on_asgirefs_thread(close_old_connections)
        else:
            _call_safely(close_old_connections)
            # A plain task may use asyncio.run(). Without a thread there is no connection.
            if SyncToAsync.single_thread_executor._threads:  # noqa: SLF001
                call_on_asgirefs_thread(close_old_connections)


def is_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def call_on_asgirefs_thread(close: Callable[[], object]) -> None:
    """Queue ``close`` before or after the queries of an async task; does not block.

    ``sync_to_async`` makes the queries on asgiref's thread, which makes its calls in order;
    under gevent on a thread of the loop's own: see ``use_for_sync_code``.
    """
    executor = SyncToAsync.single_thread_executor
    with suppress(RuntimeError):  # no loop runs
        executor = AsyncToSync.loop_thread_executors.get(asyncio.get_running_loop(), executor)
    with suppress(RuntimeError):  # the interpreter exits, and the thread has ended
        executor.submit(_call_safely, close)


def _call_safely(close: Callable[[], object]) -> None:
    try:
        close()
    except Exception as exc:
        log.error("%s raised", name_of(close), exc_info=exc)


class _Middleware(BackgroundTasksMiddleware):
    """The middleware around Django's application."""

    _around = Around
