"""``Hooks``: the moments in a task's life that a monitor or a tracer wants to know of."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .task import BackgroundTask
    from .tasks import BackgroundTasks


class TaskRecord:
    """What is known of one task; every hook of a task is given the same object.

    Times are seconds by :func:`time.monotonic`, and None as long as they have not come. Who
    keeps a record keeps the tasks of that request, and their arguments.

    :ivar task: the task. Its arguments are the application's data: do not log them.
    :ivar batch: the ``BackgroundTasks`` of its request, the same for all of that request.
    :ivar added_at: when it was added.
    :ivar started_at: when its call began.
    :ivar ended_at: when it returned, raised, was sent or was discarded.
    :ivar error: what it raised.
    :ivar reason: why it was discarded.
    """

    __slots__ = (
        "__weakref__",
        "added_at",
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
        self.added_at: float = time.monotonic()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.error: BaseException | None = None
        self.reason: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.task.name}>"


class Hooks:
    """Base class for what watches tasks: override the methods that you need.

    ``task_added`` is called first. Then ``task_discarded`` follows, or ``task_sent``, or
    ``task_started`` and one of ``task_finished``, ``task_failed`` and, if the worker is
    stopped in the middle, ``task_discarded``. A task that could not be sent and is given up
    has ``task_failed`` without ``task_started``. Each is called at most once a task.

    ``task_started``, ``task_finished`` and ``task_failed`` are called in the task's context
    variables: what ``task_started`` sets there (a span) the task sees, and no other. They
    come on the thread of the call; for an ``async def`` task that is the event loop's, which
    a hook must not block. ``task_discarded`` comes on whatever thread has given the task up.

    What a hook raises is logged at ERROR and harms nothing, but for what stops the worker,
    such as a ``KeyboardInterrupt``.
    """

    def task_added(self, record: TaskRecord) -> None:
        """The task is about to join its batch; on the thread of ``add_task``."""

    def task_sent(self, record: TaskRecord) -> None:
        """Another process has the task now, for its runner has sent it; its end is not seen."""

    def task_started(self, record: TaskRecord) -> None:
        """The call is about to be made."""

    def task_finished(self, record: TaskRecord) -> None:
        """The call has returned."""

    def task_failed(self, record: TaskRecord) -> None:
        """The call has raised ``record.error``, or could not be made."""

    def task_discarded(self, record: TaskRecord) -> None:
        """The task will not run, or not to its end, for ``record.reason``."""


HOOKS = tuple(name for name in vars(Hooks) if name.startswith("task_"))
"""The names of the methods of :class:`Hooks`."""
