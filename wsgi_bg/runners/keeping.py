"""Runners that keep tasks: the part that the middleware and the calls of tasks use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from wsgi_bg._tasks.task import BackgroundTask, Caller, Done, Queue, WasDiscarded
from wsgi_bg.runners.ledger import LedgerRunner

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks, TaskQueue


class KeepingRunner(LedgerRunner):
    """A runner that stores tasks; the methods ignore all tasks that it does not store.

    :ivar keeps: False if the runner was made without a folder, and stores nothing.
    """

    keeps: bool = True

    @property
    def folder_of_tasks(self) -> str | None:
        """The path of the folder that keeps tasks until they have run, if there is any."""
        return None

    @property
    def folder_of_messages(self) -> str | None:
        """The path of the folder that keeps messages until they are sent, if there is any."""
        return None

    @property
    def keep_done(self) -> tuple[int, float]:
        """How many ended tasks the folder of tasks keeps, and for how many seconds."""
        raise NotImplementedError

    def file_numbers(self) -> list[int]:
        """The numbers of the files of tasks that this process owns."""
        raise NotImplementedError

    def start_on_worker(self) -> None:
        """A call on a worker begins, in a process that has no request. Must not raise."""

    def keep(self, tasks: Iterable[BackgroundTask]) -> None:
        """Store the tasks that are not stored yet; blocks until they are stored.

        :raises RuntimeError: if the tasks cannot be stored; none of them is then.
        """
        raise NotImplementedError

    def keep_unsent(self) -> None:
        """Store the messages that wait in memory alone to be sent; blocks.

        :raises RuntimeError: as ``keep`` does.
        """

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """``task`` is about to join ``batch``; may store the task, and raise as ``keep``."""
        raise NotImplementedError

    def joined(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """``task`` has joined ``batch``; may store the task, and raise as ``keep``.

        The answer may have begun between the call of ``added`` and this call.
        """
        raise NotImplementedError

    def is_stored(self, task: BackgroundTask) -> bool:
        """True if a file keeps the task, and lets it wait for its time."""
        return False

    def postpone(
        self, task: BackgroundTask, wait: float | None, tasks: TaskQueue, status: int
    ) -> bool:
        """Let a stored task wait in its file, and in no memory. Must not raise.

        :param wait: how long to wait for the next attempt, in seconds; None until the task's
            delay is over.
        :param tasks: the list of the task, which knows the request.
        :param status: the status of the request; see :class:`Batch`.
        :return: False if the task has to wait in memory.
        """
        raise NotImplementedError

    def hold_back(self, task: BackgroundTask, wait: float, tasks: TaskQueue) -> None:
        """Note in the file that a stored task waits for its next attempt. Must not raise.

        :param tasks: the list of the task; the stored tasks that are left in it wait, too.
        """

    def leave(self, task: BackgroundTask) -> None:
        """Let the next process run a stored task. Must not raise."""

    def begin(self, task: BackgroundTask) -> bool:
        """The call is about to be made; called in the task's context. Must not raise.

        :return: False if the call must not be made, since the task was discarded by hand.
        """
        raise NotImplementedError

    def finished(self, task: BackgroundTask) -> None:
        """The call has returned. Must not raise."""
        raise NotImplementedError

    def raised(self, task: BackgroundTask) -> None:
        """The call has just raised; the error is not logged yet. Must not raise."""

    def stopped(self, task: BackgroundTask, exc: BaseException, tasks: TaskQueue) -> None:
        """The tasks after ``task`` will not run, in no process. Must not raise.

        :param tasks: the list of the task, which has raised ``exc`` under ``stop_on_error``.
        """

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """The call has raised ``exc``, and was logged. Must not raise."""
        raise NotImplementedError

    def forget(self, task: BackgroundTask) -> None:
        """The task will not run, in no process. Must not raise."""
        raise NotImplementedError

    def moved(self, task: BackgroundTask, copy: BackgroundTask) -> None:
        """``copy`` will run in place of ``task``."""
        raise NotImplementedError


def is_kept_at_once(task: BackgroundTask, batch: BackgroundTasks) -> bool:
    """True if an added task is stored now: the answer may have begun, or the tasks run.

    A task that does not run after that answer is stored at the end of the request, if an error
    has changed the outcome by then.
    """
    return getattr(batch, "is_answered", True) and batch.expects(task)


def is_recorded(batch: BackgroundTasks) -> bool:
    """True if a test records the tasks, and runs them in its own process."""
    observer = getattr(batch, "observer", None)
    return observer is not None and not observer.waits


def keeps_tasks(runner: object) -> TypeGuard[KeepingRunner]:
    """True if ``runner`` stores tasks."""
    return isinstance(runner, KeepingRunner) and runner.keeps


class KeepingCaller(Caller):
    """Tells the runner when the call of a task begins and ends.

    :param runner: stores the tasks.
    :param inner: makes the calls.
    """

    __slots__ = ("_runner", "inner")

    def __init__(self, runner: KeepingRunner, inner: Caller) -> None:
        self._runner = runner
        self.inner: Caller = inner

    @property
    def around(self) -> Any:
        """See :class:`Caller`."""
        return self.inner.around

    def without_around(self) -> Caller:
        """See :class:`Caller`; on a worker, the runner's file has no row of the task."""
        return self.inner.without_around()

    @property
    def hooks(self) -> Any:
        """See :class:`Caller`."""
        return self.inner.hooks

    def watch(self, batch: Any, tasks: Any, hooks: Sequence[Any], in_front: int) -> None:
        """See :class:`Caller`."""
        self.inner.watch(batch, tasks, hooks, in_front)

    def received(self, task: BackgroundTask, batch: Any) -> None:
        """See :class:`Caller`."""
        self.inner.received(task, batch)

    def added(self, task: BackgroundTask, batch: Any) -> None:
        """See :class:`Caller`.

        :raises RuntimeError: if the task cannot be stored.
        """
        self._runner.added(task, batch)
        self.inner.added(task, batch)

    def sends_delayed(self, task: BackgroundTask) -> bool:
        """See :class:`Caller`."""
        return self.inner.sends_delayed(task)

    def send(self, task: BackgroundTask) -> bool | Queue:
        """See :class:`Caller`."""
        return self.inner.send(task)

    def send_or_make(self, task: BackgroundTask, done: Done) -> Any:
        """See :class:`Caller`; a task that has a message begins in another process."""
        if task.message is None:
            return self.make(task, done)
        return self.inner.send_or_make(task, done)

    def sent(self, task: BackgroundTask) -> None:
        """See :class:`Caller`."""
        self.inner.sent(task)

    def joined(self, task: BackgroundTask, batch: Any) -> None:
        """See :class:`Caller`.

        :raises RuntimeError: if the task cannot be stored.
        """
        self._runner.joined(task, batch)

    def make(self, task: BackgroundTask, done: Done) -> Any:
        """See :class:`Caller`.

        :raises WasDiscarded: if the task was discarded by hand.
        """
        if self._runner.begin(task):
            return self.inner.make(task, done)
        self.inner.discarded(task, "it was discarded by hand")
        raise WasDiscarded

    def finished(self, task: BackgroundTask) -> None:
        """See :class:`Caller`."""
        self._runner.finished(task)
        self.inner.finished(task)

    def raised(self, task: BackgroundTask) -> None:
        """See :class:`Caller`."""
        self._runner.raised(task)
        self.inner.raised(task)

    def stopped(self, task: BackgroundTask, exc: BaseException, batch: Any) -> None:
        """See :class:`Caller`."""
        self._runner.stopped(task, exc, batch)
        self.inner.stopped(task, exc, batch)

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """See :class:`Caller`."""
        self._runner.failed(task, exc)
        self.inner.failed(task, exc)

    def retried(self, task: BackgroundTask, exc: BaseException, seconds: float) -> None:
        """See :class:`Caller`."""
        self.inner.retried(task, exc, seconds)

    def moved(self, task: BackgroundTask, copy: BackgroundTask, batch: Any) -> None:
        """See :class:`Caller`."""
        self._runner.moved(task, copy)
        self.inner.moved(task, copy, batch)

    def discarded(self, task: BackgroundTask, reason: str) -> None:
        """See :class:`Caller`."""
        self.inner.discarded(task, reason)

    def forget(self, task: BackgroundTask) -> None:
        """Let the runner forget a task that will not run, in no process."""
        self._runner.forget(task)
