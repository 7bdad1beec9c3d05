"""``PoolRunner``: on threads of its own, so that the server's are free."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import NoneType
from typing import TYPE_CHECKING

from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.process import PerProcess, is_exiting
from wsgi_bg.report import logger
from wsgi_bg.shutdown import register

from .base import Statistics
from .ledger import Ledger

if TYPE_CHECKING:
    from wsgi_bg.batch import Batch
    from wsgi_bg.task import BackgroundTask

# An incomplete response's batch is taken in up to this many times max_pending: to run it
# in close() would make its client wait.
_INCOMPLETE_FACTOR = 10


class PoolRunner:
    """Hands batches over in ``close()`` and runs them on worker threads, in any order.

    The tasks of one batch run one after another. Beyond ``max_pending`` a complete
    response's batch runs in ``close()``, so that load slows the server down and does not
    fill the memory.

    :param threads: how many worker threads at most; started when needed, all daemons.
    :param max_pending: how many batches may be handed over and not finished; None for no
        limit.
    :param drain_timeout: how long interpreter exit waits for the tasks, in seconds. Those
        not finished by then are named at ERROR and lost.
    :raises TypeError: if a number is none.
    :raises ValueError: if a number is out of range.
    """

    def __init__(
        self, *, threads: int = 40, max_pending: int | None = 1000, drain_timeout: float = 30.0
    ) -> None:
        if not isinstance(threads, int):
            raise OptionTypeError("threads", threads, "a whole number")
        if threads < 1:
            raise OptionValueError("threads", threads, "1 or more")
        if not isinstance(max_pending, (int, NoneType)):
            raise OptionTypeError("max_pending", max_pending, "a whole number or None")
        if max_pending is not None and max_pending < 0:
            raise OptionValueError("max_pending", max_pending, "0 or more, or None")
        if not isinstance(drain_timeout, (int, float)):
            raise OptionTypeError("drain_timeout", drain_timeout, "a number of seconds")
        if not drain_timeout >= 0:
            raise OptionValueError("drain_timeout", drain_timeout, "0 seconds or more")
        self._threads = threads
        self._max_pending = max_pending
        self.drain_timeout = drain_timeout
        self._crews = PerProcess(lambda: _Crew(threads))

    def submit(self, batch: Batch) -> None:
        """Hand the batch over to a worker thread; runs it here where there is no room.

        Does not block, unless it runs the batch.

        :raises KeyboardInterrupt: or what else stops the server's worker, from a batch
            that runs here.
        """
        crew = self._crews.get()
        has_room = self._has_room(len(crew.ledger), batch)
        takes_more = crew.ledger.enter(batch) and not is_exiting()
        if not (has_room and takes_more and batch.tasks and crew.take(batch)):
            batch.run()

    def _has_room(self, pending: int, batch: Batch) -> bool:
        limit = self._max_pending
        if limit is None or pending < limit:
            return True
        if batch.response_complete:
            return False
        if pending < max(limit, 1) * _INCOMPLETE_FACTOR:
            return True
        logger.warning(
            "%d batches are pending in %r: %r runs before its response is complete, and "
            "its client waits",
            pending,
            self,
            batch,
        )
        return False

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


shared_pool = PoolRunner()
"""The process's shared runner of the name ``"pool"``."""
register(shared_pool)  # other runners hand over to it, and it may not be anyone's option


class _Crew:
    """The worker threads of one pool in one process."""

    def __init__(self, threads: int) -> None:
        self.ledger = Ledger()
        self._limit = threads
        self._queue: SimpleQueue[Batch] = SimpleQueue()
        self._lock = threading.RLock()  # guards the two numbers; see Ledger
        self._started = 0
        self._free = 0  # threads less batches queued or running: below 0 one has to wait

    def take(self, batch: Batch) -> bool:
        """Queue the batch; False if there is no thread to run it, nor one to be had."""
        with self._lock:
            if self._free <= 0 and self._started < self._limit:
                self._start_thread()
            if not self._started:
                return False
            self._free -= 1
        self._queue.put(batch)
        return True

    def _start_thread(self) -> None:
        name = f"wsgi_bg-pool-{self._started}"
        try:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        except RuntimeError:  # no memory for a stack, or the interpreter is exiting
            return
        self._started += 1
        self._free += 1

    def _work(self) -> None:
        while True:
            batch = self._queue.get()
            try:
                batch.run()
            except BaseException as exc:  # a greenlet's kill; the batch has named its tasks
                logger.error("%r was stopped", batch, exc_info=exc)
            del batch
            with self._lock:
                self._free += 1
