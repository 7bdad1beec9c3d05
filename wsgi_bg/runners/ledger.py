"""The batches that a runner has taken in and not finished, and counts of the others."""

from __future__ import annotations

import threading
import time
from math import inf
from typing import TYPE_CHECKING

from .base import Statistics

if TYPE_CHECKING:
    from wsgi_bg.batch import Batch
    from wsgi_bg.task import BackgroundTask


class Ledger:
    """Counts the batches of one runner in one process, and lets one wait for them."""

    def __init__(self) -> None:
        # Guards all below; its notification says that no batch is left. Its lock can be
        # taken again: a signal handler that drains may have interrupted its holder.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._handed_over: set[Batch] = set()
        self._run_here: set[Batch] = set()
        self._succeeded = self._failed = self._discarded = self._tasks_run_here = 0
        self.is_draining = False
        self._on_done = self._leave  # one object for all batches

    def enter(self, batch: Batch, limit: float = inf) -> bool:
        """Keep ``batch`` until its run has ended.

        :param limit: how many batches may be handed over at the same time.
        :return: whether it may be handed over; False also while the runner is drained.
        """
        batch.when_done(self._on_done)
        with self._lock:
            may_go = len(self._handed_over) < limit and not self.is_draining
            (self._handed_over if may_go else self._run_here).add(batch)
            return may_go

    def _leave(self, batch: Batch) -> None:
        with self._lock:
            self._handed_over.discard(batch)
            self._run_here.discard(batch)
            self._succeeded += batch.succeeded
            self._failed += batch.failed
            self._discarded += batch.discarded
            if not self._handed_over and not self._run_here:
                self._changed.notify_all()

    @property
    def _batches(self) -> list[Batch]:
        return [*self._handed_over, *self._run_here]

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until no batch is left or ``timeout`` seconds are over; return the rest."""
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        with self._changed:
            self.is_draining = True
            while self._batches and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [task for batch in self._batches for task in batch.tasks]

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone."""
        with self._lock:
            return [task for batch in self._batches for task in batch.abandon()]

    def count_run_here(self, batch: Batch) -> None:
        """Count the tasks of a batch that is to run on the server's thread."""
        tasks = len(batch.tasks)
        with self._lock:
            self._tasks_run_here += tasks

    def statistics(self) -> Statistics:
        with self._lock:
            batches = self._batches
            succeeded, failed, discarded = self._succeeded, self._failed, self._discarded
            run_here = self._tasks_run_here
        # Without the lock, which every request with tasks takes: there may be a million.
        running = unfinished = 0
        for batch in batches:
            running += batch.is_running
            unfinished += len(batch.tasks)
            succeeded += batch.succeeded
            failed += batch.failed
            discarded += batch.discarded
        return Statistics(
            pending=max(0, unfinished - running),  # a task may end between the two
            running=running,
            succeeded=succeeded,
            failed=failed,
            discarded=discarded,
            run_here=run_here,
        )
