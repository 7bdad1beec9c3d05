"""The ``BackgroundTasks`` of one request, and their submission when the request ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextvars import Context
from enum import Enum
from typing import TYPE_CHECKING, Any

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import is_from_signal_handler, stops_worker
from wsgi_bg._request import arguments, invocation, servers
from wsgi_bg._request.unclosed import Collector, collectors
from wsgi_bg._tasks import successors
from wsgi_bg._tasks.background_tasks import CLOSED, ENDED, BackgroundTasks
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.current import current
from wsgi_bg._tasks.task import CRASHED, BackgroundTask
from wsgi_bg.runners.ledger import keep
from wsgi_bg.runners.pool import shared_pool

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._request.observer import Observe, RequestObserver


class Outcome(Enum):
    """How the application's call and the iteration over its body ended."""

    ABANDONED = "the server has not asked for the end of the body"
    EXHAUSTED = "the server has taken the whole body"
    RAISED = "the application has raised"


ABANDONED, EXHAUSTED, RAISED = Outcome


class RequestTasks(BackgroundTasks):
    """The ``BackgroundTasks`` that the middleware puts into the environ.

    Every request makes such an object, even if the request adds no task. To save time the
    middleware sets the slots in place of an ``__init__``, and these slots are set only when
    they are needed:

    - ``_status`` and ``_headers``: the arguments of the last call of ``start_response``;
    - ``_declared_late``: True if that call may have come after the application returned;
    - ``_collector``: of the process that added the first task; holds the request until the
      tasks begin to run;
    - ``_invocation``: the call of a serverless handler that waits for the tasks;
    - ``_is_handed_over``: True if the tasks were submitted to a runner.
    """

    __slots__ = (
        "_collector",
        "_declared_late",
        "_headers",
        "_invocation",
        "_is_handed_over",
        "_start_response",
        "_status",
    )

    _collector: Collector
    _declared_late: bool
    _headers: list[tuple[str, str]]
    _invocation: invocation.Invocation | None
    _is_handed_over: bool
    _start_response: Any  # dropped at the end: the server's function holds the environ
    _status: str

    observer: RequestObserver | None = None  # no slot: it would cost each request 3 %

    __init__: Any = object.__init__  # so that making an object calls no Python function

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Any:
        """Call the server's ``start_response`` and keep status and headers."""
        self._status = status
        self._headers = list(headers)  # the application may change its list later
        if exc_info is None:
            return self._start_response(status, headers)
        self._declared_late = True  # perhaps: the server may have sent a Content-Length
        return self._start_response(status, headers, exc_info)

    @property
    def headers(self) -> Sequence[tuple[str, str]] | None:
        """Headers of the last call of ``start_response``; None before that call."""
        return getattr(self, "_headers", None)

    def _begin(self) -> list[BackgroundTask]:
        # Make all objects that a later step may need with the first task: a garbage
        # collection that frees the response can start no thread.
        successors.begin_request()
        collector = collectors.get()
        collector.start()
        new_list = [] if self.observer is None else self.observer.new_list()
        tasks, added = collector.unfinished.setdefault(id(self), (self, new_list))
        assert tasks is self
        self._collector = collector
        self._is_handed_over = False
        self._invocation = invocation.current() if invocation.running else None
        if self._invocation is not None:
            self._invocation.begin(self)
        self._list = added  # last: a thread that sees the list sees the slots set above
        return added

    def _may_start(self) -> bool:
        return self._collector.unfinished.pop(id(self), None) is not None

    def _allow_start(self) -> None:
        assert self._list is not None
        self._collector.unfinished[id(self)] = self, self._list

    def _context_of(self, task: BackgroundTask) -> Context:
        context = super()._context_of(task)
        inside = context.get(current)
        if inside is self or (inside is not None and inside._root is self):
            return context
        context.run(current.set, self)  # the task was added in a stream or on another thread
        return context

    def _notify_failure(self, task: BackgroundTask, exc: BaseException) -> None:
        if self.observer is not None:
            self.observer.task_failed(task, exc)
        super()._notify_failure(task, exc)

    def end_if_empty(self) -> bool:
        """End the batch if no task was added; a later ``add_task`` then raises."""
        self._start_response = None
        if not self._list and self._front is None:
            self._phase = ENDED  # and look again: see BackgroundTasks.add_task
            if not self._list:
                if self._list is not None:  # the view has run all its tasks by hand
                    self._may_start()
                return True
        self._phase = CLOSED
        return False

    def end(self, environ: WSGIEnvironment, outcome: Outcome, *, closed: bool = True) -> None:
        """Submit the tasks, if any: the application is done with the request.

        May be called again if the exception of a signal handler has ended the first call.
        Parameters and exceptions are those of :meth:`submit`.
        """
        if self._phase != ENDED and not self.end_if_empty():
            self.submit(environ, outcome, closed=closed)

    def submit(
        self, environ: WSGIEnvironment, outcome: Outcome, *, closed: bool = True
    ) -> None:
        """Submit the tasks to the runner, after :meth:`end_if_empty` has returned False.

        :param closed: True if the server has called ``close()``, or an equivalent of it.
        :raises KeyboardInterrupt: or another exception that stops the server's worker.
        """
        batch = None
        try:
            if self._is_handed_over:
                return
            if self._collector.pid != os.getpid():
                return  # in a forked child: the tasks belong to the parent
            if invocation.freezes and self._invocation is None:
                invocation.warn_of_freezing(environ)
            batch = self._make_batch(environ, outcome, closed)
            if not batch.discard_excluded():
                return
            self._submit(batch)
            self._is_handed_over = True
        except BaseException as exc:
            if batch is not None and self._collector.pid == os.getpid():
                self._stop(batch, exc)
            raise

    def abandon(self) -> list[BackgroundTask]:
        """End the batch; claim and return the tasks that are left."""
        self._end()
        return [task for task in self._left() if task._claim()]

    def end_unclosed(self, *, failed: bool) -> None:
        """End a request whose response was neither closed nor freed."""
        self.end({}, RAISED if failed else ABANDONED, closed=False)

    def _make_batch(self, environ: WSGIEnvironment, outcome: Outcome, closed: bool) -> Batch:
        status = self._status
        complete = closed and (
            (
                outcome is EXHAUSTED
                and servers.is_written(
                    environ,
                    status,
                    getattr(self, "_headers", ()),
                    declared_late=getattr(self, "_declared_late", False),
                )
            )
            or servers.is_test_client(environ)
        )
        return Batch(
            self,
            response_complete=complete,
            status=CRASHED if outcome is RAISED else _code_of(status),
        )

    def _submit(self, batch: Batch) -> None:
        runner = self._options.runner
        assert runner is not None
        if self._invocation is not None:
            self._await(batch)
        batch.sends = hasattr(runner, "send")
        try:
            arguments.look_at(self._list or ())
            if self.observer is None:
                runner.submit(batch)
                if not batch.is_kept:
                    keep(batch)
            else:
                self.observer.submit(batch, runner)
        except BaseException as exc:
            if is_from_signal_handler(exc) or self._collector.pid != os.getpid():
                raise
            if id(self) not in self._collector.unfinished:  # the batch has begun all the same
                log.error("%s raised in submit()", runner, exc_info=exc)
                return
            log.error(
                "%s did not take %s, which run in this process",
                runner,
                ", ".join(task.name for task in batch.tasks),
                exc_info=exc,
            )
            again = self._await(batch.again())
            if batch.response_complete:
                again.run()
            else:
                shared_pool.submit(again)

    def _await(self, batch: Batch) -> Batch:
        """Let the invocation of the request, if any, wait for ``batch``, and return it."""
        if self._invocation is not None:
            self._invocation.hand_over(self, batch)
        return batch

    def _stop(self, batch: Batch, exc: BaseException) -> None:
        """Stop or resubmit the tasks whose submission was interrupted by ``exc``."""
        self._is_handed_over = True
        if not self._may_start():
            # The tasks run, on some thread, or are done, or were logged as unfinished.
            batch.notify_if_ended()  # what was interrupted may have been this call
            return
        if stops_worker(exc):
            batch.stop(exc)
        else:  # perhaps a time limit, which stops this thread and not the tasks
            batch.unclaim_running()
            self._allow_start()
            shared_pool.submit(self._await(batch.again()))


class ObservedTasks(RequestTasks):
    """The ``BackgroundTasks`` of an observed request: see :mod:`wsgi_bg._request.observer`."""

    __slots__ = ("observer",)

    def __init__(self, observe: Observe, environ: WSGIEnvironment) -> None:
        self.observer = observe(self, environ)


def _code_of(status: str) -> int:
    """The status code; 0 if the status has no code, as before ``start_response``."""
    try:
        return int(status[:3])
    except ValueError:
        return 0
