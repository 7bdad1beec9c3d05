"""State that belongs to a single process.

A fork copies objects but not threads, and ``os.register_at_fork`` does not fire under
uWSGI. So only the process id shows reliably that an object was made by a parent process.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")

generation: int = 0
"""Number of forks that led to this process; in the child of a task that forks, one more."""


def _count_fork() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_count_fork)

_MADV_WIPEONFORK = 18  # linux/mman.h; the module mmap has no name for it


def _make_mark() -> tuple[mmap.mmap | bytearray, int]:
    """Return a byte, and the number that marks this process in the byte.

    Linux clears the byte in each forked child, also if C code has forked. On other systems the
    number is 0, which marks nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # before Linux 4.14
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            page.madvise(_MADV_WIPEONFORK)
            return page, 1
    return bytearray(1), 0


_mark, _MARKED = _make_mark()
_pid = 0


def pid() -> int:
    """Return the id of this process.

    ``os.getpid()`` is a system call: with it, a request with one inline task takes 8 % longer.
    """
    return _pid if _mark[0] else _note_pid()


def _note_pid() -> int:
    global _pid
    _pid = os.getpid()
    _mark[0] = _MARKED  # last: from now on other threads read _pid
    return _pid


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
        number = _pid if _mark[0] else _note_pid()  # pid(), without a call
        value = self._values.get(number)
        if value is None:
            with self._lock_of(number):
                value = self._values.get(number)
                if value is None:
                    value = self._values.setdefault(number, self._make())
        return value

    def peek(self) -> T | None:
        """Return this process's object, or None if not made yet; never blocks."""
        return self._values.get(pid())

    def forget(self, value: T) -> None:
        """Forget ``value``, so that the next :meth:`get` of this process makes a new object.

        Does nothing if another thread has replaced ``value`` already.
        """
        number = pid()
        with self._lock_of(number):
            if self._values.get(number) is value:
                del self._values[number]

    def lock(self) -> threading.RLock:
        """Return the lock that a thread of this process holds while it makes the object."""
        return self._lock_of(pid())

    def _lock_of(self, number: int) -> threading.RLock:
        return self._locks.setdefault(number, threading.RLock())
