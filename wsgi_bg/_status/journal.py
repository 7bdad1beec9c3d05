"""``Journal``: the tasks that have ended in this process."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from wsgi_bg._durable.writer import Turn, Turns
from wsgi_bg._status.document import KEEP_DONE, MAX_FAILURES, MINUTES, KeepDone, Numbers
from wsgi_bg._status.model import Failure, State
from wsgi_bg._status.numbers import Tally

MAX_ENTRIES = 1_024
"""The number of ended tasks after which the thread that ends the next one counts them."""

_MOST_ENTRIES = 100 * MAX_ENTRIES  # never reached, unless a thread is stopped while it counts


class Entry(NamedTuple):
    """A task that has ended, or an attempt after which the task will be called again."""

    name: str | tuple[str, str]
    """The name of the function, or its module and its qualified name."""
    outcome: int
    """The index in :data:`wsgi_bg._status.numbers.OUTCOMES`."""
    ended_at: float
    """By :func:`time.monotonic`, as all moments of the entry."""
    handed_over_at: float | None
    started_at: float | None
    id: str | None
    """None if nobody has read the id of the task."""
    state: State | None
    failure: Failure | None


class Journal:
    """Counts the tasks of a process that have ended. All methods may be called by any thread.

    The thread that ends a task only appends to :attr:`entries`. A thread that has the turn
    counts the entries: one that reads, one that writes the file of the process, or the thread
    that ends a task if there are many entries. A thread without the turn never waits.

    :ivar started: when the journal has begun, by :func:`time.time`.
    :ivar numbers: the numbers of the tasks that were counted.
    :ivar counted: the number of entries that were counted.
    :ivar keeps_ended: True if :attr:`new_ended` is read from time to time.
    :ivar new_ended: the ids of ended tasks, with the state and the time by :func:`time.time`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.pid: int = os.getpid()
        self.started: float = time.time()
        self.entries: deque[tuple[object, ...]] = deque(maxlen=_MOST_ENTRIES)
        self.numbers = Numbers()
        self.counted: int = 0
        self.keep_done: KeepDone = KEEP_DONE
        self.keeps_ended: bool = False
        self.new_ended: deque[tuple[str, str, float]] = deque(maxlen=_MOST_ENTRIES)
        self._clock = clock
        self._offset = self.started - clock()
        # Two generations: the older goes when the younger is full.
        self._ended: dict[str, tuple[State, float]] = {}
        self._ended_before: dict[str, tuple[State, float]] = {}
        self._tallies: dict[object, Tally] = {}
        self._turns = Turns(delays_forks=False)

    def wall(self, moment: float) -> float:
        """Return a moment of the monotonic clock by :func:`time.time`."""
        return moment + self._offset

    def look_at_clock(self) -> None:
        """Follow the clock on the wall if it was set."""
        offset = time.time() - self._clock()
        if abs(offset - self._offset) > 0.5:
            self._offset = offset

    def count(self) -> None:
        """Count the entries, unless another thread does so now."""
        turn = Turn(self._turns)
        if turn.claim():
            with turn:
                entries = self.entries
                while entries:
                    self._count(Entry._make(entries.popleft()))

    def _count(self, entry: Entry) -> None:
        tally = self._tallies.get(entry.name)
        if tally is None:
            tally = self._tally_of(entry.name)
        ended = entry.ended_at + self._offset
        minute = int(ended // 60)
        of_minute = self.numbers.minutes.get(minute)
        if of_minute is None:
            of_minute = self._begin(minute)
        outcome, started = entry.outcome, entry.started_at
        tally.counts[outcome] += 1
        of_minute.counts[outcome] += 1
        if started is not None:
            run = entry.ended_at - started
            tally.run.add(run)
            of_minute.run.add(run)
            if entry.handed_over_at is not None:
                wait = started - entry.handed_over_at
                tally.wait.add(wait)
                of_minute.wait.add(wait)
        if entry.failure is not None:
            failures = self.numbers.failures
            failures.append(entry.failure)
            del failures[:-MAX_FAILURES]
        if entry.id is not None and entry.state is not None:
            self._keep(entry.id, entry.state, ended)
        self.counted += 1

    def _tally_of(self, name: str | tuple[str, str]) -> Tally:
        text = name if isinstance(name, str) else ".".join(filter(None, name))
        tally = self.numbers.tally_of(text)
        if text in self.numbers.names:  # else there would be no end of keys
            self._tallies[name] = tally
        return tally

    def _begin(self, minute: int) -> Tally:
        minutes = {
            each: tally
            for each, tally in self.numbers.minutes.items()
            if minute - MINUTES < each < minute + MINUTES  # the clock may have been set back
        }
        minutes[minute] = tally = Tally()
        self.numbers.minutes = minutes
        return tally

    def _keep(self, id: str, state: State, ended: float) -> None:  # noqa: A002
        if not self.keep_done.number:
            return
        if len(self._ended) >= self.keep_done.number:
            self._ended_before = self._ended
            self._ended = {}
        self._ended[id] = state, ended
        if self.keeps_ended:
            self.new_ended.append((id, state, ended))

    def state_of(self, id: str) -> State | None:  # noqa: A002
        """Return how the task with the id has ended; None if that is not known."""
        found = self._ended.get(id) or self._ended_before.get(id)
        if found is None or time.time() - found[1] > self.keep_done.age:
            return None
        return found[0]
