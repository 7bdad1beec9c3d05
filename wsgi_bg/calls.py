"""How a task is called where its layer has hooks, something around tasks, or sends them.

Most layers have none of these: their tasks are called as they are, and nothing here runs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from . import log, process
from .hooks import Hooks, TaskRecord
from .interrupts import is_from_signal_handler
from .steps import AwaitedIn
from .successors import observe

if TYPE_CHECKING:
    from .task import BackgroundTask
    from .tasks import BackgroundTasks

Done = defaultdict[Any, Any] | None
Send = Callable[["BackgroundTask"], bool]
Around = Callable[[], AbstractContextManager[Any]]


RESULT = "result"


def call(task: BackgroundTask, done: Done) -> Any:
    """Make the call of ``task`` in the current context and return its result.

    :param done: on a thread that signal handlers run on, makes the call and keeps the result
        under RESULT. No bytecode, and so no handler, comes between.
    :raises BaseException: what the call raises.
    """
    if done is None:
        return task.func(*task.args, **task.kwargs)
    done.default_factory = partial(task.func, *task.args, **task.kwargs)
    return done[RESULT]


class Calls:
    """Makes the calls of one layer's tasks and tells its hooks of them.

    :param hooks: each is told, in this order.
    :param around: makes a context manager that a task is called in; an awaitable that the
        call returns is awaited in it too. It lets errors through.
    :param send: the runner's, which says whether another process makes the call.
    :param may_send: the runner's, which says whether ``send`` is to be asked; None for always.
    """

    __slots__ = ("_around", "_hooks", "_may_send", "_send")

    def __init__(
        self,
        hooks: tuple[Hooks, ...],
        around: Around | None,
        send: Send | None,
        may_send: Send | None = None,
    ) -> None:
        self._hooks = hooks
        self._around = around
        self._send = send
        self._may_send = may_send

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """The task is about to join ``batch``."""
        if self._hooks:
            record = TaskRecord(task, batch)
            task._record = [record]
            self._tell("task_added", record)

    def send(self, task: BackgroundTask) -> bool:
        """Whether the task was sent to where it is called; blocks while it is.

        :raises Exception: what the runner's ``send`` raises: the task is given up.
        """
        if self._send is None or not self._send(task):
            return False
        self._end(task, "task_sent")
        return True

    def send_or_make(self, task: BackgroundTask, done: Done) -> Any:
        """Send the task or, if it stays here, make the call as :meth:`make` does."""
        if self._may_send is not None and not self._may_send(task):
            return self.make(task, done)
        if task.is_async:
            return self._send_or_make_async(task, done)
        return None if self.send(task) else self.make(task, done)

    async def _send_or_make_async(self, task: BackgroundTask, done: Done) -> Any:
        import asyncio  # the loop that this runs on has loaded it

        is_sent = await asyncio.to_thread(self.send, task)  # not on the loop: it blocks
        return None if is_sent else await self.make(task, done)

    def make(self, task: BackgroundTask, done: Done) -> Any:
        """Call the task's function in the current context and return its result.

        :param done: see :func:`call`.
        :raises BaseException: what the call raises.
        """
        generation = process.generation
        self._started(task)
        if process.generation != generation:  # a hook has forked: the call is the parent's
            return None
        if self._around is None:
            return call(task, done)
        inside = self._around()
        inside.__enter__()  # an ExitStack for all would take as long again as Flask's
        if process.generation != generation:
            self._exit(inside, task, None)
            return None
        try:
            result = call(task, done)
        except BaseException as exc:
            self._exit(inside, task, exc)
            raise
        if result is not None and isawaitable(result):
            stack = ExitStack()
            stack.push(partial(self._exit_of_stack, inside, task))
            return AwaitedIn(stack, result)
        self._exit(inside, task, None)
        return result

    def _exit(
        self,
        inside: AbstractContextManager[Any],
        task: BackgroundTask,
        exc: BaseException | None,
    ) -> None:
        if exc is None:
            observe(task, inside.__exit__, None, None, None)
        else:
            observe(task, inside.__exit__, type(exc), exc, exc.__traceback__)

    def _exit_of_stack(
        self,
        inside: AbstractContextManager[Any],
        task: BackgroundTask,
        kind: object,
        exc: BaseException | None,
        traceback: object,
    ) -> None:
        self._exit(inside, task, exc)

    def _started(self, task: BackgroundTask) -> None:
        # Not in make(): what a call raises holds that frame, and the record holds the error.
        for record in getattr(task, "_record", ()):
            record.started_at = time.monotonic()
            self._tell("task_started", record)

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
            # One end only, whatever threads come here; and task, record and batch would
            # be a cycle that only the garbage collector could free.
            record = task._record.pop()
        except (AttributeError, IndexError):
            return
        record.ended_at = time.monotonic()
        record.error = error
        record.reason = reason
        self._tell(hook, record)

    def _tell(self, hook: str, record: TaskRecord) -> None:
        generation = process.generation
        for hooks in self._hooks:
            try:
                observe(record.task, getattr(hooks, hook), record)
            except BaseException as exc:
                if is_from_signal_handler(exc) or process.generation != generation:
                    raise
                log.error(
                    "%s.%s raised for background task %s",
                    log.type_name(hooks),
                    hook,
                    record.task.name,
                    exc_info=exc,
                )
