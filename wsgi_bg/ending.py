"""The moment at which a process ends: when no thread keeps it any more.

``atexit`` does not always come: what :mod:`multiprocessing` has started, the workers of
granian among it, never calls it. All processes wait for threads that are not daemons. One
of those waits here for all the others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from . import greenlets

# The processes in which a thread still waits for the end.
_awaited: set[int] = set()


def is_exiting() -> bool:
    """Whether the interpreter is on its way out and no one will wait for a thread."""
    return os.getpid() not in _awaited and not threading.main_thread().is_alive()


def when_it_comes(call: Callable[[], object]) -> None:
    """Have ``call()`` made on a thread once the main one and all that are no daemons ended.

    The process does not end before it has returned. Nothing happens where it is too late,
    where a thread waits already (two would wait for each other), where threads are
    greenlets, for which no one would wait, and under uWSGI, whose forks Python does not
    know of: a child would wait for its parent's thread.
    """
    is_late = not threading.main_thread().is_alive() and not _keepers()
    is_useless = greenlets.are_threads() or "uwsgi" in sys.modules
    if is_late or is_useless or os.getpid() in _awaited:
        return
    _awaited.add(os.getpid())
    try:
        threading.Thread(target=_await, args=(call,), name="wsgi_bg-end", daemon=False).start()
    except RuntimeError:  # no memory for a stack
        _awaited.discard(os.getpid())


def _await(call: Callable[[], object]) -> None:
    threading.main_thread().join()
    itself = threading.current_thread()
    while others := [thread for thread in _keepers() if thread is not itself]:
        others[0].join()
    try:
        call()
    finally:
        _awaited.discard(os.getpid())


def _keepers() -> list[threading.Thread]:
    """The threads that keep this process, but for the main one."""
    main = threading.main_thread()
    return [t for t in threading.enumerate() if not t.daemon and t is not main]
