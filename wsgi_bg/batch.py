"""The run of one request's tasks, as a runner gets it."""

from __future__ import annotations

from asyncio import CancelledError, current_task
from collections.abc import Callable
from contextvars import Context, copy_context
from inspect import GEN_CREATED, getgeneratorstate, isawaitable, isgenerator
from types import CoroutineType
from typing import Any

from . import portal, steps
from .asgiref_state import move_here
from .calls import Calls
from .interrupts import goes_through
from .progress import Progress
from .steps import DONE, RestOf, as_coroutine, cancellations
from .task import BackgroundTask
from .tasks import BackgroundTasks

_NOT_RUN = "it returned a generator that no one runs: nothing was done"


class Batch(Progress):
    """The tasks of one request, once it is known how the request ended.

    A task's error is reported and the next task runs, unless the task was added under
    ``stop_on_error``: then the rest is discarded, each task by name.

    :ivar response_complete: whether the server needs nothing more from the application
        to finish the response. If not, :meth:`run` must not be called before ``submit``
        has returned.
    :ivar sends: whether the runner that has it may send its tasks to another process.
    :ivar not_before: when its runner will have it begin, by :func:`time.monotonic`.
    """

    __slots__ = ("_begun", "not_before", "response_complete", "sends")

    def __init__(
        self, tasks: BackgroundTasks, *, request_failed: bool, response_complete: bool
    ) -> None:
        super().__init__(tasks, request_failed)
        self.response_complete = response_complete
        self.sends = False
        self.not_before = 0.0
        # The task whose plain function has returned an awaitable, for the portal.
        self._begun: tuple[BackgroundTask, Context, Any] | None = None

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

    def send(self) -> None:
        """Offer all tasks that are left to their runner's ``send``, in order; blocks.

        For a runner that does not wait for their turn. Those that it does not take stay.

        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            for task in self.tasks:
                if self._stopped or self._abandoned:
                    return
                self._running = task  # first, so that a signal finds its name
                if task._claim():
                    self._send_or_keep(task)
                self._running = None
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            self._tell_if_ended()  # a stop; else the batch goes on to who runs the others

    def _send_or_keep(self, task: BackgroundTask) -> None:
        calls = task._options.calls
        context = task._context or copy_context()
        try:
            if calls is None or not context.run(calls.send, task):
                task._unclaimed = True  # by who has claimed it
                return
        except BaseException as exc:
            if goes_through(exc):
                raise
            self._fail(task, context, exc)
        else:
            self.succeeded += 1
        task._context = None

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

    def _run_plain_tasks(self) -> bool:
        while (task := self._next(is_async=False)) is not None:
            context = self._of._context_of(task)
            calls = task._options.calls
            error: BaseException | None = None
            try:
                if calls is None:
                    result = context.run(task.func, *task.args, **task.kwargs)
                else:
                    result = context.run(self._make_of(calls), task)
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
            self._running = None
            if error is None:
                self.succeeded += 1
                if calls is not None:
                    context.run(calls.finished, task)
            else:
                self._fail(task, context, error)
                error = None  # or it holds itself, by this frame
        return not self.has_ended

    def _make_of(self, calls: Calls) -> Callable[[BackgroundTask], Any]:
        return calls.send_or_make if self.sends else calls.make

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
            steps.drop(context, awaitable)
        self._running = None
        self._fail(task, context, exc)

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
                    move_here(context)
                else:
                    task = self._next(is_async=True)
                    if task is None:
                        return
                    awaitable = None
                    context = self._of._context_of(task)
                calls = task._options.calls
                cancelled = False
                try:
                    if awaitable is None:
                        if calls is None:
                            awaitable = context.run(task.func, *task.args, **task.kwargs)
                        else:
                            awaitable = context.run(self._make_of(calls), task)
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
                    self._running = None
                    self._fail(task, context, exc)
                else:
                    self._running = None
                    self.succeeded += 1
                    if calls is not None:
                        context.run(calls.finished, task)
                if cancelled or cancellations(this) > 0:
                    return
        finally:
            self._tell_if_ended()
