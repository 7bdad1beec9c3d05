"""Responses that a server has freed without calling ``close()``.

A response may be freed inside a garbage collection, on any thread, at any allocation:
no place to take a lock or start a thread. So freeing puts it on a ``SimpleQueue``,
whose ``put`` is safe there by its documentation, and a thread takes it from there.
"""

from __future__ import annotations

import gc
import os
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from . import log, servers, shutdown
from .ending import is_exiting
from .interrupts import goes_through
from .process import PerProcess
from .threads import start_daemon

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from .request import Outcome, RequestTasks
    from .task import BackgroundTask


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

    are_running: bool = False

    def note(self, phase: str, info: object) -> None:
        self.are_running = phase == "start"


collections: _Collections = _Collections()


class Collector:
    """The queue and its thread; started when the first task of the process is added."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.queue: queue.SimpleQueue[Unclosed | threading.Event] = queue.SimpleQueue()
        # The requests whose tasks nobody has begun to run, by their id, with the list of
        # these tasks. Whoever pops a request runs or names its tasks.
        self.unfinished: dict[int, tuple[RequestTasks, list[BackgroundTask]]] = {}
        self.has_warned: bool = False
        self._has_thread = False
        gc.callbacks.append(collections.note)
        shutdown.arm(self.flush, self.abandon)

    def start(self) -> None:
        """Let a thread take from the queue.

        Without memory for a stack the next request tries again, and so does :meth:`flush`.
        Two requests that come at once may start two threads, which does no harm.
        """
        if not self._has_thread and not is_exiting():
            with suppress(RuntimeError):
                start_daemon(self._work, "wsgi_bg-unclosed")
                self._has_thread = True

    def _work(self) -> None:
        try:
            while True:
                self._take_next()
        finally:
            self._has_thread = False

    def _take_next(self) -> None:
        try:
            self._take(self.queue.get())
        except BaseException as exc:
            if goes_through(exc):
                raise
            log.error("the thread for unclosed responses raised", exc_info=exc)

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

    def abandon(self) -> list[BackgroundTask]:
        """Claim and return the tasks of requests that are not over, or were not handed over."""
        left: list[BackgroundTask] = []
        while self.unfinished:
            with suppress(KeyError):
                _, (tasks, _) = self.unfinished.popitem()
                tasks._end()
                left += [task for task in tasks._left() if task._claim()]
        return left


collectors: PerProcess[Collector] = PerProcess(Collector)
