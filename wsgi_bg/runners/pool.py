"""``PoolRunner``: on threads and a loop of its own, so that the server's threads are free."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING

from wsgi_bg import greenlets, portal
from wsgi_bg.batch import Batch
from wsgi_bg.checks import seconds, whole_number
from wsgi_bg.ending import is_exiting
from wsgi_bg.portal_thread import LoopJob
from wsgi_bg.process import PerProcess
from wsgi_bg.repeated import RepeatedWarning
from wsgi_bg.shutdown import register
from wsgi_bg.workers import Workers

from .base import Statistics
from .ledger import Ledger

if TYPE_CHECKING:
    from wsgi_bg.task import BackgroundTask

# An incomplete response's batch is taken in up to this many times max_pending: to run it
# in close() would make its client wait.
_INCOMPLETE_FACTOR = 10

_RAN_HERE = "%d batches ran on the server's thread since the last record of this kind: "

PUT_OFF = 0.005
"""How long after ``submit`` the batch of an incomplete response begins, in seconds.

``close()`` has to return and the server to write its last bytes: a task that computes would
keep the interpreter from both for as long as its switch interval, 5 ms.
"""


class PoolRunner:
    """Hands batches over in ``close()`` and runs them on worker threads, in any order.

    The tasks of one batch run one after another. Beyond ``max_pending`` a complete
    response's batch runs in ``close()``, so that load slows the server down and does not
    fill the memory. A WARNING says so, once a minute at most, with the number of such
    batches; ``statistics().run_here`` counts their tasks.

    :param threads: how many worker threads at most; started when needed, all daemons.
    :param max_pending: how many batches may be handed over and not finished; None for no
        limit.
    :param drain_timeout: how long interpreter exit waits for the tasks, in seconds;
        ``math.inf`` for no limit. Those not finished by then are named at ERROR and lost.
    :raises TypeError: if a number is of another type; a bool is none.
    :raises ValueError: if a number is out of range.
    """

    work_is_in_ledgers = True

    def __init__(
        self, *, threads: int = 40, max_pending: int | None = 1000, drain_timeout: float = 30.0
    ) -> None:
        whole_number("threads", threads, least=1)
        whole_number("max_pending", max_pending, least=0, or_none=True)
        seconds("drain_timeout", drain_timeout)
        self._threads = threads
        self._max_pending = max_pending
        limit = inf if max_pending is None else max_pending
        # [True] for complete responses, [False] for others.
        self._limits = (max(limit, 1) * _INCOMPLETE_FACTOR, limit)
        self.drain_timeout = drain_timeout
        self._crews = PerProcess(lambda: _Crew(threads))

    def submit(self, batch: Batch) -> None:
        """Hand the batch over; runs it here where there is no room, and then blocks.

        :raises KeyboardInterrupt: or what else stops the server's worker, from a batch
            that runs here.
        """
        crew = self._crews.get()
        is_complete = batch.response_complete
        has_room = crew.ledger.add(batch, self._limits[is_complete])
        if not is_complete:
            batch.not_before = time.monotonic() + PUT_OFF
        if is_exiting() or crew.ledger.is_draining:
            batch.run()
        elif not has_room:
            self._run_here(batch, crew.full if is_complete else crew.too_full)
        elif not crew.submit(batch):
            self._run_here(batch, crew.no_thread)

    def _run_here(self, batch: Batch, warning: RepeatedWarning) -> None:
        if batch.tasks:  # else nothing but its end is to come
            batch.run_here = batch.length
            warning.count(self, batch)
        batch.run()

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Take no more work in and wait until all is done; blocks.

        A batch submitted later runs in ``close()``.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished by then. They go on.
        """
        return self._crews.get().ledger.drain(timeout)

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone. Does not block."""
        return self._crews.get().ledger.abandon()

    def statistics(self) -> Statistics:
        """Numbers of tasks."""
        return self._crews.get().ledger.statistics()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(threads={self._threads}, max_pending={self._max_pending}, "
            f"drain_timeout={self.drain_timeout})"
        )


shared_pool: PoolRunner = PoolRunner()
"""The process's shared runner of the name ``"pool"``."""
register(shared_pool)  # other runners hand over to it, and it may not be anyone's option


class _Crew:
    """What runs the batches of one pool in one process.

    A batch goes to a worker for the plain functions that come next in it and to the
    portal's loop for the async ones, to and fro, and holds nothing of the other kind.
    """

    def __init__(self, threads: int) -> None:
        self.ledger = Ledger()
        self._workers = Workers(self._work, threads, "wsgi_bg-pool")
        self._starter = Workers(self._work, 1, "wsgi_bg-start")
        # Greenlets, which are cheap to hold; see _work().
        self._waiting = Workers(Batch.run, inf, "wsgi_bg-wait")
        self._job = LoopJob(Batch.run_async, Batch.goes_on_async, self._pass_on)
        self._late_job = self._job._replace(work=_run_late)
        self.full = RepeatedWarning(_RAN_HERE + "max_pending of %s is reached; the last was %s")
        self.too_full = RepeatedWarning(
            _RAN_HERE + "ten times max_pending of %s is reached, the responses are incomplete "
            "and their clients wait; the last was %s"
        )
        self.no_thread = RepeatedWarning(_RAN_HERE + "%s can start no thread; the last was %s")

    def submit(self, batch: Batch) -> bool:
        """Have the batch begin; False if it has no task or there is no thread to be had."""
        is_async = batch.next_is_async
        if is_async is None:
            return False
        if not is_async:
            return self._workers.submit(batch)
        thread = None if greenlets.are_threads() else portal.peek()
        if thread is None:
            # To make it takes longer than close() may, and plain functions may have all
            # the workers for long.
            return self._starter.submit(batch)
        thread.start(batch, self._late_job if batch.not_before else self._job)
        return True

    def _work(self, batch: Batch) -> None:
        """On a thread: run the plain functions that come next, then pass the batch on."""
        wait = batch.not_before and batch.not_before - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        if not batch.run_plain():
            return
        if greenlets.are_threads():
            # The loop's thread could not pass it on: its greenlets are not the server's.
            self._waiting.submit(batch)
            return
        try:
            portal.start(batch, self._job)
        except Exception:  # no portal to be had
            batch.run()

    def _pass_on(self, batch: Batch) -> None:
        """On the loop: have a worker go on with what is left of the batch."""
        if not batch.has_ended and not self._workers.submit(batch):
            self._work(batch)  # no thread to be had: better than not at all


async def _run_late(batch: Batch) -> None:
    import asyncio  # the loop that this runs on has loaded it

    await asyncio.sleep(batch.not_before - time.monotonic())
    await batch.run_async()
