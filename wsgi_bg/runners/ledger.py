"""The batches that a runner has taken in and not finished, and counts of the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING

from wsgi_bg.process import PerProcess
from wsgi_bg.waiting import watch

from .base import Statistics

if TYPE_CHECKING:
    from wsgi_bg.batch import Batch
    from wsgi_bg.task import BackgroundTask


class Ledger:
    """Counts the batches of one runner in one process, and lets others wait for them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Guards all below; its notification says that a batch has ended. Its lock can be
        # taken again: a signal handler that drains may have interrupted its holder.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._handed_over: set[Batch] = set()
        self._run_here: set[Batch] = set()
        self._succeeded = self._failed = self._discarded = 0
        self._waiters = 0
        self.is_draining = False
        watch(self)
        self._on_done = self.leave  # one object for all batches

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

    def leave(self, batch: Batch) -> None:
        with self._lock:
            self._handed_over.discard(batch)
            self._run_here.discard(batch)
            self._succeeded += batch.succeeded
            self._failed += batch.failed
            self._discarded += batch.discarded
            if self._waiters:
                self._changed.notify_all()

    @property
    def batches(self) -> list[Batch]:
        """The batches that have not ended."""
        with self._lock:
            return [*self._handed_over, *self._run_here]

    def wait_for(self, batches: Iterable[Batch], deadline: float) -> bool:
        """Block until none of ``batches`` is here, or ``deadline`` by the monotonic clock.

        :return: False if the deadline came first.
        """
        with self._changed:
            self._waiters += 1
            try:
                for batch in batches:
                    while batch in self._handed_over or batch in self._run_here:
                        left = deadline - time.monotonic()
                        if left <= 0:
                            return False
                        self._changed.wait(min(left, threading.TIMEOUT_MAX))
                return True
            finally:
                self._waiters -= 1

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until no batch is left or ``timeout`` seconds are over; return the rest."""
        deadline = time.monotonic() + timeout
        self.is_draining = True
        while (batches := self.batches) and self.wait_for(batches, deadline):
            pass
        return [task for batch in batches for task in batch.tasks]

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone."""
        with self._lock:
            return [task for batch in self.batches for task in batch.abandon()]

    def statistics(self) -> Statistics:
        with self._lock:
            batches = self.batches
            running = sum(batch.is_running for batch in batches)
            unfinished = sum(len(batch.tasks) for batch in batches)
            return Statistics(
                pending=max(0, unfinished - running),  # a task may end between the two
                running=running,
                succeeded=self._succeeded + sum(batch.succeeded for batch in batches),
                failed=self._failed + sum(batch.failed for batch in batches),
                discarded=self._discarded + sum(batch.discarded for batch in batches),
            )


_others = PerProcess(Ledger)


def keep(batch: Batch) -> None:
    """Keep a batch that its runner has taken and that no ledger knows, until it ends.

    A user's runner keeps none. Called after ``submit``: most batches are known by then, or
    have ended.
    """
    if batch.is_watched or not batch.tasks:
        return
    ledger = _others.get()
    ledger.enter(batch)
    if batch.has_ended:  # perhaps before it could tell the ledger
        ledger.leave(batch)
