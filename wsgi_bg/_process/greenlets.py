"""Threads and waits, also under gevent, where threads are greenlets and a wait may block all.

gevent runs many greenlets on a thread, and switches between greenlets when a greenlet waits
by gevent's functions. After ``monkey.patch_all()``, waits of :mod:`threading` are gevent's, and
its threads are greenlets. Without the patch, a wait for another thread blocks all greenlets of
this thread. This module never imports gevent: if no application has, there are no greenlets.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any


def are_threads() -> bool:
    """True if a ``threading.Thread`` is a greenlet (of the thread that starts it)."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def is_on_greenlet() -> bool:
    """True if greenlets share the calling thread, so that its stack may be of any of them."""
    gevent = sys.modules.get("gevent")
    return gevent is not None and (
        are_threads() or isinstance(gevent.getcurrent(), gevent.Greenlet)
    )


def start_daemon(target: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Call ``target(*args)`` on a new daemon thread, with no context variable set.

    Free-threaded Python 3.14 and Sentry give a new thread a copy of the context in which
    ``start()`` is called. With that copy the thread would keep the first request alive as long
    as the thread lives, and Sentry would add that request to each record of the thread.

    :raises RuntimeError: if no thread can be started: there is no memory for a stack, or the
        interpreter exits.
    """
    # Python 3.11 would wait for ever for the thread to begin. (Coverage has ended then.)
    if sys.is_finalizing():  # pragma: no cover
        raise RuntimeError("can't start a thread while the interpreter exits")
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    Context().run(thread.start)
    return thread


def start_real_thread(target: Callable[[], object], name: str) -> None:
    """Call ``target()`` on a real daemon thread, even if gevent has patched threads."""

    def run() -> None:
        threading.current_thread().name = name  # gevent's thread has none
        target()

    if are_threads():
        # Locks of imports are gevent's, too. If the new thread and this thread import at once,
        # this thread may need its hub within an import; the hub's own imports then break that.
        sys.modules["gevent"].get_hub()
        sys.modules["gevent.monkey"].get_original("_thread", "start_new_thread")(run, ())
    else:
        start_daemon(run, name)


class _Event:
    """A ``threading.Event`` for waits in which a signal handler may raise.

    Such an exception can leave the lock inside a ``threading.Event`` locked, and then the
    thread that sets the event waits for ever. The methods of a ``SimpleQueue`` are atomic.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.set = partial(self._queue.put, None)  # runs no bytecode

    def clear(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def wait(self, timeout: float) -> bool:
        try:
            self._queue.get(timeout=timeout)
        except queue.Empty:
            return False
        self._queue.put(None)  # the next wait() returns at once, too
        return True


def event() -> Any:
    """Return an event that any thread may set, and whose ``wait()`` lets greenlets run."""
    gevent = sys.modules.get("gevent")
    if gevent is not None and isinstance(gevent.getcurrent(), gevent.Greenlet):
        return sys.modules["gevent.event"].Event()
    return event_for_thread()


def event_for_thread() -> Any:
    """Return an event that any thread may set, and on which a ``threading.Thread`` waits."""
    return threading.Event() if are_threads() else _Event()
