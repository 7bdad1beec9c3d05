"""``Calls``: calls tasks of layers that have hooks, ``around``, or a runner with ``send``.

Most layers have none of these: their tasks are called directly, and this module does not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
)
from functools import partial
from inspect import isawaitable
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop.coroutines import AwaitableInStack
from wsgi_bg._process import per_process
from wsgi_bg._status.recorder import recorder
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
from wsgi_bg._tasks.task_log import call_hook
from wsgi_bg.exceptions import AsyncContextError
from wsgi_bg.hooks import BATCH_HOOKS, HOOKS, BatchRecord, Hooks, TaskRecord

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.batch import Batch

# The recorder is called directly, which halves its time: it adds no task and never raises.
_ENDS = ("task_finished", "task_failed", "task_retried", "task_discarded", "task_sent")
_RECORDED = {name: (getattr(recorder, name),) for name in _ENDS}
_NOT_RECORDED: dict[str, tuple[Callable[[TaskRecord], None], ...]] = dict.fromkeys(_ENDS, ())

_make = Caller.make  # super().make() takes 0.1 us more

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

    __slots__ = (
        "_ends",
        "_may_send",
        "_queues",
        "_send",
        "_told",
        "_told_of_batches",
        "_waits",
        "around",
        "hooks",
    )

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
        others = tuple(each for each in hooks if each is not recorder)
        self._ends = _RECORDED if len(others) < len(hooks) else _NOT_RECORDED
        self._told = {name: overriding(others, name) for name in HOOKS}
        self._told_of_batches = _of_batches(others)
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
            if self._told["task_added"]:
                self._tell("task_added", record)

    def without_around(self) -> Caller:
        """See :class:`Caller`."""
        return Calls(self.hooks, None, None)

    def watch(
        self, batch: Batch, tasks: BackgroundTasks, hooks: Sequence[Hooks], in_front: int
    ) -> None:
        """Call the hooks for a batch that is about to be handed over, and later."""
        told = self._told_of_batches if hooks == self.hooks else _of_batches(hooks)
        if told is not None:
            assert tasks.handed_over_at is not None
            record = BatchRecord(
                tasks,
                length=batch.length,
                in_front=in_front,
                handed_over_at=tasks.handed_over_at,
            )
            batch.watch(_Watch(told, record))

    def received(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Make the record of a task that another process has added."""
        if self.hooks:
            record = TaskRecord(task, batch)
            record.attempt = task.attempt
            task.record = [record]

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
        if self._told["around"]:
            return self._make_inside(task, done)
        if self.around is None:
            return self._noted(task, _make(self, task, done))
        inside = self._enter(task, self.around)
        if per_process.generation != generation:
            self._exit(inside, task, None)
            return None
        try:
            result = super().make(task, done)
        except BaseException as exc:
            self._exit(inside, task, exc)
            raise
        if self._noted(task, result) is not None and isawaitable(result):
            stack = ExitStack()
            stack.push(partial(self._exit_of_stack, inside, task))
            return AwaitableInStack(stack, result)
        self._exit(inside, task, None)
        return result

    def _make_inside(self, task: BackgroundTask, done: Done) -> Any:
        """Make the call inside of the context managers of hooks: see :meth:`make`."""
        makers: list[Callable[[], Any]] = [
            partial(make, record) for record in task.record for make in self._told["around"]
        ]
        if self.around is not None:
            makers.insert(0, self.around)
        if task.is_async:
            return self._make_inside_async(task, makers)
        generation = per_process.generation
        with ExitStack() as stack:
            for make in makers:
                _enter(task, stack, make())
                if per_process.generation != generation:
                    return None
            result = self._noted(task, super().make(task, done))
            if result is not None and isawaitable(result):
                return AwaitableInStack(stack.pop_all(), result)
        return result

    async def _make_inside_async(
        self, task: BackgroundTask, makers: list[Callable[[], Any]]
    ) -> Any:
        async with AsyncExitStack() as stack:
            for make in makers:
                manager = make()
                if hasattr(manager, "__aenter__"):
                    await manager.__aenter__()
                    stack.push_async_exit(partial(_leave_async, manager))
                else:
                    _enter(task, stack, manager)
            return await self._noted(task, super().make(task, None))

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

    @staticmethod
    def _noted(task: BackgroundTask, result: Any) -> Any:
        """Return ``result``; the record knows it as long as it is awaited."""
        if result is not None and task.record and isawaitable(result):
            task.record[0].awaitable = result
        return result

    def _started(self, task: BackgroundTask) -> None:
        # Not in make(): the error of a call refers to the frame of make(), and the record
        # refers to the error.
        for record in task.record:
            record.ended_at = record.error = None
            record.thread_id = get_ident()
            record.started_at = time.monotonic()
            if self._told["task_started"]:
                self._tell("task_started", record)

    def finished(self, task: BackgroundTask) -> None:
        """Call the hooks for a task that has returned; an awaitable it returned was awaited."""
        self._end(task, "task_finished")

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks for a task that has raised ``exc``."""
        self._end(task, "task_failed", error=exc)

    def retried(self, task: BackgroundTask, exc: BaseException, seconds: float) -> None:
        """Call the hooks for a task that has raised ``exc`` and will be called again."""
        for record in task.record:
            record.ended_at = now = time.monotonic()
            record.retry_at = now + seconds
            record.awaitable = None
            record.error = exc
            for record_end in self._ends["task_retried"]:
                record_end(record)
            self._tell("task_retried", record)
            record.retry_at = record.started_at = None
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
        record.awaitable = None
        record.error = error
        record.reason = reason
        for record_end in self._ends[hook]:
            record_end(record)
        for method in self._told[hook]:
            call_hook(record.task, hook, method, record)

    def _tell(self, hook: str, record: TaskRecord) -> None:
        for method in self._told[hook]:
            call_hook(record.task, hook, method, record)


class _Watch:
    """Calls the hooks that watch a batch.

    :param told: the methods by their names.
    """

    __slots__ = ("_left", "_record", "_told")

    def __init__(
        self, told: dict[str, tuple[Callable[..., Any], ...]], record: BatchRecord
    ) -> None:
        self._told = told
        self._record = record
        self._left = ["ended", "begun"]
        self._tell("batch_handed_over")

    def begun(self) -> None:
        """A thread begins to run the tasks; called once or more often."""
        if self._take("begun"):
            self._record.begun_at = time.monotonic()
            self._tell("batch_begun")

    def ended(self) -> None:
        """The last task is done; called once or more often."""
        if self._take("ended"):
            self._record.ended_at = time.monotonic()
            self._tell("batch_ended")

    def _take(self, moment: str) -> bool:
        try:
            self._left.remove(moment)  # a single atomic step: batches may be copied
        except ValueError:
            return False
        return True

    def _tell(self, moment: str) -> None:
        for method in self._told[moment]:
            call_hook(None, moment, method, self._record)


def _of_batches(
    hooks: Sequence[Hooks],
) -> dict[str, tuple[Callable[..., Any], ...]] | None:
    """The methods about batches that the hooks override, by name; None if there are none."""
    told = {name: overriding(hooks, name) for name in BATCH_HOOKS}
    return told if any(told.values()) else None


def overriding(hooks: Sequence[Hooks], name: str) -> tuple[Callable[..., Any], ...]:
    """The methods ``name`` of ``hooks``, without those of the base class, which do nothing."""
    methods = [getattr(each, name) for each in hooks]
    base = getattr(Hooks, name)
    return tuple(each for each in methods if getattr(each, "__func__", None) is not base)


def _enter(task: BackgroundTask, stack: ExitStack | AsyncExitStack, manager: Any) -> None:
    """Enter a context manager of a hook, or of an application.

    :raises TypeError: if the context manager is async only: nothing would await it here.
    """
    if manager is None:
        return
    if not hasattr(manager, "__enter__"):
        raise AsyncContextError(task.name, manager)
    observe(task, manager.__enter__)
    stack.push(partial(_leave, task, manager))


def _leave(
    task: BackgroundTask,
    manager: AbstractContextManager[Any],
    kind: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:  # and not what __exit__() returns: the error is not suppressed
    observe(task, manager.__exit__, kind, exc, traceback)


async def _leave_async(
    manager: AbstractAsyncContextManager[Any],
    kind: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    await manager.__aexit__(kind, exc, traceback)
