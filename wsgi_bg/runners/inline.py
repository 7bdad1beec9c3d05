"""``InlineRunner``: runs tasks on the server's thread, if no response waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_bg._process.per_process import PerProcess
from wsgi_bg.runners.ledger import Ledger, LedgerRunner
from wsgi_bg.runners.pool import shared_pool

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch


class InlineRunner(LedgerRunner):
    """Runs tasks in ``close()``, on the server's thread, if the response is complete.

    Batches of other responses go to the process's shared :class:`PoolRunner`. The
    server's thread is busy until the tasks are done, and the next request on the same
    connection waits: for production use ``runner="pool"``.
    """

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

    def submit_later(self, batch: Batch) -> None:
        """Hand the batch over to the shared pool: no thread of a server is there to run it."""
        self._ledgers.get().add(batch)
        shared_pool.submit_later(batch)

    @property
    def ledger(self) -> Ledger:
        return self._ledgers.get()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
