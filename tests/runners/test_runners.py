"""The inline runner and the pool: which thread runs a batch, limits, drain, statistics."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import support
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
)
from wsgi_bg import BackgroundTasksMiddleware, InlineRunner, PoolRunner, background_tasks
from wsgi_bg._process import repeated
from wsgi_bg.runners import Runner, Statistics, resolve
from wsgi_bg.runners.ledger import Ledger


def submit(runner: Runner, func: Any, *args: Any, complete: bool = True) -> None:
    """Handle a request whose task goes to ``runner``; the response is complete or not."""
    headers = [("Content-Length", "2")] if complete else []
    app = app_that(lambda e: background_tasks.add_task(func, *args), headers=headers)
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())


def test_a_name_means_the_processs_shared_runner() -> None:
    assert resolve("inline") is resolve("inline") is resolve(None)
    assert resolve("pool") is resolve("pool")
    assert isinstance(resolve("pool"), PoolRunner)


def test_the_repr_of_a_runner_shows_its_options() -> None:
    assert repr(InlineRunner()) == "InlineRunner()"
    assert repr(PoolRunner(max_pending=None)) == (
        "PoolRunner(threads=40, max_pending=None, drain_timeout=30.0)"
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("threads", 0, "threads must be 1 or more; got 0"),
        ("max_pending", -1, "max_pending must be 0 or more, or None; got -1"),
        ("drain_timeout", -1.0, "drain_timeout must be 0 seconds or more; got -1.0"),
        ("drain_timeout", float("nan"), "drain_timeout must be 0 seconds or more; got nan"),
        ("threads", True, "threads must be a whole number; got True"),
        ("max_waiting", -1, "max_waiting must be 0 or more, or None; got -1"),
        ("max_waiting", True, "max_waiting must be a whole number or None; got True"),
        ("max_pending", False, "max_pending must be a whole number or None; got False"),
        ("drain_timeout", True, "drain_timeout must be a number of seconds; got True"),
        ("threads", float("inf"), "threads must be a whole number; got inf"),
        ("threads", "4", "threads must be a whole number; got '4'"),
        ("max_pending", 0.5, "max_pending must be a whole number or None; got 0.5"),
        ("drain_timeout", "1", "drain_timeout must be a number of seconds; got '1'"),
    ],
)
def test_a_pool_refuses_numbers_out_of_range(option: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PoolRunner(**{option: value})


def test_a_pool_starts_threads_on_demand_up_to_its_limit() -> None:
    runner = PoolRunner(threads=2)
    names: set[str] = set()
    barrier = threading.Barrier(2)

    def meet() -> None:
        barrier.wait(TIMEOUT)
        names.add(threading.current_thread().name)

    def alone() -> None:
        names.add(threading.current_thread().name)

    submit(runner, alone)
    assert runner.drain(TIMEOUT) == []
    assert names == {"wsgi_bg-pool-0"}

    runner = PoolRunner(threads=2)
    for _ in range(6):
        submit(runner, meet)
    assert runner.drain(TIMEOUT) == []
    assert names == {"wsgi_bg-pool-0", "wsgi_bg-pool-1"}
    assert runner.statistics() == Statistics(0, 0, 6, 0, 0)


def test_the_numbers_of_a_pool(gate: Gate) -> None:
    runner = PoolRunner(threads=1)

    def add(environ: Environ) -> None:
        background_tasks.add_task(print, end="")
        background_tasks.add_task(int)
        background_tasks.add_task(gate.task)
        background_tasks.add_task(lambda: 1 / 0)
        background_tasks.using(run_on="error").add_task(print)

    app = BackgroundTasksMiddleware(app_that(add), runner=runner)
    Server().run(app, make_environ())
    submit(runner, int)
    assert gate.begun.wait(TIMEOUT)
    assert runner.statistics() == Statistics(
        pending=2, running=1, succeeded=2, failed=0, discarded=1
    )
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics() == Statistics(
        pending=0, running=0, succeeded=4, failed=1, discarded=1
    )


def test_the_tasks_that_a_stopped_worker_leaves_are_counted() -> None:
    runner = InlineRunner()

    def stop() -> None:
        background_tasks.add_task(int)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(runner, stop)
    assert runner.drain(0) == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, discarded=2)


def test_beyond_max_pending_a_complete_batch_runs_in_close(gate: Gate) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    threads: list[int] = []
    submit(runner, gate.task)
    submit(runner, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time for repeated warnings, in minutes: a list with a single number."""
    minutes = [0.0]
    monkeypatch.setattr(repeated, "time", SimpleNamespace(monotonic=lambda: minutes[0] * 60))
    return minutes


@pytest.mark.parametrize("complete", [True, False])
def test_a_full_pool_warns_once_a_minute_with_the_number_of_batches_run_here(
    complete: bool, log: Log, gate: Gate, minutes: list[float]
) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    for _ in range(1 if complete else 10):
        submit(runner, gate.task, complete=complete)
    for minute in (0, 0.2, 0.9, 0.99, 1.0, 1.5, 2.5):
        minutes[0] = minute
        submit(runner, int, complete=complete)
    assert [message.split(" batches")[0] for message in log.warnings] == ["1", "4", "2"]
    assert ("ten times" in log.warnings[0]) is not complete
    assert "max_pending" in log.warnings[0]
    assert "builtins.int" in log.warnings[0]
    assert runner.statistics().run_here == 7


def test_tasks_of_a_full_pool_are_counted_as_they_begin_and_each_kind_warns_by_itself(
    log: Log, gate: Gate, minutes: list[float]
) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    seen: list[int] = []
    support.submit(runner, gate.task)
    support.submit(runner, lambda: seen.append(runner.statistics().run_here), int)
    assert seen == [2]
    for _ in range(9):
        submit(runner, int, complete=False)
    submit(runner, int, complete=False)
    assert len(log.warnings) == 2
    assert runner.statistics().run_here == 3


def test_the_inline_runner_counts_batches_of_the_pool_that_ran_on_the_servers_thread(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    pool, runner = PoolRunner(threads=1, max_pending=0), InlineRunner()
    monkeypatch.setattr("wsgi_bg.runners.inline.shared_pool", pool)
    for _ in range(10):
        submit(runner, gate.task, complete=False)
    submit(runner, int, complete=False)
    assert runner.statistics().run_here == pool.statistics().run_here == 1


def test_a_batch_without_a_task_to_run_is_none_that_a_full_pool_ran(
    log: Log, gate: Gate, minutes: list[float]
) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    submit(runner, gate.task)
    app = app_that(lambda e: background_tasks.using(run_on="error").add_task(int))
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    assert [message for message in log.warnings if "server's thread" in message] == []
    assert runner.statistics().run_here == 0


def test_the_record_on_a_full_pool_is_short_however_many_tasks_there_are(
    log: Log, gate: Gate, minutes: list[float]
) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    support.submit(runner, gate.task)
    support.submit(runner, *[int] * 12)
    assert log.warnings[0].endswith(f"<Batch [{'builtins.int, ' * 10}2 others]>")


def test_the_warning_comes_again_from_each_pool(
    log: Log, gate: Gate, minutes: list[float]
) -> None:
    for runner in (PoolRunner(max_pending=0), PoolRunner(threads=2, max_pending=0)):
        submit(runner, int)
        submit(runner, int)
    assert len(log.warnings) == 2


def test_two_threads_at_the_same_event_log_a_single_record(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second thread counts and logs just after the first thread has looked at the clock."""
    warning = repeated.RepeatedWarning("%d events")

    class Now(float):
        def __lt__(self, other: float) -> bool:
            monkeypatch.setattr(repeated, "time", SimpleNamespace(monotonic=lambda: 0.0))
            warning.count()
            return False

    monkeypatch.setattr(repeated, "time", SimpleNamespace(monotonic=Now))
    warning.count()
    assert log.warnings == ["2 events"]


def test_an_event_while_another_thread_logs_is_counted_only(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = repeated.RepeatedWarning("%d events")
    times = 0

    def clock() -> float:
        nonlocal times
        times += 1
        if times == 2:  # the first thread is logging
            warning.count()
        return 60.0 * (times > 3)

    monkeypatch.setattr(repeated, "time", SimpleNamespace(monotonic=clock))
    warning.count()
    warning.count()
    assert log.warnings == ["1 events", "2 events"]


def test_errors_that_come_in_turns_are_logged_once_a_minute_each(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(repeated, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    error = repeated.RepeatedError("%s failed")
    for clock[0] in (0.0, 1.0, 59.0):
        error.log(ValueError(1), "first")
        error.log(ValueError(2), "second")
    assert log.errors == ["first failed", "second failed"]
    clock[0] = 60.0
    error.log(ValueError(1), "first")
    assert log.errors == ["first failed", "second failed", "first failed"]


def test_errors_with_ever_new_texts_do_not_fill_the_memory(log: Log) -> None:
    error = repeated.RepeatedError("failed")
    for number in range(1000):
        error.log(ValueError(number))
    assert len(log.errors) == 1000
    assert len(error._until) <= 100


def test_beyond_max_pending_an_incomplete_batch_is_still_taken(log: Log, gate: Gate) -> None:
    runner = PoolRunner(threads=1, max_pending=1)
    threads: list[int] = []

    def here() -> None:
        threads.append(threading.get_ident())

    submit(runner, gate.task, complete=False)
    for _ in range(9):
        submit(runner, here, complete=False)
    assert threads == []
    submit(runner, here, complete=False)
    assert threads == [threading.get_ident()]
    assert log.warnings[0].startswith(
        "1 batches ran on the server's thread since the last record of this kind: "
        f"ten times max_pending of {runner} is reached, the responses are incomplete and their "
        "clients wait; the last was <Batch [tests.runners.test_runners.test_beyond_"
    )
    assert runner.statistics().run_here == 1
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert len(threads) == 10


def test_a_pool_with_max_pending_0_still_takes_incomplete_batches(log: Log) -> None:
    runner = PoolRunner(max_pending=0)
    threads: list[int] = []
    submit(runner, lambda: threads.append(threading.get_ident()), complete=False)
    assert runner.drain(TIMEOUT) == []
    assert threads != [threading.get_ident()]
    assert log.warnings == []


def test_a_pool_without_a_limit_takes_all(gate: Gate) -> None:
    runner = PoolRunner(threads=1, max_pending=None)
    submit(runner, gate.task)
    for _ in range(2000):
        submit(runner, int)
    assert runner.statistics().pending == 2000
    gate.open()
    assert runner.drain(TIMEOUT) == []


def test_waiting_async_batches_count_as_pending_too(gate: Gate) -> None:
    runner = PoolRunner(threads=4, max_pending=2)
    threads: list[int] = []
    submit(runner, gate.async_task)
    submit(runner, gate.async_task)
    submit(runner, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("make", [PoolRunner, InlineRunner])
def test_drain_returns_unfinished_tasks_and_takes_no_more_in(
    make: Any, gate: Gate, log: Log
) -> None:
    runner = make()
    threads: list[int] = []
    submit(runner, gate.task, complete=False)
    (left,) = runner.drain(0.01)
    assert left.func == gate.task
    for complete in (True, False):
        submit(runner, lambda: threads.append(threading.get_ident()), complete=complete)
    assert threads == [threading.get_ident()] * 2
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert log.warnings == []  # a record would wrongly claim that the runner is full
    assert gate.passed == [True]


def test_drain_waits_for_running_tasks() -> None:
    runner, gate = PoolRunner(), Gate()
    submit(runner, gate.task)
    waiting = threading.Event()
    left: list[object] = []

    def drain() -> None:
        waiting.set()
        left.extend(runner.drain(TIMEOUT))
        left.append("drained")

    thread = threading.Thread(target=drain)
    thread.start()
    assert waiting.wait(TIMEOUT)
    gate.open()
    thread.join(TIMEOUT)
    assert left == ["drained"]
    assert gate.passed == [True]


def test_an_inline_runner_counts_batches_run_here_and_batches_of_the_pool() -> None:
    runner = InlineRunner()
    submit(runner, int)
    submit(runner, int, complete=False)
    submit(runner, int, "no number")
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics() == Statistics(0, 0, 2, 1, 0)


def test_the_order_within_a_batch_is_kept_in_a_pool() -> None:
    runner = PoolRunner()
    seen: list[int] = []

    async def append(x: int) -> None:
        await asyncio.sleep(0)
        seen.append(x)

    def add(environ: Environ) -> None:
        for x in range(20):
            background_tasks.add_task(append if x % 3 else seen.append, x)

    Server().run(BackgroundTasksMiddleware(app_that(add), runner=runner), make_environ())
    assert runner.drain(TIMEOUT) == []
    assert seen == list(range(20))


def test_a_pool_that_can_start_no_thread_runs_batches_in_close(
    monkeypatch: pytest.MonkeyPatch, log: Log, minutes: list[float]
) -> None:
    """Simulate that no thread can start: using up the real memory would end the tests."""
    runner = PoolRunner()
    threads: list[int] = []

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for minute in (0, 0.5, 1):
            minutes[0] = minute
            submit(runner, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()] * 3
    assert [message.split(" batches")[0] for message in log.warnings] == ["1", "2"]
    assert f"{runner} can start no thread" in log.warnings[0]
    assert runner.statistics().run_here == 3


class Many:
    """A batch; while its tasks are counted, another batch joins the ledger."""

    succeeded = failed = discarded = run_here = sent = 0
    is_running = True

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def on_done(self, functions: Any) -> None:
        pass

    @property
    def length(self) -> int:
        entering = threading.Thread(target=self._ledger.add, args=(Many(self._ledger),))
        entering.start()
        entering.join(TIMEOUT)
        assert not entering.is_alive(), "statistics() holds requests up"
        return 3


def test_requests_are_not_held_up_while_statistics_counts() -> None:
    ledger = Ledger()
    ledger.add(cast("Any", Many(ledger)))
    assert ledger.statistics() == Statistics(2, 1, 0, 0, 0)
    for batch in ledger.batches:
        ledger.remove(batch)  # or a later test finds batches under way


def test_a_runner_of_the_users_own() -> None:
    """A runner needs the methods of the protocol, not a base class."""

    class Mine:
        def __init__(self) -> None:
            self.taken: list[Any] = []

        def submit(self, batch: Any) -> None:
            self.taken.append(batch)

        def drain(self, timeout: float) -> list[Any]:
            return [task for batch in self.taken for task in batch.tasks]

        def statistics(self) -> Statistics:
            return Statistics(len(self.taken), 0, 0, 0, 0)

    runner, seen = Mine(), list[int]()
    submit(runner, seen.append, 1)
    assert [task.args for task in runner.drain(0)] == [(1,)]
    runner.taken.pop().run()
    assert seen == [1]
