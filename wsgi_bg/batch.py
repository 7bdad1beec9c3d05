"""The run of one request's tasks, as a runner gets it."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from contextvars import Context
from inspect import GEN_CREATED, getgeneratorstate, isawaitable, isgenerator
from types import CoroutineType
from typing import Any

from . import portal, report, steps
from .interrupts import goes_through
from .task import BackgroundTask
from .tasks import CLOSED, ENDED, BackgroundTasks


class Batch:
    """The tasks of one request, once it is known how the request ended.

    A task's error is reported and the next task runs, unless the task was added under
    ``stop_on_error``: then the rest is discarded, each task by name.

    :ivar response_complete: whether the server needs nothing more from the application
        to finish the response. If not, :meth:`run` must not be called before ``submit``
        has returned.
    :ivar succeeded: how many tasks have returned.
    :ivar failed: how many have raised.
    :ivar discarded: how many will not run.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_index",
        "_list",
        "_of",
        "_request_failed",
        "_running",
        "_stopped",
        "_when_done",
        "discarded",
        "failed",
        "response_complete",
        "succeeded",
    )

    def __init__(
        self, tasks: BackgroundTasks, *, request_failed: bool, response_complete: bool
    ) -> None:
        self.response_complete = response_complete
        self.succeeded = self.failed = self.discarded = 0
        self._of = tasks
        self._list = tasks.tasks
        self._request_failed = request_failed
        self._index = 0
        self._running: BackgroundTask | None = None
        self._stopped = self._abandoned = False
        self._when_done: list[Callable[[Batch], None]] = []
        for task in self._list:
            if not task._options.runs_after[request_failed] and task._claim():
                self._discard(task)

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are to run and have not finished, the running one first."""
        running = self._running
        waiting = [task for task in self._list[self._index :] if task._is_unclaimed]
        if running is None or running in waiting:  # it was claimed meanwhile
            return waiting
        return [running, *waiting]

    @property
    def is_running(self) -> bool:
        """Whether a task is running now."""
        return self._running is not None

    def run(self) -> None:
        """Run the tasks in order, what they add included; blocks until all are done.

        Plain functions run on the calling thread, async ones on the portal, consecutive
        ones in one trip.

        :raises KeyboardInterrupt: or what else stops the server's worker (see
            :mod:`wsgi_bg.interrupts`), after the tasks left undone were named; never a
            task's own error.
        """
        try:
            while (task := self._next()) is not None:
                if task.is_async:
                    self._make_trip(task)
                else:
                    self._run_plain(task)
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            for tell in self._when_done:
                tell(self)

    def when_done(self, tell: Callable[[Batch], None]) -> None:
        """Have ``tell(batch)`` called when :meth:`run` ends, on its thread."""
        self._when_done.append(tell)

    def abandon(self) -> list[BackgroundTask]:
        """Begin no further task; return those left undone, the running one first."""
        left = [] if self._abandoned else self.tasks
        self._abandoned = True
        self._of._phase = ENDED
        return left

    def _next(self, *, only_async: bool = False) -> BackgroundTask | None:
        """Claim the next task that is to run; where there is none, end the batch."""
        of, tasks = self._of, self._list
        while not self._abandoned:
            if self._index >= len(tasks):
                if only_async:
                    return None
                of._phase = ENDED  # and look again: see BackgroundTasks.add_task
                if self._index >= len(tasks) or self._abandoned:
                    return None
                of._phase = CLOSED
            task = tasks[self._index]
            if only_async and not task.is_async:
                return None
            self._running = task  # first, so that a signal finds its name
            self._index += 1
            try:
                del task._unclaimed  # task._claim(), without the call
            except AttributeError:
                pass
            else:
                if not self._stopped and task._options.runs_after[self._request_failed]:
                    return task
                self._discard(task)
            self._running = None
        return None

    def _run_plain(self, task: BackgroundTask) -> None:
        context = self._of._context_of(task)
        error: BaseException | None = None
        try:
            result = context.run(task.func, *task.args, **task.kwargs)
            if result is not None:
                error = self._await(context, result)
        except BaseException as exc:
            if goes_through(exc):
                raise
            error = exc
        if error is None:
            self.succeeded += 1
        else:
            self._fail(task, context, error)
        self._running = None

    def _await(self, context: Context, result: Any) -> BaseException | None:
        """What came of a plain function's result, if there was more to do than to make it."""
        if isawaitable(result):
            return portal.wait_for(context, result)[1]
        if isgenerator(result) and getgeneratorstate(result) == GEN_CREATED:
            return TypeError("it returned a generator that no one runs: nothing was done")
        return None

    def _make_trip(self, task: BackgroundTask) -> None:
        """Have ``task`` and the async tasks behind it run on the portal; wait for them."""
        try:
            portal.run(self._run_async, task, interrupted=self.stop_for)
        except Exception as exc:  # no loop to be had, or one that was ended
            if self._abandoned:  # by a drain whose time was up, and which named the tasks
                return
            task = self._running or task
            self._fail(task, self._of._context_of(task), exc)
            self._running = None

    async def _run_async(self, first: BackgroundTask) -> None:
        """Run async tasks one after another; on the portal's thread."""
        cancellations = steps.cancellations_of_current_task()
        task: BackgroundTask | None = first
        while task is not None:
            context = self._of._context_of(task)
            try:
                coroutine = context.run(task.func, *task.args, **task.kwargs)
                if type(coroutine) is not CoroutineType:
                    coroutine = steps.as_coroutine(coroutine)
                # The first step, and for a coroutine that waits for nothing the last.
                waits_for = context.run(next, coroutine.__await__(), steps.DONE)
                if waits_for is not steps.DONE:
                    await steps.rest_of(context, coroutine, waits_for)
            except BaseException as exc:
                cancelled = isinstance(exc, CancelledError)
                if cancelled and self._abandoned:
                    raise
                self._fail(task, context, exc)
            else:
                self.succeeded += 1
                cancelled = False
            self._running = None
            if cancelled or cancellations() > 0:
                return  # the next trip is a new asyncio task, without this one's cancellation
            task = self._next(only_async=True)

    def _fail(self, task: BackgroundTask, context: Context, exc: BaseException) -> None:
        self.failed += 1
        if task._options.stop_on_error:
            self._stopped = True
        context.run(report.failure, task, exc)

    def _discard(self, task: BackgroundTask) -> None:
        self.discarded += 1
        if self._stopped:
            reason = "a task before it failed, with stop_on_error set"
        else:
            ending = "failed" if self._request_failed else "succeeded"
            reason = f"the request {ending}, and run_on is {task._options.run_on!r}"
        self._of._context_of(task).run(report.not_run, task, reason)

    def stop_for(self, exc: BaseException) -> None:
        """Begin no further task, since ``exc`` stops the worker, and name those left."""
        running = self._running
        for task in self.abandon():
            report.stopped(task, exc, began=task is running)

    def __repr__(self) -> str:
        names = ", ".join(task.name for task in self.tasks)
        return f"<{type(self).__name__} [{names}]>"
