"""``Calls``: calls tasks of layers that have hooks, ``around``, or a runner with ``send``.

Most layers have none of these: their tasks are called directly, and this module does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
)
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from wsgi_bg._loop.coroutines import AwaitableInStack, is_awaitable
from wsgi_bg._process import per_process
from wsgi_bg._tasks.retry import NotSent
from wsgi_bg._tasks.successors import observe, observe_async
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
from wsgi_bg.hooks.base import BATCH_HOOKS, HOOKS, BatchRecord, Hooks, OptionHooks, TaskRecord

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.batch import Batch

Send = Callable[..., bool | Queue]
MaySend = Callable[..., bool]
Around = Callable[[], AbstractContextManager[Any]]


_make_plain = Caller.make  # super().make() takes 0.1 us more


def _make(caller: Caller, task: BackgroundTask, done: Done) -> Any:
    """Make the call as :meth:`Caller.make` does, or as the message of the task says."""
    call_here = None if task.message is None else getattr(task.message, "call_here", None)
    if call_here is None:
        return _make_plain(caller, task, done)
    if done is None:
        return call_here()
    done.default_factory = call_here  # see Caller.make()
    return done[RESULT]


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
        "_arounds",
        "_has_contexts",
        "_is_simple",
        "_makers",
        "_may_send",
        "_outer",
        "_queues",
        "_send",
        "_told",
        "_told_of_batches",
        "_waits",
        "around",
        "ends_in_context",
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
        self._told = {name: _functions(hooks, name) for name in HOOKS}
        self._told_of_batches = _of_batches(hooks)
        ended = overriding(hooks, "task_finished")
        self.ends_in_context: bool = not all(map(_is_direct, ended))
        self._arounds = overriding(hooks, "around")
        # Functions that make the context managers of a call, the outermost first.
        self._outer = () if around is None else (lambda *record: around(),)
        self._makers = (*self._outer, *self._arounds)
        self._has_contexts = bool(self._makers)
        self._is_simple = not (self._has_contexts or self._told["task_started"])
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
            for tell in self._told["task_added"]:
                tell(record)

    def without_around(self) -> Caller:
        """See :class:`Caller`."""
        return Calls(self.hooks, None, None)

    def watch(
        self, batch: Batch, tasks: BackgroundTasks, hooks: Sequence[Hooks], in_front: int
    ) -> None:
        """Call the hooks for a batch that is about to be handed over, and later."""
        told = self._told_of_batches if hooks is self.hooks else _of_batches(hooks)
        if told is not None:
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
        if self._is_simple:
            if task.record:
                task.record[0].begin()
            result = _make(self, task, done)
            return result if result is None else self._noted(task, result)
        generation = per_process.generation
        self._tell_start(task)
        if per_process.generation != generation:  # a hook has forked: the parent makes the call
            return None
        if not self._has_contexts:
            return self._noted(task, _make(self, task, done))
        if self._arounds and task.is_async:
            return self._noted(task, self._make_inside_async(task))
        # Not an ExitStack, which costs as much again as Flask's context.
        with _Inside(task) as inside:
            if not self._enter_all(task, inside):
                return None
            result = self._noted(task, _make(self, task, done))
            if result is None or not is_awaitable(result):
                return result
            return AwaitableInStack(inside.pop_all(), result)

    async def _make_inside_async(self, task: BackgroundTask) -> Any:
        async with AsyncExitStack() as stack:
            await self._enter_all_async(task, stack)
            return await _make(self, task, None)

    def _enter_all(self, task: BackgroundTask, inside: _Inside) -> bool:
        """Enter the context managers of a call; False in a child that one has forked."""
        # Not in make(), whose frame an error of the call refers to: no name there refers to the
        # record, which refers to the error.
        generation = per_process.generation
        record = [*task.record]  # empty if the end of the task was reported meanwhile
        for make in self._makers if record else self._outer:
            inside.enter(make(*record))
            if per_process.generation != generation:
                return False
        return True

    async def _enter_all_async(self, task: BackgroundTask, stack: AsyncExitStack) -> None:
        record = [*task.record]
        for make in self._makers if record else self._outer:
            manager = make(*record)
            if hasattr(manager, "__aenter__") and hasattr(manager, "__aexit__"):
                await observe_async(task, manager.__aenter__)
                stack.push_async_exit(partial(_leave_async, task, manager))
            else:
                stack.enter_context(_Inside(task)).enter(manager)

    @staticmethod
    def _noted(task: BackgroundTask, result: Any) -> Any:
        """Return ``result``; the record knows it as long as it is awaited."""
        if result is not None and task.record and is_awaitable(result):
            task.record[0].awaitable = result
        return result

    def _tell_start(self, task: BackgroundTask) -> None:
        # Not in make(): the error of a call refers to the frame of make(), and the record
        # refers to the error.
        for record in task.record:
            record.begin()
            for tell in self._told["task_started"]:
                tell(record)

    def finished(self, task: BackgroundTask) -> None:
        """Call the hooks for a task that has returned; an awaitable it returned was awaited."""
        self._end(task, "task_finished")

    def raised(self, task: BackgroundTask) -> None:
        """Note the end of a call that has begun, before a slow log handler delays the hooks."""
        for record in task.record:
            record.ended_at = None if record.started_at is None else monotonic()

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """Call the hooks for a task that has raised ``exc``."""
        self._end(task, "task_failed", error=exc)

    def retried(self, task: BackgroundTask, exc: BaseException, seconds: float) -> None:
        """Call the hooks for a task that has raised ``exc`` and will be called again."""
        for record in task.record:
            now = monotonic()
            record.ended_at = record.ended_at or now
            record.retry_at = now + seconds
            record.awaitable = None
            record.error = exc
            for tell in self._told["task_retried"]:
                tell(record)
            record.wait_for_attempt()

    def moved(self, task: BackgroundTask, copy: BackgroundTask, batch: BackgroundTasks) -> None:
        """Let the record be the one of ``copy``, too; a single thread pops the record."""
        copy.record = task.record
        for record in task.record:
            record.move(copy, batch)

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
        record.ended_at = record.ended_at or monotonic()
        record.awaitable = None
        record.error = error
        record.reason = reason
        for tell in self._told[hook]:
            tell(record)


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
            self._record.begun_at = monotonic()
            self._tell("batch_begun")

    def ended(self) -> None:
        """The last task is done; called once or more often."""
        if self._take("ended"):
            self._record.ended_at = monotonic()
            self._tell("batch_ended")

    def _take(self, moment: str) -> bool:
        try:
            self._left.remove(moment)  # a single atomic step: batches may be copied
        except ValueError:
            return False
        return True

    def _tell(self, moment: str) -> None:
        for method in self._told[moment]:
            call_hook(moment, method, self._record)


def _of_batches(
    hooks: Sequence[Hooks],
) -> dict[str, tuple[Callable[..., Any], ...]] | None:
    """The methods about batches that the hooks override, by name; None if there are none."""
    told = {name: overriding(hooks, name) for name in BATCH_HOOKS}
    return told if any(told.values()) else None


def _functions(hooks: Sequence[Hooks], name: str) -> tuple[Callable[[TaskRecord], object], ...]:
    """Functions that call the method ``name`` of ``hooks``, and log their errors."""
    return tuple(
        method if _is_direct(method) else partial(call_hook, name, method)
        for method in overriding(hooks, name)
    )


def _is_direct(method: object) -> bool:
    hooks = getattr(method, "__self__", None)
    return isinstance(hooks, OptionHooks) and hooks.is_direct


def overriding(hooks: Sequence[Hooks], name: str) -> tuple[Callable[..., Any], ...]:
    """The methods ``name`` of ``hooks``, without those of the base class, which do nothing."""
    methods = [getattr(each, name) for each in hooks]
    base = getattr(Hooks, name)
    return tuple(each for each in methods if getattr(each, "__func__", None) is not base)


class _Inside:
    """The context managers in which a call is made; they cannot suppress its error."""

    __slots__ = ("_entered", "_task")

    def __init__(self, task: BackgroundTask) -> None:
        self._task = task
        self._entered: list[Callable[..., Any]] = []  # the methods that leave

    def enter(self, manager: Any) -> None:
        """Enter a context manager of an application or of a hook; None is ignored.

        :raises TypeError: if the context manager is async only: nothing would await it here.
        """
        if manager is None:
            return
        enter, leave = getattr(manager, "__enter__", None), getattr(manager, "__exit__", None)
        if enter is None or leave is None:
            raise AsyncContextError(self._task.name, manager)
        observe(self._task, enter)
        self._entered.append(leave)

    def pop_all(self) -> _Inside:
        """Return an object that leaves the context managers in place of this object."""
        other = _Inside(self._task)
        other._entered, self._entered = self._entered, []
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        error = exc
        while self._entered:
            leave = self._entered.pop()
            try:
                if error is None:
                    observe(self._task, leave, None, None, None)
                else:
                    observe(self._task, leave, type(error), error, error.__traceback__)
            except BaseException as new:
                error = new
        if error is not None and error is not exc:
            try:
                raise error
            finally:
                del error  # or it refers to itself, by this frame


async def _leave_async(
    task: BackgroundTask,
    manager: AbstractAsyncContextManager[Any],
    kind: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    await observe_async(task, manager.__aexit__, kind, exc, traceback)
