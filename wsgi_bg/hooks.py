"""``Hooks``: methods called when a task changes state, for monitors and tracers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.task import BackgroundTask


class TaskRecord:
    """The state of a task; all hooks of a task get the same record, in each attempt.

    Times are seconds by :func:`time.monotonic`, or None before the event. A record that is
    kept keeps alive the tasks of the request, and their arguments.

    :ivar task: the task. The arguments are the application's data: do not log them. A task
        that has waited for its time is another object, with the same function and arguments.
    :ivar batch: the ``BackgroundTasks`` of the request, the same for all its tasks. A task
        that has waited for its time has a new one.
    :ivar attempt: the number of the call: 1, or more if a ``Retry`` has called the task again.
    :ivar added_at: when the task was added.
    :ivar started_at: when the call began.
    :ivar ended_at: when the task returned, raised, was sent or was discarded.
    :ivar error: the exception that the task raised.
    :ivar reason: why the task was discarded.
    """

    __slots__ = (
        "__weakref__",
        "added_at",
        "attempt",
        "batch",
        "ended_at",
        "error",
        "reason",
        "started_at",
        "task",
    )

    def __init__(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        self.task: BackgroundTask = task
        self.batch: BackgroundTasks = batch
        self.attempt: int = 1
        self.added_at: float = time.monotonic()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.error: BaseException | None = None
        self.reason: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.task.name}>"


class Hooks:
    """Base class for monitors and tracers: override the methods that you need.

    ``task_added`` is called first. Then follows ``task_discarded``, or ``task_sent``, or
    ``task_started``. After ``task_started`` follows ``task_finished``, ``task_failed`` or, if
    the worker is stopped during the task, ``task_discarded``. If a task could not be sent and
    is given up, ``task_failed`` is called without ``task_started``. If the call raised and a
    ``Retry`` will call the task again, ``task_retried`` is called in place of ``task_failed``,
    and ``task_started`` again with the next attempt. Each further method is called at most once
    a task.

    ``task_started``, ``task_finished``, ``task_failed`` and ``task_retried`` run in the task's
    context variables: only that task sees a variable (a span) that ``task_started`` sets. These
    methods are called on the thread of the call; for an ``async def`` task this is the event
    loop's thread, which a hook must not block. ``task_discarded`` is called on the thread that
    gives the task up.

    An exception of a hook is logged at ERROR and otherwise ignored, unless the exception
    stops the worker, such as a ``KeyboardInterrupt``.
    """

    def task_added(self, record: TaskRecord) -> None:
        """The task is about to be added; called on the thread of ``add_task``."""

    def task_sent(self, record: TaskRecord) -> None:
        """The runner has sent the task to another process; no hook is called for its end."""

    def task_started(self, record: TaskRecord) -> None:
        """The call is about to be made."""

    def task_finished(self, record: TaskRecord) -> None:
        """The call has returned."""

    def task_failed(self, record: TaskRecord) -> None:
        """The call has raised ``record.error`` or could not be made."""

    def task_retried(self, record: TaskRecord) -> None:
        """Attempt ``record.attempt`` has raised ``record.error``; a further attempt follows."""

    def task_discarded(self, record: TaskRecord) -> None:
        """The task will not run, or was stopped, because of ``record.reason``."""


HOOKS = tuple(name for name in vars(Hooks) if name.startswith("task_"))
"""The names of the methods of :class:`Hooks`."""
