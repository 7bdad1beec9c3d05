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
    """Counts the batches of one runner in one process, and lets a thread wait for them.

    No lock is held here: the exception of a signal handler could leave it locked, and then
    no batch could end any more. A thread that publishes something (a batch, the drain, a
    waiter) looks afterwards at what other threads have published meanwhile.
    """

    def __init__(self) -> None:
        self._handed_over: dict[Batch, None] = {}
        self._run_here: dict[Batch, None] = {}
        # Succeeded, failed and discarded tasks of batches that have ended, by the thread that
        # ended them: no two threads add to the same numbers.
        self._counts: dict[int, list[int]] = {}
        # Tasks that were to run on the server's thread for want of room; one number a thread.
        self._run_here_counts: dict[int, int] = {}
        self._waiters: list[threading.Event] = []
        self.is_draining = False
        self._on_done = self._remove  # one object for all batches

    def add(self, batch: Batch, limit: float = inf) -> bool:
        """Keep ``batch`` until its run has ended.

        :param limit: how many batches may be handed over at the same time.
        :return: whether it may be handed over; False also while the runner is drained.
        """
        batch.when_done(self._on_done)
        handed_over = self._handed_over
        handed_over[batch] = None
        if len(handed_over) <= limit and not self.is_draining:
            return True
        self._run_here[batch] = None
        handed_over.pop(batch, None)
        return False

    def _remove(self, batch: Batch) -> None:
        was_here = self._handed_over.pop(batch, self) is None
        was_here = self._run_here.pop(batch, self) is None or was_here
        if not was_here:
            return
        counts = self._counts.setdefault(threading.get_ident(), [0, 0, 0])
        counts[0] += batch.succeeded
        counts[1] += batch.failed
        counts[2] += batch.discarded
        for waiter in list(self._waiters):
            waiter.set()

    def count_run_here(self, batch: Batch) -> None:
        """Count the tasks of a batch that is to run on the server's thread."""
        thread, counts = threading.get_ident(), self._run_here_counts
        counts[thread] = counts.get(thread, 0) + batch.length

    @property
    def batches(self) -> list[Batch]:
        """The batches that have not ended."""
        # dict.fromkeys: add() moves a batch by adding it to the second dict first.
        return list(dict.fromkeys([*list(self._handed_over), *list(self._run_here)]))

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until no batch is left or ``timeout`` seconds are over; return the rest."""
        self.is_draining = True
        return self.wait(timeout)

    def wait(self, timeout: float) -> list[BackgroundTask]:
        """Wait until no batch is left or ``timeout`` seconds are over; return the rest."""
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        changed = threading.Event()
        self._waiters.append(changed)
        try:
            while self.batches and (left := deadline - time.monotonic()) > 0:
                changed.wait(left)
                changed.clear()
        finally:
            self._waiters.remove(changed)
        return [task for batch in self.batches for task in batch.tasks]

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone."""
        return [task for batch in self.batches for task in batch.abandon()]

    def statistics(self) -> Statistics:
        """Count without making a list of tasks, of which there may be a million."""
        batches = self.batches
        ended = list(self._counts.values())
        running = sum(batch.is_running for batch in batches)
        unfinished = sum(batch.length for batch in batches)
        return Statistics(
            pending=max(0, unfinished - running),  # a task may end between the two
            running=running,
            succeeded=sum(each[0] for each in ended) + sum(b.succeeded for b in batches),
            failed=sum(each[1] for each in ended) + sum(b.failed for b in batches),
            discarded=sum(each[2] for each in ended) + sum(b.discarded for b in batches),
            run_here=sum(list(self._run_here_counts.values())),
        )
