"""How a task is called where its layer has hooks, or something that goes around tasks.

Most layers have neither: their tasks are called as they are, and nothing here runs.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from .hooks import Hooks, TaskRecord
from .interrupts import goes_through
from .report import logger

if TYPE_CHECKING:
    from .task import BackgroundTask
    from .tasks import BackgroundTasks

Around = Callable[[], AbstractContextManager[Any]]


class Calls:
    """Makes the calls of one layer's tasks and tells its hooks of them.

    :param hooks: each is told, in this order.
    :param around: makes a context manager that a task is called in; an awaitable that the
        call returns is awaited in it too.
    """

    __slots__ = ("_around", "_hooks")

    def __init__(self, hooks: tuple[Hooks, ...], around: Around | None) -> None:
        self._hooks = hooks
        self._around = around

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """The task is about to join ``batch``."""
        if self._hooks:
            task._record = record = TaskRecord(task, batch)
            self._tell("task_added", record)

    def make(self, task: BackgroundTask) -> Any:
        """Call the task's function, in the current context, and return its result.

        :raises BaseException: what the call raises.
        """
        record = getattr(task, "_record", None)
        if record is not None:
            record.started_at = time.monotonic()
            self._tell("task_started", record)
        if self._around is None:
            return task.func(*task.args, **task.kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._around())
            result = task.func(*task.args, **task.kwargs)
            if result is not None and isawaitable(result):
                return _await_in(stack.pop_all(), result)
            return result

    def finished(self, task: BackgroundTask) -> None:
        """The call has returned, and what it returned was awaited."""
        self._end(task, "task_finished")

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """The call has raised ``exc``."""
        self._end(task, "task_failed", error=exc)

    def discarded(self, task: BackgroundTask, reason: str) -> None:
        """The task will not run, or not to its end."""
        self._end(task, "task_discarded", reason=reason)

    def _end(
        self,
        task: BackgroundTask,
        hook: str,
        error: BaseException | None = None,
        reason: str | None = None,
    ) -> None:
        try:
            record = task._record
            # One end only, whatever threads come here; and task, record and batch would
            # be a cycle that only the garbage collector could free.
            del task._record
        except AttributeError:
            return
        record.ended_at = time.monotonic()
        record.error = error
        record.reason = reason
        self._tell(hook, record)

    def _tell(self, hook: str, record: TaskRecord) -> None:
        for hooks in self._hooks:
            try:
                getattr(hooks, hook)(record)
            except BaseException as exc:
                if goes_through(exc):
                    raise
                logger.error(
                    "%s.%s raised for background task %s",
                    type(hooks).__qualname__,
                    hook,
                    record.task.name,
                    exc_info=exc,
                )


async def _await_in(stack: ExitStack, awaitable: Awaitable[Any]) -> Any:
    with stack:
        return await awaitable
