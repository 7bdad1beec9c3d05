"""Hooks: the calls that a monitor or a tracer gets for each task."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Gate,
    Subject,
    app_that,
    make_environ,
    respond,
    run_python,
    submit,
)
from tests.support.hooks import Diary
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    get_background_tasks,
    status,
)
from wsgi_bg._tasks.options import DEFAULTS
from wsgi_bg._tasks.task import DIRECT
from wsgi_bg.exceptions import OptionTypeError
from wsgi_bg.hooks import Hooks, TaskRecord

MOMENTS = ("added", "sent", "started", "finished", "failed", "discarded")


def plain(*args: object) -> None:
    pass


async def later() -> None:
    await asyncio.sleep(0)


def failing() -> None:
    raise ValueError("a bug")


def request(*functions: Any, **options: Any) -> Diary:
    """Handle a request; return the hook calls of its tasks."""
    diary = Diary()

    def add(environ: Environ) -> None:
        for function in functions:
            background_tasks.add_task(function)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=diary, **options))
    return diary


@pytest.mark.parametrize("function", [plain, later, lambda: later()])
def test_a_task_is_added_started_and_finished(function: Any) -> None:
    name = function.__name__
    diary = request(function)
    assert diary.moments == [f"added {name}", f"started {name}", f"finished {name}"]
    first = diary.records[0]
    assert all(record is first for record in diary.records)
    assert first.started_at is not None
    assert first.ended_at is not None
    assert first.added_at <= first.started_at <= first.ended_at
    assert (first.error, first.reason) == (None, None)
    assert repr(first) == f"<TaskRecord of {first.task.name}>"


async def failing_later() -> None:
    await asyncio.sleep(0)
    failing()


@pytest.mark.parametrize("function", [failing, failing_later])
def test_a_task_that_raises_has_failed(function: Any) -> None:
    name = function.__name__
    told: list[BaseException] = []
    diary = request(function, on_error=lambda task, exc: told.append(exc))
    assert diary.moments == [f"added {name}", f"started {name}", f"failed {name}"]
    assert [diary.records[0].error] == told
    assert diary.records[0].ended_at is not None


def test_a_task_that_will_not_run_is_discarded_with_the_reason() -> None:
    diary = request(plain, run_on="error")
    assert diary.moments == ["added plain", "discarded plain"]
    assert diary.records[0].reason == "the request succeeded with 200, and run_on is 'error'"
    assert diary.records[0].started_at is None
    diary = request(failing, later, stop_on_error=True)
    assert diary.moments[-2:] == ["failed failing", "discarded later"]
    assert diary.records[-1].reason == "a task before it failed, with stop_on_error set"


def test_the_tasks_of_a_request_share_its_batch() -> None:
    batches: list[BackgroundTasks] = []
    diary = Diary()

    def add(environ: Environ) -> None:
        background_tasks.add_task(plain)
        background_tasks.using(run_on="always").add_task(later)
        batches.append(get_background_tasks(environ))

    app = BackgroundTasksMiddleware(app_that(add), hooks=diary)
    respond(app)
    respond(app)
    assert {id(record.batch) for record in diary.records} == {id(batch) for batch in batches}
    assert len({id(batch) for batch in batches}) == 2


def test_a_stopped_worker_discards_its_tasks() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    diary = Diary()

    def add(environ: Environ) -> None:
        background_tasks.add_task(stop)
        background_tasks.add_task(plain)

    with pytest.raises(KeyboardInterrupt):
        respond(BackgroundTasksMiddleware(app_that(add), hooks=diary))
    assert diary.moments[-2:] == ["discarded stop", "discarded plain"]
    assert diary.records[-1].reason == "KeyboardInterrupt stopped its worker"


def test_a_task_added_to_an_ended_batch_is_discarded() -> None:
    diary = Diary()
    kept: list[BackgroundTasks] = []

    def add(environ: Environ) -> None:
        background_tasks.add_task(plain)
        kept.append(diary.records[0].batch)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=diary))
    with pytest.raises(RuntimeError):
        kept[0].add_task(later)
    assert diary.moments[-2:] == ["added later", "discarded later"]
    assert diary.records[-1].reason == "the batch has ended"


def test_tasks_left_at_the_exit_are_discarded() -> None:
    result = run_python("""
        import threading
        from tests.support import submit
        from tests.support.hooks import Diary
        from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
        from tests.support import app_that, respond

        class Loud(Diary):
            def note(self, moment, record):
                print(moment, record.reason, flush=True)

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        runner = PoolRunner(drain_timeout=0)
        app = app_that(lambda environ: background_tasks.add_task(stuck))
        respond(BackgroundTasksMiddleware(app, runner=runner, hooks=Loud()))
        assert begun.wait(10)
    """)
    assert result.stdout.splitlines() == [
        "added None",
        "started None",
        "discarded it was not finished within the drain time of 0 seconds",
    ], result.stderr


def test_hooks_see_tasks_called_by_hand_and_an_extra_call_besides() -> None:
    diary = Diary()

    def add(environ: Environ) -> None:
        for function in (plain, failing, failing_later, later):
            background_tasks.add_task(function)
        with pytest.raises(ValueError, match="a bug"):
            background_tasks()
        background_tasks.add_task(plain)
        background_tasks.tasks[-1]()

    respond(BackgroundTasksMiddleware(app_that(add), hooks=diary))
    assert [moment for moment in diary.moments if not moment.startswith("added")] == [
        "started plain",
        "finished plain",
        "started failing",
        "failed failing",
        "started failing_later",
        "failed failing_later",
        "started later",
        "finished later",
        *["started plain", "finished plain"] * 2,  # the extra call, and the request's
    ]


def test_an_extra_call_leaves_hooks_and_status_to_the_run_by_the_request() -> None:
    class Session(Hooks):
        @contextmanager
        def around(self, record: TaskRecord) -> Iterator[None]:
            sessions.append(record.id)
            yield

    def fail_later() -> None:
        if len(sessions) == 2:
            raise ValueError("a bug")

    def add(environ: Environ) -> None:
        added.append(background_tasks.add_task(fail_later))
        added[0]()

    sessions: list[str] = []
    added: list[BackgroundTask] = []
    respond(BackgroundTasksMiddleware(app_that(add), hooks=Session(), status=True))
    assert len(set(sessions)) == 2
    assert sessions[1] == added[0].id
    assert status.of(sessions[0]) == "succeeded"
    assert status.of(sessions[1]) == "failed"


@pytest.mark.parametrize("hooks", [None, Hooks()])
def test_the_run_by_the_request_sees_no_variable_that_an_extra_call_has_set(
    hooks: Hooks | None,
) -> None:
    seen: list[str] = []

    def trace() -> None:
        seen.append(span.get())
        span.set("of a call")

    def add(environ: Environ) -> None:
        task = background_tasks.add_task(trace)
        task()
        task()

    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    assert seen == ["none"] * 3


def test_an_extra_call_outside_of_the_request_has_no_record() -> None:
    diary = Diary()

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        added = contextvars.Context().run(tasks.add_task, plain)
        added()

    respond(BackgroundTasksMiddleware(app_that(add), hooks=diary))
    assert diary.moments == ["added plain", "started plain", "finished plain"]


def test_a_task_that_a_task_adds_has_its_moments_too() -> None:
    diary = request(lambda: background_tasks.add_task(plain))
    assert diary.moments[-4:] == [
        "added plain",
        "finished <lambda>",
        "started plain",
        "finished plain",
    ]


span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")


def test_a_hook_sets_context_variables_for_its_task_alone() -> None:
    class Tracer(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            assert span.get() == "none"
            span.set(record.task.name)

        def task_finished(self, record: TaskRecord) -> None:
            seen.append(span.get() == record.task.name)

        task_failed = task_finished

    seen: list[bool] = []

    def look() -> None:
        seen.append(span.get().endswith("look"))

    async def look_async() -> None:
        await asyncio.sleep(0)
        seen.append(span.get().endswith("look_async"))
        raise ValueError

    def add(environ: Environ) -> None:
        for function in (look, look_async, look):
            background_tasks.add_task(function)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=Tracer()))
    assert seen == [True] * 6
    assert span.get() == "none"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_hook_that_raises_harms_nothing(moment: str, log: Log) -> None:
    def broken(self: Hooks, record: TaskRecord) -> None:
        raise OSError("the monitor is away")

    kind: Any = type("Broken", (Hooks,), {f"task_{moment}": broken})
    diary = Diary()

    def add(environ: Environ) -> None:
        for function in (plain, later, failing):
            background_tasks.add_task(function)
        background_tasks.using(run_on="error").add_task(plain)

    app = BackgroundTasksMiddleware(app_that(add), hooks=[kind(), diary])
    assert respond(app) == b"ok"
    assert diary.moments[-2:] == ["started failing", "failed failing"]
    assert len(diary.moments) == 11
    times = {"added": 4, "sent": 0, "started": 3, "finished": 2, "failed": 1, "discarded": 1}
    complaints = [error for error in log.errors if f"Broken.task_{moment} raised" in error]
    assert len(complaints) == times[moment]


def test_a_ctrl_c_in_a_hook_stops_the_worker() -> None:
    class Stopping(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            raise KeyboardInterrupt

    app = app_that(lambda environ: background_tasks.add_task(plain))
    with pytest.raises(KeyboardInterrupt):
        respond(BackgroundTasksMiddleware(app, hooks=Stopping()))


@pytest.mark.parametrize("function", [plain, failing])
def test_a_worker_stopped_after_a_task_names_those_that_follow(function: Any, log: Log) -> None:
    class Stopping(Hooks):
        def task_finished(self, record: TaskRecord) -> None:
            raise KeyboardInterrupt

        task_failed = task_finished

    runner = InlineRunner()

    def add(environ: Environ) -> None:
        background_tasks.add_task(function)
        background_tasks.add_task(later)

    with pytest.raises(KeyboardInterrupt):
        respond(BackgroundTasksMiddleware(app_that(add), runner=runner, hooks=Stopping()))
    assert [warning.split()[2] for warning in log.warnings] == ["tests.hooks.test_hooks.later"]
    counts = runner.statistics()
    assert (counts.succeeded + counts.failed, counts.discarded) == (1, 1)


def test_hooks_of_the_innermost_layer_that_has_some_hold() -> None:
    outer, inner = Diary(), Diary()

    def nested(**options: Any) -> Any:
        app = app_that(lambda environ: background_tasks.add_task(plain))
        return BackgroundTasksMiddleware(BackgroundTasksMiddleware(app, **options), hooks=outer)

    respond(nested(hooks=inner))
    assert (len(inner.moments), len(outer.moments)) == (3, 0)
    respond(nested(run_on="always"))
    assert (len(inner.moments), len(outer.moments)) == (3, 3)


def test_hooks_are_called_on_the_thread_that_runs_the_task(gate: Gate) -> None:
    threads: list[threading.Thread] = []

    class Where(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            threads.append(threading.current_thread())

    def task() -> None:
        threads.append(threading.current_thread())

    async def async_task() -> None:
        task()

    runner = PoolRunner()

    def add(environ: Environ) -> None:
        background_tasks.add_task(task)
        background_tasks.add_task(async_task)

    respond(BackgroundTasksMiddleware(app_that(add), runner=runner, hooks=Where()))
    assert runner.drain(TIMEOUT) == []
    assert threads[0] is threads[1]
    assert threads[2] is threads[3]
    assert threading.current_thread() not in threads


@pytest.mark.usefixtures("no_collection")
def test_the_arguments_of_a_watched_task_are_freed_without_a_collection() -> None:
    subject = Subject()
    freed = subject.freed
    app = app_that(lambda environ: background_tasks.add_task(environ.pop("subject").touch))
    environ = make_environ(subject=subject)
    del subject
    respond(BackgroundTasksMiddleware(app, hooks=Hooks()), environ)
    environ.clear()
    assert freed.wait(TIMEOUT)


@pytest.mark.parametrize("hooks", [Hooks, "monitor", [Hooks(), None], {Hooks(): 1}])
def test_objects_without_hook_methods_are_refused(hooks: Any) -> None:
    with pytest.raises(TypeError, match=r"hooks must be a wsgi_bg\.hooks\.Hooks object") as e:
        BackgroundTasksMiddleware(app_that(lambda environ: None), hooks=hooks)
    assert isinstance(e.value, OptionTypeError)


def test_async_hooks_are_refused_since_none_would_be_awaited() -> None:
    class Later(Hooks):
        async def task_finished(self, record: TaskRecord) -> None:  # type: ignore[override]
            """Would never run."""

    with pytest.raises(
        TypeError, match="hooks must be of plain functions; one is an async def"
    ):
        BackgroundTasksMiddleware(app_that(lambda environ: None), hooks=[Hooks(), Later()])


def test_hooks_with_an_attribute_in_place_of_a_method_are_refused() -> None:
    hooks = type("Switched", (Hooks,), {"task_finished": None})()
    with pytest.raises(TypeError, match="hooks must be of plain functions"):
        BackgroundTasksMiddleware(app_that(lambda environ: None), hooks=hooks)


def test_a_runner_sees_a_task_before_the_hooks_do() -> None:
    class Choosy(PoolRunner):
        def check(self, task: Any) -> None:
            raise TypeError("not this one")

    diary = Diary()
    app = app_that(lambda environ: background_tasks.add_task(plain))
    with pytest.raises(TypeError, match="not this one"):
        respond(BackgroundTasksMiddleware(app, runner=Choosy(), hooks=diary))
    assert diary.moments == []


def test_without_hooks_nothing_is_kept_of_a_task() -> None:
    kept: list[Any] = []
    runner = PoolRunner()
    submit(runner, lambda: kept.append(background_tasks.tasks[0]))
    assert runner.drain(TIMEOUT) == []
    assert not hasattr(kept[0], "_record")


def test_times_are_set_when_the_hook_is_called() -> None:
    seen: list[tuple[str, bool, bool, bool]] = []

    class Times(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            seen.append(
                ("started", record.started_at is not None, record.ended_at is None, True)
            )

        def task_finished(self, record: TaskRecord) -> None:
            assert record.started_at is not None
            assert record.ended_at is not None
            seen.append(
                (
                    "finished",
                    record.added_at >= began,
                    True,
                    record.ended_at > record.started_at,
                )
            )

    began = time.monotonic()
    app = app_that(lambda environ: background_tasks.add_task(threading.Event().wait, 0.001))
    respond(BackgroundTasksMiddleware(app, hooks=Times()))
    assert seen == [("started", True, True, True), ("finished", True, True, True)]


def test_a_discarded_task_has_an_end() -> None:
    record = request(plain, run_on="error").records[-1]
    assert record.ended_at is not None


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, OSError])
def test_no_error_of_a_hook_gets_out(error: type[BaseException], log: Log) -> None:
    class Broken(Hooks):
        def task_added(self, record: TaskRecord) -> None:
            raise error

        task_started = task_finished = task_added

    def add(environ: Any) -> None:
        background_tasks.add_task(plain)
        background_tasks.add_task(later)

    assert respond(BackgroundTasksMiddleware(app_that(add), hooks=Broken())) == b"ok"
    assert [type(exc) for exc in log.tracebacks] == [error] * 6


@pytest.mark.parametrize("watched", [False, True])
def test_a_ctrl_c_while_the_loop_is_in_a_tasks_context_goes_through(watched: bool) -> None:
    diary = Diary()
    over = threading.Event()

    async def blocks() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(1)

    def add(environ: Any) -> None:
        background_tasks.add_task(blocks)
        background_tasks()

    app = BackgroundTasksMiddleware(app_that(add), hooks=diary if watched else None)
    with pytest.raises(KeyboardInterrupt):
        respond(app)
    over.set()
    assert diary.moments == ["added blocks", "started blocks", "discarded blocks"] * watched


async def fail_later(subject: Subject) -> None:
    await asyncio.sleep(0)
    raise ValueError


def fail(subject: Subject) -> None:
    raise ValueError


class Entering(Hooks):
    """Gives a context manager that refers to the record."""

    def around(self, record: TaskRecord) -> Any:
        @contextmanager
        def manager() -> Iterator[None]:
            yield record.data.setdefault("entered")

        return manager()


def frees_argument(function: Any, hooks: Any) -> bool:
    """True if the argument of a task is freed after the request."""
    subject = Subject()
    freed = subject.freed
    app = app_that(lambda environ: background_tasks.add_task(function, environ.pop("subject")))
    environ = make_environ(subject=subject)
    del subject
    respond(BackgroundTasksMiddleware(app, hooks=hooks), environ)
    environ.clear()
    return freed.wait(TIMEOUT)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("function", [fail, fail_later])
@pytest.mark.parametrize("hooks", [None, Hooks(), Entering()])
def test_the_arguments_of_a_task_that_failed_are_freed_without_a_collection(
    function: Any, hooks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="wsgi_bg")
    assert frees_argument(function, hooks)


class Leaving(Hooks):
    """Gives a context manager that cannot be left."""

    def around(self, record: TaskRecord) -> Any:
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        raise KeyError


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("function", [fail, id])
def test_the_arguments_of_a_task_are_freed_although_a_context_manager_was_not_left(
    function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="wsgi_bg")
    assert frees_argument(function, Leaving())


def test_hooks_may_be_a_tuple() -> None:
    first, second = Diary(), Diary()
    app = app_that(lambda environ: background_tasks.add_task(plain))
    respond(BackgroundTasksMiddleware(app, hooks=(first, second)))
    assert len(first.moments) == len(second.moments) == 3


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_last_hook_is_called_in_the_tasks_context(by_hand: bool) -> None:
    class Tracer(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            span.set(record.task.name)

        def task_finished(self, record: TaskRecord) -> None:
            seen.append(span.get() == record.task.name)

        task_failed = task_finished

    seen: list[bool] = []

    def add_them(environ: Any) -> None:
        for function in (plain, later, failing, failing_later):
            background_tasks.add_task(function)
        if by_hand:
            with pytest.raises(ValueError, match="a bug"):
                background_tasks()

    respond(BackgroundTasksMiddleware(app_that(add_them), hooks=Tracer()))
    assert seen == [True] * 4


def test_the_tasks_of_a_layer_without_hooks_are_called_directly() -> None:
    assert DEFAULTS.calls is DIRECT
    assert not DEFAULTS.is_watched
