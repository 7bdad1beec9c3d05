"""The default executor of the portal's loop, for ``asyncio.to_thread`` and host look-ups.

The standard library's executor refuses calls as soon as the interpreter exits, while tasks
are still drained, and makes the exit wait for its threads without a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from wsgi_bg._process.workers import Workers

T = TypeVar("T")

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class LoopExecutor(ThreadPoolExecutor):
    """Daemon threads as a ``ThreadPoolExecutor``, the type that asyncio requires."""

    def __init__(self, threads: int = min(32, (os.cpu_count() or 1) + 4)) -> None:
        super().__init__(max_workers=1)  # starts no thread before its own submit()
        # Greenlets would run the calls on the thread of the loop.
        self._workers = Workers(_make, threads, "wsgi_bg-loop", are_real=True)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call ``fn(*args, **kwargs)`` on a thread, or here if no thread can be started."""
        future: Future[T] = Future()
        call = (future, fn, args, kwargs)
        if not self._workers.submit(call):
            _make(call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: idle threads end by themselves, and the exit does not wait for them."""


def _make(call: _Call) -> None:
    future, fn, args, kwargs = call
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as exc:
        future.set_exception(exc)
        del call, future  # or the error keeps, by this frame, itself and all arguments
    else:
        future.set_result(result)
