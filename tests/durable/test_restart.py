"""The order of a request, and attempts, after the death of the process that had the tasks."""

from __future__ import annotations

import sqlite3
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Log
from tests.durable.support import dead_store
from tests.support import TIMEOUT, Server, app_that, make_server_environ, run_python, wait_until
from tests.support import durable_shop as shop
from tests.support.durable_shop import fail, handle, run_view, wait_at, write
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    PoolRunner,
    Retry,
    background_tasks,
    get_background_tasks,
    wait,
)
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.rows import Outcome, Row
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError
from wsgi_bg.hooks import Hooks, TaskRecord

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    for each in (shop.calls, shop.gates, shop.begun):
        each.clear()
    yield
    for gate in shop.gates.values():
        gate.set()
    wait(TIMEOUT)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[DurableRunner]:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=2))
    yield runner
    for gate in shop.gates.values():
        gate.set()
    runner.drain(TIMEOUT)
    runner.abandon()


def killed(path: Path, code: str) -> None:
    """Execute ``code``, which has a ``runner``, in a process that then kills itself."""
    begin = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tests.support.durable_shop import *
        from wsgi_bg import get_background_tasks
        from wsgi_bg._store.folder import check_folder
        from wsgi_bg._store.inspection import list_tasks
        folder = {str(path)!r}
        runner = DurableRunner(folder, local=PoolRunner(threads=2))

        def found():
            return [each.outcome for each in list_tasks(check_folder(folder))]

        def until(predicate):
            while not predicate():
                time.sleep(0.005)

        def die():
            os.kill(os.getpid(), 9)
        """
    done = run_python(textwrap.dedent(begin) + textwrap.dedent(code))
    assert done.returncode == -9, done.stderr


def left(path: Path) -> list[Outcome]:
    """The tasks that are not done, in the order added."""
    found = [each.outcome for each in list_tasks(check_folder(path))]
    return [outcome for outcome in found if outcome.state != "done"]


def waiting(path: Path) -> list[str]:
    return [outcome.row.name for outcome in left(path) if outcome.state == "waiting"]


def arguments(path: Path) -> list[str]:
    return [outcome.row.arguments for outcome in left(path)]


def let_time_pass(path: Path) -> None:
    """Let the time of all waiting tasks come; no process may use the folder."""
    for file in path.glob("*.sqlite"):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE tasks SET due = 1.0 WHERE due > 0")


def run_beside(runner: DurableRunner, tasks: int) -> list[Any]:
    """Return the calls of a task beside the first of ``tasks``, which waits at a gate.

    The pool has a thread for each of the two. A task that does not wait for the first of its
    request would run before.
    """
    assert wait_until(lambda: len(runner._states.get()._in_memory) == tasks)
    assert shop.begun["gate"].wait(TIMEOUT)
    handle(runner, (write, "beside"))
    return shop.wait_for(1)


def test_tasks_added_in_a_stream_keep_their_place(
    tmp_path: Path, runner: DurableRunner
) -> None:
    code = """
        def app(environ, start_response):
            background_tasks.add_task(wait_at, "gate")
            background_tasks.add_task(write, 1)
            start_response("200 OK", [])
            return stream(environ)

        def stream(environ):
            yield b"first"
            get_background_tasks(environ).add_task(write, 2)
            yield b"second"
            get_background_tasks(environ).add_task(write, 3)
            die()

        Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
        """
    killed(tmp_path, code)
    runner.start()
    shop.gate("gate")
    assert run_beside(runner, 4) == ["beside"]
    shop.gate("gate").set()
    assert shop.wait_for(5) == ["beside", "gate", 1, 2, 3]


def test_tasks_added_by_tasks_and_threads_keep_their_place_behind_other_requests(
    tmp_path: Path, runner: DurableRunner
) -> None:
    code = """
        kept = []

        def add(environ):
            kept.append(background_tasks.root)
            background_tasks.add_task(wait_at, "first")
            background_tasks.add_task(add_two, "a")
            background_tasks.add_task(wait_at, "gate")

        run_view(runner, add)
        gate("first"), gate("gate")
        begun["first"].wait()
        kept[0].add_task(write, 1)
        handle(runner, (wait_at, "other"))  # its row has a key between those of the request
        gate("other")
        begun["other"].wait()
        kept[0].add_task(write, 2)
        gate("first").set()
        begun["gate"].wait()
        die()
        """
    killed(tmp_path, code)
    runner.start()
    shop.gate("other").set()
    shop.gate("gate")
    assert run_beside(runner, 5) == ["beside"]
    shop.gate("gate").set()
    calls = list(shop.wait_for(7))
    calls.remove("other")  # begins when "gate" has ended, beside the tasks after it
    assert calls == ["beside", "gate", 1, 2, "a.1", "a.2"]


def test_tasks_that_an_error_of_the_stream_lets_run_keep_their_place(
    tmp_path: Path, runner: DurableRunner
) -> None:
    code = """
        def add(environ):
            background_tasks.using(run_on="always").add_task(write, 0)
            background_tasks.using(run_on="error").add_task(wait_at, "gate")
            background_tasks.using(run_on="error").add_task(write, 1)
            background_tasks.using(run_on="always").add_task(write, 2)
            background_tasks.using(run_on="error").add_task(write, 3)

        def stream():
            yield b"first"
            raise LookupError

        try:
            run_view(runner, add, body=stream)
        except LookupError:
            gate("gate")
            begun["gate"].wait()
            die()
        """
    killed(tmp_path, code)
    runner.start()
    shop.gate("gate")
    assert run_beside(runner, 4) == ["beside"]
    shop.gate("gate").set()
    assert shop.wait_for(5) == ["beside", "gate", 1, 2, 3]


def test_rows_that_are_stored_when_a_stream_has_failed_are_in_the_order_added(
    runner: DurableRunner,
) -> None:
    def add(environ: object) -> None:
        for number in range(6):
            run_on: Any = "always" if number % 3 == 0 else "error"
            tasks = background_tasks.using(run_on=run_on)
            tasks.add_task(wait_at if number == 0 else write, f"gate {number}")

    def stream() -> Iterator[bytes]:
        yield b"first"
        raise LookupError

    with pytest.raises(LookupError):
        run_view(runner, add, body=stream)
    assert arguments(Path(runner.path)) == [f'[1,["gate {n}"],{{}}]' for n in range(6)]
    shop.gate("gate 0").set()
    assert shop.wait_for(6) == [f"gate {number}" for number in range(6)]


def test_a_late_task_that_is_far_behind_in_the_file_is_read_with_its_request(
    tmp_path: Path, runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        from wsgi_bg._store.rows import Row, Settings
        from wsgi_bg._store.store import Store
        store = Store.own(check_folder(folder), Settings())
        [first] = store.add([Row("durable.wait_at", '[1,["gate"],{}]')])
        for number in range(5):
            store.add([Row("durable.write", '[1,["other"],{}]')])
        store.add([Row("durable.write", '[1,["late"],{}]', request=-first.key)])
        die()
        """
    killed(tmp_path, code)
    monkeypatch.setattr("wsgi_bg._durable.state._READ", 2)
    runner.start()
    shop.gate("gate")
    assert shop.wait_for(5) == ["other"] * 5
    handle(runner, (write, "beside"))
    assert shop.wait_for(6)[5:] == ["beside"]
    shop.gate("gate").set()
    assert shop.wait_for(8)[6:] == ["gate", "late"]


HELD_BACK = """
    def add(environ):
        tasks = background_tasks.using(stop_on_error=True)
        kept.append(tasks.root)
        tasks.add_task(flaky, "a")
        tasks.add_task(note, "local")
        tasks.add_task(write, 1)

    kept = []
    run_view(runner, add)
    until(lambda: runner.ledger.waiting)
    kept[0].add_task(write, 2)
    die()
    """


def test_a_retry_that_holds_its_request_survives_with_its_attempt_and_no_crash(
    tmp_path: Path, runner: DurableRunner, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAKY", "1")
    killed(tmp_path, HELD_BACK)
    found = left(tmp_path)
    assert [each.row.attempts for each in found] == [1, 0, 0]
    assert [each.row.crashes for each in found] == [0, 0, 0]
    assert min(each.row.due for each in found) > time.time() + 100
    let_time_pass(tmp_path)
    runner.start()
    assert wait_until(lambda: [each.row.attempts for each in left(tmp_path)] == [2, 0, 0])
    assert wait_until(lambda: len(log.warnings) == 1)
    assert "raised ValueError in attempt 2 of 5" in log.warnings[0]
    assert runner.drain(TIMEOUT) == []
    runner.abandon()
    assert shop.calls == ["a"]
    found = left(tmp_path)
    assert [each.state for each in found] == ["waiting"] * 3
    assert min(each.row.due for each in found) > time.time() + 100


LABELLED = """
    def view(environ):
        background_tasks.add_task(write, 1)
        background_tasks.using(run_on="error").add_task(write, 2)
        environ["user"] = "7"

    def label(environ):
        asked.append(environ)
        return f"user {environ['user']}"

    asked = []
    app = BackgroundTasksMiddleware(app_that(view), runner=runner, request_label=label)
    body = app(make_server_environ(), Server().start_response)
    assert len(asked) == 1
    die()
    """


def test_the_label_of_a_request_survives_with_its_tasks(
    tmp_path: Path, runner: DurableRunner
) -> None:
    killed(tmp_path, LABELLED)
    hooks = Requests()
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=hooks)
    runner.start()
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: hooks.requests == ["user 7"])


class Requests(Hooks):
    """Notes the requests of tasks that have finished."""

    def __init__(self) -> None:
        self.requests: list[str | None] = []

    def task_finished(self, record: TaskRecord) -> None:
        self.requests.append(record.request)


def test_the_label_is_asked_for_once_and_before_the_answer(runner: DurableRunner) -> None:
    asked: list[str] = []

    def label(environ: Any) -> str:
        asked.append(environ["PATH_INFO"])
        return "label"

    def view(environ: Any) -> None:
        if environ["PATH_INFO"] == "/task":
            background_tasks.add_task(write, 1)

    app = BackgroundTasksMiddleware(app_that(view), runner=runner, request_label=label)
    for path in ("/no-task", "/task"):
        Server().run(app, make_server_environ(PATH_INFO=path))
    assert asked == ["/task"]
    assert shop.wait_for(1) == [1]


def test_the_last_attempt_of_a_function_that_has_lost_its_retry_has_its_number(
    tmp_path: Path, runner: DurableRunner, log: Log
) -> None:
    dead_store(
        check_folder(tmp_path),
        """store.add([Row("durable.fail", '[1,["a"],{}]', attempts=2)])""",
    )
    runner.start()
    assert wait_until(lambda: [each.state for each in left(tmp_path)] == ["failed"])
    assert [each.row.attempts for each in left(tmp_path)] == [3]
    assert shop.calls == ["a"]
    (error,) = log.errors
    assert error.endswith("raised ValueError in attempt 3 of 3")


def test_a_request_that_was_held_goes_on_when_its_retry_has_succeeded(
    tmp_path: Path, runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAKY", "1")
    killed(tmp_path, HELD_BACK)
    monkeypatch.delenv("FLAKY")
    let_time_pass(tmp_path)
    runner.start()
    assert shop.wait_for(3) == ["a", 1, 2]
    assert wait_until(lambda: left(tmp_path) == [])


def test_a_retry_that_holds_its_request_waits_in_memory_while_the_disk_is_full(
    runner: DurableRunner, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "hold_back", full_disk)

    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True)
        tasks.add_task(shop.fail_twice, 1)
        tasks.add_task(write, 2)

    run_view(runner, add)
    assert shop.wait_for(5) == [1, 1, 1, 2, "child"]
    assert any("waits in memory for its next attempt" in message for message in log.errors)
    assert wait_until(lambda: left(Path(runner.path)) == [])


def test_a_thread_adds_a_task_that_is_stored_after_the_attempt_that_started_the_thread(
    runner: DurableRunner, log: Log
) -> None:
    handle(runner, (shop.add_on_a_thread_and_fail, "a"), (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    shop.gate("thread").set()
    assert shop.gate("added").wait(TIMEOUT)  # the row is stored before the batch has the task
    found = left(Path(runner.path))
    assert [each.row.name for each in found][2:] == ["durable.write"]
    shop.gate("gate").set()
    assert shop.wait_for(2) == ["gate", "a"]


# stop_on_error: no process runs the tasks after the one that failed.


def stopped_by(func: Any, *arguments: Any) -> Any:
    """A view that adds ``func``, and then two tasks that its error skips."""

    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True)
        tasks.add_task(func, *arguments)
        tasks.add_task(write, 1)
        tasks.using(delay=3600).add_task(write, 2)

    return add


SKIPPED = (
    "background task tests.support.durable_shop.write was not run: "
    "a task before it failed, with stop_on_error set"
)


def test_a_task_that_fails_in_a_drain_skips_the_tasks_that_the_drain_has_left(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    opened = shop.gate("gate")
    run_view(runner, stopped_by(shop.wait_and_fail_at_once, "gate"))
    assert shop.begun["gate"].wait(TIMEOUT)
    runner.prepare_drain()
    assert len(left(tmp_path)) == 3
    opened.set()
    assert runner.drain(TIMEOUT) == []
    assert waiting(tmp_path) == []
    assert log.warnings == [SKIPPED] * 2
    assert runner.statistics().discarded == 2


def test_a_task_that_fails_in_the_next_process_skips_the_tasks_whose_time_has_not_come(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    code = """
        def add(environ):
            tasks = background_tasks.using(stop_on_error=True)
            tasks.add_task(fail, "a")
            tasks.using(delay=3600).add_task(write, 1)
            background_tasks.add_task(write, 2)

        runner._states.get().keep = lambda tasks, keep=runner._states.get().keep: (
            keep(tasks), die()
        )
        run_view(runner, add)
        """
    killed(tmp_path, code)
    assert len(left(tmp_path)) == 3
    runner.start()
    assert shop.wait_for(1) == ["a"]
    assert wait_until(lambda: [outcome.state for outcome in left(tmp_path)] == ["failed"])
    assert wait_until(lambda: log.warnings == [SKIPPED] * 2)
    assert shop.calls == ["a"]


def test_a_task_that_fails_again_after_its_delay_skips_no_other(
    runner: DurableRunner, log: Log
) -> None:
    def add(environ: object) -> None:
        failing = background_tasks.using(
            delay=0.01, stop_on_error=True, retry=Retry(2, first=0.0)
        )
        failing.add_task(fail, "a")
        background_tasks.using(delay=3600).add_task(write, 1)

    run_view(runner, add)
    assert shop.wait_for(2) == ["a", "a"]
    assert wait_until(lambda: runner.statistics().failed == 1)
    assert waiting(Path(runner.path)) == ["durable.write"]
    assert runner.statistics().discarded == 0


def test_skipped_tasks_are_gone_from_the_file_before_on_error_is_called(
    runner: DurableRunner, tmp_path: Path
) -> None:
    found: list[list[str]] = []
    app = BackgroundTasksMiddleware(
        app_that(stopped_by(fail, "a")),
        runner=runner,
        on_error=lambda task, exc: found.append(waiting(tmp_path)),
    )
    Server().run(app, make_server_environ())
    assert wait_until(lambda: bool(found))
    assert found == [[]]


def test_a_task_that_fails_after_its_delay_skips_no_task_of_another_time(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True)
        tasks.using(delay=0.01).add_task(fail, "a")
        tasks.using(delay=3600).add_task(write, 1)

    run_view(runner, add)
    assert shop.wait_for(1) == ["a"]
    assert wait_until(lambda: "failed" in [outcome.state for outcome in left(tmp_path)])
    assert waiting(tmp_path) == ["durable.write"]
    assert log.warnings == []


def test_a_task_that_is_not_stored_skips_the_stored_tasks_after_it(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    def fail_here() -> None:
        raise ValueError

    run_view(runner, stopped_by(fail_here))
    assert wait_until(lambda: log.warnings == [SKIPPED] * 2)
    assert waiting(tmp_path) == []


def test_tasks_whose_file_cannot_be_read_are_named_and_not_skipped(
    runner: DurableRunner, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_read(store: Store, row: Row) -> list[Row]:
        raise StoreError(store.path, "disk I/O error")

    monkeypatch.setattr(Store, "read_rest", fail_to_read)
    run_view(runner, stopped_by(fail, "a"))
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: len(log.errors) == 2)
    assert "could not be skipped" in log.errors[1]


# The moment of the answer.


class Gated(Hooks):
    """Holds the thread that adds a task, between the two looks at the answer."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.discarded: list[str | None] = []

    def task_added(self, record: TaskRecord) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.opened.wait(TIMEOUT)

    def task_discarded(self, record: TaskRecord) -> None:
        self.discarded.append(record.reason)


def answer_beside_a_thread(
    runner: DurableRunner, hooks: Gated, add: Callable[[Any], object]
) -> Any:
    """Answer a request while a thread is about to add a task, and return the body."""

    def view(environ: Any) -> None:
        threading.Thread(target=add, args=[get_background_tasks(environ)]).start()
        assert hooks.reached.wait(TIMEOUT)

    app = BackgroundTasksMiddleware(app_that(view), runner=runner, hooks=hooks)
    return app(make_server_environ(), Server().start_response)


def test_a_task_that_a_thread_adds_as_the_answer_begins_is_stored_when_add_task_returns(
    runner: DurableRunner,
) -> None:
    hooks = Gated()
    stored: list[list[str]] = []

    def add(tasks: Any) -> None:
        tasks.add_task(write, 1)
        stored.append(arguments(Path(runner.path)))

    body = answer_beside_a_thread(runner, hooks, add)
    assert arguments(Path(runner.path)) == []
    hooks.opened.set()
    assert wait_until(lambda: stored == [["[1,[1],{}]"]])
    assert list(body) == [b"ok"]
    body.close()
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: left(Path(runner.path)) == [])


def test_a_task_that_cannot_be_stored_as_the_answer_begins_is_refused(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = Gated()
    refused: list[StoreError] = []

    def add(tasks: Any) -> None:
        try:
            tasks.add_task(write, 1)
        except StoreError as exc:
            refused.append(exc)

    body = answer_beside_a_thread(runner, hooks, add)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", full_disk)
        hooks.opened.set()
        assert wait_until(lambda: len(refused) == 1)
    assert hooks.discarded == ["it could not be stored"]
    assert list(body) == [b"ok"]
    body.close()
    assert wait(TIMEOUT) == []
    assert shop.calls == []


def test_a_task_that_cannot_be_stored_and_runs_already_is_not_refused(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = Gated()
    joined, added = DurableRunner.joined, threading.Event()

    def join(self: DurableRunner, task: Any, batch: Any) -> None:
        assert task.claim()  # as the thread that runs the task
        with monkeypatch.context() as patch:
            patch.setattr(Store, "add", full_disk)
            joined(self, task, batch)
        task.unclaim()

    def add(tasks: Any) -> None:
        tasks.add_task(write, 1)
        added.set()

    monkeypatch.setattr(DurableRunner, "joined", join)
    body = answer_beside_a_thread(runner, hooks, add)
    hooks.opened.set()
    assert added.wait(TIMEOUT)
    assert list(body) == [b"ok"]
    body.close()
    assert shop.wait_for(1) == [1]


@pytest.mark.parametrize("is_full", [False, True])
def test_a_task_that_begins_before_its_thread_has_stored_it_is_stored_first(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    hooks = Gated()
    joins, joined, added = threading.Event(), DurableRunner.joined, threading.Event()

    def join(self: DurableRunner, task: Any, batch: Any) -> None:
        joins.set()
        assert shop.gate("joined").wait(TIMEOUT)
        joined(self, task, batch)

    def add(tasks: Any) -> None:
        tasks.add_task(wait_at, "gate")
        added.set()

    monkeypatch.setattr(DurableRunner, "joined", join)
    body = answer_beside_a_thread(runner, hooks, add)
    shop.gate("gate"), shop.gate("joined")
    if is_full:
        monkeypatch.setattr(Store, "add", full_disk)
    hooks.opened.set()
    assert joins.wait(TIMEOUT)
    assert list(body) == [b"ok"]
    body.close()
    assert shop.begun["gate"].wait(TIMEOUT)
    states = [each.state for each in left(Path(runner.path))]
    assert states == ([] if is_full else ["running"])
    shop.gate("joined").set()
    assert added.wait(TIMEOUT)
    shop.gate("gate").set()
    assert shop.wait_for(1) == ["gate"]
    assert wait_until(lambda: left(Path(runner.path)) == [])
    assert shop.calls == ["gate"]


def test_a_task_that_another_thread_stores_begins_when_it_is_stored(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = Gated()
    ran_before: list[list[Any]] = []
    store, stores = Store.add, threading.Event()

    class Pause(threading.Event):
        """The pause of the thread that would run the task: the disk is slow until then."""

        def wait(self, timeout: float | None = None) -> bool:
            shop.gate("disk").set()
            return super().wait(timeout)

    def add_slowly(self: Store, *args: Any) -> Any:
        stores.set()
        assert shop.gate("disk").wait(TIMEOUT)
        ran_before.append(list(shop.calls))
        return store(self, *args)

    body = answer_beside_a_thread(runner, hooks, lambda tasks: tasks.add_task(write, 1))
    monkeypatch.setattr(Store, "add", add_slowly)
    hooks.opened.set()
    assert stores.wait(TIMEOUT)
    monkeypatch.setattr("wsgi_bg._durable.state.event", Pause)
    assert list(body) == [b"ok"]
    body.close()
    assert shop.wait_for(1) == [1]
    assert ran_before == [[]]
    assert wait_until(lambda: left(Path(runner.path)) == [])


# A drain, while a task waits for a retry that holds its request.


def test_a_drain_does_not_wait_for_a_retry_that_holds_its_request_in_the_file(
    runner: DurableRunner,
) -> None:
    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True, retry=Retry(2, first=3600.0))
        tasks.add_task(fail, 1)
        tasks.add_task(write, 2)

    run_view(runner, add)
    assert wait_until(lambda: runner.statistics().waiting == 2)
    runner.prepare_drain()
    assert runner.ledger.not_submitted(inf, runner) == []
    assert waiting(Path(runner.path)) == ["durable.fail", "durable.write"]


def fail_during_a_drain(runner: DurableRunner, first: float) -> None:
    """Let a task raise during a drain, and hold the task behind it until a retry.

    :param first: the seconds until the retry.
    """

    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True, retry=Retry(2, first=first))
        tasks.add_task(shop.wait_and_fail, "gate")
        tasks.add_task(write, 2)

    run_view(runner, add)
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    runner.prepare_drain()
    shop.gate("gate").set()
    assert runner.drain(TIMEOUT) == []


def test_a_task_that_raises_during_a_drain_is_not_called_again_in_this_process(
    runner: DurableRunner,
) -> None:
    fail_during_a_drain(runner, first=0.0)
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: runner.ledger.not_submitted(inf, runner) == [])
    [failed, held] = left(Path(runner.path))
    assert (failed.row.name, failed.row.attempts) == ("durable.wait_and_fail", 1)
    assert (held.row.name, held.row.attempts) == ("durable.write", 0)
    assert shop.calls == []


def test_a_task_that_raises_during_a_drain_holds_the_tasks_that_the_drain_has_left(
    runner: DurableRunner,
) -> None:
    fail_during_a_drain(runner, first=3600.0)
    [failed, held] = left(Path(runner.path))
    assert held.row.due == failed.row.due > time.time() + 100


# A drain that was given up.


@pytest.mark.parametrize("stops", [False, True], ids=["alone", "holds its request"])
@pytest.mark.parametrize("is_full", [False, True], ids=["", "full disk"])
def test_a_task_that_raises_after_its_drain_was_given_up_stays_for_the_next_process(
    runner: DurableRunner, log: Log, monkeypatch: pytest.MonkeyPatch, stops: bool, is_full: bool
) -> None:
    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=stops)
        tasks.add_task(shop.wait_and_fail, "gate")
        tasks.add_task(write, 1)
        tasks.add_task(shop.note, 2)

    run_view(runner, add)
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    runner.drain(0.0)
    names = [task.name for task in runner.abandon()]
    assert names == [
        "tests.support.durable_shop.wait_and_fail",
        "tests.support.durable_shop.note",
    ]
    if is_full:
        monkeypatch.setattr(Store, "hold_back", full_disk)
        monkeypatch.setattr(Store, "postpone", full_disk)
    shop.gate("gate").set()
    assert wait_until(lambda: len(log.warnings) == 1)
    assert "in attempt 1 of 3, and is called again" in log.warnings[0]
    found = left(Path(runner.path))
    assert [each.state for each in found] == ["waiting", "waiting"]
    assert [each.row.attempts for each in found] == [int(not is_full), 0]
    assert shop.calls == []


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise StoreError("tasks", "the disk is full")


@pytest.mark.parametrize("is_of_this_process", [True, False])
def test_a_task_from_the_file_adds_tasks_although_its_request_failed(
    tmp_path: Path, runner: DurableRunner, is_of_this_process: bool
) -> None:
    def view(environ: object) -> None:
        if is_of_this_process:
            background_tasks.using(delay=0.01).add_task(shop.add_two, 1)

    if not is_of_this_process:
        code = """
            gate("gate")
            handle(runner, (wait_at, "gate"), (add_two, 1))
            begun["gate"].wait()
            die()
            """
        killed(tmp_path, code)
    shop.gate("gate").set()
    app = BackgroundTasksMiddleware(
        app_that(view, status="500 OOPS"), runner=runner, run_on="error"
    )
    Server().run(app, make_server_environ())
    assert shop.wait_for(3 if is_of_this_process else 4)[-3:] == [1, "1.1", "1.2"]
