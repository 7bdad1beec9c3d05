"""The run of one request's tasks, as a runner gets it."""

from __future__ import annotations

from asyncio import CancelledError, current_task
from collections.abc import Callable
from contextvars import Context
from inspect import GEN_CREATED, getgeneratorstate, isawaitable, isgenerator
from types import CoroutineType
from typing import Any

from . import portal, report
from .interrupts import goes_through
from .steps import DONE, RestOf, as_coroutine, cancellations
from .task import BackgroundTask
from .tasks import CLOSED, ENDED, BackgroundTasks

_NOT_RUN = "it returned a generator that no one runs: nothing was done"


class Batch:
    """The tasks of one request, once it is known how the request ended.

    A task's error is reported and the next task runs, unless the task was added under
    ``stop_on_error``: then the rest is discarded, each task by name.

    :ivar response_complete: whether the server needs nothing more from the application
        to finish the response. If not, :meth:`run` must not be called before ``submit``
        has returned.
    :ivar not_before: when its runner will have it begin, by :func:`time.monotonic`.
    :ivar succeeded: how many tasks have returned.
    :ivar failed: how many have raised.
    :ivar discarded: how many will not run.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_begun",
        "_index",
        "_list",
        "_of",
        "_request_failed",
        "_running",
        "_stopped",
        "_when_done",
        "discarded",
        "failed",
        "not_before",
        "response_complete",
        "succeeded",
    )

    def __init__(
        self, tasks: BackgroundTasks, *, request_failed: bool, response_complete: bool
    ) -> None:
        self.response_complete = response_complete
        self.not_before = 0.0
        self.succeeded = self.failed = self.discarded = 0
        self._of = tasks
        self._list = tasks.tasks
        self._request_failed = request_failed
        self._index = 0
        self._running: BackgroundTask | None = None
        self._begun: tuple[BackgroundTask, Context, Any] | None = None
        self._stopped = self._abandoned = False
        self._when_done: tuple[Callable[[Batch], None], ...] = ()
        for task in self._list:
            if not task._options.runs_after[request_failed] and task._claim():
                self._discard(task)

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are to run and have not finished, the running one first."""
        waiting = [task for task in self._list[self._index :] if task._is_unclaimed]
        running = self._running  # now: one that begins is running before it is claimed
        if running is None or running in waiting:  # it was claimed meanwhile
            return waiting
        return [running, *waiting]

    @property
    def is_running(self) -> bool:
        """Whether a task is running now."""
        return self._running is not None

    @property
    def has_ended(self) -> bool:
        """Whether no further task will begin."""
        return self._of._phase == ENDED

    @property
    def next_is_async(self) -> bool | None:
        """Whether the next task is for the portal; None if there is none."""
        for index in range(self._index, len(self._list)):
            if self._list[index]._is_unclaimed:
                return self._list[index].is_async
        return None

    def run(self) -> None:
        """Run the tasks in order, what they add included; blocks until all are done.

        Plain functions run on the calling thread, async ones on the portal, consecutive
        ones in one trip.

        :raises KeyboardInterrupt: or what else stops the server's worker (see
            :mod:`wsgi_bg.interrupts`), after the tasks left undone were named; never a
            task's own error.
        """
        while self.run_plain():
            self._make_trip()

    def run_plain(self) -> bool:
        """Run the plain tasks that come next, on the calling thread; blocks.

        :return: whether :meth:`run_async` is to go on.
        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            return self._run_plain_tasks()
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            self._tell_if_ended()

    def when_done(self, tell: Callable[[Batch], None]) -> None:
        """Have ``tell(batch)`` called when the last task is done, on its thread."""
        self._when_done += (tell,)

    def _tell_if_ended(self) -> None:
        if self.has_ended:
            when_done, self._when_done = self._when_done, ()
            for tell in when_done:
                tell(self)

    def abandon(self) -> list[BackgroundTask]:
        """Begin no further task; return those left undone, the running one first."""
        was_abandoned = self._abandoned
        self._abandoned = True
        self._of._phase = ENDED  # and look then: no task is added any more
        return [] if was_abandoned else self.tasks

    def _next(self, *, is_async: bool) -> BackgroundTask | None:
        """Claim the next task, if it is of this kind; where there is none, end the batch."""
        of, tasks = self._of, self._list
        while not self._abandoned:
            if self._index >= len(tasks):
                of._phase = ENDED  # and look again: see BackgroundTasks.add_task
                if self._index >= len(tasks) or self._abandoned:
                    return None
                of._phase = CLOSED
            task = tasks[self._index]
            is_to_run = not self._stopped and task._options.runs_after[self._request_failed]
            if is_to_run and task.is_async is not is_async and task._is_unclaimed:
                return None
            self._running = task  # first, so that a signal finds its name
            self._index += 1
            try:
                del task._unclaimed  # task._claim(), without the call
            except AttributeError:
                pass
            else:
                if is_to_run:
                    return task
                self._discard(task)
            self._running = None
        of._phase = ENDED  # again: abandon() may have come between the look and CLOSED
        return None

    def _run_plain_tasks(self) -> bool:
        while (task := self._next(is_async=False)) is not None:
            context = self._of._context_of(task)
            error: BaseException | None = None
            try:
                result = context.run(task.func, *task.args, **task.kwargs)
                if result is not None:
                    if isawaitable(result):
                        self._begun = task, context, result
                        return True
                    if isgenerator(result) and getgeneratorstate(result) == GEN_CREATED:
                        error = TypeError(_NOT_RUN)
            except BaseException as exc:
                if goes_through(exc):
                    raise
                error = exc
            if error is None:
                self.succeeded += 1
            else:
                self._fail(task, context, error)
            self._running = None
        return not self.has_ended

    def _make_trip(self) -> None:
        """Have the async tasks that come next run on the portal; wait for them."""
        try:
            portal.run(self.run_async, interrupted=self.stop_for)
        except Exception as exc:  # no loop to be had, or one that was ended
            self._fail_next(exc)
        finally:
            self._tell_if_ended()

    def _fail_next(self, exc: Exception) -> None:
        """Without a loop: the task that should have run on it has failed."""
        # Abandoned by a drain whose time was up, and which named the tasks?
        task = None if self._abandoned else self._running or self._next(is_async=True)
        if task is None:
            return
        context = self._of._context_of(task)
        if self._begun is not None:
            _, context, awaitable = self._begun
            self._begun = None
            if isinstance(awaitable, CoroutineType):
                awaitable.close()  # or Python warns that it was never awaited
        self._fail(task, context, exc)
        self._running = None

    async def run_async(self) -> None:
        """Run the async tasks that come next; on the portal's thread.

        Where a task is cancelled it ends early, for the next tasks to run in an asyncio
        task that is not.
        """
        this = current_task()
        try:
            task: BackgroundTask | None
            while True:
                if self._begun is not None:  # what a plain function has returned
                    task, context, awaitable = self._begun
                    self._begun = None
                else:
                    task = self._next(is_async=True)
                    if task is None:
                        return
                    awaitable = None
                    context = self._of._context_of(task)
                cancelled = False
                try:
                    if awaitable is None:
                        awaitable = context.run(task.func, *task.args, **task.kwargs)
                    if type(awaitable) is not CoroutineType:
                        awaitable = as_coroutine(awaitable)
                    # The first step, and for a coroutine that waits for nothing the last.
                    waits_for = context.run(next, awaitable.__await__(), DONE)
                    if waits_for is not DONE:
                        await RestOf(context, awaitable, waits_for)
                except BaseException as exc:
                    cancelled = isinstance(exc, CancelledError)
                    if cancelled and self._abandoned:
                        raise
                    self._fail(task, context, exc)
                else:
                    self.succeeded += 1
                self._running = None
                if cancelled or cancellations(this) > 0:
                    return
        finally:
            self._tell_if_ended()

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
            self.discarded += 1
            report.stopped(task, exc, began=task is running)
        if not self.is_running:  # perhaps no one else does: the hand-over was stopped
            self._tell_if_ended()

    def __repr__(self) -> str:
        names = ", ".join(task.name for task in self.tasks)
        return f"<{type(self).__name__} [{names}]>"
