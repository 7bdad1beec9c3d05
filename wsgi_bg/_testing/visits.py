"""Records the requests of one test for the pytest fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_bg._tasks.background_tasks import ENDED, BackgroundTasks
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg._tasks.task_log import notify_discarded

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask


class TaskList(list["BackgroundTask"]):
    """The list of a request's tasks, which a batch empties.

    :ivar everything: all tasks that were ever in the list.
    """

    def __init__(self) -> None:
        super().__init__()
        self.everything: list[BackgroundTask] = []

    def append(self, task: BackgroundTask) -> None:
        self.everything.append(task)
        super().append(task)


class Visit:
    """A request that began while the fixture was in use.

    :ivar path: the path of the request's URL, including ``SCRIPT_NAME``.
    :ivar batch: the request's batch; None before its response is closed, or without tasks.
    :ivar is_done: True if the last task of the batch is done.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        self.path: str = path.encode("latin-1").decode(
            "utf-8", "replace"
        )  # PEP 3333, "Unicode"
        self.batch: Batch | None = None
        self.is_done = False
        self._environ: WSGIEnvironment | None = environ
        self._tasks: BackgroundTasks | None = None

    @property
    def tasks(self) -> BackgroundTasks | None:
        """The request's ``BackgroundTasks``; None before the middleware makes the object."""
        if self._environ is None:
            return self._tasks
        tasks = self._environ.get(ENVIRON_KEY)
        return tasks._root if isinstance(tasks, BackgroundTasks) else None

    def leave(self) -> None:
        """Drop the environ, after the application has returned or raised."""
        self._tasks = self.tasks
        self._environ = None

    def take(self, batch: Batch) -> None:
        """Note the batch of the request, after its response was closed."""
        self.batch = batch
        self._status = batch._status
        self._to_run = batch.tasks
        self._length = len(self._list)

    def added(self) -> list[BackgroundTask]:
        """Return the tasks that are not skipped, including tasks that these tasks added."""
        later = self._list[self._length :]
        return self._to_run + [task for task in later if self._runs(task)]

    def not_to_run(self) -> list[BackgroundTask]:
        """Return the tasks that are skipped because of the request's outcome."""
        return [task for task in self._list if not self._runs(task)]

    def _runs(self, task: BackgroundTask) -> bool:
        return task._options.lets_run(self._status)

    def has(self, task: BackgroundTask) -> bool:
        """True if this request, or a task of this request, added ``task``; on any thread."""
        return any(task is each for each in self._list)

    @property
    def _list(self) -> list[BackgroundTask]:
        added = self.tasks and self.tasks._list
        return added.everything if isinstance(added, TaskList) else []

    @property
    def waits(self) -> bool:
        """True if the request has unfinished tasks; on any thread."""
        return bool(self._list) and not self.is_over(recorded=False)

    def is_over(self, *, recorded: bool) -> bool:
        """True if the response is closed and all tasks are done; on any thread.

        :param recorded: True if recorded tasks that have not run count as done.
        """
        if self.batch is not None:
            return recorded or self.is_done
        tasks = self._tasks
        return self._environ is None and (tasks is None or tasks._phase == ENDED)

    def describe(self) -> str:
        """Name the unclosed response or the unfinished tasks."""
        if self.batch is None:
            return f"the response of {self.path}, which was not closed"
        return ", ".join(task.name for task in self.batch.tasks) or f"tasks of {self.path}"

    def drop(self) -> None:
        """Let no further task of this request begin or be added; on any thread."""
        tasks = self.tasks
        if tasks is not None:
            tasks._phase = ENDED  # before the loop: from now on no task is added
            for task in self._list:
                if task._claim():
                    notify_discarded(task, "the test is over")
