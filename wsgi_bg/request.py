"""The ``BackgroundTasks`` of one request, and how the request's end reaches the runner."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import Context
from enum import Enum
from typing import TYPE_CHECKING, Any

from . import invocation, log, servers
from .batch import Batch
from .context import current
from .interrupts import goes_through
from .runners.pool import shared_pool
from .task import BackgroundTask
from .tasks import CLOSED, ENDED, BackgroundTasks
from .unclosed import collectors

if TYPE_CHECKING:
    from queue import SimpleQueue

    from _typeshed.wsgi import WSGIEnvironment

    from .runners import Runner


class Outcome(Enum):
    """How the application's call and the iteration over its body ended."""

    LEFT = "the server has not asked for the end of the body"
    USED_UP = "the server has taken the whole body"
    RAISED = "the application has raised"


LEFT, USED_UP, RAISED = Outcome

stand_in: Callable[[Runner], Runner] | None = None
"""What gives the runner to use in place of a request's own: the pytest plugin's."""


class RequestTasks(BackgroundTasks):
    """What the middleware puts into the environ.

    It is made for every request, those that add no task included, so its middleware
    fills it in place of an ``__init__`` and some slots are not set before they are
    needed: ``_status`` and ``_headers``, what ``start_response`` was last called with;
    ``_pid``, the process that added the first task; ``_unclosed``, the queue for a
    response that is freed without ``close()``; ``_all_open``, the requests of the process
    that have tasks and have not ended, this one among them; ``_invocation``, the call of a
    serverless handler that waits for the tasks.
    """

    __slots__ = (
        "_all_open",
        "_headers",
        "_invocation",
        "_pid",
        "_start_response",
        "_status",
        "_unclosed",
    )

    _all_open: dict[int, RequestTasks]
    _headers: list[tuple[str, str]]
    _invocation: invocation.Invocation | None
    _pid: int
    _start_response: Any  # dropped in the end: a server's holds the environ
    _status: str
    _unclosed: SimpleQueue[Any]

    __init__ = object.__init__  # so that to make one calls no Python function

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Any:
        """The server's ``start_response``, watched."""
        self._status = status
        self._headers = headers
        if exc_info is None:
            return self._start_response(status, headers)
        return self._start_response(status, headers, exc_info)

    def _begin(self) -> list[BackgroundTask]:
        # Everything that a later step may need is made here, with the first task: a
        # garbage collection that frees the response can start no thread.
        collector = collectors.get()
        with collector.lock:
            collector.start()
            if self._list is None:
                self._pid = os.getpid()
                self._unclosed = collector.queue
                self._all_open = collector.open
                self._all_open[id(self)] = self
                self._invocation = invocation.current() if invocation.running else None
                if self._invocation is not None:
                    self._invocation.begin(self)
                self._list = []
            return self._list

    def _context_of(self, task: BackgroundTask) -> Context:
        context = super()._context_of(task)
        inside = context.get(current)
        if inside is None or inside._root is not self:  # added in a stream, another thread
            context.run(current.set, self)
        return context

    def end_if_empty(self) -> bool:
        """End the batch if no task was added; a later ``add_task`` then raises.

        :return: True if there is nothing to give to the runner, or not any more.
        """
        self._start_response = None
        if not self._list:
            self._phase = ENDED  # and look again: see BackgroundTasks.add_task
        if self._list:
            if self._phase == ENDED and id(self) not in self._all_open:
                return True
            self._phase = CLOSED
            return False
        self.leave_open_requests()
        return True

    def leave_open_requests(self) -> None:
        """Forget the request, whose list was made and is empty."""
        if self._list is not None:
            self._all_open.pop(id(self), None)

    def end(self, environ: WSGIEnvironment, outcome: Outcome, *, closed: bool = True) -> None:
        """Give the tasks to the runner, now that the application has nothing more to say.

        :param closed: whether this is the server's call of ``close()``, or as good as it.
        :raises KeyboardInterrupt: or what else stops the server's worker.
        """
        # dict.pop is atomic: two threads never end the same request.
        if self.end_if_empty() or self._all_open.pop(id(self), None) is None:
            return
        if self._pid != os.getpid():
            return  # in a forked child the tasks are the parent's
        status = getattr(self, "_status", "")
        failed = outcome is RAISED or status[:3] >= "500"
        complete = closed and (
            servers.is_test_client(environ)
            or (
                outcome is USED_UP
                and servers.is_written(environ, status, getattr(self, "_headers", ()))
            )
        )
        batch = Batch(self, request_failed=failed, response_complete=complete)
        runner = self._options.runner
        assert runner is not None
        if self._invocation is not None:
            self._invocation.hand_over(self, batch)
        elif invocation.freezes:
            invocation.warn_of_freezing(environ)
        in_place = stand_in  # once: another thread may end the test meanwhile
        if in_place is not None:
            runner = in_place(runner)
        batch.sends = hasattr(runner, "send")
        try:
            runner.submit(batch)
        except BaseException as exc:
            if goes_through(exc):
                batch.stop_for(exc)
                raise
            log.error(
                "%s did not take %s, which run in this process",
                runner,
                [task.name for task in batch.tasks],
                exc_info=exc,
            )
            if batch.response_complete:
                batch.run()
            else:
                shared_pool.submit(batch)

    def end_unclosed(self, *, failed: bool = False) -> None:
        """End the request, whose response was neither closed nor freed."""
        self.end({}, RAISED if failed else LEFT, closed=False)


def end_open_requests() -> None:
    """End every request of this process that has tasks and whose response was not closed.

    Its tasks go to the runner as those of a response that was freed without ``close()``.
    For the end of the process: a request whose view still runs is ended too.
    """
    collector = collectors.get()
    collector.flush()  # first: how the body of a freed response has ended is known there
    for tasks in list(collector.open.values()):
        tasks.end_unclosed()
