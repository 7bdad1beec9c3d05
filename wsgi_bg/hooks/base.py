"""The base class of hooks, and the records that the hooks get."""

from __future__ import annotations

import threading
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from time import monotonic
from typing import TYPE_CHECKING, Any

from wsgi_bg._process.clock import on_the_wall
from wsgi_bg._process.interrupts import type_name

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.task import BackgroundTask


class _Record:
    """Base class of the records of tasks and of batches."""

    __slots__ = ("__weakref__", "_data", "batch", "ended_at")

    _data: dict[Any, Any]
    batch: BackgroundTasks
    ended_at: float | None

    @property
    def data(self) -> dict[Any, Any]:
        """For hooks, which use themselves as keys: ``record.data[self] = span``."""
        try:
            return self._data
        except AttributeError:
            self._data = {}
            return self._data

    @property
    def request(self) -> str | None:
        """The request: method and path, or the result of the middleware's ``request_label``.

        On a worker: method and path, or None if there is a ``request_label``, which is called
        only when the request ends, or when its durable tasks are stored.
        """
        return self.batch.root.request

    @property
    def runner(self) -> str:
        """The name of the runner's class."""
        return type_name(self.batch.root.options.runner)


class TaskRecord(_Record):
    """The state of a task; all hooks of a task get the same record, in each attempt.

    A durable task that has waited in its file gets a new record.

    Times ending in ``_at`` are seconds by :func:`time.monotonic`, those ending in ``_time``
    are seconds by :func:`time.time`; each is None before the event. A record that is kept
    keeps alive the tasks of the request, and their arguments.

    :ivar task: the task. The arguments are the application's data: do not log them. A task
        that has waited for its time is another object, with the same function and arguments.
    :ivar batch: the ``BackgroundTasks`` of the request, the same for all its tasks. A task
        that has waited for its time has a new one.
    :ivar attempt: the number of the call: 1, or more if a ``Retry`` has called the task again.
    :ivar added_at: when the task was added. On a worker, and for a task of an earlier process:
        when this process got the task.
    :ivar started_at: when the call began.
    :ivar ended_at: when the task returned, raised, was sent or was discarded.
    :ivar retry_at: when the next attempt is due; None except in ``task_retried``.
    :ivar thread_id: :func:`threading.get_ident` of the thread of the call.
    :ivar awaitable: the coroutine, or another awaitable, that the call has returned, as long as
        it is awaited. For an ``async def`` task whose hooks have ``around``: the coroutine that
        enters the context managers, awaits the call and leaves the context managers.
    :ivar error: the exception that the task raised.
    :ivar reason: why the task was discarded.
    """

    __slots__ = (
        "_handed_over_at",
        "added_at",
        "attempt",
        "awaitable",
        "error",
        "reason",
        "retry_at",
        "started_at",
        "task",
        "thread_id",
    )

    batch: BackgroundTasks

    def __init__(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        self.task: BackgroundTask = task
        self.batch = batch
        self._handed_over_at: float | None = None  # of the attempt that has ended before move()
        self.attempt: int = 1
        self.added_at: float = monotonic()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.retry_at: float | None = None
        self.thread_id: int | None = None
        self.awaitable: Any = None
        self.error: BaseException | None = None
        self.reason: str | None = None

    def begin(self) -> None:
        """The call is about to be made on this thread; called by the package."""
        self.thread_id = threading.get_ident()
        self.ended_at = self.error = None
        self.started_at = monotonic()

    def move(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """``task`` in ``batch`` will run in place of the task; called by the package."""
        if self.started_at is not None:
            self._handed_over_at = self.handed_over_at
        self.task = task
        self.batch = batch

    def wait_for_attempt(self) -> None:
        """The next attempt will be made later; called by the package."""
        self._handed_over_at = self.started_at = self.ended_at = self.retry_at = None
        self.attempt += 1

    @property
    def id(self) -> str:
        """The id of the task."""
        return self.task.id

    @property
    def name(self) -> str:
        """``module.qualname`` of the function."""
        return self.task.name

    @property
    def thread(self) -> str | None:
        """The name of the thread of the call; None before the call, and if the thread ended."""
        names = (each.name for each in threading.enumerate() if each.ident == self.thread_id)
        return next(names, None)

    @property
    def handed_over_at(self) -> float | None:
        """When the request handed its tasks over to the runner, or the task was added later.

        The time after a delay, or before a further attempt, is not counted: the runner gets
        the task afterwards.
        """
        handed_over = self._handed_over_at or getattr(self.batch, "handed_over_at", None)
        if handed_over is None or handed_over > self.added_at:
            return handed_over
        return self.added_at

    @property
    def wait(self) -> float | None:
        """Seconds from :attr:`handed_over_at` to the call; None before the call."""
        handed_over = self.handed_over_at
        if handed_over is None or self.started_at is None:
            return None
        return max(0.0, self.started_at - handed_over)

    @property
    def duration(self) -> float | None:
        """Seconds of the call; None before its end, and for a call that was never made."""
        if self.ended_at is None or self.started_at is None:
            return None
        return self.ended_at - self.started_at

    @property
    def added_time(self) -> float:
        """:attr:`added_at` by the clock on the wall."""
        return on_the_wall(self.added_at)

    @property
    def started_time(self) -> float | None:
        """:attr:`started_at` by the clock on the wall."""
        return None if self.started_at is None else on_the_wall(self.started_at)

    @property
    def ended_time(self) -> float | None:
        """:attr:`ended_at` by the clock on the wall."""
        return None if self.ended_at is None else on_the_wall(self.ended_at)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.task.name}>"


class BatchRecord(_Record):
    """The tasks of a request that the middleware hands over to a runner.

    A task that has waited for its time comes in a batch of its own.

    :ivar batch: the ``BackgroundTasks`` of the request.
    :ivar length: number of tasks at the time of the hand-over.
    :ivar in_front: number of batches of the runner that were handed over before and have not
        ended.
    :ivar handed_over_at: when the batch was handed over (:func:`time.monotonic`).
    :ivar begun_at: when a thread began to run the tasks; None before.
    :ivar ended_at: when the last task was done; None before.
    """

    __slots__ = ("begun_at", "handed_over_at", "in_front", "length")

    def __init__(
        self, batch: BackgroundTasks, *, length: int, in_front: int, handed_over_at: float
    ) -> None:
        self.batch = batch
        self.length: int = length
        self.in_front: int = in_front
        self.handed_over_at: float = handed_over_at
        self.begun_at: float | None = None
        self.ended_at: float | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.length} tasks, {self.in_front} in front>"


class Hooks:
    """Base class for monitors and tracers: override the methods that you need.

    A method that is not overridden is not called, and costs nothing.

    ``task_added`` is called first. Then follows ``task_discarded``, or ``task_sent``, or
    ``task_started``. After ``task_started`` follows ``task_finished``, ``task_failed`` or, if
    the worker is stopped during the task, ``task_discarded``. If a task could not be sent and
    is given up, ``task_failed`` is called without ``task_started``. If the call raised and a
    ``Retry`` will call the task again, ``task_retried`` is called in place of ``task_failed``,
    and ``task_started`` again with the next attempt. Each further method is called at most once
    a task.

    A task that was sent to another process, or that an earlier process has stored, begins with
    ``task_started`` in the process that makes the call, if that process has the hooks. A
    message that an earlier process has left in the folder of an outbox begins with
    ``task_sent``, or with ``task_failed``.

    ``task_started``, ``task_finished``, ``task_failed`` and ``task_retried`` run in the task's
    context variables: only that task sees a variable (a span) that ``task_started`` sets. These
    methods are called on the thread of the call; for an ``async def`` task this is the event
    loop's thread, which a hook must not block. ``task_discarded`` is called on the thread that
    gives the task up.

    An exception of a hook is logged at ERROR and otherwise ignored, unless the exception
    stops the worker, such as a ``KeyboardInterrupt``. For :meth:`around` see there.
    """

    def task_added(self, record: TaskRecord) -> None:
        """The task is about to be added; called on the thread of ``add_task``."""

    def task_sent(self, record: TaskRecord) -> None:
        """The runner has sent the task to another process, whose hooks see the call."""

    def task_started(self, record: TaskRecord) -> None:
        """The call is about to be made."""

    def task_finished(self, record: TaskRecord) -> None:
        """The call has returned."""

    def task_failed(self, record: TaskRecord) -> None:
        """The call has raised ``record.error`` or could not be made."""

    def task_retried(self, record: TaskRecord) -> None:
        """A further attempt is planned for ``record.retry_at``.

        Attempt ``record.attempt`` has raised ``record.error``.
        """

    def task_discarded(self, record: TaskRecord) -> None:
        """The task will not run, or was stopped, because of ``record.reason``."""

    def around(
        self, record: TaskRecord
    ) -> AbstractContextManager[Any] | AbstractAsyncContextManager[Any] | None:
        """Return a context manager in which the call is made, or None.

        Called once an attempt, after ``task_started``, in the task's context and on the thread
        of the call; on workers, too. The context manager may be async if the task is an
        ``async def`` function; a plain task with one that is only async fails with a
        ``TypeError``. The first hook's context manager is the outermost. All are inside of the
        application's context.

        The context manager sees an error of the task, and cannot suppress the error. If
        this method or entering raises, the call is not made; then, and if leaving raises, the
        task has failed with that error.
        """
        return None

    def batch_handed_over(self, record: BatchRecord) -> None:
        """A request is about to hand its tasks over to the runner.

        Called on the thread that ends the request: the server's thread, which waits.
        """

    def batch_begun(self, record: BatchRecord) -> None:
        """A thread is about to run the tasks; called on this thread."""

    def batch_ended(self, record: BatchRecord) -> None:
        """The last task is done; called on the thread that ran it, or gave it up."""


class OptionHooks(Hooks):
    """Hooks that an option of the middleware adds; ``hooks=`` of an inner layer keeps them."""

    is_direct: bool = False
    """True if no method raises or adds a task: they are called directly, in half the time.

    Then ``task_finished`` may be called outside of the task's context variables.
    """


BATCH_HOOKS: tuple[str, ...] = ("batch_handed_over", "batch_begun", "batch_ended")

HOOKS: tuple[str, ...] = tuple(name for name in vars(Hooks) if not name.startswith("_"))
"""The names of the methods of :class:`Hooks`."""
