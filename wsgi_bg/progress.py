"""How far a request's tasks have come: which are done, which one runs, which is next."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any

from . import report
from .task import BackgroundTask
from .tasks import CLOSED, ENDED, BackgroundTasks


class Progress:
    """The tasks of one request, each of which is claimed, and then done or discarded.

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
        "succeeded",
    )

    def __init__(self, tasks: BackgroundTasks, request_failed: bool) -> None:
        self.succeeded = self.failed = self.discarded = 0
        self._of = tasks
        self._list = tasks.tasks
        self._request_failed = request_failed
        self._index = 0
        self._running: BackgroundTask | None = None
        self._stopped = self._abandoned = False
        self._when_done: tuple[Callable[[Any], None], ...] = ()
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
            task = self._list[index]
            if hasattr(task, "_unclaimed"):  # task._is_unclaimed, without the call
                return task.is_async
        return None

    def when_done(self, tell: Callable[[Any], None]) -> None:
        """Have ``tell(batch)`` called when the last task is done, on its thread."""
        self._when_done += (tell,)

    @property
    def is_watched(self) -> bool:
        """True if something will be called when the last task is done."""
        return bool(self._when_done)

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
