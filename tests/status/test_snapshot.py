"""``snapshot`` and ``of`` in a single process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.status.support import fail, handle, nothing, process, visit
from tests.support import TIMEOUT, Gate, app_that
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    PoolRunner,
    Retry,
    background_tasks,
    portal,
    status,
    wait,
)
from wsgi_bg._status.recorder import recorder
from wsgi_bg.runners.ledger import ledgers_here
from wsgi_bg.status import Snapshot

NOTHING = "tests.status.support.nothing"
FAIL = "tests.status.support.fail"


def counts_of(snapshot: Snapshot, name: str) -> status.NameCounts:
    return next(each for each in snapshot.names if each.name == name)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
    wait(TIMEOUT)


def test_ended_tasks_are_counted_by_name() -> None:
    handle(nothing, nothing, fail)
    snapshot = status.snapshot()
    assert counts_of(snapshot, NOTHING).succeeded == 2
    assert counts_of(snapshot, FAIL).failed == 1
    assert (snapshot.counts.name, snapshot.counts.succeeded, snapshot.counts.failed) == (
        "",
        2,
        1,
    )


def test_a_callable_that_is_no_function_is_counted_by_its_name() -> None:
    handle([].clear)
    assert counts_of(status.snapshot(), "list.clear").succeeded == 1


def test_a_function_whose_module_cannot_be_written_is_counted() -> None:
    class Odd:
        def __format__(self, form: str) -> str:
            raise ValueError

    def function() -> None:
        pass

    odd: Any = function
    odd.__module__ = Odd()
    handle(odd, nothing)
    snapshot = status.snapshot()
    assert {each.name for each in snapshot.names} == {NOTHING, "function"}
    assert counts_of(snapshot, NOTHING).succeeded == 1


def test_wait_and_run_have_percentiles() -> None:
    handle(nothing, nothing, nothing)
    counts = counts_of(status.snapshot(), NOTHING)
    for times in (counts.wait, counts.run):
        assert times.count == 3
        assert 0 < times.p50 <= times.p95 <= times.p99 <= times.max < TIMEOUT


def test_the_last_failures_have_message_and_traceback() -> None:
    (task,) = handle(fail, path="/orders")
    (failure,) = status.snapshot().failures
    assert (failure.name, failure.id, failure.request) == (FAIL, task.id, "GET /orders")
    assert (failure.error, failure.message, failure.attempt) == ("ValueError", "not today", 1)
    assert failure.traceback.startswith("Traceback")
    assert failure.traceback.endswith("ValueError: not today\n")


def test_an_error_without_a_text_and_with_a_long_traceback_is_recorded() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise SystemExit

    def raise_odd() -> None:
        raise OddError

    def raise_long() -> None:
        raise ValueError("x" * 30_000)

    handle(raise_odd, raise_long)
    long, odd = status.snapshot().failures
    assert odd.message.endswith("OddError")
    assert len(long.message) == 1_000
    assert len(long.traceback) == 10_003
    assert long.traceback.endswith("xxx\n")


def test_only_a_hundred_failures_are_kept() -> None:
    for _ in range(3):
        handle(*[fail] * 50)
    assert len(status.snapshot().failures) == 100


def test_a_running_task_has_its_request_and_its_begin(gate: Gate) -> None:
    (task,) = handle(gate.task, path="/orders", runner=PoolRunner(threads=1))
    assert gate.begun.wait(TIMEOUT)
    snapshot = status.snapshot()
    (running,) = snapshot.running
    assert (running.name, running.id) == ("tests.support.Gate.task", task.id)
    assert (running.request, running.attempt) == ("GET /orders", 1)
    assert running.thread is not None
    assert running.thread.startswith("wsgi_bg-pool")
    assert running.since is not None
    assert 0 <= snapshot.taken - running.since < TIMEOUT
    assert status.of(task.id) == "running"


def test_waiting_tasks_are_counted_by_name(gate: Gate) -> None:
    tasks = handle(gate.task, nothing, nothing, runner=PoolRunner(threads=1))
    assert gate.begun.wait(TIMEOUT)
    snapshot = status.snapshot()
    assert snapshot.waiting == {NOTHING: 2}
    assert counts_of(snapshot, NOTHING).waiting == snapshot.counts.waiting == 2
    assert (
        snapshot.counts.running == counts_of(snapshot, "tests.support.Gate.task").running == 1
    )
    assert status.of(tasks[1].id) == "waiting"


def test_a_batch_that_waits_for_a_thread_is_counted(gate: Gate) -> None:
    pool = PoolRunner(threads=1)
    handle(gate.task, runner=pool)
    assert gate.begun.wait(TIMEOUT)
    handle(nothing, nothing, runner=pool)
    assert status.snapshot().waiting == {NOTHING: 2}


def test_a_long_batch_is_counted_without_names(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._status.live.MAX_WAITING", 2)
    pool = PoolRunner(threads=1)
    handle(gate.task, runner=pool)
    assert gate.begun.wait(TIMEOUT)
    handle(*[nothing] * 5, runner=pool)
    assert status.snapshot().waiting == {"(other names)": 5}


def test_the_load_of_the_pool_is_shown(gate: Gate) -> None:
    pool = PoolRunner(threads=3, max_pending=5)
    handle(gate.task, nothing, runner=pool)
    assert gate.begun.wait(TIMEOUT)
    (process,) = status.snapshot().processes
    assert process.is_alive
    assert process.threads_busy >= 1
    assert process.threads >= 3
    assert process.pending >= 1


def test_a_pool_without_a_limit_has_none() -> None:
    pool = PoolRunner(max_pending=None)
    handle(nothing, runner=pool)
    assert wait(TIMEOUT) == []
    (process,) = status.snapshot().processes
    assert process.max_pending is None


def test_the_lag_of_the_loop_is_measured_if_a_loop_runs() -> None:
    portal().call(nothing)
    handle(nothing)
    (process,) = status.snapshot().processes
    assert process.loop_lag is not None
    assert 0 <= process.loop_lag < TIMEOUT


def test_a_blocked_loop_has_a_lag_that_grows() -> None:
    gate = Gate()
    handle(nothing)
    lag = recorder.process().lag
    portal().start_task_soon(gate.task)
    assert gate.begun.wait(TIMEOUT)
    first = lag.measure()
    second = lag.measure()
    assert first is not None
    assert second is not None
    assert 0.04 < first < second
    gate.open()
    gate.wait()
    portal().call(nothing)
    third = lag.measure()
    assert third is not None
    assert third < second


def test_the_loop_itself_does_not_wait_for_its_lag() -> None:
    handle(nothing)
    lag = portal().call(recorder.process().lag.measure)
    assert lag is not None
    assert lag < 0.04


def test_an_id_has_a_state_from_its_request_on() -> None:
    states: list[Any] = []
    tasks: list[BackgroundTask] = []

    def look() -> None:
        states.append([status.of(task.id) for task in tasks])

    def add() -> None:
        tasks.extend([background_tasks.add_task(look), background_tasks.add_task(fail)])
        look()

    visit(add)
    look()
    assert states == [
        ["waiting", "waiting"],
        ["running", "waiting"],
        ["succeeded", "failed"],
    ]


def test_a_task_that_did_not_run_is_discarded() -> None:
    handle(nothing, run_on="error")
    assert status.snapshot().counts.discarded == 1


def test_the_id_of_a_discarded_task_is_known_if_it_was_read() -> None:
    ids: list[str] = []

    def add() -> None:
        view = background_tasks.using(run_on="error")
        ids.append(view.add_task(nothing).id)

    visit(add)
    assert [status.of(id) for id in ids] == ["discarded"]  # noqa: A001


def test_a_task_that_waits_for_its_next_attempt_is_retrying() -> None:
    ids: list[str] = []

    def add() -> None:
        view = background_tasks.using(retry=Retry(attempts=2, first=600.0, longest=600.0))
        ids.append(view.add_task(fail).id)

    visit(add)
    assert [status.of(id) for id in ids] == ["retrying"]  # noqa: A001
    snapshot = status.snapshot()
    assert counts_of(snapshot, FAIL).retried == 1
    assert snapshot.waiting == {FAIL: 1}
    for ledger in ledgers_here():
        ledger.abandon_waiting()


def test_tasks_that_wait_for_a_retry_under_stop_on_error_are_counted() -> None:
    def add() -> None:
        view = background_tasks.using(retry=Retry(2, first=600.0), stop_on_error=True)
        view.add_task(fail)
        view.add_task(nothing)
        background_tasks.add_task(nothing)

    visit(add)
    assert status.snapshot().waiting == {FAIL: 1, NOTHING: 2}
    for ledger in ledgers_here():
        ledger.abandon_waiting()


def test_an_unknown_id_has_no_state() -> None:
    handle(nothing)
    assert status.of("unknown") is None


def test_an_id_must_be_a_text() -> None:
    with pytest.raises(TypeError, match=r"^id must be the id of a task, a text; got 3$"):
        status.of(3)  # type: ignore[arg-type]


def test_a_snapshot_of_an_unknown_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, "with\0NUL"):
        with pytest.raises(ValueError, match="path must be a folder that was given as status_"):
            status.snapshot(path)
    with pytest.raises(TypeError, match="path must be the path of a folder; got 3"):
        status.of("x", 3)  # type: ignore[arg-type]


def test_a_folder_is_known_to_its_process_before_the_first_write(tmp_path: Path) -> None:
    folder = tmp_path / "status"
    BackgroundTasksMiddleware(app_that(lambda environ: None), status_path=folder)
    assert status.of("x", folder) is None
    (process,) = status.snapshot(folder).processes
    assert process.pid == os.getpid()
    folder.rmdir()
    assert len(status.snapshot(folder).processes) == 1


def test_the_last_hour_has_sixty_minutes() -> None:
    handle(nothing, fail)
    snapshot = status.snapshot()
    assert len(snapshot.minutes) == 60
    assert sum(minute.succeeded for minute in snapshot.minutes) == 1
    assert sum(minute.failed for minute in snapshot.minutes) == 1
    assert snapshot.minutes[-1].time <= snapshot.taken < snapshot.minutes[-1].time + 60
    assert sum(minute.run.count for minute in snapshot.minutes) == 2


def test_a_snapshot_is_json() -> None:
    handle(nothing, fail)
    snapshot = status.snapshot()
    as_dict = snapshot.as_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["counts"]["run"]["count"] == 2
    assert as_dict["failures"][0]["error"] == "ValueError"


def test_without_the_option_the_ledgers_have_the_sums(tmp_path: Path) -> None:
    code = """
        pool = PoolRunner(threads=1, drain_timeout=0.0)
        handle(nothing, nothing, fail, status=None, runner=pool)
        assert wait(10) == []
        handle(hang, nothing, status=None, runner=pool)
        input()
        snapshot = status.snapshot()
        print(snapshot.counts.succeeded, snapshot.counts.failed, snapshot.waiting)
        (running,) = snapshot.running
        print(running.name, running.id, running.since, snapshot.minutes)
        """
    with process(code, tmp_path) as other:
        assert other.line() == "hangs"
        other.tell()
        assert other.line() == "2 1 {'tests.status.support.nothing': 1}"
        assert other.line() == "tests.status.support.hang None None ()"
        assert other.end() == 0
