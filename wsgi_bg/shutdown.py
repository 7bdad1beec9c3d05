"""Deprecated: the functions of version 0.2 for process exit. Call :func:`wsgi_bg.drain`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from wsgi_bg.runners.shutdown import finish

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask


def leave(*, limit: float | None = None, began: float | None = None) -> list[BackgroundTask]:
    """Deprecated: call :func:`wsgi_bg.drain`.

    :param limit: how long to wait, in seconds, in place of each runner's own limit.
    :param began: start of that time, by :func:`time.monotonic`; None for now.
    """
    warnings.warn(
        "wsgi_bg.shutdown.leave() will go: call wsgi_bg.drain(timeout)",
        DeprecationWarning,
        stacklevel=2,
    )
    return finish(limit=limit, began=began)
