"""``Calls``: calls tasks of layers that have hooks, ``around``, or a runner with ``send``.

Most layers have none of these: their tasks are called directly, and this module does not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop.coroutines import AwaitableInStack
from wsgi_bg._process import log, per_process
from wsgi_bg._process.interrupts import is_from_signal_handler, type_name
from wsgi_bg._tasks.retry import NotSent
from wsgi_bg._tasks.successors import observe
from wsgi_bg._tasks.task import (
    RESULT,
    SENT,
    BackgroundTask,
    Caller,
    Done,
    Queue,
    WasQueued,
    plan_of,
)
from wsgi_bg.hooks import Hooks, TaskRecord

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks

Send = Callable[..., bool | Queue]
MaySend = Callable[..., bool]
Around = Callable[[], AbstractContextManager[Any]]


class Calls(Caller):
    """Calls the tasks of a layer and the layer's hooks.

    :param hooks: called in this order.
    :param around: makes a context manager, in which a task is called and an awaitable that
        the call returns is awaited. The context manager must not suppress errors.
    :param send: the runner's method, which returns True if another process makes the call.
        Called with the task and, unless ``check`` returned None, the message.
    :param may_send: the runner's method, which returns True if ``send`` may be called without
        a message; None if ``send`` may always be called.
    :param waits: True if the process that gets a message waits for the task's delay.
    :param queues: True if ``send`` does not block.
    """

    __slots__ = ("_may_send", "_queues", "_send", "_waits", "around", "hooks")

    def __init__(
        self,
        hooks: tuple[Hooks, ...],
        around: Around | None,
        send: Send | None,
        may_send: MaySend | None = None,
        *,
        waits: bool = False,
        queues: bool = False,
    ) -> None:
        self.hooks: tuple[Hooks, ...] = hooks
        self.around: Around | None = around
        self._send = send
        self._may_send = may_send
        self._waits = waits
        self._queues = queues

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Call the hooks for a task that is about to join ``batch``."""
        if self.hooks:
            record = TaskRecord(task, batch)
            task.record = [record]
            self._tell("task_added", record)

    def sends_delayed(self, task: BackgroundTask) -> bool:
        """True if the process that gets the message of ``task`` waits for the delay."""
        return self._waits and task.message is not None

    def send(self, task: BackgroundTask) -> bool | Queue:
        """Send the task to another process; True if the runner sent the task. May block.

        :return: a function if the caller has to call it in order to have the task sent.
        :raises Exception: the error of the runner's ``send``; the task fails with this error.
        """
        if self._send is None:
            return False
        message, task.message = task.message, None  # send once, then free the message
        given = (task,) if message is None else (task, message)
        try:
            is_sent = self._send(*given)
        except BaseException:
            plan = plan_of(task)
            if plan is not None:
                plan.retry = None  # given up: the function was not called
            raise
        if not is_sent:
            return False
        if callable(is_sent):
            return is_sent
        self._end(task, "task_sent")
        return True

    def sent(self, task: BackgroundTask) -> None:
        """Call the hooks for a task that was sent from a queue."""
        self._end(task, "task_sent")

    def send_or_make(self, task: BackgroundTask, done: Done) -> Any:
        """Send the task; if the task is not sent, make the call as :meth:`make` does."""
        if not (task.message is not None or self._may_send is None or self._may_send(task)):
            return self.make(task, done)
        if task.is_async and not self._queues:
            return self._send_or_make_async(task, done)
        is_sent = self._is_sent(task)
        if not is_sent:
            return self.make(task, done)
        if is_sent is True:
            return SENT
        if done is None:
            return is_sent()
        done.default_factory = is_sent  # see Caller.make()
        return done[RESULT]

    def _is_sent(self, task: BackgroundTask) -> bool | Queue:
        """Send the task: see :meth:`send`.

        :raises NotSent: if the task was not sent, and its time has not come.
        """
        is_sent = self.send(task)
        if not is_sent and task.options.delay and not task.plan.is_due:
            raise NotSent
        return is_sent

    async def _send_or_make_async(self, task: BackgroundTask, done: Done) -> Any:
        import asyncio  # already loaded: this code runs on a loop

        if await asyncio.to_thread(self._is_sent, task):  # not on the loop: send() blocks
            raise WasQueued(is_sent=True)
        return await self.make(task, done)

    def make(self, task: BackgroundTask, done: Done) -> Any:
        """Call the task's function in the current context and return its result.

        :param done: see :meth:`Caller.make`.
        :raises BaseException: the error of the call.
        """
        generation = per_process.generation
        self._started(task)
        if per_process.generation != generation:  # a hook has forked: the parent makes the call
            return None
        if self.around is None:
            return super().make(task, done)
        inside = self._enter(task, self.around)
        if per_process.generation != generation:
            self._exit(inside, task, None)
            return None
        try:
            result = super().make(task, done)
        except BaseException as exc:
            self._exit(inside, task, exc)
            raise
        if result is not None and isawaitable(result):
            stack = ExitStack()
            stack.push(partial(self._exit_of_stack, inside, task))
            return AwaitableInStack(stack, result)
        self._exit(inside, task, None)
        return result

    @staticmethod
    def _enter(task: BackgroundTask, around: Around) -> AbstractContextManager[Any]:
        # An ExitStack for each task costs as much again as Flask's context.
        inside = around()
        observe(task, inside.__enter__)
        return inside

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
        # Not in make(): the error of a call refers to the frame of make(), and the record
        # refers to the error.
        for record in task.record:
            record.ended_at = record.error = None
            record.started_at = time.monotonic()
            self._tell("task_started", record)

    def finished(self, task: BackgroundTask) -> None:
        """Call the hooks for a task that has returned; an awaitable it returned was awaited."""
        self._end(task, "task_finished")

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks for a task that has raised ``exc``."""
        self._end(task, "task_failed", error=exc)

    def retried(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks for a task that has raised ``exc`` and will be called again."""
        for record in task.record:
            record.ended_at = time.monotonic()
            record.error = exc
            self._tell("task_retried", record)
            record.attempt += 1

    def moved(self, task: BackgroundTask, copy: BackgroundTask, batch: BackgroundTasks) -> None:
        """Let the record be the one of ``copy``, too; a single thread pops the record."""
        copy.record = task.record
        for record in task.record:
            record.task = copy
            record.batch = batch

    def discarded(self, task: BackgroundTask, reason: str) -> None:
        """Call the hooks for a task that will not run, or that was interrupted."""
        self._end(task, "task_discarded", reason=reason)

    def _end(
        self,
        task: BackgroundTask,
        hook: str,
        error: BaseException | None = None,
        reason: str | None = None,
    ) -> None:
        try:
            # Popped, so that a single thread reports the end, and so that task, record and
            # batch are no cycle that only the garbage collector could free.
            record = task.record.pop()
        except IndexError:
            return
        record.ended_at = time.monotonic()
        record.error = error
        record.reason = reason
        self._tell(hook, record)

    def _tell(self, hook: str, record: TaskRecord) -> None:
        generation = per_process.generation
        for hooks in self.hooks:
            try:
                observe(record.task, getattr(hooks, hook), record)
            except BaseException as exc:
                if is_from_signal_handler(exc) or per_process.generation != generation:
                    raise
                log.error(
                    "%s.%s raised for background task %s",
                    type_name(hooks),
                    hook,
                    record.task.name,
                    exc_info=exc,
                )
