"""State that belongs to a single process.

A fork copies objects but not threads, and ``os.register_at_fork`` does not fire under
uWSGI. So only the process id shows reliably that an object was made by a parent process.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")

generation: int = 0
"""Number of forks that led to this process; in the child of a task that forks, one more."""


def _count_fork() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_count_fork)


def end_child(exc: BaseException | None) -> NoReturn:
    """Exit the child process that an async task has forked, like the child of a thread.

    In that child only the event loop's thread is left. If the loop went on or was closed,
    the child would run coroutines of the parent.
    """
    try:
        if exc is not None and not isinstance(exc, SystemExit):
            traceback.print_exception(exc)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


class PerProcess(Generic[T]):
    """Holds an object for each process, made by ``make()`` on first use.

    The parent's object stays referenced in the child, but is never used there. Freeing the
    object would run finalizers of loops and threads that belong to the parent.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}
        # A lock for each process: a lock that was held during the fork is never released in
        # the child. Reentrant, since a signal handler may have interrupted the holder.
        self._locks: dict[int, threading.RLock] = {}

    def get(self) -> T:
        """Return this process's object; blocks while another thread makes the object."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            with self._lock_of(pid):
                value = self._values.get(pid)
                if value is None:
                    value = self._values.setdefault(pid, self._make())
        return value

    def peek(self) -> T | None:
        """Return this process's object, or None if not made yet; never blocks."""
        return self._values.get(os.getpid())

    def forget(self, value: T) -> None:
        """Forget ``value``, so that the next :meth:`get` of this process makes a new object.

        Does nothing if another thread has replaced ``value`` already.
        """
        pid = os.getpid()
        with self._lock_of(pid):
            if self._values.get(pid) is value:
                del self._values[pid]

    def _lock_of(self, pid: int) -> threading.RLock:
        return self._locks.setdefault(pid, threading.RLock())
