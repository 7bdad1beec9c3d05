"""``Journal``: the tasks that have ended in this process."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from wsgi_bg._status.document import KEEP_DONE, MAX_FAILURES, MINUTES, KeepDone, Numbers
from wsgi_bg._status.model import End, Failure, State
from wsgi_bg._status.numbers import SUCCEEDED, Histogram, Tally
from wsgi_bg._store.writer import Turn, Turns

T = TypeVar("T")

MAX_ENTRIES = 1_024
"""The number of ended tasks after which the thread that ends the next one counts them."""

_MOST_ENTRIES = 100 * MAX_ENTRIES  # never reached, unless a thread is stopped while it counts


Success = tuple[str, float | None, float, float, str | None]
"""A task that has succeeded: its name, when the task was handed over, began and ended (by
:func:`time.monotonic`), and its id, if anybody has read the id."""


class Entry(NamedTuple):
    """A task that has not succeeded, or an attempt that a further attempt follows."""

    name: str
    outcome: int
    """The index in :data:`wsgi_bg._status.numbers.OUTCOMES`."""
    handed_over_at: float | None
    """By :func:`time.monotonic`, as all moments of the entry."""
    started_at: float | None
    ended_at: float
    id: str | None
    """None if nobody has read the id of the task."""
    state: State | None
    failure: Failure | None


class Journal:
    """Counts the tasks of a process that have ended. All methods may be called by any thread.

    The thread that ends a task only appends to :attr:`successes` or :attr:`entries`. A thread
    that has the turn counts them: a thread that reads or writes, or the thread that ends a task
    if there are many. A thread without the turn never waits.

    :ivar started: when the journal has begun, by :func:`time.time`.
    :ivar numbers: the numbers of the tasks that were counted.
    :ivar counted: how many tasks and attempts were counted.
    :ivar keeps_ended: True if :attr:`new_ended` is read from time to time.
    :ivar new_ended: the ids of ended tasks, with the state and the time by :func:`time.time`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.pid: int = os.getpid()
        self.started: float = time.time()
        self.successes: deque[Success] = deque(maxlen=_MOST_ENTRIES)
        self.entries: deque[Entry] = deque(maxlen=_MOST_ENTRIES)
        self.numbers = Numbers()
        self.counted: int = 0
        self.keep_done: KeepDone = KEEP_DONE
        self.keeps_ended: bool = False
        self.new_ended: deque[tuple[str, str, float]] = deque(maxlen=_MOST_ENTRIES)
        self._clock = clock
        self._offset = self.started - clock()
        # Two generations: the older goes when the younger is full.
        self._ended: dict[str, End] = {}
        self._ended_before: dict[str, End] = {}
        self._turns = Turns(delays_forks=False)

    def wall(self, moment: float) -> float:
        """Return a moment of the monotonic clock by :func:`time.time`."""
        return moment + self._offset

    def _look_at_clock(self) -> None:
        """Follow the clock on the wall if it was set."""
        offset = time.time() - self._clock()
        if abs(offset - self._offset) > 0.5:
            self._offset = offset

    def count(self) -> None:
        """Count what was appended, unless another thread does so now."""
        turn = Turn(self._turns)
        if turn.claim():
            with turn:
                self._look_at_clock()
                self._count_successes(_pop_all(self.successes))
                for entry in _pop_all(self.entries):
                    self._count(entry)

    def _count_successes(self, successes: list[Success]) -> None:
        # By minute and name, so that the loop over all tasks does little.
        groups: dict[str, tuple[list[float], list[float]]] = {}
        begin = end = 0.0  # of the minute of these groups
        for name, handed_over, started, ended, id in successes:  # noqa: A001
            if not begin <= ended < end:
                self._count_groups(groups, begin)
                groups = {}
                begin, end = self._minute_of(ended)
            try:
                waits, runs = groups[name]
            except KeyError:
                waits, runs = groups[name] = [], []
            runs.append(ended - started)
            if handed_over is not None:
                waits.append(started - handed_over)
            if id is not None:
                self._keep(id, "succeeded", ended)
        self._count_groups(groups, begin)

    def _count_groups(
        self, groups: dict[str, tuple[list[float], list[float]]], moment: float
    ) -> None:
        """Count tasks that have succeeded in the minute of ``moment``."""
        for name, (waits, runs) in groups.items():
            self._add(name, SUCCEEDED, len(runs), waits, runs, moment)

    def _count(self, entry: Entry) -> None:
        started, handed_over, ended = entry.started_at, entry.handed_over_at, entry.ended_at
        waits, runs = [], []
        if started is not None:
            runs.append(ended - started)
            if handed_over is not None:
                waits.append(started - handed_over)
        self._add(entry.name, entry.outcome, 1, waits, runs, ended)
        if entry.failure is not None:
            failures = self.numbers.failures
            failures.append(entry.failure)
            del failures[:-MAX_FAILURES]
        if entry.id is not None and entry.state is not None:
            self._keep(entry.id, entry.state, ended)

    def _add(
        self,
        name: str,
        outcome: int,
        count: int,
        waits: list[float],
        runs: list[float],
        moment: float,
    ) -> None:
        """Count tasks of a name that have ended in the minute of ``moment``."""
        self.counted += count
        minute = int((moment + self._offset) // 60)
        wait, run = Histogram(waits), Histogram(runs)
        for tally in (
            self.numbers.tally_of(name),
            self.numbers.minutes.get(minute) or self._begin(minute),
        ):
            tally.counts[outcome] += count
            tally.wait.merge(wait)
            tally.run.merge(run)

    def _minute_of(self, moment: float) -> tuple[float, float]:
        """Return the begin and the end of the minute of ``moment``, by the monotonic clock."""
        begin = (moment + self._offset) // 60 * 60 - self._offset
        # A rounding error must not make an endless number of groups.
        return min(begin, moment), max(begin + 60, moment + 1e-6)

    def _begin(self, minute: int) -> Tally:
        minutes = {
            each: tally
            for each, tally in self.numbers.minutes.items()
            if minute - MINUTES < each < minute + MINUTES  # the clock may have been set back
        }
        minutes[minute] = tally = Tally()
        self.numbers.minutes = minutes
        return tally

    def _keep(self, id: str, state: State, ended_at: float) -> None:  # noqa: A002
        if not self.keep_done.number:
            return
        ended = ended_at + self._offset
        if len(self._ended) >= self.keep_done.number:
            self._ended_before = self._ended
            self._ended = {}
        self._ended[id] = state, ended
        if self.keeps_ended:
            self.new_ended.append((id, state, ended))

    def end_of(self, id: str) -> End | None:  # noqa: A002
        """Return how the task with the id has ended; None if that is not known."""
        found = self._ended.get(id) or self._ended_before.get(id)
        if found is None or time.time() - found[1] > self.keep_done.age:
            return None
        return found


def _pop_all(entries: deque[T]) -> list[T]:
    """Empty a deque to which other threads append."""
    return [entries.popleft() for _ in range(len(entries))]
