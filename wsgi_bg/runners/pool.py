"""``PoolRunner``: runs tasks on worker threads and the portal's loop, not server threads."""

from __future__ import annotations

import os
import time
from math import inf
from weakref import WeakValueDictionary

from wsgi_bg._loop import portal
from wsgi_bg._loop.portal import LoopJob
from wsgi_bg._process import greenlets
from wsgi_bg._process.exit import is_exiting
from wsgi_bg._process.interrupts import stops_worker
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedWarning
from wsgi_bg._process.workers import Workers
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.checks import seconds, whole_number
from wsgi_bg.runners.ledger import MAX_WAITING, Ledger, LedgerRunner
from wsgi_bg.runners.shutdown import register

# The limit for batches of incomplete responses is max_pending times this: running such a batch
# in close() would make the client wait.
_INCOMPLETE_FACTOR = 10

_RAN_HERE = "%d batches ran on the server's thread since the last record of this kind: "

START_DELAY = 0.005
"""How long after ``submit`` the batch of an incomplete response begins, in seconds.

In this time ``close()`` returns and the server writes its last bytes. A task that computes
would delay both by the interpreter's switch interval, 5 ms.
"""


class PoolRunner(LedgerRunner):
    """Hands batches over in ``close()`` and runs them on worker threads, in any order.

    The tasks of a batch run in order, never two at a time. Beyond ``max_pending`` the batch
    of a complete response runs in ``close()``, so that load slows the server down and does
    not fill the memory. A WARNING, at most once a minute, logs the number of such batches;
    ``statistics().run_here`` counts their tasks.

    :param threads: the most worker threads; started when needed, all daemons.
    :param max_pending: how many batches may be handed over and not finished; None for no
        limit.
    :param max_waiting: how many tasks may wait for their time in a process, which do not count
        in ``max_pending``; None for no limit. Beyond it ``add_task`` with a delay raises
        ``WaitingLimitError``, and a task that raised is not called again.
    :param drain_timeout: how long interpreter exit waits for the tasks, in seconds;
        ``math.inf`` for no limit. Tasks not finished in time are logged at ERROR and lost.
    :raises TypeError: if a number has the wrong type; a bool is not a number.
    :raises ValueError: if a number is out of range.
    """

    def __init__(
        self,
        *,
        threads: int = 40,
        max_pending: int | None = 1000,
        max_waiting: int | None = MAX_WAITING,
        drain_timeout: float = 30.0,
    ) -> None:
        whole_number("threads", threads, least=1)
        whole_number("max_pending", max_pending, least=0, or_none=True)
        whole_number("max_waiting", max_waiting, least=0, or_none=True)
        seconds("drain_timeout", drain_timeout)
        self._threads = threads
        self._max_pending = max_pending
        limit = inf if max_pending is None else max_pending
        # [True] for complete responses, [False] for incomplete responses.
        self._limits = (max(limit, 1) * _INCOMPLETE_FACTOR, limit)
        self.max_waiting: float = inf if max_waiting is None else max_waiting
        self.drain_timeout = drain_timeout
        self._states = PerProcess(
            lambda: _PoolState(threads, max_pending, Ledger(self.max_waiting))
        )

    def submit(self, batch: Batch) -> None:
        """Hand the batch over, or run the batch here and block, if there is no room.

        :raises KeyboardInterrupt: or another exception that stops the server's worker, from
            a batch that runs here.
        """
        state = self._states.get()
        is_complete = batch.response_complete
        has_room = state.ledger.add(batch, self._limits[is_complete])
        if not is_complete:
            batch.not_before = time.monotonic() + START_DELAY
        if is_exiting() or state.ledger.is_draining:
            batch.run()
        elif not has_room:
            self._run_here(batch, state.full if is_complete else state.too_full)
        elif not state.submit(batch):
            self._run_here(batch, state.no_thread)

    def submit_later(self, batch: Batch) -> None:
        """Hand a batch over whose tasks have waited, or run the batch here without a thread."""
        state = self._states.get()
        state.ledger.add(batch)
        if is_exiting() or state.ledger.is_draining or not state.submit(batch):
            batch.run()

    def offer(self, batch: Batch, *, share: float = 1.0) -> bool:
        """Hand the batch over if there is room; never runs the batch here, and does not block.

        :param share: the part of ``max_pending`` that may be taken before this batch.
        :return: False if the batch was not handed over.
        """
        state = self._states.get()
        if not self._has_room(state.ledger, share):
            return False
        state.ledger.add(batch)
        if not batch.response_complete:
            batch.not_before = time.monotonic() + START_DELAY
        if state.submit(batch):
            return True
        state.ledger.forget(batch)
        return False

    def has_room(self, share: float = 1.0) -> bool:
        """True if :meth:`offer` would take a batch now."""
        return self._has_room(self.ledger, share)

    def _has_room(self, ledger: Ledger, share: float) -> bool:
        has_room = ledger.length < max(self._limits[True], 1) * share
        return has_room and not (is_exiting() or ledger.is_draining)

    def _run_here(self, batch: Batch, warning: RepeatedWarning) -> None:
        tasks = batch.tasks
        if tasks:  # else the batch has no task left and only has to end
            batch.run_here = len(tasks)
            warning.count(self, batch)
        batch.run()

    @property
    def state(self) -> _PoolState:
        """The threads and the batches of this pool in this process."""
        return self._states.get()

    @property
    def ledger(self) -> Ledger:
        return self.state.ledger

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(threads={self._threads}, max_pending={self._max_pending}, "
            f"drain_timeout={self.drain_timeout})"
        )


shared_pool: PoolRunner = PoolRunner()
"""The process's shared runner of the name ``"pool"``."""
register(shared_pool)  # runners hand batches over to this pool even if no option names it


class _PoolState:
    """Runs the batches of one pool in one process.

    Plain functions of a batch run on a worker thread, async functions on the portal's loop.
    The batch moves to and fro: on the loop it occupies no worker, on a worker not the loop.

    :ivar ledger: the batches of the pool.
    :ivar threads: the most worker threads.
    :ivar max_pending: see :class:`PoolRunner`.
    """

    def __init__(self, threads: int, max_pending: int | None, ledger: Ledger) -> None:
        self.ledger = ledger
        self.threads = threads
        self.max_pending = max_pending
        _states[id(self)] = self
        self._workers = Workers(self._work, threads, "wsgi_bg-pool")
        self._starter = Workers(self._work, 1, "wsgi_bg-start")
        # Workers are greenlets here, cheap to keep waiting; see _work().
        self._waiting = Workers(Batch.run, inf, "wsgi_bg-wait")
        self._job = LoopJob(Batch.run_async, Batch.goes_on_async, self._pass_on)
        self._late_job = self._job._replace(work=_run_late)
        self.full: RepeatedWarning = RepeatedWarning(
            _RAN_HERE + "max_pending of %s is reached; the last was %s"
        )
        self.too_full: RepeatedWarning = RepeatedWarning(
            _RAN_HERE + "ten times max_pending of %s is reached, the responses are incomplete "
            "and their clients wait; the last was %s"
        )
        self.no_thread: RepeatedWarning = RepeatedWarning(
            _RAN_HERE + "%s can start no thread; the last was %s"
        )

    @property
    def threads_alive(self) -> int:
        """Number of worker threads."""
        return self._workers.alive

    @property
    def threads_idle(self) -> int:
        """Number of worker threads that wait for a batch."""
        return self._workers.idle

    def submit(self, batch: Batch) -> bool:
        """Start the batch; return False if it has no task or no thread can be started."""
        is_async = batch.next_is_async
        if is_async is None:
            return False
        if not is_async:
            return self._workers.submit(batch)
        thread = None if greenlets.are_threads() else portal.peek()
        if thread is None:
            # Starting the portal takes too long for close(), and plain functions may occupy
            # all workers for long.
            return self._starter.submit(batch)
        thread.start(batch, self._late_job if batch.not_before else self._job)
        return True

    def _work(self, batch: Batch) -> None:
        """Run the next plain functions, on a worker thread, then pass the batch to the loop."""
        wait = batch.not_before and batch.not_before - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        if not batch.run_plain():
            return
        if greenlets.are_threads():
            # The loop's thread cannot pass a batch back: its greenlets are not the server's.
            self._waiting.submit(batch)
            return
        try:
            portal.start(batch, self._job)
        except BaseException as exc:  # the portal cannot be started
            if stops_worker(exc):
                raise
            batch.run()

    def _pass_on(self, batch: Batch) -> None:
        """Hand the rest of the batch to a worker; called on the loop."""
        if not batch.has_ended and not self._workers.submit(batch):
            self._work(batch)  # no thread can be started: block the loop rather than lose tasks


# Weak: a batch that is under way holds the ledger, and a worker its _PoolState.
_states: WeakValueDictionary[int, _PoolState] = WeakValueDictionary()


def pools_here() -> list[_PoolState]:
    """The pools of this process that have got a batch, or the shared pool if none has."""
    states = [reference() for reference in _states.valuerefs()]
    pid = os.getpid()
    here = [each for each in states if each is not None and each.ledger.pid == pid]
    return [each for each in here if each.ledger.is_used] or [shared_pool.state]


async def _run_late(batch: Batch) -> None:
    import asyncio  # the running loop has imported asyncio

    await asyncio.sleep(batch.not_before - time.monotonic())
    await batch.run_async()
