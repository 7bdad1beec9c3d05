"""The requests of one test, as the pytest fixture sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_bg.context import ENVIRON_KEY
from wsgi_bg.report import discarded
from wsgi_bg.tasks import ENDED, BackgroundTasks

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg.batch import Batch
    from wsgi_bg.task import BackgroundTask


class TaskList(list["BackgroundTask"]):
    """The list of a request's tasks, which a batch empties.

    :ivar everything: all tasks that were ever in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.everything: list[BackgroundTask] = []

    def append(self, task: BackgroundTask) -> None:
        self.everything.append(task)
        super().append(task)


class Visit:
    """One request that came while the fixture was in use.

    :ivar path: what its URL's path was, the part that the server has taken off included.
    :ivar batch: its tasks, once its response was closed; None before, and where it had none.
    :ivar is_done: whether the last task of the batch is done.
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
        """The request's object; None before it is made."""
        if self._environ is None:
            return self._tasks
        tasks = self._environ.get(ENVIRON_KEY)
        return tasks._root if isinstance(tasks, BackgroundTasks) else None

    def leave(self) -> None:
        """The application has returned or raised."""
        self._tasks = self.tasks
        self._environ = None

    def take(self, batch: Batch) -> None:
        """The response was closed and its tasks are to run."""
        self.batch = batch
        self._outcome = batch._raised, batch._status
        self._to_run = batch.tasks
        self._length = len(self._list)

    def added(self) -> list[BackgroundTask]:
        """The tasks that the request's outcome lets run, those that they added included."""
        later = self._list[self._length :]
        return self._to_run + [task for task in later if self._runs(task)]

    def not_to_run(self) -> list[BackgroundTask]:
        """The tasks that the request's outcome keeps from running."""
        return [task for task in self._list if not self._runs(task)]

    def _runs(self, task: BackgroundTask) -> bool:
        return task._options.lets_run(*self._outcome)

    def has(self, task: BackgroundTask) -> bool:
        """Whether this request, or a task of it, has added ``task``; on any thread."""
        return any(task is each for each in self._list)

    @property
    def _list(self) -> list[BackgroundTask]:
        added = self.tasks and self.tasks._list
        return added.everything if isinstance(added, TaskList) else []

    @property
    def waits(self) -> bool:
        """Whether there are tasks that are not done; on any thread."""
        return bool(self._list) and not self.is_over(recorded=False)

    def is_over(self, *, recorded: bool) -> bool:
        """Whether nothing more is to come of this request; on any thread.

        :param recorded: whether tasks that are not run count as done.
        """
        if self.batch is not None:
            return recorded or self.is_done
        tasks = self._tasks
        return self._environ is None and (tasks is None or tasks._phase == ENDED)

    def describe(self) -> str:
        """What is left of it."""
        if self.batch is None:
            return f"the response of {self.path}, which was not closed"
        return ", ".join(task.name for task in self.batch.tasks) or f"tasks of {self.path}"

    def drop(self) -> None:
        """Let no further task of this request begin, nor be added; on any thread."""
        tasks = self.tasks
        if tasks is not None:
            tasks._phase = ENDED  # and look then: no task is added any more
            for task in self._list:
                if task._claim():
                    discarded(task, "the test is over")
