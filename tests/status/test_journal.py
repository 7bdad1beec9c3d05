"""Numbers that do not grow, on a clock of the test."""

from __future__ import annotations

import time

import pytest

from tests.support import Clock
from wsgi_bg._status.document import MAX_NAMES, KeepDone, Numbers
from wsgi_bg._status.journal import Entry, Journal
from wsgi_bg._status.model import OTHER_NAMES, Times
from wsgi_bg._status.numbers import DISCARDED, FAILED, RETRIED, SUCCEEDED, Histogram


def succeed(journal: Journal, name: str, ended: float, id: str | None = None) -> None:
    journal.successes.append((name, ended - 3.0, ended - 1.0, ended, id))


def test_percentiles_are_at_most_a_tenth_too_high() -> None:
    times = [number / 1000 for number in range(1, 1001)]
    found = Histogram(times).times()
    assert found.count == 1000
    for share, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
        assert share <= value <= share * 1.1
    assert found.max == 1.0


def test_a_histogram_without_times_has_zeros() -> None:
    assert Histogram().times() == Times()


def test_the_longest_and_the_shortest_times_have_buckets() -> None:
    found = Histogram([0.0, 1e30]).times()
    assert (found.count, found.max) == (2, 1e30)
    assert found.p50 <= 1e-6
    assert found.p99 <= 1e30


def test_times_are_those_of_the_entries() -> None:
    journal = Journal()
    now = time.monotonic()
    succeed(journal, "a.b", now)
    journal.entries.append(Entry("a.b", FAILED, None, now - 5.0, now, None, "failed", None))
    journal.entries.append(Entry("a.b", DISCARDED, None, None, now, None, "discarded", None))
    journal.count()
    tally = journal.numbers.names["a.b"]
    assert tally.counts[SUCCEEDED] == tally.counts[FAILED] == tally.counts[DISCARDED] == 1
    wait, run = tally.wait.times(), tally.run.times()
    assert (wait.count, run.count) == (1, 2)
    assert wait.max == pytest.approx(2.0)
    assert run.max == pytest.approx(5.0)
    assert journal.counted == 3


def test_names_are_bounded() -> None:
    journal = Journal()
    now = time.monotonic()
    for number in range(MAX_NAMES + 50):
        succeed(journal, f"name{number}", now)
    journal.count()
    assert len(journal.numbers.names) == MAX_NAMES + 1
    assert journal.numbers.names[OTHER_NAMES].counts[SUCCEEDED] == 50
    other = Numbers()
    other.add(journal.numbers)
    other.add(journal.numbers)
    assert len(other.names) == MAX_NAMES + 1
    assert other.names[OTHER_NAMES].counts[SUCCEEDED] == 100


def test_tasks_are_counted_in_the_minute_in_which_they_have_ended(clock: Clock) -> None:
    journal = Journal(clock=clock)
    for minute in range(3):
        for _ in range(minute + 1):
            succeed(journal, "a", clock())
        clock.advance(60.0)
    journal.count()
    first = min(journal.numbers.minutes)
    counts = [journal.numbers.minutes[first + each].counts[SUCCEEDED] for each in range(3)]
    assert counts == [1, 2, 3]


def test_an_hour_of_minutes_is_kept() -> None:
    journal = Journal()
    now = time.monotonic()
    for minute in range(200):
        succeed(journal, "a", now + 60.0 * minute)
        journal.count()
    assert len(journal.numbers.minutes) == 60
    succeed(journal, "a", now - 86400)  # the clock was set back
    journal.count()
    assert len(journal.numbers.minutes) == 1


def test_the_clock_on_the_wall_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    before = journal.wall(0.0)
    journal.count()
    assert journal.wall(0.0) == before
    now = time.time() + 7200.0
    monkeypatch.setattr(time, "time", lambda: now)
    succeed(journal, "a", time.monotonic(), "an id")
    journal.count()
    assert journal.wall(0.0) == pytest.approx(before + 7200.0, abs=10.0)
    assert max(journal.numbers.minutes) in (now // 60, now // 60 - 1)
    end = journal.end_of("an id")
    assert end is not None
    assert end[1] == pytest.approx(now, abs=10.0)


def test_ended_ids_are_kept_as_keep_done_says(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    journal.keep_done = KeepDone(10, 100.0)
    now = time.monotonic()
    for number in range(50):
        succeed(journal, "a", now, id=str(number))
    journal.count()
    ends = [journal.end_of(str(number)) for number in range(50)]
    states = [end and end[0] for end in ends]
    assert states == [None] * 30 + ["succeeded"] * 20
    today = time.time()
    monkeypatch.setattr(time, "time", lambda: today + 101.0)
    assert journal.end_of("49") is None


def test_no_ended_id_is_kept_if_keep_done_is_zero() -> None:
    journal = Journal()
    journal.keep_done = KeepDone(0, 100.0)
    succeed(journal, "a", time.monotonic(), id="1")
    journal.count()
    assert journal.end_of("1") is None


def test_a_retried_attempt_is_no_end() -> None:
    journal = Journal()
    now = time.monotonic()
    journal.entries.append(Entry("a", RETRIED, None, now, now, "1", None, None))
    journal.count()
    assert journal.end_of("1") is None
    assert journal.numbers.names["a"].counts[RETRIED] == 1


def test_a_thread_without_the_turn_does_not_wait() -> None:
    journal = Journal()
    succeed(journal, "a", time.monotonic())
    turn = journal._turns.take(0.0)
    assert turn is not None
    journal.count()
    assert journal.counted == 0
    turn.give()
    journal.count()
    assert journal.counted == 1
