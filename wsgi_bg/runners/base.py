"""The protocol of a runner; a runner needs no base class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask


@dataclass(frozen=True)
class Statistics:
    """A snapshot of the numbers of a runner's tasks, unfinished and finished.

    :ivar pending: submitted tasks that have not begun, also those that wait in a file of this
        process until the pool has room.
    :ivar running: tasks that run now.
    :ivar succeeded: tasks that have returned in this process.
    :ivar failed: tasks that have raised.
    :ivar discarded: tasks that were skipped because of the request's outcome or an earlier
        task's error, or whose worker was stopped before or during the task.
    :ivar run_here: tasks that a pool began to run on the server's thread, because the pool
        had no room or no thread for them.
    :ivar waiting: tasks that wait for their time, because of a delay or before a further
        attempt, and the tasks that wait for them, in memory or in a file of this process, and
        the tasks that wait to be sent. They do not count as pending.
    :ivar sent: tasks that were sent to other processes, which know how each task ends.
    :ivar aside: stored tasks that this process has put aside: they were damaged, or processes
        have died while they ran.
    """

    pending: int
    running: int
    succeeded: int
    failed: int
    discarded: int
    run_here: int = 0
    waiting: int = 0
    sent: int = 0
    aside: int = 0


@runtime_checkable
class Runner(Protocol):
    """Decides on which thread and when a batch runs.

    A runner may also have

    - ``check(task)``, called when a task is added, on the thread of ``add_task``; raises
      ``TypeError`` to refuse the task; may return a message, for example the encoded call;
    - ``send(task)``, or ``send(task, message)`` if ``check`` returned a message, called when
      the task's turn has come, on a thread that ``send`` may block: returns True if the task
      was sent to another process, which then makes the call, or False if the call is to be
      made here; raises to give the task up. The message is passed only once;
    - ``may_send(task)``, called for a task without a message, which must not block: returns
      False if an ``async def`` task stays here, so that the task needs no thread for ``send``;
    - ``sends_delayed``, True if ``send`` lets the other process wait for the delay of a task
      with a message (``task.options.delay``). Otherwise the task waits in this process, and is
      sent when its time has come;
    - ``drain_timeout``, how long interpreter exit waits for the runner, in seconds (30 if
      missing);
    - ``work_is_in_ledgers``, True if no work is left once the runner's batches have ended:
      exit then does not keep the runner alive;
    - ``abandon()``, called at exit after ``drain``: lets no batch begin more tasks and returns
      the unfinished tasks. Without ``abandon``, exit logs the tasks that ``drain`` returned.
    """

    def submit(self, batch: Batch) -> None:
        """Accept a batch; called on the thread that closes the response.

        The runner calls ``batch.run()`` at some time. Unless ``batch.response_complete``, the
        call must come after ``submit`` has returned, or the client would wait for the tasks.
        A batch may have no task left to run. A task that has waited for its time, because of
        a delay or for a further attempt, comes in a complete batch of its own, which a thread
        of the package submits.
        """

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Accept no more batches, wait ``timeout`` seconds at most, return unfinished tasks.

        Exit calls ``drain`` several times with parts of the time, until no task is left, the
        time is up, or ``drain`` returns tasks before ``timeout`` is over. Exit then waits for
        batches that ``drain`` has left out.
        """

    def statistics(self) -> Statistics:
        """Return numbers of tasks; must not block for long."""
