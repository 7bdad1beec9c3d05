"""Hooks in the process that makes the call of a task which another process has added."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from celery import Celery, Task, current_task
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject
from celery.signals import task_prerun
from flask import Flask

from tests.conftest import Log
from tests.status.support import handle, hang, nothing, process
from tests.support import TIMEOUT, Server, app_that, make_server_environ, wait_until
from tests.support.celery import filesystem, messages
from tests.support.list_runner import ListRunner
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    Retry,
    background_tasks,
    registered_task,
    status,
)
from wsgi_bg._status.recorder import recorder
from wsgi_bg.celery import CeleryRunner
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.outbox import RetryLater, run_call

ROOT = Path(__file__).parents[2]
TEXT = "[1,[],{}]"


class Diary(Hooks):
    """Notes moments, ids and attempts."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ids: set[str] = set()
        self.requests: set[str | None] = set()

    def note(self, moment: str, record: TaskRecord) -> None:
        self.notes.append(f"{moment} {record.attempt}")
        self.ids.add(record.id)
        self.requests.add(record.request)

    def task_added(self, record: TaskRecord) -> None:
        self.note("added", record)

    def task_started(self, record: TaskRecord) -> None:
        self.note("started", record)

    @contextmanager
    def around(self, record: TaskRecord) -> Iterator[None]:
        self.note("entered", record)
        try:
            yield
        finally:
            self.note("left", record)

    def task_finished(self, record: TaskRecord) -> None:
        self.note("finished", record)

    def task_retried(self, record: TaskRecord) -> None:
        self.note("retried", record)

    def task_failed(self, record: TaskRecord) -> None:
        self.note("failed", record)

    def task_discarded(self, record: TaskRecord) -> None:
        self.note("discarded", record)


def moments(end: str, attempt: int = 1) -> list[str]:
    return [f"{moment} {attempt}" for moment in ("started", "entered", "left", end)]


@registered_task(name="observed.works")
def works() -> None:
    pass


@registered_task(name="observed.fails", retry=Retry(2, first=0, jitter=False))
def fails() -> None:
    raise ValueError("a bug")


@registered_task(name="observed.works_async")
async def works_async() -> None:
    pass


@registered_task(name="observed.stops")
def stops() -> None:
    raise SystemExit


kept: WeakSet[Any] = WeakSet()


@registered_task(name="observed.fails_async")
async def fails_async() -> None:
    local = Diary()
    kept.add(local)
    raise ValueError("a bug")


def attached(runner: Any) -> Diary:
    diary = Diary()
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=diary)
    return diary


@pytest.mark.parametrize("name", ["observed.works", "observed.works_async"])
def test_hooks_see_a_call_on_a_worker(name: str) -> None:
    runner = ListRunner()
    diary = attached(runner)
    run_call(runner, name, TEXT, {}, 1, "the id")
    assert diary.notes == moments("finished")
    assert diary.ids == {"the id"}


@pytest.mark.parametrize(
    ("header", "label"),
    [("GET /orders/7", "GET /orders/7"), ("GET /\nforged", "GET /\\nforged"), (7, None)],
)
def test_hooks_on_a_worker_know_the_request_that_has_added_the_task(
    header: object, label: str | None
) -> None:
    runner = ListRunner()
    diary = attached(runner)
    run_call(runner, "observed.works", TEXT, {"x-wsgi-bg-request": header})
    assert diary.requests == {label}


@pytest.mark.usefixtures("no_collection")
def test_a_call_that_raised_on_a_worker_is_freed_without_a_collection() -> None:
    with suppress(ValueError):
        run_call(ListRunner(), "observed.fails_async", TEXT, {})
    assert wait_until(lambda: not kept)  # the loop's thread may still have the call


def test_hooks_see_the_attempts_on_a_worker() -> None:
    runner = ListRunner()
    diary = attached(runner)
    with pytest.raises(RetryLater):
        run_call(runner, "observed.fails", TEXT, {}, 1, "the id")
    with pytest.raises(ValueError, match="a bug"):
        run_call(runner, "observed.fails", TEXT, {}, 2, "the id")
    assert diary.notes == moments("retried") + moments("failed", 2)


def test_hooks_see_that_a_worker_is_stopped() -> None:
    runner = ListRunner()
    diary = attached(runner)
    with pytest.raises(SystemExit):
        run_call(runner, "observed.stops", TEXT, {})
    assert diary.notes == moments("discarded")


class TimeLimitError(Exception):
    """Raised by a signal handler, as the time limits of RQ and Celery are."""


stuck: list[threading.Event] = []
"""Set when the call of ``observed.is_stuck`` has begun, and when it is cancelled."""


@registered_task(name="observed.is_stuck", retry=Retry(2, first=0))
async def is_stuck() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    try:
        await asyncio.Event().wait()
    finally:
        stuck.pop().set()


@pytest.mark.parametrize(("attempt", "error"), [(1, RetryLater), (2, TimeLimitError)])
def test_a_time_limit_cancels_an_async_call_while_its_hooks_run(
    attempt: int, error: type[Exception]
) -> None:
    """The hooks entered the context of the call, in which the loop cancels the call."""
    cancelled = threading.Event()
    stuck.append(cancelled)

    class Waits(Hooks):
        seen = False

        def task_retried(self, record: TaskRecord) -> None:
            self.seen = cancelled.wait(TIMEOUT)

        task_failed = task_retried

    def handler(number: int, frame: object) -> None:
        raise TimeLimitError

    hooks, runner = Waits(), ListRunner()
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=hooks)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(error):
            run_call(runner, "observed.is_stuck", TEXT, {}, attempt)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert hooks.seen


@pytest.mark.parametrize("name", ["observed.works", "observed.works_async"])
def test_hooks_see_a_call_on_a_worker_of_celery(name: str, tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app))
    assert app.tasks[name].apply(args=(TEXT,), task_id="the id").state == "SUCCESS"
    assert diary.notes == moments("finished")
    assert diary.ids == {"the id"}


def test_hooks_see_the_attempts_on_a_worker_of_celery(tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app))
    assert app.tasks["observed.fails"].apply(args=(TEXT,)).state == "FAILURE"
    assert diary.notes == moments("retried") + moments("failed", 2)


@registered_task(
    name="observed.repeated",
    celery={"autoretry_for": (KeyError,), "max_retries": 1, "default_retry_delay": 30},
)
def repeated() -> None:
    raise KeyError


def test_hooks_see_the_attempts_of_a_task_that_celery_repeats_by_itself(tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app))
    name = "observed.repeated"
    call_as_a_worker = build_tracer(name, app.tasks[name], app=app)
    for retries in (0, 1):
        request: dict[str, Any] = {"id": "the id", "retries": retries, "delivery_info": {}}
        call_as_a_worker("the id", (TEXT,), {}, request)
    assert diary.notes == moments("retried") + moments("failed", 2)
    assert len(messages(filesystem(tmp_path))) == 1


def test_hooks_see_that_a_worker_of_celery_is_stopped(tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app))
    with pytest.raises(SystemExit):
        app.tasks["observed.stops"].apply(args=(TEXT,))
    assert diary.notes == moments("discarded")


@registered_task(name="observed.adds_and_stops")
def add_and_stop() -> None:
    background_tasks.add_task(works)
    background_tasks.add_task(print)
    raise SystemExit


def stop_a_worker_of_celery(folder: Path) -> None:
    app = filesystem(folder).app()
    CeleryRunner(app)
    app.tasks["observed.adds_and_stops"].apply(args=(TEXT,))


def stop_another_worker(folder: Path) -> None:
    run_call(ListRunner(), "observed.adds_and_stops", TEXT, {})


@pytest.mark.parametrize("stop", [stop_a_worker_of_celery, stop_another_worker])
def test_a_call_that_stops_its_worker_names_the_tasks_that_it_has_added(
    stop: Callable[[Path], None], tmp_path: Path, log: Log
) -> None:
    with pytest.raises(SystemExit):
        stop(tmp_path)
    assert log.warnings == [
        f"background task {name} was not run: SystemExit stopped its worker"
        for name in ("tests.worker.test_observed.works", "builtins.print")
    ]


def test_a_call_without_a_worker_lets_a_system_exit_out(tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    CeleryRunner(app)
    with pytest.raises(SystemExit):
        app.tasks["observed.stops"](TEXT)


@registered_task(name="observed.leaves")
def leaves(how: str) -> None:
    request = current_task.request
    if request.retries:
        return
    if how == "reject":
        raise Reject
    if how == "ignore":
        raise Ignore
    eta = datetime.now(UTC) - timedelta(seconds=1)
    raise current_task.retry(**({"eta": eta} if how == "eta" else {"countdown": 0}))


@pytest.mark.parametrize(
    ("how", "notes"),
    [
        ("reject", moments("discarded")),
        ("ignore", moments("discarded")),
        ("eta", moments("retried") + moments("finished", 2)),
        ("countdown", moments("retried") + moments("finished", 2)),
    ],
)
def test_hooks_see_how_a_task_leaves_by_celerys_own_means(
    how: str, notes: list[str], tmp_path: Path
) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app))
    app.tasks["observed.leaves"].apply(args=(json.dumps([1, [how], {}]),))
    assert diary.notes == notes


@pytest.mark.parametrize("has_folder", [False, True])
def test_hooks_see_a_call_in_the_context_of_the_applications_own_task_class(
    tmp_path: Path, *, has_folder: bool
) -> None:
    flask = Flask("shop")

    class FlaskTask(Task):  # type: ignore[misc]  # as Flask's documentation has it
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask.app_context():
                return self.run(*args, **kwargs)

    app = Celery("shop", task_cls=FlaskTask, set_as_current=False)
    diary = Diary()
    outbox = tmp_path / "tasks" if has_folder else None
    Background(flask, CeleryRunner(app, outbox=outbox), hooks=diary)
    assert app.tasks["observed.works"].apply(args=(TEXT,)).state == "SUCCESS"
    assert diary.notes == moments("finished")


KILLED = """
import json, os, signal, sys
from tests.support import *
from tests.worker.test_observed import *

def add(environ):
    added = background_tasks.using(delay=0.01).add_task(works)
    os.write(1, (added.id + "\\n").encode())

app = BackgroundTasksMiddleware(app_that(add), runner=DurableRunner(sys.argv[1]))
Server().run(app, make_server_environ())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_hooks_see_a_stored_task_of_a_process_that_was_killed(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=False,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL
    runner = DurableRunner(tmp_path)
    diary = Diary()
    app = BackgroundTasksMiddleware(app_that(lambda _: None), runner=runner, hooks=diary)
    Server().run(app, make_server_environ())
    assert wait_until(lambda: len(diary.notes) == 4, TIMEOUT)
    assert diary.notes == moments("finished")
    assert diary.ids == {killed.stdout.strip()}
    assert diary.requests == {"GET /"}


def test_a_call_by_hand_on_a_worker_has_no_hooks(tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    diary = attached(CeleryRunner(app, plain_calls=True))
    app.tasks["observed.works"]()
    assert diary.notes == []


@pytest.mark.parametrize("engine", ["run_call", "celery"])
@pytest.mark.parametrize(("name", "outcome"), [("works", "succeeded"), ("breaks", "failed")])
def test_a_worker_logs_the_end_of_each_task(
    engine: str, name: str, outcome: str, tmp_path: Path, log: Log
) -> None:
    if engine == "celery":
        app = filesystem(tmp_path).app()
        CeleryRunner(app)
        app.tasks[f"observed.{name}"].apply(args=(TEXT,))
    else:
        with suppress(ValueError):
            run_call(ListRunner(), f"observed.{name}", TEXT, {})
    [record] = [each for each in log.at(logging.DEBUG) if __name__ in each]
    assert record.startswith(f"background task {__name__}.{name} has {outcome} after ")


@registered_task(name="observed.breaks")
def breaks() -> None:
    raise ValueError


@registered_task(name="observed.breaks_async")
async def breaks_async() -> None:
    raise ValueError


registered_task(name="observed.hangs")(hang)

ENDS = [
    ("works", "succeeded"),
    ("works_async", "succeeded"),
    ("breaks", "failed"),
    ("breaks_async", "failed"),
    ("stops", "discarded"),
]


def call(
    engine: str, name: str, folder: Path, path: Path | None = None
) -> BaseException | None:
    """Make a call on a worker that records its status; return the error, which has the task."""
    app = filesystem(folder).app()
    runner = CeleryRunner(app) if engine == "celery" else ListRunner()
    where: Any = {"status": True} if path is None else {"status_path": path}
    BackgroundTasksMiddleware(app_that(print), runner=runner, **where)
    try:
        if engine == "celery":
            app.tasks[f"observed.{name}"].apply(args=(TEXT,), task_id="the id", throw=True)
        else:
            run_call(runner, f"observed.{name}", TEXT, {}, 1, "the id")
    except BaseException as exc:
        return exc
    return None


@pytest.mark.parametrize("engine", ["run_call", "celery"])
@pytest.mark.parametrize(("name", "state"), ENDS)
def test_a_task_has_ended_for_a_worker_whose_error_has_the_task(
    engine: str, name: str, state: str, tmp_path: Path
) -> None:
    error = call(engine, name, tmp_path)
    assert status.of("the id") == state
    assert "the id" not in recorder.process().document().ids
    del error


@pytest.mark.parametrize(("name", "state"), [*ENDS, ("fails", "retrying"), ("hangs", "lost")])
def test_the_state_of_a_task_outlives_its_killed_worker(
    name: str, state: str, tmp_path: Path
) -> None:
    folder = tmp_path / "status"
    code = f"""
        from tests.worker.test_observed import *
        error = call("run_call", {name!r}, Path({str(tmp_path)!r}), Path(PATH))
        recorder.process().write()
        say("has ended")
        input()
        """
    with process(code, folder) as worker:
        assert worker.line() == ("hangs" if name == "hangs" else "has ended")
        if name == "hangs":
            assert wait_until((folder / "owners.lock").exists)
            assert wait_until(lambda: status.of("the id", folder) == "running")
        worker.kill()
    assert status.of("the id", folder) == state
    handle(nothing, status_path=folder)
    assert wait_until(lambda: not (folder / "1.status").exists())
    assert status.of("the id", folder) == state
    assert status.snapshot(folder).counts.lost == (state == "lost")


def test_a_task_that_an_engine_will_call_again_is_retrying(tmp_path: Path) -> None:
    error = call("run_call", "fails", tmp_path)
    assert isinstance(error, RetryLater)
    assert status.of("the id") == "retrying"
    assert "the id" not in recorder.process().document().ids
    counts = status.snapshot().counts
    assert (counts.retried, counts.failed) == (1, 0)


@pytest.mark.parametrize("name", ["fails", "leaves"])
def test_a_task_that_celery_will_call_again_is_retrying(name: str, tmp_path: Path) -> None:
    app = filesystem(tmp_path).app()
    BackgroundTasksMiddleware(app_that(print), runner=CeleryRunner(app), status=True)
    states: list[str | None] = []

    def note(task_id: str, **_: object) -> None:
        states.append(status.of(task_id))

    task_prerun.connect(note)
    try:
        text = TEXT if name == "fails" else json.dumps([1, ["countdown"], {}])
        app.tasks[f"observed.{name}"].apply(args=(text,), task_id="the id")
    finally:
        task_prerun.disconnect(note)
    end = "failed" if name == "fails" else "succeeded"
    assert [*states, status.of("the id")] == [None, "retrying", end]
    counts = status.snapshot().counts
    assert (counts.retried, counts.failed + counts.succeeded) == (1, 1)
