"""The unfinished batches of a runner, and counts of the tasks of finished batches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from wsgi_bg._process.greenlets import event
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg.runners.base import Statistics

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.options import Options
    from wsgi_bg._tasks.task import BackgroundTask


MAX_WAITING = 100_000
"""How many tasks of a runner may wait for their time in a process."""


class UnsentTasks(Protocol):
    """Tasks that wait to be sent, and belong to no batch."""

    @property
    def tasks(self) -> list[BackgroundTask]: ...

    def give_up(self) -> list[BackgroundTask]:
        """Wait no longer; claim and return the tasks."""


class WaitingTasks(UnsentTasks, Protocol):
    """Tasks that wait for their time, and belong to no batch yet.

    :ivar due: the time, by :func:`time.monotonic`.
    :ivar invocation: the call of a serverless handler that the request belongs to, or None.
    :ivar runner: the runner that gets the tasks then.
    """

    due: float
    invocation: Any

    @property
    def runner(self) -> object: ...

    def length(self) -> int:
        """Approximate number of tasks."""

    def left(self) -> list[BackgroundTask]:
        """The tasks, also those that the exit has claimed."""


class Ledger:
    """Counts the batches of one runner in one process, and lets a thread wait for them.

    :param max_waiting: how many tasks may wait for their time.
    :ivar waiting: tasks that wait for their time, and belong to no batch yet.
    :ivar unsent: tasks that wait to be sent to another process, and belong to no batch.

    A ledger holds no lock: the exception of a signal handler could leave the lock locked,
    and then no batch could end. A thread that publishes an object (a batch, the drain, a
    waiter) checks afterwards if another thread has published an object at the same time.
    """

    def __init__(self, max_waiting: float = MAX_WAITING) -> None:
        self.pid: int = os.getpid()
        self.max_waiting: float = max_waiting
        self._handed_over: dict[Batch, None] = {}
        self._run_here: dict[Batch, None] = {}
        self.waiting: dict[WaitingTasks, None] = {}
        self.unsent: dict[UnsentTasks, None] = {}
        # Tasks whose batch a thread is submitting, after their time has come.
        self._submitting: dict[WaitingTasks, None] = {}
        # Numbers of ended tasks: succeeded, failed, discarded, run on the server's thread,
        # sent, put aside. By the thread that ended them, so that no two threads add to a
        # number.
        self._counts: dict[int, list[int]] = {}
        self._waiters: list[Any] = []
        self.is_draining: bool = False
        self._on_done = (self.remove,)  # one tuple for all batches
        _ledgers[id(self)] = self

    def add(self, batch: Batch, limit: float = inf) -> bool:
        """Keep ``batch`` until its run has ended.

        :param limit: how many batches may be handed over at the same time.
        :return: True if ``batch`` may be handed over; False also while the runner is drained.
        """
        batch.on_done(self._on_done)
        batch.is_kept = True
        handed_over = self._handed_over
        handed_over[batch] = None
        if len(handed_over) <= limit and not self.is_draining:
            return True
        self._run_here[batch] = None
        handed_over.pop(batch, None)
        return False

    def remove(self, batch: Batch) -> None:
        """Remove a batch that has ended, and count its tasks."""
        was_here = self._handed_over.pop(batch, self) is None
        was_here = self._run_here.pop(batch, self) is None or was_here
        if not was_here:
            return
        counts = self._counts_here()
        counts[0] += batch.succeeded
        if batch.failed or batch.discarded or batch.run_here or batch.sent:
            counts[1] += batch.failed
            counts[2] += batch.discarded
            counts[3] += batch.run_here
            counts[4] += batch.sent
        if self._waiters:
            self._notify()

    def _counts_here(self) -> list[int]:
        return self._counts.setdefault(threading.get_ident(), [0, 0, 0, 0, 0, 0])

    def end_unsent(self, unsent: UnsentTasks, *, sent: int = 0, failed: int = 0) -> None:
        """Remove a task from :attr:`unsent`, and count the task."""
        self.unsent.pop(unsent, None)
        counts = self._counts_here()
        counts[1] += failed
        counts[4] += sent
        self._notify()

    def count_aside(self) -> None:
        """Count a stored task that was put aside, and belongs to no batch."""
        self._counts_here()[5] += 1

    def may_wait(self) -> bool:
        """True if one more task may wait for its time. Threads may pass together."""
        return len(self.waiting) < self.max_waiting

    def end_wait(self, later: WaitingTasks) -> None:
        """Let tasks wait no more whose time has come: their batch was added."""
        self._submitting[later] = None
        self.waiting.pop(later, None)

    def end_submit(self, later: WaitingTasks) -> None:
        """Note that the runner has got the batch of ``later``."""
        self._submitting.pop(later, None)
        self._notify()

    def _notify(self) -> None:
        for waiter in list(self._waiters):
            waiter.set()

    @property
    def is_used(self) -> bool:
        """True if a batch has come."""
        return bool(self._counts or self._handed_over or self._run_here)

    @property
    def run_here(self) -> int:
        """Number of tasks that a pool ran on the server's thread."""
        ended = sum(counts[3] for counts in list(self._counts.values()))
        return ended + sum(batch.run_here for batch in self.batches)

    @property
    def length(self) -> int:
        """Number of batches that were handed over and have not ended."""
        return len(self._handed_over)

    def forget(self, batch: Batch) -> None:
        """Do not keep a batch that was not handed over after all; counts no task."""
        self._handed_over.pop(batch, None)

    @property
    def batches(self) -> list[Batch]:
        """The batches that have not ended."""
        # dict.fromkeys: while add() moves a batch, both dictionaries hold the batch.
        return list(dict.fromkeys([*list(self._handed_over), *list(self._run_here)]))

    def due_by(self, due: float, runner: object = None) -> list[WaitingTasks]:
        """The tasks whose time comes before ``due`` by the monotonic clock.

        :param runner: only tasks of this runner; None for all that this ledger has.
        """
        return [
            later
            for later in list(self.waiting)
            if later.due <= due
            and (runner is None or runner is later.runner)
            and any(task.unclaimed for task in later.left())  # else only a file has them
        ]

    def not_submitted(self, due: float, runner: object = None) -> list[WaitingTasks]:
        """The tasks that the runner has not got yet, and gets before ``due``; see due_by()."""
        submitting = list(self._submitting)
        if runner is not None:
            submitting = [later for later in submitting if later.runner is runner]
        return self.due_by(due, runner) + submitting

    def wait_for(self, batches: Iterable[Batch | UnsentTasks], deadline: float) -> bool:
        """Block until all ``batches`` have ended, or until ``deadline`` by the monotonic clock.

        Tasks that wait for their time are waited for until they have become a batch.

        :return: False if the deadline has passed first.
        """
        changed = event()
        self._waiters.append(changed)
        try:
            for batch in batches:
                while (
                    batch in self._handed_over
                    or batch in self._run_here
                    or batch in self.waiting
                    or batch in self._submitting
                    or batch in self.unsent
                    or self._has_moved(batch)
                ):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    changed.wait(min(left, threading.TIMEOUT_MAX))
                    changed.clear()
            return True
        finally:
            self._waiters.remove(changed)

    def _has_moved(self, unsent: object) -> bool:
        """True if a task that could not be sent is in a batch of this ledger."""
        batch = getattr(unsent, "moved_to", None)
        return batch in self._handed_over or batch in self._run_here

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait ``timeout`` seconds at most for all batches; return the unfinished tasks.

        Tasks whose time comes within ``timeout`` are waited for, too.
        """
        deadline = time.monotonic() + timeout
        self.is_draining = True
        left: list[Batch | UnsentTasks] = [*self.batches, *self.not_submitted(deadline)]
        while left and self.wait_for(left, deadline):
            left = [*self.batches, *self.not_submitted(deadline)]
        return [task for batch in self.batches for task in batch.tasks]

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin more tasks; return the unfinished tasks."""
        return [task for batch in self.batches for task in batch.abandon()]

    def abandon_waiting(self) -> list[BackgroundTask]:
        """Let no task wait any longer; claim and return the tasks that were waiting."""
        return [task for later in list(self.waiting) for task in later.give_up()]

    def abandon_unsent(self) -> list[BackgroundTask]:
        """Send no task any more; claim and return the tasks that were to be sent."""
        return [task for later in list(self.unsent) for task in later.give_up()]

    def statistics(self) -> Statistics:
        """Return numbers of tasks, without making a list of perhaps a million tasks."""
        batches = self.batches
        ended = list(self._counts.values())
        running = sum(batch.is_running for batch in batches)
        unfinished = sum(batch.length for batch in batches)
        return Statistics(
            pending=max(0, unfinished - running),  # a task may end between the two counts
            running=running,
            succeeded=sum(each[0] for each in ended) + sum(b.succeeded for b in batches),
            failed=sum(each[1] for each in ended) + sum(b.failed for b in batches),
            discarded=sum(each[2] for each in ended) + sum(b.discarded for b in batches),
            run_here=sum(each[3] for each in ended) + sum(b.run_here for b in batches),
            waiting=sum(later.length() for later in list(self.waiting)) + len(self.unsent),
            sent=sum(each[4] for each in ended) + sum(b.sent for b in batches),
            aside=sum(each[5] for each in ended),
        )


calls_on_worker: dict[BackgroundTask, int] = {}
"""The tasks that this process runs as an engine's worker, and the id of the process."""

# Weak: an unfinished batch holds its ledger.
_ledgers: WeakValueDictionary[int, Ledger] = WeakValueDictionary()


def ledgers_here() -> list[Ledger]:
    """The ledgers of this process, without those inherited from a parent by fork."""
    pid = os.getpid()
    found = [reference() for reference in _ledgers.valuerefs()]
    return [ledger for ledger in found if ledger is not None and ledger.pid == pid]


def batches_under_way() -> dict[Batch, None]:
    """The submitted batches that have not ended, each once."""
    return dict.fromkeys(chain.from_iterable(ledger.batches for ledger in ledgers_here()))


def tasks_to_send() -> dict[UnsentTasks, None]:
    """The tasks that wait to be sent to other processes."""
    return dict.fromkeys(chain.from_iterable(list(each.unsent) for each in ledgers_here()))


_others = PerProcess(Ledger)


def ledger_of(runner: object) -> Ledger:
    """The ledger of ``runner``, or the one of all runners that have no ledger."""
    return runner.ledger if isinstance(runner, LedgerRunner) else _others.get()


def keep(batch: Batch) -> None:
    """Keep a batch that no ledger has until the batch ends; a user's runner has no ledger."""
    if not batch.length:
        return
    ledger = _others.get()
    ledger.add(batch)
    if batch.has_ended:  # perhaps before add() registered remove()
        ledger.remove(batch)


class LedgerRunner:
    """Base class of the package's runners, whose work is in the batches of their ledger.

    A subclass defines ``ledger`` and ``submit``.
    """

    work_is_in_ledgers = True

    @property
    def ledger(self) -> Ledger:
        """The batches of this runner in this process."""
        raise NotImplementedError

    @property
    def is_behind(self) -> bool:
        """True if tasks of this process, whose time has come, are in a file for want of room.

        False while they cannot come into memory, since the process ends.
        """
        return False

    def submit(self, batch: Batch) -> None:
        """Accept a batch; called on the thread that closes the response."""
        raise NotImplementedError

    def submit_later(self, batch: Batch) -> None:
        """Accept a batch whose tasks have waited for their time; may block.

        Called on a thread of the timer. ``max_pending`` does not hold.
        """
        self.submit(batch)

    def attach(self, options: Options) -> None:
        """Note the options of a middleware that was given this runner.

        A runner whose tasks also run in other processes makes the calls there under these
        options. Called when the middleware is made, and by an inner middleware with the first
        request.
        """

    def start(self) -> None:
        """Run the tasks that earlier processes have left, if the runner stores tasks.

        :raises RuntimeError: if the stored tasks cannot be used.
        """

    def prepare_drain(self) -> None:
        """Begin no task that the runner has stored: exit is about to drain all runners."""

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Hand no more batches over and wait until all batches have ended; blocks.

        A batch submitted later runs in ``close()``. ``drain`` waits for a delayed task, or for
        a further attempt, if the time comes within ``timeout``; the others go on to wait, and
        are not returned.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished in time. They go on.
        """
        return self.ledger.drain(timeout)

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin more tasks; return the unfinished tasks. Does not block."""
        return self.ledger.abandon()

    def statistics(self) -> Statistics:
        """Return numbers of tasks, including tasks that another runner runs for this one."""
        return self.ledger.statistics()
