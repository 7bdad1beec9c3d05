"""State that belongs to one process.

A fork copies objects but not threads, and ``os.register_at_fork`` does not fire under
uWSGI, so the process id is the only sure sign that what lies here is a parent's.
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
"""How many forks led to this process; a task that forks returns in its child with another."""


def _count_fork() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_count_fork)


def end_child(exc: BaseException | None) -> NoReturn:
    """End the child that an async task has forked, as a child ends that a thread has forked.

    Only the event loop's thread is left in that child. To go on, or to end the loop, would
    run the parent's other coroutines there.
    """
    try:
        if exc is not None and not isinstance(exc, SystemExit):
            traceback.print_exception(exc)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


class PerProcess(Generic[T]):
    """One ``T`` a process, made by ``make()`` on first use.

    A parent's object stays referenced in the child and is never used there: to free it
    would run the finalizers of loops and threads that are not the child's.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}
        # A lock a process: one that was held during the fork is never released here.
        # It can be taken again, since a signal handler may have interrupted its holder.
        self._locks: dict[int, threading.RLock] = {}

    def get(self) -> T:
        """This process's object; from any thread, blocks while another one makes it."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            with self._lock_of(pid):
                value = self._values.get(pid)
                if value is None:
                    value = self._values.setdefault(pid, self._make())
        return value

    def peek(self) -> T | None:
        """This process's object if there is one; never blocks and never makes one."""
        return self._values.get(os.getpid())

    def forget(self, value: T) -> None:
        """Make a new object at the next :meth:`get` of this process, in place of ``value``.

        Nothing happens where another thread has done it: what is there now is of use.
        """
        pid = os.getpid()
        with self._lock_of(pid):
            if self._values.get(pid) is value:
                del self._values[pid]

    def _lock_of(self, pid: int) -> threading.RLock:
        return self._locks.setdefault(pid, threading.RLock())
