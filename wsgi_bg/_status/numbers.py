"""Numbers of tasks that do not grow: counts, and histograms with fixed buckets."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from math import inf
from typing import Any

from wsgi_bg._status.model import Minute, NameCounts, Times

BOUNDS: list[float] = [*(1e-6 * 1.1**number for number in range(320)), inf]
"""The upper limits of the buckets, in seconds: from a microsecond to months."""

OUTCOMES = ("succeeded", "failed", "retried", "discarded", "sent", "lost")
SUCCEEDED, FAILED, RETRIED, DISCARDED, SENT, LOST = range(len(OUTCOMES))


_MOST = 2**63  # times in a bucket


class Histogram:
    """Numbers of times by length, in buckets of which each is a tenth wider than the last.

    :param times: in seconds.
    :ivar buckets: the numbers; a bucket without a time has no entry.
    :ivar longest: the longest time, in seconds.
    """

    __slots__ = ("buckets", "longest")

    def __init__(self, times: list[float] | None = None) -> None:
        self.buckets: Counter[int] = Counter()
        self.longest: float = 0.0
        if times:
            # Sorted: a search for each bucket takes a third of the time of one for each time.
            times = sorted(times)
            self.longest = times[-1]
            begin = 0
            while begin < len(times):
                bucket = bisect(BOUNDS, times[begin])
                end = bisect_left(times, BOUNDS[bucket], begin)
                self.buckets[bucket] = end - begin
                begin = end

    def merge(self, other: Histogram) -> None:
        """Add the numbers of ``other``."""
        self.buckets.update(other.buckets.copy())
        self.longest = max(self.longest, other.longest)

    def times(self) -> Times:
        """Return the percentiles."""
        buckets = sorted(self.buckets.copy().items())
        if not buckets:
            return Times()
        sums = list(accumulate(number for _, number in buckets))
        total = sums[-1]

        def percentile(share: float) -> float:
            bucket, _ = buckets[bisect_left(sums, share * total)]
            return min(BOUNDS[bucket], self.longest)

        return Times(total, percentile(0.5), percentile(0.95), percentile(0.99), self.longest)

    def dump(self) -> list[Any]:
        """Return the histogram as a list for JSON; see :meth:`load`."""
        return [self.longest, *(each for pair in self.buckets.copy().items() for each in pair)]

    @classmethod
    def load(cls, dumped: list[Any]) -> Histogram:
        """Return the histogram of which ``dumped`` is the :meth:`dump`."""
        histogram = cls()
        histogram.longest = float(dumped[0])
        for bucket, number in zip(dumped[1::2], dumped[2::2], strict=True):
            if not (0 <= bucket < len(BOUNDS) and 0 < number < _MOST):
                raise ValueError
            histogram.buckets[int(bucket)] = int(number)
        return histogram


class Tally:
    """Numbers of the tasks of a function, or of a minute.

    :ivar counts: numbers of tasks by the index in :data:`OUTCOMES`.
    """

    __slots__ = ("counts", "run", "wait")

    def __init__(self) -> None:
        self.counts: list[int] = [0] * len(OUTCOMES)
        self.wait = Histogram()
        self.run = Histogram()

    def merge(self, other: Tally) -> None:
        """Add the numbers of ``other``."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.wait.merge(other.wait)
        self.run.merge(other.run)

    def dump(self) -> list[Any]:
        """Return the tally as a list for JSON; see :meth:`load`."""
        return [*self.counts, self.wait.dump(), self.run.dump()]

    @classmethod
    def load(cls, dumped: list[Any]) -> Tally:
        """Return the tally of which ``dumped`` is the :meth:`dump`."""
        tally = cls()
        *counts, wait, run = dumped
        tally.counts = [int(counts[index]) for index in range(len(OUTCOMES))]
        tally.wait = Histogram.load(wait)
        tally.run = Histogram.load(run)
        return tally

    def of_name(self, name: str, *, running: int, waiting: int, aside: int) -> NameCounts:
        """Return the numbers of a function."""
        counts = dict(zip(OUTCOMES, self.counts, strict=True))
        return NameCounts(
            name,
            running=running,
            waiting=waiting,
            aside=aside,
            wait=self.wait.times(),
            run=self.run.times(),
            **counts,
        )

    def of_minute(self, minute: int) -> Minute:
        """Return the numbers of a minute."""
        counts = self.counts
        return Minute(
            minute * 60.0,
            succeeded=counts[SUCCEEDED],
            failed=counts[FAILED],
            discarded=counts[DISCARDED],
            sent=counts[SENT],
            wait=self.wait.times(),
            run=self.run.times(),
        )


def merged(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of ``tallies``."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total
