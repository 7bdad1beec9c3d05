"""The executor of the portal's loop: what ``asyncio.to_thread`` and host look-ups use.

That of the standard library takes nothing once the interpreter is exiting, while tasks
are still being drained, and has the exit wait for its threads without a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .workers import Workers

T = TypeVar("T")

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class LoopExecutor(ThreadPoolExecutor):
    """Daemon threads behind the one interface that asyncio takes for a default executor."""

    def __init__(self, threads: int = min(32, (os.cpu_count() or 1) + 4)) -> None:
        super().__init__(max_workers=1)  # which starts none before its own submit()
        self._workers = Workers(_make, threads, "wsgi_bg-loop")

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call ``fn(*args, **kwargs)`` on a thread; where there is none, right here."""
        future: Future[T] = Future()
        call = (future, fn, args, kwargs)
        if not self._workers.submit(call):
            _make(call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the threads end on their own, and exit does not wait for them."""


def _make(call: _Call) -> None:
    future, fn, args, kwargs = call
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as exc:
        future.set_exception(exc)
        del call, future  # or the error holds itself, by this frame, and all arguments
    else:
        future.set_result(result)
