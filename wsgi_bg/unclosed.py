"""Responses that a server has freed without calling ``close()``.

A response may be freed inside a garbage collection, on any thread, at any allocation:
no place to take a lock or start a thread. So freeing puts it on a ``SimpleQueue``,
whose ``put`` is safe there by its documentation, and a thread takes it from there.
"""

from __future__ import annotations

import gc
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from . import log, servers, shutdown
from .ending import is_exiting
from .process import PerProcess

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from .request import Outcome, RequestTasks


_FLUSH_TIMEOUT = 1.0  # seconds


class Unclosed(NamedTuple):
    """What is left of a response that was freed."""

    tasks: RequestTasks
    environ: WSGIEnvironment
    outcome: Outcome


class _Collections:
    """Whether a garbage collection goes on; known once the first task was added.

    A collection closes generators before or after the objects that hold them, so that
    how one has ended does not show then.
    """

    are_running = False

    def note(self, phase: str, info: object) -> None:
        self.are_running = phase == "start"


collections = _Collections()


class Collector:
    """The queue and its thread; started when the first task of the process is added."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Unclosed | threading.Event] = queue.SimpleQueue()
        # Requests with tasks whose end has not come, by their id().
        self.open: dict[int, RequestTasks] = {}
        # Guards the making of a request's list. A finalizer or a signal handler that adds a
        # task may have interrupted its holder.
        self.lock = threading.RLock()
        self.has_warned = False
        self._has_thread = False
        gc.callbacks.append(collections.note)
        shutdown.arm(self.flush)

    def start(self) -> None:
        """Have a thread take from the queue; called with :attr:`lock` held."""
        if not self._has_thread and not is_exiting():
            # Without memory for a stack the next request tries again, and so does flush.
            with suppress(RuntimeError):
                thread = threading.Thread(
                    target=self._work, name="wsgi_bg-unclosed", daemon=True
                )
                thread.start()
                self._has_thread = True

    def _work(self) -> None:
        while True:
            self._take(self.queue.get())

    def flush(self) -> None:
        """Have what was freed so far handed over; blocks for a second at most."""
        if self._has_thread:
            # Behind the others: what the thread has taken is not in the queue any more.
            reached = threading.Event()
            self.queue.put(reached)
            reached.wait(_FLUSH_TIMEOUT)
        # Without a thread, or with one that runs a batch that no runner has taken.
        with suppress(queue.Empty):
            while True:
                self._take(self.queue.get_nowait())

    def _take(self, item: Unclosed | threading.Event) -> None:
        if isinstance(item, threading.Event):
            item.set()
        else:
            self._hand_over(item)

    def _hand_over(self, response: Unclosed) -> None:
        tasks, environ, outcome = response
        if not self.has_warned:
            self.has_warned = True
            log.warning(
                "%s freed a response without calling its close(), as PEP 3333 asks: its "
                "background tasks were handed over when it was freed (said once a process)",
                servers.describe(environ),
            )
        tasks.end(environ, outcome, closed=False)


collectors = PerProcess(Collector)
