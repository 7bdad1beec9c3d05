"""Retries and delays in the pytest fixture: no thread, no timer, and no wait unless "real"."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Clock, app_that, wait_until
from tests.support.recording import by_werkzeug, done, recording
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    PoolRunner,
    Retry,
    _testing,
    background_tasks,
    registered_task,
)
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg.runners.timer import timers

LATER: dict[str, Any] = {"delay": 600, "retry": Retry(3, first=600)}


@pytest.fixture(autouse=True)
def clear() -> None:
    done.clear()
    calls.clear()


calls: list[int] = []  # the threads


@registered_task
def fail_twice() -> None:
    calls.append(threading.get_ident())
    if len(calls) < 3:
        background_tasks.add_task(done.append, "child")
        raise ValueError("not yet")


async def fail_twice_async() -> None:
    fail_twice()


@registered_task
def fail() -> None:
    calls.append(threading.get_ident())
    raise ValueError("never")


def app(func: Any, *, stop_on_error: Any = False, runner: Any = None, **options: Any) -> Any:
    def add(environ: object) -> None:
        background_tasks.using(**(options or LATER)).add_task(func)
        background_tasks.add_task(done.append, "beside")

    return BackgroundTasksMiddleware(app_that(add), runner=runner, stop_on_error=stop_on_error)


@pytest.mark.parametrize("func", [fail_twice, fail_twice_async])
@pytest.mark.parametrize("stop_on_error", [False, True])
def test_run_makes_waits_zero_and_records_the_attempts(
    func: Any, stop_on_error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timers, "get", None)
    with recording("run") as tasks:
        by_werkzeug(app(func, stop_on_error=stop_on_error))
        assert [task.attempts for task in tasks.tasks] == [3, 1]
        assert [task.delay for task in tasks.tasks] == [600, 0]
        assert tasks.errors == []
    assert len(calls) == 3
    assert done == ["beside"]  # and no child of a repeated attempt


def test_record_runs_each_attempt_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "get", None)
    with recording("record") as tasks:
        by_werkzeug(app(fail_twice))
        assert [task.attempts for task in tasks.tasks] == [0, 0]
        tasks.assert_added(fail_twice)
        tasks.run()
        assert [task.attempts for task in tasks.tasks] == [3, 1]
    assert set(calls) == {threading.get_ident()}


def test_a_task_that_is_skipped_after_an_error_has_no_attempts() -> None:
    with recording("record") as tasks:
        by_werkzeug(app(fail, stop_on_error=True))
        with pytest.raises(ValueError, match="never"):
            tasks.run()
        assert [task.attempts for task in tasks.tasks] == [3, 0]
    assert done == []


@pytest.mark.parametrize("mode", ["record", "run"])
def test_the_last_failure_is_the_error(mode: Any, log: Log) -> None:
    with recording(mode) as tasks:
        response = app(fail)
        if mode == "run":
            with pytest.raises(ValueError, match="never"):
                by_werkzeug(response)
        else:
            by_werkzeug(response)
            with pytest.raises(ValueError, match="never"):
                tasks.run()
        assert len(tasks.errors) == 1
        assert tasks.tasks[0].attempts == 3
    assert len(log.errors) == 1


def test_real_waits_as_in_production() -> None:
    pool = PoolRunner()
    with recording("real") as tasks:
        by_werkzeug(app(fail_twice, runner=pool, delay=0.01, retry=Retry(3, first=0.01)))
        tasks.join()
        assert [task.attempts for task in tasks.tasks] == [3, 1]
    assert pool.statistics().succeeded == 2


@pytest.mark.parametrize("func", [fail_twice, fail])
@pytest.mark.parametrize("stop_on_error", [False, True])
def test_real_waits_for_durable_tasks_and_has_their_errors(
    func: Any, stop_on_error: bool, tmp_path: Path
) -> None:
    runner = DurableRunner(tmp_path)
    options = {"delay": 0.01, "retry": Retry(3, first=0.01), "stop_on_error": stop_on_error}
    with recording("real") as tasks:
        by_werkzeug(app(func, runner=runner, **options))
        if func is fail:
            with pytest.raises(ValueError, match="never"):
                tasks.join()
        else:
            tasks.join()
        assert tasks.tasks[0].attempts == 3
        assert len(tasks.errors) == (func is fail)
    assert len(calls) == 3
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


@pytest.mark.parametrize("options", [{"delay": 600}, {"retry": Retry(3, first=600)}])
def test_a_durable_task_that_waits_when_the_test_ends_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    runner = DurableRunner(tmp_path)
    monkeypatch.setattr(_testing, "TEARDOWN_TIMEOUT", 0.01)

    def use() -> None:
        with recording("real"):
            by_werkzeug(app(fail, runner=runner, **options))
            assert wait_until(lambda: runner.statistics().waiting == 1)

    with pytest.raises(TimeoutError, match=r"test_recording_waits\.fail"):
        use()
    assert runner.statistics().waiting == 0
    assert runner.drain(TIMEOUT) == []
    runner.abandon()
    assert list_tasks(check_folder(tmp_path)) == []


def test_a_delayed_task_has_no_attempt_before_it_was_called(clock: Clock) -> None:
    with recording("real") as tasks:
        by_werkzeug(app(fail, runner=PoolRunner(), delay=600))
        assert wait_until(lambda: done == ["beside"])
        assert [task.attempts for task in tasks.tasks] == [0, 1]
        clock.advance(600)
        with pytest.raises(ValueError, match="never"):
            tasks.join()
        assert [task.attempts for task in tasks.tasks] == [1, 1]


def test_real_records_what_a_task_adds_that_has_waited() -> None:
    def add_child() -> None:
        background_tasks.add_task(done.append, "child")

    with recording("real") as tasks:
        by_werkzeug(app(add_child, delay=0.01))
        tasks.join()
        tasks.assert_added(done.append, "child")
        assert len(tasks.tasks) == 3
    assert done == ["beside", "child"]


def test_real_names_the_tasks_that_wait_too_long_and_drops_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = PoolRunner()
    monkeypatch.setattr(_testing, "TEARDOWN_TIMEOUT", 0.01)

    def use() -> None:
        with recording("real") as tasks:
            by_werkzeug(app(fail_twice, runner=pool))
            assert wait_until(lambda: pool.statistics().waiting == 1)
            with pytest.raises(TimeoutError, match=r"test_recording_waits\.fail_twice"):
                tasks.join(0.01)

    with pytest.raises(TimeoutError, match=r"test_recording_waits\.fail_twice"):
        use()
    assert pool.statistics().waiting == 0
    assert not calls
