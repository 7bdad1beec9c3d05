"""What a runner is: a small protocol, no base class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from wsgi_bg.batch import Batch
    from wsgi_bg.task import BackgroundTask


@dataclass(frozen=True)
class Statistics:
    """How many tasks a runner has, and has had; a snapshot.

    :ivar pending: tasks taken in that have not begun.
    :ivar running: tasks that run now.
    :ivar succeeded: tasks that have returned.
    :ivar failed: tasks that have raised.
    :ivar discarded: tasks that were not run: for the request's outcome, after another
        task's error, or because their worker was stopped, perhaps in the middle of them.
    :ivar run_here: tasks that a pool began to run on the server's thread, since it had no
        room or no thread for them.
    """

    pending: int
    running: int
    succeeded: int
    failed: int
    discarded: int
    run_here: int = 0


@runtime_checkable
class Runner(Protocol):
    """Decides where and when a batch runs.

    A runner may also have

    - ``check(task)``, called when a task is added, on that thread; it refuses the task by
      raising ``TypeError``;
    - ``send(task)``, called when the task's turn has come, on a thread that it may block:
      returns True if it has sent the task to another process, which then makes the call,
      False if the call is to be made here, and gives the task up by raising;
    - ``may_send(task)``, which does not block: False spares an ``async def`` task that stays
      here the thread on which ``send`` is called;
    - ``drain_timeout``, how long interpreter exit waits for it, in seconds (30 without);
    - ``work_is_in_ledgers``, True if no work is left once its batches have ended: exit then
      does not keep the runner alive;
    - ``abandon()``, called at exit after ``drain``: lets no batch begin another task and
      returns the tasks left undone. Without it those that ``drain`` returned are named.
    """

    def submit(self, batch: Batch) -> None:
        """Take a batch over, from the thread that closes the response.

        Calls ``batch.run()`` at some time; not before it has returned, unless
        ``batch.response_complete``: the client would wait for the tasks. A batch may
        have no task left to run.
        """

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Take no more work in, wait ``timeout`` seconds at most, return what is not done.

        Exit calls it several times with parts of the time, until nothing is left, the time is
        up, or it returns tasks before ``timeout`` is over. Exit then waits for batches that it
        has left out.
        """

    def statistics(self) -> Statistics:
        """Numbers of tasks; does not block for long."""
