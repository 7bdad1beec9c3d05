"""Durable tasks: what is stored when, and what runs."""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, current_app

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Clock,
    Gate,
    Server,
    app_that,
    make_server_environ,
    run_python,
    wait_until,
)
from tests.support import durable_shop as shop
from tests.support.durable import left_by_a_dead_process, open_files, requests_of_a_dead_process
from tests.support.durable_shop import (
    add_two,
    add_with_delay,
    fail,
    fail_for_long,
    fail_twice,
    handle,
    run_view,
    wait_at,
    write,
    write_async,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    DurableRunner,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    get_background_tasks,
    registered_task,
    wait,
)
from wsgi_bg._durable.kept import Kept, running
from wsgi_bg._durable.state import State
from wsgi_bg._process.workers import Workers
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks, order
from wsgi_bg._store.rows import Row
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError, WaitingLimitError
from wsgi_bg.flask import Background
from wsgi_bg.hooks import BatchRecord, Hooks, TaskRecord
from wsgi_bg.monitor import Monitor
from wsgi_bg.runners import Statistics, shutdown
from wsgi_bg.runners.ledger import batches_under_way

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    shop.calls.clear()
    shop.gates.clear()
    shop.begun.clear()
    yield
    for gate in shop.gates.values():
        gate.set()
    wait(TIMEOUT)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[DurableRunner]:
    runner = DurableRunner(tmp_path / "tasks")
    yield runner
    for gate in shop.gates.values():
        gate.set()
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


def stored(runner_or_path: Any) -> list[tuple[str, str]]:
    """State and name of the tasks in the folder."""
    path = runner_or_path.path if isinstance(runner_or_path, DurableRunner) else runner_or_path
    return [
        (each.outcome.state, each.outcome.row.name) for each in list_tasks(check_folder(path))
    ]


def waiting(runner: DurableRunner) -> list[str]:
    return [name for state, name in stored(runner) if state in ("waiting", "running")]


@pytest.mark.parametrize("local", ["pool", "inline", InlineRunner(), PoolRunner()])
@pytest.mark.parametrize("func", [write, write_async])
def test_a_registered_task_is_stored_before_the_answer_and_gone_once_it_has_run(
    tmp_path: Path, local: Any, func: Any
) -> None:
    runner = DurableRunner(tmp_path, local=local)
    seen: list[list[str]] = []
    app = app_that(lambda environ: background_tasks.add_task(func, 1))
    app = BackgroundTasksMiddleware(app, runner=runner)
    server = Server()
    body = app(make_server_environ(), server.start_response)
    seen.append(waiting(runner))
    assert shop.calls == []
    list(body)
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(1) == [1]
    assert wait(TIMEOUT) == []
    assert seen == [[f"durable.{func.__name__}"]]
    assert waiting(runner) == []
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


def test_durable_and_other_tasks_of_a_request_run_in_the_order_added(
    runner: DurableRunner,
) -> None:
    handle(runner, (write, 1), (shop.note, 2), (write_async, 3), (shop.note, 4), (write, 5))
    assert shop.wait_for(5) == [1, 2, 3, 4, 5]


def test_durable_tasks_never_run_on_the_servers_thread(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local="inline")
    handle(runner, (wait_at, "gate"))  # would block for ever
    shop.gate("gate").set()
    assert shop.wait_for(1) == ["gate"]


def test_a_task_runs_in_the_application_context_of_flask(tmp_path: Path) -> None:
    app = Flask("shop")
    Background(app, runner=DurableRunner(tmp_path))

    @app.post("/")
    def view() -> str:
        background_tasks.add_task(write, current_app.name)
        return "ok"

    assert app.test_client().post("/").text == "ok"
    assert shop.wait_for(1) == ["shop"]


def test_a_request_for_the_page_takes_the_tasks_of_a_dead_process_over(tmp_path: Path) -> None:
    left_by_a_dead_process(tmp_path, Row("durable.write", "[1,[1],{}]"))
    app = Flask("shop")
    Background(app, runner=DurableRunner(tmp_path), monitor=Monitor(allowed=lambda _: False))
    assert app.test_client().get("/background-tasks/").status_code == 403
    assert shop.wait_for(1) == [1]


def test_arguments_that_a_later_process_would_not_get_back_are_refused_in_the_view(
    runner: DurableRunner,
) -> None:
    with pytest.raises(TypeError, match=r"durable\.write"):
        handle(runner, (write, object()))
    assert waiting(runner) == []


@pytest.mark.parametrize("run_on", ["success", "error", "always"])
@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_tasks_that_the_outcome_lets_run_are_stored(
    runner: DurableRunner, run_on: Any, status: str
) -> None:
    def add(environ: Any) -> None:
        background_tasks.using(run_on=run_on).add_task(write, 1)

    app = BackgroundTasksMiddleware(app_that(add, status=status), runner=runner)
    body = app(make_server_environ(), Server().start_response)
    runs = run_on == "always" or (run_on == "error") == status.startswith("5")
    assert waiting(runner) == ["durable.write"] * runs
    list(body)
    body.close()  # type: ignore[attr-defined]
    assert wait(TIMEOUT) == []
    assert shop.calls == [1] * runs
    assert waiting(runner) == []


def test_a_view_that_crashes_stores_its_error_tasks_before_the_error_goes_out(
    runner: DurableRunner,
) -> None:
    def crash(environ: Any) -> None:
        tasks = background_tasks
        tasks.using(run_on="success").add_task(wait_at, "success")
        tasks.using(run_on="error").add_task(wait_at, "error")
        tasks.using(run_on="always").add_task(wait_at, "always")
        raise LookupError

    app = BackgroundTasksMiddleware(app_that(crash), runner=runner)
    with pytest.raises(LookupError):
        app(make_server_environ(), Server().start_response)
    assert waiting(runner) == ["durable.wait_at"] * 2
    shop.gate("error").set()
    shop.gate("always").set()
    assert shop.wait_for(2) == ["error", "always"]


def test_a_stream_that_raises_takes_its_success_tasks_back(runner: DurableRunner) -> None:
    def stream() -> Iterator[bytes]:
        yield b"first"
        raise LookupError

    def add(environ: Any) -> None:
        background_tasks.add_task(write, "success")
        background_tasks.using(run_on="always").add_task(write, "always")

    app = BackgroundTasksMiddleware(app_that(add, body=stream), runner=runner)
    body = app(make_server_environ(), Server().start_response)
    chunks = iter(body)
    assert next(chunks) == b"first"
    assert waiting(runner) == ["durable.write"] * 2
    with pytest.raises(LookupError):
        next(chunks)
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(1) == ["always"]
    assert wait(TIMEOUT) == []
    assert waiting(runner) == []


def test_a_generator_application_has_its_tasks_stored_before_its_first_chunk(
    runner: DurableRunner,
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        get_background_tasks(environ).add_task(write, 1)
        start_response("200 OK", [])
        get_background_tasks(environ).add_task(write, 2)
        yield b"first"
        get_background_tasks(environ).add_task(write, 3)
        yield b"second"

    body = BackgroundTasksMiddleware(app, runner=runner)(
        make_server_environ(), Server().start_response
    )
    assert waiting(runner) == []
    chunks = iter(body)
    assert next(chunks) == b"first"
    assert len(waiting(runner)) == 2
    assert next(chunks) == b"second"
    assert len(waiting(runner)) == 3
    assert list(chunks) == []
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(3) == [1, 2, 3]


def test_tasks_are_stored_although_middleware_further_out_holds_the_response_back(
    runner: DurableRunner,
) -> None:
    class Outermost(BackgroundTasksMiddleware):  # as under wsgi-bg
        _runner_is_default = True

    def hold_back(environ: Any, start_response: Any) -> Any:
        held = Server()
        body = inner(environ, held.start_response)
        seen.append(waiting(runner))
        start_response(held.status, held.headers)
        return body

    def add(environ: Any) -> None:
        background_tasks.add_task(write, 1)
        background_tasks.using(run_on="error").add_task(write_async, 2)

    seen: list[list[str]] = []
    inner = BackgroundTasksMiddleware(app_that(add), runner=runner)
    Server().run(Outermost(hold_back), make_server_environ())
    assert shop.wait_for(1) == [1]
    assert seen == [["durable.write"]]


def test_tasks_are_taken_back_if_an_error_replaces_the_status_before_it_was_sent(
    runner: DurableRunner,
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        tasks = get_background_tasks(environ)
        tasks.add_task(write, "success")
        tasks.using(run_on="error").add_task(write_async, "error")
        tasks.using(run_on="always").add_task(write_async, "always")
        start_response("200 OK", [])
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", [], sys.exc_info())
        yield b"Oops"

    body = BackgroundTasksMiddleware(app, runner=runner)(
        make_server_environ(), Server().start_response
    )
    assert next(iter(body)) == b"Oops"
    assert waiting(runner) == ["durable.write_async"] * 2
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(2) == ["error", "always"]


def test_write_stores_the_tasks_before_it_passes_its_first_bytes(runner: DurableRunner) -> None:
    seen: list[int] = []

    class Writing(Server):
        def start_response(self, *args: Any) -> Any:
            super().start_response(*args)
            return lambda data: seen.append(len(waiting(runner)))

    def app(environ: Any, start_response: Any) -> list[bytes]:
        background_tasks.add_task(wait_at, "gate")
        write_bytes = start_response("200 OK", [])
        background_tasks.add_task(wait_at, "gate")
        write_bytes(b"first")
        background_tasks.add_task(wait_at, "gate")
        write_bytes(b"second")
        return []

    Writing().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    assert seen == [2, 3]


def fill_disk(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """Make methods of the store fail, as on a full disk. (``durable/test_full.py`` has one.)"""

    def fail(*args: Any) -> Any:
        raise StoreError("tasks", "the disk is full")

    for method in methods:
        monkeypatch.setattr(Store, method, fail)


@pytest.mark.parametrize("has_close", [True, False])
def test_a_request_whose_tasks_cannot_be_stored_fails_and_is_closed(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, log: Log, has_close: bool
) -> None:
    closed = threading.Event()

    class Closing(list[bytes]):
        def close(self) -> None:
            closed.set()

    kind = Closing if has_close else list[bytes]

    def add(environ: Any) -> None:
        background_tasks.add_task(write, "success")
        background_tasks.using(run_on="error").add_task(fail_twice, "error")

    fill_disk(monkeypatch, "add")
    app = BackgroundTasksMiddleware(app_that(add, body=lambda: kind([b"ok"])), runner=runner)
    with pytest.raises(StoreError):
        app(make_server_environ(), Server().start_response)
    assert closed.is_set() is has_close
    assert shop.wait_for(3) == ["error", "error", "error"]  # from memory
    assert wait(TIMEOUT) == []
    assert any("not stored" in message for message in log.errors)
    assert any("was not run" in message for message in log.warnings)


def test_a_late_task_that_cannot_be_stored_is_refused_by_add_task(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(environ: Any) -> Iterator[bytes]:
        yield b"first"
        fill_disk(monkeypatch, "add")
        with pytest.raises(StoreError):
            get_background_tasks(environ).add_task(write, 1)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        return stream(environ)

    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    assert wait(TIMEOUT) == []
    assert shop.calls == []


@pytest.mark.parametrize(("status", "runs"), [("200 OK", "success"), ("500 Oops", "error")])
def test_a_late_task_that_the_outcome_does_not_let_run_is_not_stored(
    runner: DurableRunner, status: str, runs: str
) -> None:
    def stream(environ: Any) -> Iterator[bytes]:
        yield b"first"
        tasks = get_background_tasks(environ)
        for run_on in ("success", "error", "always"):
            tasks.using(run_on=run_on).add_task(write, run_on)
        yield b"second"

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response(status, [])
        return stream(environ)

    body = BackgroundTasksMiddleware(app, runner=runner)(
        make_server_environ(), Server().start_response
    )
    chunks = iter(body)
    assert [next(chunks), next(chunks)] == [b"first", b"second"]
    found = [each.outcome.row for each in list_tasks(check_folder(runner.path))]
    assert [row.arguments for row in found] == [f'[1,["{runs}"],{{}}]', '[1,["always"],{}]']
    assert list(chunks) == []
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(2) == [runs, "always"]


def test_late_tasks_are_stored_in_their_order_if_the_stream_raises(
    runner: DurableRunner,
) -> None:
    def stream(environ: Any) -> Iterator[bytes]:
        yield b"first"
        tasks = get_background_tasks(environ)
        tasks.using(run_on="always").add_task(wait_at, "first")
        tasks.using(run_on="error").add_task(write, "error")
        tasks.using(run_on="always").add_task(write_async, "always")
        raise LookupError

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        return stream(environ)

    with pytest.raises(LookupError):
        Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    names = ["durable.wait_at", "durable.write", "durable.write_async"]
    assert waiting(runner) == names
    shop.gate("first").set()
    assert shop.wait_for(3) == ["first", "error", "always"]


def test_what_a_durable_task_adds_is_stored_with_its_end(runner: DurableRunner) -> None:
    handle(runner, (add_two, "a"), (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    assert sorted(waiting(runner)) == ["durable.wait_at", "durable.write", "durable.write"]
    shop.gate("gate").set()
    assert shop.wait_for(4) == ["a", "gate", "a.1", "a.2"]
    assert wait(TIMEOUT) == []
    assert waiting(runner) == []


def test_a_failed_task_is_kept_with_its_error(runner: DurableRunner, log: Log) -> None:
    handle(runner, (fail, 1), (write, 2))
    assert shop.wait_for(2) == [1, 2]
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: ("failed", "durable.fail") in stored(runner))
    assert len(log.errors) == 1


def test_a_task_whose_traceback_cannot_be_formatted_is_kept_as_failed(
    runner: DurableRunner,
) -> None:
    handle(runner, (shop.fail_unformattably,), (write, 2))
    assert shop.wait_for(1) == [2]
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: ("failed", "durable.fail_unformattably") in stored(runner))


def test_tasks_beyond_max_pending_stay_in_the_file_until_there_is_room(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    for number in range(5):
        handle(runner, (write, number))
    assert shop.calls == []
    assert len(waiting(runner)) == 6
    assert [task.name for task in wait(0)] == ["tests.support.durable_shop.wait_at"]
    with ThreadPoolExecutor(1) as thread:
        left = thread.submit(wait, TIMEOUT)
        assert wait_until(lambda: bool(runner.ledger._waiters))
        shop.gate("gate").set()
        assert left.result(TIMEOUT) == []  # and not before the tasks in the file have run
    assert shop.calls[0] == "gate"
    assert sorted(shop.calls[1:]) == [0, 1, 2, 3, 4]


def test_tasks_that_wait_in_the_file_for_room_are_pending(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    handle(runner, (write, 1), (write, 2))
    run_view(runner, lambda _: background_tasks.using(delay=600.0).add_task(write, 3))
    assert wait_until(lambda: runner.statistics().waiting == 1)
    assert runner.statistics() == Statistics(2, 1, 0, 0, 0, waiting=1)
    shop.gate("gate").set()
    assert wait(TIMEOUT) == []
    assert runner.statistics() == Statistics(0, 0, 3, 0, 0, waiting=1)


@pytest.mark.parametrize("stops", [False, True])
def test_a_task_that_outlives_the_exit_and_can_add_no_task_runs_again(
    tmp_path: Path, log: Log, stops: bool
) -> None:
    runner = DurableRunner(tmp_path)

    def view(environ: Any) -> None:
        background_tasks.using(stop_on_error=stops).add_task(shop.add_at, "gate")
        background_tasks.add_task(write, "after")

    run_view(runner, view)
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    assert runner.drain(0.0) != []
    runner.abandon()
    shop.gate("gate").set()
    assert wait_until(lambda: any("BatchEndedError" in message for message in log.errors))
    assert wait_until(lambda: runner.statistics().running == 0)
    expected = [("waiting", "durable.add_at"), ("waiting", "durable.write")]
    assert stored(tmp_path) == expected


def test_wait_does_not_wait_for_tasks_in_the_file_if_the_pool_is_drained(
    tmp_path: Path,
) -> None:
    pool = PoolRunner(threads=1, max_pending=1)
    runner = DurableRunner(tmp_path, local=pool)
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    handle(runner, (write, 1))
    with ThreadPoolExecutor(1) as thread:
        left = thread.submit(pool.drain, TIMEOUT)
        assert wait_until(lambda: pool.ledger.is_draining)
        shop.gate("gate").set()
        assert left.result(TIMEOUT) == []
    assert wait(TIMEOUT) == []
    assert shop.calls == ["gate"]
    assert waiting(runner) == ["durable.write"]


def test_a_full_pool_is_not_looked_at_all_the_time_for_a_task_that_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state.start_daemon", lambda *args: None)
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    run_view(runner, lambda _: background_tasks.using(delay=0.01).add_task(write, 1))
    assert wait_until(lambda: time.time() > due_of_the_only_task(runner))
    state = runner._states.get()
    before = time.time()
    state._look()
    assert state._next_look > before
    shop.gate("gate").set()
    assert wait_until(lambda: runner._pool.has_room(0.5))
    state._look()
    assert shop.wait_for(2) == ["gate", 1]


def test_tasks_in_a_file_that_cannot_be_read_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def fail_once(store: Store, now: float, limit: int) -> list[Row]:
        monkeypatch.setattr(Store, "read", read)
        raise StoreError("tasks", "the file cannot be read")

    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    handle(runner, (write, 1))
    read = Store.read
    monkeypatch.setattr(Store, "read", fail_once)
    shop.gate("gate").set()
    assert wait(TIMEOUT) == []
    assert shop.calls == ["gate", 1]
    assert any("could not be looked at" in message for message in log.errors)


def test_tasks_in_the_file_are_read_when_there_is_room_and_not_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state._LOOK", 3600)
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    for number in range(20):
        handle(runner, (shop.note, "local"), (write, number))
    assert shop.calls == ["local"] * 20
    shop.gate("gate").set()
    assert sorted(shop.wait_for(41)[21:]) == list(range(20))
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().run_here == 20
    runner.abandon()


def test_a_long_file_of_a_dead_process_is_read_in_one_go(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests_of_a_dead_process(tmp_path / "tasks", *([writing(each)] for each in range(20)))
    monkeypatch.setattr("wsgi_bg._durable.state._LOOK", 3600)
    monkeypatch.setattr("wsgi_bg._durable.state._READ", 2)
    runner.start()
    assert sorted(shop.wait_for(20)) == list(range(20))


def test_hooks_are_told_of_a_batch_of_the_file_when_there_is_room(tmp_path: Path) -> None:
    told: list[int] = []
    looks: list[bool] = []

    class Told(Hooks):
        def batch_handed_over(self, record: BatchRecord) -> None:
            told.append(record.length)

    class Pool(PoolRunner):
        def has_room(self, share: float = 1.0) -> bool:
            looks.append(super().has_room(share))
            return looks[-1]

    def view(environ: object) -> None:
        background_tasks.add_task(wait_at, "gate")

    runner = DurableRunner(tmp_path, local=Pool(max_pending=2))
    app = BackgroundTasksMiddleware(app_that(view), runner=runner, hooks=Told())
    shop.gate("gate")
    Server().run(app, make_server_environ())
    left_by_a_dead_process(tmp_path, Row("durable.write", "[1,[1],{}]"))
    assert wait_until(lambda: looks.count(False) >= 2)
    assert told == [1]
    shop.gate("gate").set()
    assert sorted(map(str, shop.wait_for(2))) == ["1", "gate"]
    assert told == [1, 1]
    assert runner.drain(TIMEOUT) == []


def test_a_task_that_has_waited_in_the_file_knows_its_request(tmp_path: Path) -> None:
    started: list[tuple[str, int, str | None]] = []

    class Started(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            started.append((record.name.rpartition(".")[2], record.attempt, record.request))

    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))

    def request(path: str, add: Callable[[], object]) -> None:
        app = app_that(lambda _: add())
        wrapped = BackgroundTasksMiddleware(app, runner=runner, hooks=Started())
        Server().run(wrapped, make_server_environ(PATH_INFO=path))

    gate = shop.gate("gate")
    request("/holds", lambda: background_tasks.add_task(wait_at, "gate"))
    assert shop.begun["gate"].wait(TIMEOUT)
    request("/no-room", lambda: background_tasks.add_task(write, 1))
    gate.set()
    shop.wait_for(2)
    request("/delay", lambda: background_tasks.using(delay=0.01).add_task(write_async, 2))
    shop.wait_for(3)
    request("/retry", lambda: background_tasks.add_task(shop.fail_twice, 3))
    assert wait_until(lambda: runner.statistics().succeeded == 5)
    assert started == [
        ("wait_at", 1, "GET /holds"),
        ("write", 1, "GET /no-room"),
        ("write_async", 1, "GET /delay"),
        ("fail_twice", 1, "GET /retry"),
        ("fail_twice", 2, "GET /retry"),
        ("fail_twice", 3, "GET /retry"),
        ("note", 1, "GET /retry"),
    ]
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


def test_a_drain_leaves_the_tasks_that_wait_in_the_file(tmp_path: Path, log: Log) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1))
    run_view(runner, lambda _: background_tasks.using(delay=3600).add_task(write, 4))
    assert wait_until(lambda: runner.statistics().waiting == 1)  # in the file alone
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    for number in range(4):
        handle(runner, (write, number))
    thread = threading.Thread(target=runner.drain, args=[TIMEOUT])
    thread.start()
    assert wait_until(
        lambda: any("5 durable tasks stay" in message for message in log.at(logging.INFO))
    )
    shop.gate("gate").set()
    thread.join(TIMEOUT)
    assert shop.calls == ["gate"]
    assert waiting(runner) == ["durable.write"] * 5
    runner.abandon()


@registered_task(name="durable.add_at_the_end")
def add_at_the_end() -> None:
    wait_at("gate")
    background_tasks.add_task(write, "child")
    background_tasks.add_task(shop.note, "in memory")


def test_a_task_that_is_added_during_a_drain_waits_for_the_next_process(
    tmp_path: Path, log: Log
) -> None:
    runner = DurableRunner(tmp_path)
    run_view(runner, lambda _: background_tasks.using(delay=3600).add_task(write, 4))
    assert wait_until(lambda: runner.statistics().waiting == 1)  # in the file alone
    handle(runner, (add_at_the_end,))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    with ThreadPoolExecutor(1) as thread:
        left = thread.submit(runner.drain, TIMEOUT)
        assert wait_until(lambda: any("stay" in each for each in log.at(logging.INFO)))
        shop.gate("gate").set()
        assert left.result(TIMEOUT) == []
    assert shop.calls == ["gate", "in memory"]
    assert waiting(runner) == ["durable.write"] * 2
    runner.abandon()


def test_a_retry_waits_in_the_file_and_holds_up_no_other_task(
    runner: DurableRunner,
) -> None:
    handle(runner, (fail_for_long, 1), (write, 2))
    assert shop.wait_for(2) == [1, 2]
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: waiting(runner) == ["durable.fail_for_long"])


def test_a_retry_that_succeeds_leaves_nothing_in_the_file(runner: DurableRunner) -> None:
    handle(runner, (fail_twice, 1))
    assert shop.wait_for(4) == [1, 1, 1, "child"]
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: waiting(runner) == [])


def test_a_retry_under_stop_on_error_holds_the_rest_of_the_request(
    runner: DurableRunner,
) -> None:
    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True)
        tasks.add_task(fail_twice, 1)
        tasks.add_task(write, 2)

    run_view(runner, add)
    assert shop.wait_for(5) == [1, 1, 1, 2, "child"]
    assert wait_until(lambda: waiting(runner) == [])


def test_a_task_after_a_delay_holds_up_no_other_task_with_the_same_delay(
    runner: DurableRunner,
) -> None:
    def add(environ: object) -> None:
        tasks = background_tasks.using(stop_on_error=True, delay=0.01)
        tasks.using(retry=Retry(2, first=3600)).add_task(fail, 1)
        tasks.add_task(fail, 2)
        tasks.add_task(write, 3)
        background_tasks.using(delay=0.01).add_task(write, 4)

    run_view(runner, add)
    assert sorted(shop.wait_for(4)) == [1, 2, 3, 4]  # as on the pool


def test_a_task_that_runs_after_its_delay_holds_up_no_other_task(runner: DurableRunner) -> None:
    opened = shop.gate("gate")

    def add(environ: object) -> None:
        background_tasks.using(delay=0.05).add_task(wait_at, "gate")
        background_tasks.using(delay=0.05).add_task(write, 1)

    run_view(runner, add)
    assert shop.wait_for(1) == [1]
    opened.set()
    assert shop.wait_for(2) == [1, "gate"]


def test_wait_includes_a_task_that_is_due_in_the_file(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = State._look
    may_look = threading.Event()
    waits = threading.Event()

    def look_later(state: State) -> None:
        if waits.is_set():
            assert may_look.wait(TIMEOUT)
        look(state)

    def open_and_list() -> Any:
        may_look.set()
        return batches_under_way()

    monkeypatch.setattr(State, "_look", look_later)
    monkeypatch.setattr("wsgi_bg.runners.shutdown.batches_under_way", open_and_list)
    waits.set()
    run_view(runner, lambda environ: background_tasks.using(delay=0.05).add_task(write, 1))
    store = runner.ledger.files.own
    assert wait_until(lambda: (store.next_due() or math.inf) <= time.time())
    assert wait(TIMEOUT) == []
    assert shop.calls == [1]


def test_wait_includes_a_task_that_goes_into_the_file_meanwhile(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = State._look
    may_look = threading.Event()

    def look_later(state: State) -> None:
        assert may_look.wait(TIMEOUT)
        look(state)

    def add(environ: Any) -> None:
        background_tasks.using(delay=0.3).add_task(write, 1)
        background_tasks.add_task(wait_at, "gate")

    def list_and_open() -> Any:
        gate = shop.gate("gate")
        if gate.is_set():
            may_look.set()
            return batches_under_way()
        assert wait_until(lambda: (store.next_due() or math.inf) <= time.time())
        found = batches_under_way()  # the task waits behind the gate
        gate.set()
        return found

    monkeypatch.setattr(State, "_look", look_later)
    monkeypatch.setattr("wsgi_bg.runners.shutdown.batches_under_way", list_and_open)
    run_view(runner, add)
    store = runner.ledger.files.own
    assert wait(TIMEOUT) == []
    assert sorted(shop.calls, key=str) == [1, "gate"]


def test_a_task_with_a_delay_comes_from_a_file_at_its_turn(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    delayed = '{"stop_on_error": true, "retry": null, "is_delayed": true}'
    requests = [
        [
            Row("durable.fail", "[1,[1],{}]", options='{"stop_on_error": true}'),
            Row("durable.write", "[1,[2],{}]", options=delayed, due=1.0),
        ],
        [
            Row("durable.wait_at", '[1,["gate"],{}]'),
            Row("durable.fail", "[1,[3],{}]", options=delayed, due=1.0),
            Row("durable.write", "[1,[4],{}]"),
        ],
    ]
    requests_of_a_dead_process(tmp_path / "tasks", *requests)
    opened = shop.gate("gate")
    runner.start()
    assert shop.begun["gate"].wait(TIMEOUT)
    assert wait_until(lambda: any("durable_shop.write" in each for each in log.warnings))
    assert shop.calls == [1]
    opened.set()
    assert sorted(shop.wait_for(4)[2:]) == [3, 4]  # the failure of 3 skips no other
    assert shop.calls[:2] == [1, "gate"]
    assert wait_until(lambda: runner.statistics().pending == 0)


def test_the_last_failure_is_the_tasks_error(
    runner: DurableRunner, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    def add(environ: object) -> None:
        background_tasks.using(retry=Retry(2, first=0.0)).add_task(fail, 1)

    run_view(runner, add)
    assert shop.wait_for(2) == [1, 1]
    assert wait_until(lambda: ("failed", "durable.fail") in stored(runner))
    [failed] = list_tasks(check_folder(runner.path))
    assert failed.outcome.row.attempts == 2
    assert len(log.errors) == 1
    [logged] = [each.created for each in caplog.records if each.levelno == logging.ERROR]
    assert failed.outcome.ended <= logged  # a log handler may take long


def test_a_delay_waits_in_the_file(runner: DurableRunner) -> None:
    def add(environ: object) -> None:
        background_tasks.using(delay=0.05).add_task(write, 1)
        background_tasks.using(delay=3600).add_task(write, 2)
        background_tasks.add_task(write, 3)

    run_view(runner, add)
    assert shop.wait_for(2) == [3, 1]
    assert wait_until(lambda: waiting(runner) == ["durable.write"])
    assert wait(TIMEOUT) == []


def test_tasks_that_wait_in_the_file_count_as_waiting(runner: DurableRunner) -> None:
    def add(environ: object) -> None:
        background_tasks.using(delay=3600).add_task(write, 1)
        background_tasks.using(delay=3600).add_task(shop.note, 2)  # waits in memory
        background_tasks.add_task(fail_for_long, 3)
        background_tasks.add_task(wait_at, "gate")

    run_view(runner, add)
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    assert wait_until(lambda: runner.statistics() == Statistics(0, 1, 0, 0, 0, waiting=3))
    shop.gate("gate").set()
    assert wait_until(lambda: runner.statistics() == Statistics(0, 0, 1, 0, 0, waiting=3))
    assert len(runner.ledger.abandon_waiting()) == 1


def test_tasks_of_a_dead_process_that_wait_count_once_they_are_taken_over(
    runner: DurableRunner, tmp_path: Path
) -> None:
    due = time.time() + 3600
    rows = [Row("durable.write", "[1,[1],{}]", due=due), Row("durable.write", "[1,[2],{}]")]
    left_by_a_dead_process(tmp_path / "tasks", *rows)
    assert runner.statistics().waiting == 0
    runner.start()
    assert shop.wait_for(1) == [2]
    assert wait_until(lambda: runner.statistics() == Statistics(0, 0, 1, 0, 0, waiting=1))


def test_beyond_max_waiting_a_delay_is_refused_and_a_retry_is_kept(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(max_waiting=2))
    refused: list[WaitingLimitError] = []

    def add(environ: object) -> None:
        try:
            background_tasks.using(delay=3600).add_task(write, 1)
        except WaitingLimitError as exc:
            refused.append(exc)

    for waits in (1, 2, 2, 2):
        run_view(runner, add)
        assert wait_until(lambda wanted=waits: runner.statistics().waiting == wanted)  # type: ignore[misc]
    assert [exc.name for exc in refused] == ["tests.support.durable_shop.write"] * 2
    assert refused[0].limit == 2
    handle(runner, (fail_for_long, 3))
    assert wait_until(lambda: runner.statistics().waiting == 3)
    assert waiting(runner) == ["durable.write", "durable.write", "durable.fail_for_long"]
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


def test_a_second_thread_finds_room_while_the_first_one_counts(
    runner: DurableRunner, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two requests of a server with threads: the second one was refused."""
    counts: list[int] = []

    def count_waiting() -> int:
        counts.append(0)
        if len(counts) == 1:
            gate.task()
        return 0

    monkeypatch.setattr(runner.ledger.files, "count_waiting", count_waiting)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(runner.ledger.may_wait)
        assert gate.begun.wait(TIMEOUT)
        assert runner.ledger.may_wait()
        gate.open()
        assert first.result(TIMEOUT)


def test_the_longer_a_count_of_waiting_tasks_takes_the_later_is_the_next(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, waiting_in_file, counts = 0.0, 1, 0

    def count_waiting() -> int:
        nonlocal moment, counts
        moment += 0.001
        counts += 1
        return waiting_in_file

    ledger = runner.ledger
    ledger.max_waiting = 1
    monkeypatch.setattr(ledger.files, "count_waiting", count_waiting)
    clock = SimpleNamespace(monotonic=lambda: moment)
    monkeypatch.setattr("wsgi_bg._durable.state.time", clock)
    assert not ledger.may_wait()
    waiting_in_file = 0
    assert not ledger.may_wait()
    assert counts == 1
    moment += 0.04
    assert ledger.may_wait()


def test_there_is_room_to_wait_again_when_tasks_have_run(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(max_waiting=1))

    def is_added() -> bool:
        added: list[int] = []

        def add(environ: object) -> None:
            with suppress(WaitingLimitError):
                background_tasks.using(delay=0.01).add_task(write, 1)
                added.append(1)

        run_view(runner, add)
        return bool(added)

    assert is_added()
    assert wait_until(is_added)
    assert shop.wait_for(2) == [1, 1]
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"synchronous": "always"}, ValueError),
        ({"store_timeout": 0}, ValueError),
        ({"store_timeout": math.nan}, ValueError),
        ({"store_timeout": timedelta(1)}, TypeError),
        ({"max_crashes": 0}, ValueError),
        ({"max_crashes": True}, TypeError),
        ({"keep_failed": 10}, TypeError),
        ({"keep_failed": (1, 2, 3)}, TypeError),
        ({"keep_done": (-1, 3)}, ValueError),
        ({"keep_done": (1, -3)}, ValueError),
        ({"drain_timeout": "1"}, TypeError),
        ({"local": "celery"}, ValueError),
        ({"local": 3}, TypeError),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: Any, error: Any) -> None:
    with pytest.raises(error, match=f"^{next(iter(options))}"):
        DurableRunner(tmp_path, **options)


@pytest.mark.parametrize("without_limit", [10**400, 2**63])
def test_tasks_are_kept_with_numbers_that_are_no_limit(
    tmp_path: Path, without_limit: int
) -> None:
    limits = (without_limit, without_limit)
    runner = DurableRunner(
        tmp_path, store_timeout=without_limit, keep_failed=limits, keep_done=limits
    )
    handle(runner, (write, 1), (fail, 2))
    assert shop.wait_for(2) == [1, 2]
    ended = [("done", "durable.write"), ("failed", "durable.fail")]
    assert wait_until(lambda: sorted(stored(runner)) == ended)
    assert runner.drain(TIMEOUT) == []
    runner.abandon()


def test_the_path_is_the_path_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="path"):
        DurableRunner(None)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        DurableRunner(":memory:")


def test_a_config_key_names_the_folder(tmp_path: Path) -> None:
    app = Flask("shop")
    app.config["WSGI_BG_DURABLE"] = str(tmp_path)
    Background(app)

    @app.post("/")
    def view() -> str:
        background_tasks.add_task(write, current_app.name)
        return "ok"

    assert app.test_client().post("/").text == "ok"
    assert shop.wait_for(1) == ["shop"]
    other = Flask("other")
    other.config["WSGI_BG_DURABLE"] = str(tmp_path)
    with pytest.raises(ValueError, match="WSGI_BG_DURABLE"):
        Background(other, runner="pool")


def test_the_repr_says_which_promise_holds(tmp_path: Path) -> None:
    assert "the death of the process" in repr(DurableRunner(tmp_path))
    assert "the death of the machine" in repr(DurableRunner(tmp_path, synchronous="full"))


def test_tasks_that_a_task_has_added_run_although_the_disk_is_full(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    fill_disk(monkeypatch, "end_with")
    handle(runner, (add_two, "a"))
    assert shop.wait_for(3) == ["a", "a.1", "a.2"]
    assert any("are not stored, and run from memory" in message for message in log.errors)
    assert wait(TIMEOUT) == []
    assert waiting(runner) == []


def test_a_retry_waits_in_memory_while_the_disk_is_full(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    fill_disk(monkeypatch, "postpone")
    handle(runner, (fail_twice, 1))
    assert shop.wait_for(4) == [1, 1, 1, "child"]
    assert any("waits in memory for its next attempt" in message for message in log.errors)


def test_a_task_runs_although_its_begin_cannot_be_noted(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, "begin")
    handle(runner, (write, 1))
    assert shop.wait_for(1) == [1]


@pytest.mark.parametrize("func", [write, write_async])
def test_a_task_that_waits_in_memory_can_be_discarded(
    tmp_path: Path, log: Log, func: Any
) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1))
    handle(runner, (wait_at, "gate"), (func, 1), (write, 2))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    discard_by_hand(tmp_path, "[1,[1],{}]")
    shop.gate("gate").set()
    assert shop.wait_for(2) == ["gate", 2]
    assert wait(TIMEOUT) == []
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.failed, statistics.discarded) == (2, 0, 1)
    ends = [message.partition(" after ")[0] for message in log.at(logging.DEBUG)]
    assert ends == [
        "background task tests.support.durable_shop.wait_at has succeeded",
        "background task tests.support.durable_shop.write has succeeded",
    ]


@pytest.mark.parametrize("stops", [False, True])
def test_a_retry_that_waits_in_memory_can_be_discarded(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, log: Log, clock: Clock, stops: bool
) -> None:
    fill_disk(monkeypatch, "hold_back" if stops else "postpone")

    def add(environ: object) -> None:
        background_tasks.using(stop_on_error=stops).add_task(fail_for_long, 1)

    run_view(runner, add)
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: runner.statistics().waiting == 1)
    assert stored(runner) == [("waiting", "durable.fail_for_long")]
    discard_by_hand(Path(runner.path), "[1,[1],{}]")
    clock.advance(3600)
    assert wait_until(lambda: runner.statistics().discarded == 1)
    assert shop.calls == [1]
    assert stored(runner) == []


def discard_by_hand(path: Path, arguments: str) -> None:
    """Discard the stored task with these arguments, as the command does."""
    folder = check_folder(path)
    [found] = list_tasks(folder, lambda outcome: outcome.row.arguments == arguments)
    ordered = order(folder, found, "discard")
    assert wait_until(lambda: not Path(ordered).exists())


@pytest.mark.parametrize("func", [write, write_async])
def test_a_discarded_task_that_a_stream_runs_by_hand_is_not_called(
    tmp_path: Path, log: Log, func: Any
) -> None:
    runner = DurableRunner(tmp_path)

    def stream() -> Iterator[bytes]:
        yield b"first"
        tasks[0].add_task(func, 1)  # stored at once, since the answer has begun
        discard_by_hand(tmp_path, "[1,[1],{}]")
        tasks[0]()
        yield b"last"

    tasks: list[Any] = []
    run_view(runner, lambda _: tasks.append(background_tasks.root), body=stream)
    assert wait(TIMEOUT) == []
    assert shop.calls == []
    assert log.at(logging.DEBUG) == log.errors == []


def writing(number: int) -> Row:
    return Row("durable.write", f"[1,[{number}],{{}}]")


def test_files_of_dead_processes_in_which_nothing_is_due_are_not_kept_open(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    path = tmp_path / "tasks"
    for hours in (1, 2, 3):
        due = time.time() + 3600 * hours
        left_by_a_dead_process(path, Row("durable.write", "[1,[1],{}]", due=due))
    runner.start()
    assert wait_until(lambda: runner.statistics().waiting == 3)
    assert wait_until(
        lambda: {name[:8] for name in open_files(path)} == {"owners.l", "00000004"}
    )
    assert sorted(runner.file_numbers()) == [1, 2, 3, 4]
    (first, *rest) = list_tasks(check_folder(path))
    assert all(each.is_owned for each in (first, *rest))
    order(check_folder(path), first, "discard")
    assert wait_until(lambda: runner.statistics().waiting == 2)
    assert wait_until(lambda: sorted(runner.file_numbers()) == [2, 3, 4])
    assert runner.drain(TIMEOUT) == []
    assert "2 durable tasks stay" in log.at(logging.INFO)[-1]


def test_a_file_that_was_closed_is_worked_off_when_its_time_has_come(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    due = now() + 3600
    left_by_a_dead_process(tmp_path / "tasks", Row("durable.write", "[1,[1],{}]", due=due))
    runner.start()
    assert wait_until(lambda: runner.ledger.files.count_parked() == 1)
    assert shop.calls == []
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: runner.file_numbers() == [2])


def test_tasks_are_taken_over_in_time_if_the_clock_was_set_back_during_a_look(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidy, now = Store.tidy, time.time
    is_set_back = threading.Event()

    def set_back(store: Store) -> None:
        if not is_set_back.is_set():
            monkeypatch.setattr(time, "time", lambda: now() - 3600)
            is_set_back.set()
        tidy(store)

    monkeypatch.setattr(Store, "tidy", set_back)
    runner.start()
    assert is_set_back.wait(TIMEOUT)
    left_by_a_dead_process(tmp_path / "tasks", Row("durable.write", "[1,[1],{}]"))
    assert shop.wait_for(1) == [1]


@pytest.mark.parametrize(
    "row",
    [
        Row("durable.write", "forged"),
        Row("durable.write", "[1,[1],{}]", options="[]"),
        Row("durable.write", "[1,[1],{}]", options="{"),
        Row("durable.write", "[1,[1],{}]", context="[]"),
        Row("durable.write", "[1,[1],{}]", options="[" * 50_000),
    ],
)
def test_a_forged_row_is_put_aside(
    runner: DurableRunner, tmp_path: Path, log: Log, row: Row
) -> None:
    left_by_a_dead_process(tmp_path / "tasks", row, Row("durable.write", "[1,[2],{}]"))
    runner.start()
    assert shop.wait_for(1) == [2]
    assert wait_until(lambda: sorted(state for state, _ in stored(runner)) == ["aside", "done"])
    assert log.errors == ["durable task durable.write was put aside: it cannot be read"]
    assert wait_until(lambda: runner.statistics().aside == 1)


@pytest.mark.parametrize(
    ("forgery", "runs"),
    [
        ("crashes = 'x'", True),
        ("crashes = NULL", True),
        ("attempts = x'00'", True),
        ("added = 9e999", True),
        ("id = x'ff'", True),
        ("request = NULL", True),
        ("request = 'x'", True),
        ("arguments = CAST(x'ff' AS TEXT)", False),
        ("name = CAST(x'ff' AS TEXT)", False),
        ("name = NULL", False),
        ("due = 'x'", False),
        ("key = 9223372036854775807", False),
        ("key = -1", False),
    ],
)
def test_a_forged_value_keeps_no_other_row_from_running(
    runner: DurableRunner, tmp_path: Path, forgery: str, runs: bool
) -> None:
    rows = [
        Row("durable.write", "[1,[1],{}]"),
        Row("durable.write", "[1,[2],{}]", id="forged"),
        Row("durable.write", "[1,[3],{}]"),
        Row("durable.write", "[1,[4],{}]", due=1.0),
    ]
    left_by_a_dead_process(tmp_path / "tasks", *rows)
    (file,) = (tmp_path / "tasks").glob("*.sqlite")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE tasks SET {forgery} WHERE id = 'forged'")
    runner.start()
    wanted = [1, 2, 3, 4] if runs else [1, 3, 4]
    assert sorted(shop.wait_for(len(wanted))) == wanted

    def done() -> list[str]:
        return [name for state, name in stored(runner) if state == "done"]

    assert wait_until(lambda: len(done()) == len(wanted))


def with_rows_of_an_unknown_function(runner: DurableRunner, tmp_path: Path, log: Log) -> str:
    """Start ``runner`` on two rows of a function that is not registered; return its name."""
    name = f"durable.unknown_{tmp_path.name}"
    left_by_a_dead_process(tmp_path / "tasks", Row(name, "[1,[1],{}]"), Row(name, "[1,[2],{}]"))
    runner.start()
    assert wait_until(lambda: len(log.errors) == 1)
    return name


def test_rows_of_a_function_that_is_registered_later_wait_until_then(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    name = with_rows_of_an_unknown_function(runner, tmp_path, log)
    assert "no function is registered by that name" in log.errors[0]
    registered_task(name=name)(shop.new_function())
    assert shop.wait_for(2) == [1, 2]
    assert len(log.errors) == 1


def test_only_the_file_holds_the_rows_of_a_function_that_is_not_registered(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    name = with_rows_of_an_unknown_function(runner, tmp_path, log)

    def rows() -> list[Row]:
        return [each for each in gc.get_objects() if type(each) is Row and each.name == name]

    assert wait_until(lambda: rows() == [])
    assert waiting(runner) == [name] * 2


def test_a_rerun_has_the_correlation_id_and_the_options_of_its_request(
    runner: DurableRunner, tmp_path: Path
) -> None:
    name = "durable.note_correlation_id"
    rows = [
        Row(name, "[1,[],{}]", context='{"x-correlation-id": "abc"}'),
        Row("durable.fail", "[1,[1],{}]", options='{"stop_on_error": true}'),
        Row("durable.write", "[1,[2],{}]"),
    ]
    left_by_a_dead_process(tmp_path / "tasks", *rows)
    runner.start()
    assert shop.wait_for(2) == ["abc", 1]
    assert wait_until(lambda: waiting(runner) == [])
    assert shop.calls == ["abc", 1]


def test_a_runner_whose_folder_is_gone_refuses_requests_with_tasks(
    tmp_path: Path, log: Log
) -> None:
    runner = DurableRunner(tmp_path / "tasks")
    shutil.rmtree(tmp_path / "tasks")
    app = BackgroundTasksMiddleware(app_that(lambda environ: None), runner=runner)
    for _ in range(2):  # requests without tasks
        assert Server().run(app, make_server_environ()) == b"ok"
    assert len(log.errors) == 1
    with pytest.raises(StoreError):
        handle(runner, (write, 1))
    with pytest.raises(StoreError):  # and again: the first error starts no thread
        handle(runner, (write, 1))
    assert "cannot run the tasks of other processes" in log.errors[0]
    (tmp_path / "tasks").mkdir()  # perhaps with the same inode
    handle(runner, (write, 1))
    assert shop.wait_for(1) == [1]


@pytest.mark.parametrize("mode", ["record", "run"])
def test_the_fixture_checks_arguments_and_touches_no_file(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # before an installed package
    pytester.makepyfile(
        f"""
        import os, sys, threading, pytest
        sys.path.insert(0, {str(ROOT)!r})
        from tests.support.durable_shop import DurableRunner, add_two, handle, write

        @pytest.mark.wsgi_bg(mode={mode!r})
        def test_it(background_tasks, tmp_path):
            runner = DurableRunner(tmp_path)
            handle(runner, (add_two, 1))
            assert background_tasks.tasks[0].name == "tests.support.durable_shop.add_two"
            with pytest.raises(TypeError):
                handle(runner, (write, object()))
            assert os.listdir(tmp_path) == []
            assert not [t for t in threading.enumerate() if t.name == "wsgi_bg-durable"]
        """
    )
    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=1)


def test_with_the_fixture_in_mode_real_tasks_are_stored_before_the_answer(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(
        f"""
        import sys, pytest
        sys.path.insert(0, {str(ROOT)!r})
        from tests.support.durable_shop import *
        from wsgi_bg._store.folder import check_folder
        from wsgi_bg._store.inspection import list_tasks

        @pytest.mark.wsgi_bg(mode="real")
        def test_it(background_tasks, tmp_path):
            stored = []

            def stream():
                stored.extend(list_tasks(check_folder(tmp_path)))
                yield b"ok"

            handle(DurableRunner(tmp_path), (write, 1), body=stream)
            assert len(stored) == 1
            background_tasks.join()
            assert calls == [1]
        """
    )
    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=1)


def test_a_task_that_a_thread_adds_when_its_task_has_ended_is_stored(
    runner: DurableRunner,
) -> None:
    handle(runner, (shop.add_on_a_thread, "a"), (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    shop.gate("thread").set()
    assert shop.gate("added").wait(TIMEOUT)
    assert waiting(runner) == ["durable.wait_at", "durable.write"]
    shop.gate("gate").set()
    assert shop.wait_for(2) == ["gate", "a"]


def test_a_row_is_put_aside_after_too_many_crashes(
    runner: DurableRunner, tmp_path: Path, log: Log
) -> None:
    rows = [Row("durable.write", "[1,[1],{}]", crashes=3), Row("durable.write", "[1,[2],{}]")]
    left_by_a_dead_process(tmp_path / "tasks", *rows)
    runner.start()
    assert shop.wait_for(1) == [2]
    assert wait_until(lambda: sorted(state for state, _ in stored(runner)) == ["aside", "done"])
    message = (
        "durable task durable.write was put aside: the process has died 3 times while it ran"
    )
    assert log.errors == [message]
    assert wait_until(lambda: runner.statistics().aside == 1)


def test_suspects_run_one_at_a_time_as_there_is_room(tmp_path: Path) -> None:
    for name in ("a", "b"):
        row = Row("durable.wait_at", f'[1,["{name}"],{{}}]', crashes=1)
        left_by_a_dead_process(tmp_path, row)
    runner = DurableRunner(tmp_path, local=PoolRunner(max_pending=2))
    first, second, third = shop.gate("a"), shop.gate("b"), shop.gate("c")
    runner.start()
    assert wait_until(lambda: any(shop.begun[name].is_set() for name in ("a", "b")))
    running, waits = ("a", "b") if shop.begun["a"].is_set() else ("b", "a")
    handle(runner, (wait_at, "c"))  # takes the room that files may take
    assert shop.begun["c"].wait(TIMEOUT)
    assert not shop.begun[waits].is_set()
    shop.gate(running).set()
    assert shop.wait_for(1) == [running]
    assert wait_until(lambda: not runner._states.get()._more_suspects)  # there is no room yet
    third.set()
    assert shop.begun[waits].wait(TIMEOUT)
    first.set()
    second.set()
    assert sorted(shop.wait_for(3)) == ["a", "b", "c"]
    assert runner.drain(TIMEOUT) == []


@pytest.mark.parametrize("options", ["", '{"stop_on_error": true}'])
def test_a_suspect_that_waits_for_its_next_attempt_lets_the_next_one_run_at_once(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state._LOOK", 100)  # less than the waits of 300 s
    for call in (("wait_and_fail", '"gate"'), ("fail_for_long", "1")):
        row = Row(f"durable.{call[0]}", f"[1,[{call[1]}],{{}}]", options, crashes=1)
        left_by_a_dead_process(tmp_path / "tasks", row)
    gate = shop.gate("gate")
    runner.start()
    assert wait_until(lambda: runner._states.get()._more_suspects)
    gate.set()
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: runner.statistics().waiting == 2)


def test_the_end_of_a_suspect_makes_no_file_be_read_that_has_nothing_due(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state._LOOK", 3600)
    monkeypatch.setattr("wsgi_bg._store.owned_files._PARK", math.inf)  # no file is closed
    folder, names = tmp_path / "tasks", ("a", "b", "c")
    left_by_a_dead_process(folder, Row("durable.write", "[1,[0],{}]", due=9e9))
    (waits,) = check_folder(folder).numbers()
    for name in names:
        row = Row("durable.wait_at", f'[1,["{name}"],{{}}]', crashes=1)
        left_by_a_dead_process(folder, row)
    reads: list[int] = []
    read = Store.read

    def counting(store: Store, now: float, limit: int) -> list[Row]:
        reads.append(store.number)
        return read(store, now, limit)

    monkeypatch.setattr(Store, "read", counting)
    gates = [shop.gate(name) for name in names]
    runner.start()
    assert wait_until(lambda: len(runner._states.get()._more_suspects) == 2)
    for name, gate in zip(names, gates, strict=True):
        assert shop.begun[name].wait(TIMEOUT)
        if name == "c":  # two looks are over: only the first was one at all files
            assert reads.count(waits) == 2
        gate.set()
    assert shop.wait_for(3) == [*names]


def test_a_function_that_is_not_registered_is_retried_in_memory(runner: DurableRunner) -> None:
    failures = [ValueError("first")]

    def flaky() -> None:
        shop.note("call")
        if failures:
            raise failures.pop()

    def add(environ: object) -> None:
        background_tasks.using(retry=Retry(2, first=0.0)).add_task(flaky)

    run_view(runner, add)
    assert shop.wait_for(2) == ["call", "call"]


def test_a_full_pool_runs_what_only_memory_holds(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(max_pending=1))
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    handle(runner, (write, 1), (shop.note, 2))
    assert shop.calls == [2]
    shop.gate("gate").set()
    assert sorted(map(str, shop.wait_for(3))) == ["1", "2", "gate"]
    assert runner.drain(TIMEOUT) == []


def test_a_pool_that_can_start_no_thread_leaves_the_tasks_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner())
    with monkeypatch.context() as patch:
        patch.setattr(Workers, "submit", lambda *args: False)
        handle(runner, (write, 1))
    assert shop.wait_for(1) == [1]
    assert runner.drain(TIMEOUT) == []


def test_a_runner_that_was_not_used_ends_at_once(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path)
    assert runner.drain(TIMEOUT) == []
    assert runner.abandon() == []


def test_a_task_that_runs_at_the_exit_is_not_counted_as_having_crashed(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path)
    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    assert [task.name for task in runner.drain(0)] == ["tests.support.durable_shop.wait_at"]
    runner.abandon()
    assert stored(runner) == [("waiting", "durable.wait_at")]
    shop.gate("gate").set()
    assert wait_until(lambda: stored(runner) in ([], [("done", "durable.wait_at")]))


def test_the_thread_goes_on_if_the_folder_cannot_be_looked_at(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, "next_due")
        runner.start()
        # Threads of runners of earlier tests may say so of their folders.
        assert wait_until(lambda: f"{runner.path} could not be looked at" in log.errors)
    handle(runner, (fail_twice, 1))
    assert shop.wait_for(4) == [1, 1, 1, "child"]


def test_an_outer_layer_that_names_a_runner_decides(runner: DurableRunner) -> None:
    app = app_that(lambda environ: background_tasks.add_task(write, 1))
    inner = BackgroundTasksMiddleware(app, runner=runner)
    outer = BackgroundTasksMiddleware(inner, runner="pool")
    body = outer(make_server_environ(), Server().start_response)
    assert waiting(runner) == []
    list(body)
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(1) == [1]


def test_hooks_of_an_inner_layer_see_durable_tasks(runner: DurableRunner) -> None:
    seen: list[str] = []

    class Seen(Hooks):
        def task_finished(self, record: TaskRecord) -> None:
            seen.append(record.task.name)
            shop.note("seen")

    app = app_that(lambda environ: background_tasks.add_task(write, 1))
    inner = BackgroundTasksMiddleware(app, hooks=Seen())
    Server().run(BackgroundTasksMiddleware(inner, runner=runner), make_server_environ())
    assert shop.wait_for(2) == [1, "seen"]
    assert seen == ["tests.support.durable_shop.write"]


def test_the_command_refuses_a_folder_in_a_line(tmp_path: Path) -> None:
    command = "from wsgi_bg._serving.cli import main; print(main(['--durable', {!r}, 'x:app']))"
    refused = run_python(command.format(":memory:"))
    assert refused.stdout == "2\n"
    assert refused.stderr.startswith("wsgi-bg: the durable tasks in ':memory:'")
    accepted = run_python(command.format(str(tmp_path)))
    assert "No module named 'x'" in accepted.stderr


def test_a_thread_that_adds_as_its_task_ends_lets_the_request_store_the_task(
    runner: DurableRunner,
) -> None:
    parent = Kept(Row("durable.write", ""))

    class Children(list[BackgroundTask]):
        """The task ends while another thread appends."""

        def append(self, task: BackgroundTask) -> None:
            super().append(task)
            parent.children = None

    parent.children = Children()
    token = running.set(parent)
    try:
        handle(runner, (write, 1))
    finally:
        running.reset(token)
    assert shop.wait_for(1) == [1]


def test_a_users_runner_may_have_methods_of_these_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own:
        def submit(self, batch: Any) -> None:
            batch.run()

        def drain(self, timeout: float) -> list[BackgroundTask]:
            return []

        def statistics(self) -> Statistics:
            return Statistics(0, 0, 0, 0, 0)

        def start(self) -> None:
            raise AssertionError

        keep = attach = postpone = added = begin = start

    own = Own()
    app = app_that(lambda environ: background_tasks.using(delay=0.01).add_task(write, 1))
    Server().run(BackgroundTasksMiddleware(app, runner=own), make_server_environ())
    monkeypatch.setattr(shutdown, "_registered", lambda: [own])
    shutdown.start_runners()
    assert shop.wait_for(1) == [1]


def test_a_damaged_file_stops_neither_delays_nor_the_next_look(
    runner: DurableRunner, log: Log
) -> None:
    handle(runner, (write, 1))
    damaged = Path(runner.path, "damaged")
    damaged.write_bytes(b"no database" * 1000)
    damaged.rename(Path(runner.path, "00000099.sqlite"))
    assert wait_until(lambda: bool(log.errors))

    def add(environ: object) -> None:
        background_tasks.using(delay=0.01).add_task(write, 2)

    run_view(runner, add)
    assert shop.wait_for(2) == [1, 2]
    assert len(log.errors) == 1


def test_a_task_that_waited_has_the_context_and_the_options_of_its_layer(
    runner: DurableRunner,
) -> None:
    app = Flask("shop")
    Background(app)
    failed: list[str] = []

    @app.post("/")
    def view() -> str:
        tasks = background_tasks.using(delay=0.01)
        tasks.add_task(shop.note_application)
        tasks.using(on_error=lambda task, exc: failed.append(task.name)).add_task(fail, 1)
        return "ok"

    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app, runner=runner)  # type: ignore[method-assign]
    assert app.test_client().post("/").text == "ok"
    assert sorted(map(str, shop.wait_for(2))) == ["1", "shop"]
    assert wait_until(lambda: failed == ["tests.support.durable_shop.fail"])


def test_a_task_that_is_read_in_vain_has_the_options_of_its_layer(tmp_path: Path) -> None:
    refused: list[float] = []

    class Pool(PoolRunner):
        def has_room(self, share: float = 1.0) -> bool:
            has_room = super().has_room(share)
            refused.extend([share] * (not has_room and share < 1.0))  # for tasks of a file
            return has_room

    runner = DurableRunner(tmp_path, local=Pool(threads=1, max_pending=1))
    failed: list[str] = []

    def add(environ: object) -> None:
        tasks = background_tasks.using(on_error=lambda task, exc: failed.append(task.name))
        tasks.add_task(fail, 1)

    handle(runner, (wait_at, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    run_view(runner, add)
    assert wait_until(lambda: len(refused) > 0)
    shop.gate("gate").set()
    assert wait_until(lambda: failed == ["tests.support.durable_shop.fail"])


def test_a_task_that_is_refused_after_the_end_is_not_stored(runner: DurableRunner) -> None:
    kept: list[Any] = []

    def add(environ: object) -> None:
        kept.append(background_tasks.root)
        background_tasks.add_task(write, 1)

    run_view(runner, add)
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: kept[0].has_ended)
    with pytest.raises(RuntimeError, match="has ended"):
        kept[0].add_task(write, 2)
    assert wait_until(lambda: waiting(runner) == [])


def test_a_child_that_its_parent_runs_by_hand_is_not_stored(runner: DurableRunner) -> None:
    handle(runner, (shop.add_and_run_by_hand, "child"))
    assert shop.wait_for(1) == ["child"]
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: waiting(runner) == [])


def test_a_pool_without_a_queue_runs_durable_tasks(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(max_pending=0))
    handle(runner, (write, 1))
    assert shop.wait_for(1) == [1]
    assert runner.drain(TIMEOUT) == []


def test_a_short_delay_begins_after_the_stream_which_may_fail(runner: DurableRunner) -> None:
    def stream() -> Iterator[bytes]:
        yield b"first"
        assert wait_until(lambda: time.time() > due[0])
        runner._states.get()._look()
        raise LookupError

    due: list[float] = []

    def add(environ: object) -> None:
        background_tasks.using(delay=0.01).add_task(write, 1)
        due.append(time.time() + 0.02)

    with pytest.raises(LookupError):
        run_view(runner, add, body=stream)
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: waiting(runner) == [])
    assert shop.calls == []


@pytest.mark.parametrize("why", ["a delay", "no room"])
@pytest.mark.parametrize(("status", "added"), [("500 Oops", []), ("200 OK", ["a.1", "a.2"])])
def test_the_outcome_of_the_request_holds_for_what_a_task_of_the_file_adds(
    tmp_path: Path, why: str, status: str, added: list[str]
) -> None:
    runner = DurableRunner(tmp_path, local=PoolRunner(threads=1, max_pending=1))
    shop.gate("gate")
    if why == "no room":
        handle(runner, (wait_at, "gate"))
        assert shop.begun["gate"].wait(TIMEOUT)
    delay = 0.01 if why == "a delay" else 0.0

    def add(environ: object) -> None:
        background_tasks.using(run_on="always", delay=delay).add_task(add_two, "a")

    run_view(runner, add, status=status)
    shop.gate("gate").set()
    assert wait_until(lambda: "a" in shop.calls)
    assert wait(TIMEOUT) == []
    assert [value for value in shop.calls if value != "gate"] == ["a", *added]
    assert runner.drain(TIMEOUT) == []


def due_of_the_only_task(runner: DurableRunner) -> float:
    [task] = [
        each.outcome
        for each in list_tasks(check_folder(runner.path))
        if each.outcome.state == "waiting"
    ]
    return task.row.due


def test_a_delay_counts_from_the_end_of_the_stream(
    runner: DurableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream() -> Iterator[bytes]:
        yield b"first"
        assert due_of_the_only_task(runner) < begun + 3605
        clock.time = lambda: time.time() + 100.0

    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("wsgi_bg._durable.state.time", clock)
    begun = time.time()
    run_view(
        runner, lambda _: background_tasks.using(delay=3600).add_task(write, 1), body=stream
    )
    assert wait(TIMEOUT) == []
    assert due_of_the_only_task(runner) >= begun + 3700


def test_a_delay_in_a_running_task_counts_from_add_task(
    runner: DurableRunner, clock: Clock
) -> None:
    handle(runner, (add_with_delay, "gate"))
    shop.gate("gate")
    assert shop.begun["gate"].wait(TIMEOUT)
    clock.advance(600)
    shop.gate("gate").set()
    assert wait(TIMEOUT) == []
    assert wait_until(lambda: waiting(runner) == ["durable.write"])
    assert time.time() + 2900 < due_of_the_only_task(runner) <= time.time() + 3000


def test_many_tasks_of_a_request_keep_their_order(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state._READ", 4)
    left_by_a_dead_process(tmp_path / "tasks", *map(writing, range(10)))
    runner.start()
    assert shop.wait_for(10) == list(range(10))


def test_requests_are_not_split_between_two_reads(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._durable.state._READ", 5)
    requests = ([writing(start + each) for each in range(3)] for start in (0, 3, 6))
    requests_of_a_dead_process(tmp_path / "tasks", *requests)
    runner.start()
    calls = shop.wait_for(9)
    for start in (0, 3, 6):
        mine = [call for call in calls if start <= call < start + 3]
        assert mine == sorted(mine)


def test_all_requests_of_a_dead_process_run_burst_by_burst(
    runner: DurableRunner, tmp_path: Path
) -> None:
    requests_of_a_dead_process(tmp_path / "tasks", *([writing(each)] for each in range(25)))
    runner.start()
    assert sorted(shop.wait_for(25)) == list(range(25))
    assert wait_until(lambda: len(check_folder(runner.path).numbers()) == 1)


def test_a_crashed_views_local_task_adds_a_task_that_is_stored(runner: DurableRunner) -> None:
    def add_and_note() -> None:
        background_tasks.using(run_on="always").add_task(write, 1)
        shop.note(waiting(runner))

    def crash(environ: object) -> None:
        background_tasks.using(run_on="always").add_task(add_and_note)
        raise LookupError

    with pytest.raises(LookupError):
        run_view(runner, crash)
    assert shop.wait_for(2) == [["durable.write"], 1]


def test_a_second_status_stores_what_it_lets_run(runner: DurableRunner) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        get_background_tasks(environ).add_task(wait_at, "gate")
        start_response("503 Wait", [])
        start_response("200 OK", [], (ValueError, ValueError(), None))
        yield b"first"

    body = BackgroundTasksMiddleware(app, runner=runner)(
        make_server_environ(), Server().start_response
    )
    chunks = iter(body)
    assert next(chunks) == b"first"
    assert waiting(runner) == ["durable.wait_at"]
    shop.gate("gate").set()
    assert list(chunks) == []
    body.close()  # type: ignore[attr-defined]
    assert shop.wait_for(1) == ["gate"]


@pytest.mark.filterwarnings("ignore:This process")  # has threads, and forks
def test_a_child_of_a_view_that_forks_stores_nothing(
    runner: DurableRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURABLE_LOG", str(tmp_path / "calls"))
    children: list[int] = []

    def add_and_fork(environ: object) -> None:
        background_tasks.add_task(write, 1)
        children.append(os.fork())

    try:
        run_view(runner, add_and_fork)
    finally:
        if children[0] == 0:
            os._exit(0)
    os.waitpid(children[0], 0)
    assert shop.wait_for(1) == [1]
    assert wait_until(lambda: waiting(runner) == [])
    assert (tmp_path / "calls").read_text() == "1\n"


def test_two_runners_of_a_process_have_the_same_options_for_a_folder(
    runner: DurableRunner,
) -> None:
    handle(runner, (write, 1))
    with pytest.raises(StoreError, match="other options"):
        handle(DurableRunner(runner.path, synchronous="full"), (write, 2))
    handle(DurableRunner(runner.path), (write, 3))
    assert shop.wait_for(2) == [1, 3]


def test_at_exit_no_pool_begins_stored_tasks() -> None:
    done = run_python(
        f"""
        import logging, sys, tempfile, threading
        sys.path.insert(0, {str(ROOT)!r})
        from tests.support import durable_shop as shop
        from tests.support.durable_shop import *
        from tests.support.durable_shop import DurableRunner, PoolRunner
        import wsgi_bg

        class Open(logging.Handler):
            def emit(self, record):
                if "stay in" in record.getMessage():
                    gate("gate").set()

        logging.getLogger("wsgi_bg").addHandler(Open())
        logging.getLogger("wsgi_bg").setLevel(logging.INFO)
        pool = PoolRunner(threads=1)
        runner = DurableRunner(tempfile.mkdtemp(), local=pool)
        handle(runner, (wait_at, "gate"))
        gate("gate")
        assert begun["gate"].wait(10)
        for number in range(5):
            handle(runner, (write, number))
        wsgi_bg.drain(10)
        print(shop.calls)
        """
    )
    assert done.stdout == "['gate']\n", done.stderr
