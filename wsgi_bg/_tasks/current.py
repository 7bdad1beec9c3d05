"""Find the current request's ``BackgroundTasks``: by the proxy or by the environ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from werkzeug.local import LocalProxy

from wsgi_bg._tasks.task import current
from wsgi_bg.exceptions import MiddlewareMissingError, OptionTypeError, OutsideRequestError

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks

ENVIRON_KEY = "wsgi_bg.background_tasks"
"""The environ key under which the middleware puts the request's ``BackgroundTasks``."""


def current_background_tasks() -> BackgroundTasks:
    """Return the object that the proxy ``background_tasks`` stands for.

    :raises RuntimeError: if no application callable and no task is running.
    """
    try:
        return cast("BackgroundTasks", current.get())
    except LookupError:
        raise OutsideRequestError(
            "wsgi_bg.background_tasks works while the application callable runs and inside "
            "its tasks, with BackgroundTasksMiddleware installed. In a streamed body or "
            "another thread use get_background_tasks(environ), or keep the object that the "
            "view had."
        ) from None


background_tasks: BackgroundTasks = cast(
    "BackgroundTasks", LocalProxy(current_background_tasks)
)
"""The current request's :class:`BackgroundTasks`, for use during the call of the application
and in its tasks; any use outside of these raises a ``RuntimeError``."""


def get_background_tasks(environ: Mapping[str, Any]) -> BackgroundTasks:
    """Return the ``BackgroundTasks`` of the request that ``environ`` belongs to.

    Works on every thread and in streamed bodies; does not block.

    :param environ: the WSGI environ that the application was called with.
    :raises LookupError: if the middleware is not installed.
    :raises TypeError: if ``environ`` is no mapping, but a framework's request, for example.
    """
    try:
        return cast("BackgroundTasks", environ[ENVIRON_KEY])
    except KeyError:
        raise MiddlewareMissingError(ENVIRON_KEY) from None
    except TypeError:
        wanted = "the WSGI environ that the application was called with"
        raise OptionTypeError("environ", environ, wanted) from None
