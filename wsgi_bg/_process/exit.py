"""Calls a drain at the exit of a process, if possible before executors are closed.

The interpreter exits in this order. The main thread ends; the callbacks of
``threading._register_atexit`` run on the main thread, last registered first; non-daemon
threads are joined; the callbacks of :mod:`atexit` run. :mod:`concurrent.futures` closes its
executors in a callback of ``threading._register_atexit``. Tasks may need an executor, so the
drain is a callback of the same kind, registered later and therefore called earlier.

Another non-daemon thread may still serve requests at that time. Then the first callback only
waits for the tasks submitted so far, and the drain runs in a callback of :mod:`atexit`.

No thread is started for the exit while the main thread lives: the main thread may join all
non-daemon threads (CherryPy does), and would wait for this thread.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from wsgi_bg._process import per_process

# Ids of the processes whose drain at exit is still to come.
_armed: set[int] = set()


def is_exiting() -> bool:
    """True if the main thread has ended and no further drain will come."""
    return per_process.pid() not in _armed and not threading.main_thread().is_alive()


def call_before_exit(drain: Callable[[bool], object], wait: Callable[[], object]) -> None:
    """Call ``drain(is_last)`` when this process exits, if possible while executors are open.

    ``drain(is_last)`` may be called twice, on the main thread or on a thread of its own. A
    forked child does not call ``drain``.

    :param wait: called when the main thread ends, if non-daemon threads keep the process.
    """
    pid = os.getpid()
    atexit.register(_drain, pid, drain, is_last=True)
    if not threading.main_thread().is_alive() and not _keepers():
        return  # during atexit, which may not call callbacks registered now
    _armed.add(pid)
    # Imported now, since a module that is imported later would close its executors earlier.
    # The import fails if multiprocessing does not work, if the main thread has ended, or
    # without a free file descriptor.
    with suppress(Exception):
        import concurrent.futures.process  # noqa: F401
    try:
        threading._register_atexit(_main_thread_ends, pid, drain, wait)  # type: ignore[attr-defined]  # noqa: SLF001
    except RuntimeError:  # the main thread has ended
        _drain_after_threads(pid, drain)


def _main_thread_ends(
    pid: int, drain: Callable[[bool], object], wait: Callable[[], object]
) -> None:
    if pid != os.getpid() or pid not in _armed:  # a forked child, or drained by atexit
        return
    if _keepers():
        wait()
        _drain_after_threads(pid, drain)
    else:
        _drain(pid, drain, is_last=has_no_atexit())


def _drain(pid: int, drain: Callable[[bool], object], *, is_last: bool) -> None:
    if pid != os.getpid():  # a forked child inherits the registration, but no threads
        return
    try:
        drain(is_last)
    finally:
        _armed.discard(pid)


def _drain_after_threads(pid: int, drain: Callable[[bool], object]) -> None:
    """Call ``drain()`` when all other non-daemon threads have ended, if atexit will not run."""
    if has_no_atexit():
        thread = threading.Thread(
            target=_await_threads, args=(pid, drain), name="wsgi_bg-exit", daemon=False
        )
        with suppress(RuntimeError):  # no memory for a stack
            thread.start()


def has_no_atexit() -> bool:
    """True in a process that :mod:`multiprocessing` has forked, before Python 3.13."""
    multiprocessing = sys.modules.get("multiprocessing")
    return (
        sys.version_info < (3, 13)
        and multiprocessing is not None
        and multiprocessing.parent_process() is not None
        and multiprocessing.get_start_method(allow_none=True) != "spawn"
    )


def _await_threads(pid: int, drain: Callable[[bool], object]) -> None:
    itself = threading.current_thread()
    while others := [thread for thread in _keepers() if thread is not itself]:
        others[0].join()
    _drain(pid, drain, is_last=True)


def _keepers() -> list[threading.Thread]:
    """Return the non-daemon threads that keep this process, without the main thread.

    Workers of an executor do not count: they end when the executor is closed, which happens
    after the first callback.
    """
    main = threading.main_thread()
    workers = concurrent.futures.thread._threads_queues  # noqa: SLF001
    return [
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread is not main and thread not in workers
    ]
