"""Responses that a server has freed without calling ``close()``.

A response may be freed inside a garbage collection, on any thread, at any allocation. A
finalizer must take no lock and start no thread there. So the finalizer puts the response on
a ``SimpleQueue``, whose ``put`` is documented as safe in finalizers, and a thread reads the
queue.
"""

from __future__ import annotations

import gc
import os
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wsgi_bg._process import log
from wsgi_bg._process.exit import is_exiting
from wsgi_bg._process.greenlets import event, start_daemon
from wsgi_bg._process.interrupts import is_raised_here, stops_worker
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._request import servers
from wsgi_bg.runners import shutdown

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.task import BackgroundTask


_FLUSH_TIMEOUT = 1.0  # seconds


class Outcome(Enum):
    """How the application's call and the iteration over its body ended."""

    UNREAD = "the server has not asked for the body"
    ABANDONED = "the server has not asked for the end of the body"
    EXHAUSTED = "the server has taken the whole body"
    RAISED = "the application has raised"


UNREAD, ABANDONED, EXHAUSTED, RAISED = Outcome


class Unclosed(NamedTuple):
    """A response that was freed."""

    end: Callable[..., None]
    """Ends the request: ``end(environ, outcome, closed=False)``."""
    environ: WSGIEnvironment
    outcome: Outcome


class UnfinishedRequest(Protocol):
    """The tasks of a request, which no thread has begun to run."""

    @property
    def is_being_submitted(self) -> bool:
        """True if a thread ends the request now, and has not submitted its tasks yet."""

    def abandon(self) -> list[BackgroundTask]:
        """End the batch; claim and return the tasks that are left."""


class _Collections:
    """Tells if a garbage collection is running, from the first task of the process on.

    A collection closes generators before or after the objects that hold them. So during a
    collection a closed generator does not show how its iteration has ended.
    """

    are_running: bool = False

    def note(self, phase: str, info: object) -> None:
        self.are_running = phase == "start"


collections: _Collections = _Collections()


class Collector:
    """The queue and its thread, which starts when the first task of the process is added."""

    def __init__(self) -> None:
        self.pid: int = os.getpid()
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # By id of the request: the requests whose tasks no thread has begun to run, with the
        # list of these tasks. The thread that pops a request runs its tasks or logs them.
        self.unfinished: dict[int, tuple[UnfinishedRequest, list[BackgroundTask]]] = {}
        self.has_warned: bool = False
        self._right_to_start: list[None] = [None]  # popped by the thread that starts the thread
        for begin in on_first_task:
            begin()
        gc.callbacks.append(collections.note)
        shutdown.register_drain(self.flush, self.abandon)

    def start(self) -> None:
        """Start the thread that reads the queue.

        If there is no memory for a stack, the next request tries again. :meth:`flush` then
        reads the queue itself.
        """
        if not self._right_to_start or is_exiting():
            return
        try:
            self._right_to_start.pop()
        except IndexError as exc:
            if not is_raised_here(exc):
                raise
            return  # another thread was as quick
        try:
            start_daemon(self._work, "wsgi_bg-unclosed")
        except BaseException as exc:
            self._right_to_start.append(None)
            if not isinstance(exc, RuntimeError):
                raise

    @property
    def _has_thread(self) -> bool:
        return not self._right_to_start

    def _work(self) -> None:
        try:
            while True:
                self._take_next()
        finally:
            self._right_to_start.append(None)

    def _take_next(self) -> None:
        try:
            self._take(self.queue.get())
        except BaseException as exc:
            if stops_worker(exc):
                raise
            log.error("the thread for unclosed responses raised", exc_info=exc)

    def flush(self) -> None:
        """Hand over the responses that were freed so far, and wait for calls of ``close()``.

        Blocks for two seconds at most. A server may end the main thread as soon as the last
        client has its response, while a thread is about to submit the tasks.
        """
        if self._has_thread:
            # Last in the queue: when the thread sets the event, it has handled all before.
            reached = event()
            self.queue.put(reached)
            reached.wait(_FLUSH_TIMEOUT)
        # If there is no thread, or the thread runs a batch that no runner accepted.
        with suppress(queue.Empty):
            while True:
                self._take(self.queue.get_nowait())
        pause, deadline = event(), time.monotonic() + _FLUSH_TIMEOUT
        while self._are_being_submitted() and time.monotonic() < deadline:
            pause.wait(0.001)

    def _are_being_submitted(self) -> bool:
        return any(tasks.is_being_submitted for tasks, _ in list(self.unfinished.values()))

    def _take(self, item: Any) -> None:
        if isinstance(item, Unclosed):
            self._hand_over(item)
        else:  # the event of flush()
            item.set()

    def _hand_over(self, response: Unclosed) -> None:
        end, environ, outcome = response
        if not self.has_warned:
            self.has_warned = True
            log.warning(
                "%s freed a response without calling its close(), as PEP 3333 asks: its "
                "background tasks were handed over when it was freed (said once a process)",
                servers.describe(environ),
            )
        end(environ, outcome, closed=False)

    def abandon(self) -> list[BackgroundTask]:
        """Claim and return the tasks of requests that are open or were not handed over."""
        left: list[BackgroundTask] = []
        while self.unfinished:
            with suppress(KeyError):
                _, (tasks, _) = self.unfinished.popitem()
                left += tasks.abandon()
        return left


collectors: PerProcess[Collector] = PerProcess(Collector)

on_first_task: list[Callable[[], object]] = []
"""Functions to call with the first task of a process, a forked child for example."""
