"""``InlineRunner``: runs tasks on the server's thread, if no response waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_bg._process.per_process import PerProcess
from wsgi_bg.runners.base import Statistics
from wsgi_bg.runners.ledger import Ledger
from wsgi_bg.runners.pool import shared_pool

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask


class InlineRunner:
    """Runs tasks in ``close()``, on the server's thread, if the response is complete.

    Batches of other responses go to the process's shared :class:`PoolRunner`. The
    server's thread is busy until the tasks are done, and the next request on the same
    connection waits: for production use ``runner="pool"``.
    """

    work_is_in_ledgers = True

    def __init__(self) -> None:
        self._ledgers = PerProcess(Ledger)

    def submit(self, batch: Batch) -> None:
        """Run the batch now, or hand it over if the response is not complete.

        :raises KeyboardInterrupt: or another exception that stops the server's worker.
        """
        takes_more = self._ledgers.get().add(batch)
        if batch.response_complete or not takes_more:
            batch.run()
        else:
            shared_pool.submit(batch)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Hand no more batches over; wait for the batches that run or were handed over.

        Blocks; a batch submitted later runs in ``close()``.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished in time. They go on.
        """
        return self._ledgers.get().drain(timeout)

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin more tasks; return the unfinished tasks. Does not block."""
        return self._ledgers.get().abandon()

    def statistics(self) -> Statistics:
        """Return numbers of tasks, including tasks that were handed over."""
        return self._ledgers.get().statistics()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
