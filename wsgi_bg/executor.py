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


class LoopExecutor(ThreadPoolExecutor):
    """Daemon threads behind the one interface that asyncio takes for a default executor."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)  # which starts none before its own submit()
        self._workers = Workers[Callable[[], None]](
            lambda work: work(), min(32, (os.cpu_count() or 1) + 4), "wsgi_bg-loop"
        )

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call ``fn(*args, **kwargs)`` on a thread; where there is none, right here."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)

        if not self._workers.take(work):
            work()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the threads end on their own, and exit does not wait for them."""
