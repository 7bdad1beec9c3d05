"""The batches that a runner has taken in and not finished, and counts of the others."""

from __future__ import annotations

import threading
import time
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
        self._changed = threading.Condition()
        self._batches: set[Batch] = set()
        self._succeeded = self._failed = self._discarded = 0
        self._is_draining = False

    def __len__(self) -> int:
        return len(self._batches)

    def enter(self, batch: Batch) -> bool:
        """Keep ``batch`` until its run has ended; False if no more work is to be taken in."""
        batch.when_done(self._leave)
        with self._changed:
            self._batches.add(batch)
            return not self._is_draining

    def _leave(self, batch: Batch) -> None:
        with self._changed:
            self._batches.discard(batch)
            self._succeeded += batch.succeeded
            self._failed += batch.failed
            self._discarded += batch.discarded
            if not self._batches:
                self._changed.notify_all()

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until no batch is left or ``timeout`` seconds are over; return the rest."""
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        with self._changed:
            self._is_draining = True
            while self._batches and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return [task for batch in list(self._batches) for task in batch.tasks]

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone."""
        with self._changed:
            return [task for batch in list(self._batches) for task in batch.abandon()]

    def statistics(self) -> Statistics:
        with self._changed:
            batches = list(self._batches)
            running = sum(batch.is_running for batch in batches)
            unfinished = sum(len(batch.tasks) for batch in batches)
            return Statistics(
                pending=max(0, unfinished - running),  # a task may end between the two
                running=running,
                succeeded=self._succeeded + sum(batch.succeeded for batch in batches),
                failed=self._failed + sum(batch.failed for batch in batches),
                discarded=self._discarded + sum(batch.discarded for batch in batches),
            )
