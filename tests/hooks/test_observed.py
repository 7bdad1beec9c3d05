"""Observed tasks: hooks around calls, hooks for batches, the request's label, log records."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
    wait_until,
)
from tests.support.post import Post, send
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._tasks.task_log import fields as task_fields
from wsgi_bg._tasks.task_log import fields_of
from wsgi_bg.exceptions import AsyncContextError, OptionTypeError
from wsgi_bg.hooks import BatchRecord, Hooks, TaskRecord

inside: ContextVar[str] = ContextVar("inside", default="outside")

seen: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    seen.clear()


def look() -> None:
    seen.append(inside.get())


async def look_async() -> None:
    await asyncio.sleep(0)
    seen.append(inside.get())


def fail() -> None:
    seen.append(inside.get())
    raise ValueError("a bug")


async def fail_async() -> None:
    await asyncio.sleep(0)
    fail()


def request(*functions: Any, hooks: Any, **options: Any) -> None:
    def add(environ: Environ) -> None:
        for function in functions:
            background_tasks.add_task(function)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks, **options))


# Around


class Sync(Hooks):
    """Gives a context manager that notes errors, and would suppress them."""

    @contextmanager
    def around(self, record: TaskRecord) -> Iterator[None]:
        token = inside.set(f"attempt {record.attempt}")
        try:
            yield
        except ValueError:
            seen.append("error")
        finally:
            inside.reset(token)
            seen.append("left")


class Async(Hooks):
    @asynccontextmanager
    async def around(self, record: TaskRecord) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        token = inside.set("async")
        try:
            yield
        except ValueError:
            seen.append("error")
        finally:
            await asyncio.sleep(0)
            inside.reset(token)
            seen.append("left")


@pytest.mark.parametrize("function", [look, look_async, lambda: look_async()])
def test_a_call_is_made_inside_of_the_hooks_context_manager(function: Any) -> None:
    request(function, look_async, hooks=Sync())
    assert seen == ["attempt 1", "left"] * 2


def test_an_async_task_is_called_inside_of_an_async_context_manager() -> None:
    request(look_async, hooks=[Async(), Sync()])
    assert seen == ["attempt 1", "left", "left"]


@pytest.mark.parametrize("function", [fail, fail_async, lambda: fail_async()])
def test_a_context_manager_sees_an_error_and_cannot_suppress_it(function: Any) -> None:
    errors: list[BaseException] = []
    request(function, hooks=Sync(), on_error=lambda task, exc: errors.append(exc))
    assert seen == ["attempt 1", "error", "left"]
    assert [str(exc) for exc in errors] == ["a bug"]


def test_an_async_context_manager_cannot_suppress_an_error() -> None:
    errors: list[BaseException] = []
    request(fail_async, hooks=Async(), on_error=lambda task, exc: errors.append(exc))
    assert seen == ["async", "error", "left"]
    assert [str(exc) for exc in errors] == ["a bug"]


def test_a_plain_task_with_an_async_context_manager_is_not_called() -> None:
    errors: list[BaseException] = []
    request(look, lambda: look_async(), hooks=Async(), on_error=lambda t, e: errors.append(e))
    assert seen == []
    assert [type(exc) for exc in errors] == [AsyncContextError] * 2
    assert "for tests.hooks.test_observed.look: return None, or a context manager" in str(
        errors[0]
    )


@pytest.mark.parametrize("name", ["__enter__", "__aenter__"])
@pytest.mark.parametrize("function", [look, look_async])
def test_a_task_is_not_called_inside_of_an_object_that_cannot_be_left(
    function: Any, name: str
) -> None:
    half = type("Half", (), {name: lambda self: None})()
    hooks = type("Halving", (Hooks,), {"around": lambda self, record: half})()
    errors: list[BaseException] = []
    request(function, hooks=hooks, on_error=lambda task, exc: errors.append(exc))
    assert seen == []
    assert [type(exc) for exc in errors] == [AsyncContextError]


@pytest.mark.parametrize("function", [look, look_async])
@pytest.mark.parametrize("moment", ["around", "enter", "exit"])
def test_an_error_of_the_context_manager_is_one_of_the_task(function: Any, moment: str) -> None:
    class Broken(Hooks):
        def around(self, record: TaskRecord) -> Any:
            if moment == "around":
                raise OSError("no connection")
            return self

        def __enter__(self) -> None:
            if moment == "enter":
                raise OSError("no connection")

        def __exit__(self, *exc_info: object) -> None:
            raise OSError("no connection")

    errors: list[BaseException] = []
    request(function, hooks=Broken(), on_error=lambda task, exc: errors.append(exc))
    assert [str(exc) for exc in errors] == ["no connection"]
    assert seen == ["outside"] * (moment == "exit")


@pytest.mark.parametrize("function", [look, look_async])
def test_around_may_return_none(function: Any) -> None:
    class Picky(Hooks):
        def around(self, record: TaskRecord) -> None:
            seen.append(record.name.rpartition(".")[2])

    request(function, hooks=Picky())
    assert seen == [function.__name__, "outside"]


def test_the_context_manager_is_entered_once_an_attempt() -> None:
    calls: list[None] = []

    def fail_once() -> None:
        look()
        calls.append(None)
        if len(calls) == 1:
            raise ValueError

    def add(environ: Environ) -> None:
        background_tasks.using(retry=Retry(2, first=0.01)).add_task(fail_once)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=Sync()))
    assert wait_until(lambda: len(seen) == 5)
    assert seen == ["attempt 1", "error", "left", "attempt 2", "left"]


def test_the_hooks_context_is_inside_of_the_applications() -> None:
    flask = pytest.importorskip("flask")
    from wsgi_bg.flask import Background

    class Named(Hooks):
        @contextmanager
        def around(self, record: TaskRecord) -> Iterator[None]:
            seen.append(flask.current_app.name)
            yield
            seen.append(flask.current_app.name)

    app = flask.Flask("shop")
    Background(app, hooks=Named())

    @app.get("/")  # type: ignore[untyped-decorator]
    def view() -> str:
        background_tasks.add_task(look)
        background_tasks.add_task(look_async)
        return "ok"

    assert app.test_client().get("/").get_data(as_text=True) == "ok"
    assert wsgi_bg.wait(TIMEOUT) == []
    assert seen == ["shop", "outside", "shop"] * 2


def test_the_base_class_gives_no_context_manager() -> None:
    class Logged(Sync):
        def around(self, record: TaskRecord) -> Any:
            seen.append("around")
            return Hooks.around(self, record)

    request(look, hooks=Logged())
    assert seen == ["around", "outside"]


# Batches


class Batches(Hooks):
    def __init__(self) -> None:
        self.records: list[BatchRecord] = []
        self.moments: list[str] = []
        self.of_batch: dict[BatchRecord, list[str]] = {}
        self.ended = threading.Event()

    def note(self, record: BatchRecord, moment: str) -> None:
        self.of_batch.setdefault(record, []).append(moment)
        self.moments.append(moment)

    def batch_handed_over(self, record: BatchRecord) -> None:
        self.records.append(record)
        self.note(record, "handed over")

    def batch_begun(self, record: BatchRecord) -> None:
        self.note(record, "begun")

    def batch_ended(self, record: BatchRecord) -> None:
        self.note(record, "ended")
        self.ended.set()


@pytest.mark.parametrize("runner", [InlineRunner(), PoolRunner()])
@pytest.mark.parametrize("function", [look, look_async, fail])
def test_a_batch_is_handed_over_begun_and_ended(function: Any, runner: Any) -> None:
    hooks = Batches()
    request(function, look, hooks=hooks, runner=runner)
    assert hooks.ended.wait(TIMEOUT)
    assert hooks.moments == ["handed over", "begun", "ended"]
    [record] = hooks.records
    assert (record.length, record.in_front) == (2, 0)
    assert (record.request, record.runner) == ("GET /", type(runner).__name__)
    assert record.begun_at is not None
    assert record.ended_at is not None
    assert record.handed_over_at <= record.begun_at <= record.ended_at
    assert repr(record) == "<BatchRecord of 2 tasks, 0 in front>"


def test_a_batch_knows_how_many_are_in_front(gate: Gate) -> None:
    hooks = Batches()
    runner = PoolRunner(threads=1)
    for _ in range(3):
        request(gate.task, hooks=hooks, runner=runner)
    gate.open()
    assert runner.drain(TIMEOUT) == []
    assert [record.in_front for record in hooks.records] == [0, 1, 2]


def test_each_batch_of_a_task_that_is_called_again_has_its_moments() -> None:
    hooks = Batches()
    calls: list[None] = []

    def fail_once() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise ValueError

    def add(environ: Environ) -> None:
        again = background_tasks.using(retry=Retry(2, first=0.01), stop_on_error=True)
        again.add_task(fail_once)
        again.add_task(look)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    assert wait_until(lambda: len(hooks.moments) == 6)
    # The second batch may be handed over while the first one ends.
    assert [*hooks.of_batch.values()] == [["handed over", "begun", "ended"]] * 2
    assert [record.length for record in hooks.records] == [2, 2]
    assert [record.request for record in hooks.records] == ["GET /"] * 2


def test_hooks_of_several_layers_watch_a_batch_once() -> None:
    outer, inner = Batches(), Batches()

    def add(environ: Environ) -> None:
        get_background_tasks(environ).add_task(look)

    def add_outside(environ: Environ, start_response: Any) -> Any:
        background_tasks.add_task(look)
        return both(environ, start_response)

    both = BackgroundTasksMiddleware(app_that(add), hooks=[inner, outer])
    respond(BackgroundTasksMiddleware(add_outside, hooks=outer))
    assert outer.moments == inner.moments == ["handed over", "begun", "ended"]


@dataclass
class Unhashable(Hooks):
    """Hooks that are equal if their fields are, and so have no hash."""

    moments: list[str] = field(default_factory=list)

    def batch_ended(self, record: BatchRecord) -> None:
        self.moments.append("ended")

    def task_finished(self, record: TaskRecord) -> None:
        self.moments.append("finished")


def test_hooks_of_several_layers_need_no_hash() -> None:
    outer, inner = Unhashable(), Unhashable()

    def add_outside(environ: Environ, start_response: Any) -> Any:
        background_tasks.add_task(look)
        return both(environ, start_response)

    app = app_that(lambda environ: get_background_tasks(environ).add_task(look))
    both = BackgroundTasksMiddleware(app, hooks=[inner, outer])
    respond(BackgroundTasksMiddleware(add_outside, hooks=outer))
    assert outer.moments == ["finished", "finished", "ended"]
    assert inner.moments == ["finished", "ended"]


def test_hooks_of_a_delayed_task_need_no_hash() -> None:
    hooks = Unhashable()
    app = app_that(lambda environ: background_tasks.using(delay=0.01).add_task(look))
    respond(BackgroundTasksMiddleware(app, hooks=hooks))
    # The second batch may begin while the first one ends.
    assert wait_until(lambda: sorted(hooks.moments) == ["ended", "ended", "finished"])


def test_a_hook_of_a_batch_that_raises_harms_nothing(log: Log) -> None:
    class Broken(Hooks):
        def batch_begun(self, record: BatchRecord) -> None:
            raise OSError("the monitor is away")

    request(look, hooks=Broken())
    assert seen == ["outside"]
    [error] = log.errors
    assert error.endswith("Broken.batch_begun raised for a batch")


def test_a_batch_of_which_a_part_is_sent_has_each_moment_once() -> None:
    hooks = Batches()
    post = Post(local="inline")

    def add(environ: Environ) -> None:
        background_tasks.add_task(send, 1)
        background_tasks.add_task(look)

    respond(BackgroundTasksMiddleware(app_that(add), runner=post, hooks=hooks))
    assert wsgi_bg.wait(TIMEOUT) == []
    assert (post.got, seen) == ([1], ["outside"])
    assert hooks.moments == ["handed over", "begun", "ended"]


# Records


class Last(Hooks):
    """Keeps the records of tasks, and what they say at each moment."""

    def __init__(self) -> None:
        self.records: list[TaskRecord] = []
        self.requests: list[str | None] = []
        self.planned: list[float] = []

    def task_added(self, record: TaskRecord) -> None:
        self.records.append(record)
        self.requests.append(record.request)

    def task_started(self, record: TaskRecord) -> None:
        self.requests.append(record.request)
        assert record.thread == threading.current_thread().name
        assert record.duration is None

    def task_retried(self, record: TaskRecord) -> None:
        assert record.retry_at is not None
        self.planned.append(record.retry_at - time.monotonic())


def test_a_record_knows_id_name_request_runner_and_times() -> None:
    hooks = Last()
    ids: list[str] = []

    def add(environ: Environ) -> None:
        ids.append(background_tasks.add_task(look).id)

    before = time.time()
    environ = make_environ(SCRIPT_NAME="/shop", PATH_INFO="/orders/7", QUERY_STRING="key=1")
    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks), environ)
    after = time.time()
    [record] = hooks.records
    assert [record.id] == ids
    assert record.name == "tests.hooks.test_observed.look"
    assert hooks.requests == ["GET /shop/orders/7"] * 2
    assert record.runner == "InlineRunner"
    assert record.started_time is not None
    assert record.ended_time is not None
    slack = 0.01  # two clocks
    assert before - slack <= record.added_time <= record.started_time + slack
    assert record.started_time - slack <= record.ended_time <= after + slack
    assert record.handed_over_at is not None
    assert record.handed_over_at >= record.added_at
    assert record.wait is not None
    assert record.duration is not None
    record.data[hooks] = "mine"
    assert record.data == {hooks: "mine"}


def test_a_record_has_no_times_before_the_moments() -> None:
    waits: list[Any] = []

    class Early(Hooks):
        def task_added(self, record: TaskRecord) -> None:
            waits.append((record.wait, record.duration, record.started_time, record.thread))
            waits.append(record.handed_over_at)

    request(look, hooks=Early())
    assert waits == [(None, None, None, None), None]


def test_the_wait_counts_from_the_hand_over_and_not_from_add_task(gate: Gate) -> None:
    hooks = Last()

    def add(environ: Environ) -> None:
        background_tasks.add_task(look)
        gate.task()

    app = BackgroundTasksMiddleware(app_that(add), hooks=hooks)
    thread = threading.Thread(target=respond, args=(app,))
    thread.start()
    assert gate.begun.wait(TIMEOUT)
    handed_over_after = time.monotonic()
    gate.open()
    thread.join(TIMEOUT)
    [record] = hooks.records
    assert record.handed_over_at is not None
    assert record.handed_over_at >= handed_over_after > record.added_at


def test_the_moment_of_the_next_attempt_is_known() -> None:
    hooks = Last()
    calls: list[None] = []

    def fail_once() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise ValueError

    def add(environ: Environ) -> None:
        background_tasks.using(retry=Retry(2, first=0.2)).add_task(fail_once)

    respond(BackgroundTasksMiddleware(app_that(add), hooks=hooks))
    assert wait_until(lambda: bool(len(calls) == 2 and hooks.records[0].ended_at))
    assert len(hooks.planned) == 1
    assert 0 < hooks.planned[0] <= 0.4  # the wait has jitter
    assert hooks.records[0].retry_at is None
    assert hooks.records[0].wait is not None
    assert hooks.records[0].wait < 0.2  # without the pause between the attempts


# The request's label


def labels(make: Any = None, **environ: Any) -> list[str | None]:
    """The label of a request as ``on_error`` and the task itself know it."""
    found: list[str | None] = []

    def fails() -> None:
        raise ValueError

    app = app_that(lambda _: background_tasks.add_task(fails))
    app = BackgroundTasksMiddleware(
        app, request_label=make, on_error=lambda task, exc: found.append(task.request)
    )
    Server().run(app, make_server_environ(**environ))
    assert wsgi_bg.wait(TIMEOUT) == []
    return found


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/orders", "GET /orders"),
        ("/caf\u00c3\u00a9", "GET /caf\u00e9"),  # UTF-8 as Latin-1, by PEP 3333
        ("/\u00ff", "GET /\ufffd"),
        ("/a\nERROR b", "GET /a\\nERROR b"),
        ("/" + 600 * "a", "GET /" + 495 * "a"),
        (b"/orders", "GET b'/orders'"),  # illegal, and no reason to raise in a log
    ],
)
def test_the_label_is_method_and_path_in_a_line(path: Any, label: str) -> None:
    assert labels(PATH_INFO=path, QUERY_STRING="token=secret") == [label]


def test_a_function_makes_the_label() -> None:
    def make(environ: Environ) -> str:
        return f"{environ['REQUEST_METHOD']} of\n{environ['HTTP_HOST']}"

    assert labels(make) == ["GET of\\n127.0.0.1"]


class Unreadable(str):
    """A text of a class of the user's own."""

    __slots__ = ()

    def __getitem__(self, place: Any) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "make",
    [lambda environ: environ["none"], lambda environ: None, lambda environ: Unreadable("GET")],
)
def test_a_function_without_a_label_is_logged(make: Any, log: Log) -> None:
    assert labels(make) == [None]
    assert log.errors[0] == "request_label raised"


def test_the_label_of_the_inner_layer_holds() -> None:
    found: list[str | None] = []
    inner = BackgroundTasksMiddleware(
        app_that(lambda _: background_tasks.add_task(fail)),
        request_label=lambda environ: "inner",
        on_error=lambda task, exc: found.append(task.request),
    )
    respond(BackgroundTasksMiddleware(inner, request_label=lambda environ: "outer"))
    assert found == ["inner"]


@pytest.mark.parametrize("options", [{"hooks": Hooks()}, {"slow_after": 60}, {"status": True}])
def test_a_layer_inside_asks_for_no_label_before_the_end_of_a_request_with_tasks(
    options: Any, log: Log
) -> None:
    found: list[str | None] = []
    asked: list[str] = []

    def view(environ: Environ) -> None:
        environ["route"] = "the route"
        if environ["PATH_INFO"] == "/task":
            background_tasks.add_task(fail)

    def make(environ: Environ) -> str:
        asked.append(environ["PATH_INFO"])
        return str(environ["route"])

    app = BackgroundTasksMiddleware(
        BackgroundTasksMiddleware(app_that(view), **options),
        request_label=make,
        on_error=lambda task, exc: found.append(task.request),
    )
    for path in ("/no-task", "/task"):
        respond(app, make_environ(PATH_INFO=path))
    assert asked == ["/task"]
    assert found == ["the route"]
    assert [error for error in log.errors if "request_label" in error] == []


@pytest.mark.usefixtures("no_request_left")
def test_a_signal_in_the_function_for_the_label_goes_through(log: Log) -> None:
    def make(environ: Environ) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labels(make)
    [warning] = log.warnings
    assert warning.endswith("fails was not run: KeyboardInterrupt stopped its worker")


@pytest.mark.parametrize("make", ["GET", fail_async])
def test_a_label_that_is_no_function_is_refused(make: Any) -> None:
    with pytest.raises(OptionTypeError, match="request_label must be a plain function"):
        BackgroundTasksMiddleware(app_that(print), request_label=make)


def test_a_task_without_a_request_has_no_label() -> None:
    assert BackgroundTask(look).request is None


# Log records


def fields(caplog: pytest.LogCaptureFixture, level: int) -> dict[str, Any]:
    [record] = [
        each
        for each in caplog.records
        if each.levelno == level
        # A thread may still log the end of a task of the test before.
        and getattr(each, "wsgi_bg_task", "").startswith(__name__)
    ]
    return {key: value for key, value in vars(record).items() if key.startswith("wsgi_bg_")}


def test_log_records_have_the_fields_of_the_task(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wsgi_bg")
    tasks: list[BackgroundTask] = []

    def add(environ: Environ) -> None:
        tasks.append(background_tasks.add_task(fail))

    respond(BackgroundTasksMiddleware(app_that(add)))
    found = fields(caplog, logging.ERROR)
    assert time.time() - found.pop("wsgi_bg_ended") < TIMEOUT
    assert found == {
        "wsgi_bg_task": "tests.hooks.test_observed.fail",
        "wsgi_bg_id": tasks[0].id,
        "wsgi_bg_request": "GET /",
        "wsgi_bg_runner": "InlineRunner",
        "wsgi_bg_thread": threading.current_thread().name,
        "wsgi_bg_attempt": 1,
        "wsgi_bg_outcome": "failed",
        "wsgi_bg_error": "ValueError",
        "wsgi_bg_reason": None,
        "wsgi_bg_added": None,  # no hook needs the times
        "wsgi_bg_started": None,
        "wsgi_bg_wait": None,
        "wsgi_bg_duration": None,
    }


def test_with_hooks_the_fields_have_times(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wsgi_bg")
    request(fail, hooks=Last())
    found = fields(caplog, logging.ERROR)
    assert found["wsgi_bg_added"] <= found["wsgi_bg_started"] <= found["wsgi_bg_ended"]
    assert found["wsgi_bg_wait"] >= 0
    assert found["wsgi_bg_duration"] >= 0


@pytest.mark.parametrize("function", [look, look_async, fail, fail_async])
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_each_task_has_a_debug_record_of_its_end(
    function: Any, runner: Any, caplog: pytest.LogCaptureFixture, log: Log
) -> None:
    respond(
        BackgroundTasksMiddleware(
            app_that(lambda _: background_tasks.add_task(function)), runner=runner
        )
    )
    assert wsgi_bg.wait(TIMEOUT) == []
    found = fields(caplog, logging.DEBUG)
    outcome = "failed" if "fail" in function.__name__ else "succeeded"
    assert found["wsgi_bg_outcome"] == outcome
    assert found["wsgi_bg_duration"] >= 0
    start = f"background task {__name__}.{function.__name__} has {outcome} "
    assert [each.startswith(start) for each in log.at(logging.DEBUG)].count(True) == 1


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_an_attempt_that_is_repeated_has_its_duration(
    level: int, caplog: pytest.LogCaptureFixture, log: Log
) -> None:
    """Without hooks, which would keep the times."""
    caplog.set_level(level, "wsgi_bg")
    attempts = iter([True, False])

    def fail_once() -> None:
        if next(attempts):
            raise LookupError

    retry = Retry(2, first=0.001)
    respond(
        BackgroundTasksMiddleware(
            app_that(lambda _: background_tasks.using(retry=retry).add_task(fail_once))
        )
    )
    assert wsgi_bg.wait(TIMEOUT) == []
    found = fields(caplog, logging.WARNING)
    assert found["wsgi_bg_outcome"] == "retried"
    if level == logging.DEBUG:
        assert found["wsgi_bg_duration"] >= 0
        assert found["wsgi_bg_started"] <= found["wsgi_bg_ended"]
    else:
        assert found["wsgi_bg_duration"] is found["wsgi_bg_started"] is None


def test_a_task_that_is_not_run_has_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    request(look, hooks=None, run_on="error")
    found = fields(caplog, logging.WARNING)
    assert found["wsgi_bg_outcome"] == "discarded"
    assert found["wsgi_bg_reason"] == "the request succeeded with 200, and run_on is 'error'"


class Times(Hooks):
    """Notes when the attempts have ended, and their waits."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waits: list[float | None] = []

    def task_retried(self, record: TaskRecord) -> None:
        assert record.ended_at is not None
        self.ends.append(record.ended_at)
        self.waits.append(record.wait)

    task_failed = task_retried


class Moments(logging.Handler):
    """Notes when a record comes; a handler that sends a mail takes seconds then."""

    def __init__(self) -> None:
        super().__init__()
        self.of_level: dict[int, list[float]] = {}
        self.durations: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.of_level.setdefault(record.levelno, []).append(time.monotonic())
        self.durations.append(vars(record).get("wsgi_bg_duration", 0.0))


@pytest.mark.parametrize("function", [fail, fail_async])
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_the_times_of_an_attempt_are_those_of_its_call_whatever_the_log_takes(
    function: Any, runner: Any
) -> None:
    moments, times = Moments(), Times()
    logger = logging.getLogger("wsgi_bg")
    logger.addHandler(moments)
    level = logger.level
    logger.setLevel(logging.DEBUG)

    def add(environ: Environ) -> None:
        background_tasks.using(retry=Retry(2, first=0.0)).add_task(function)

    try:
        app = BackgroundTasksMiddleware(app_that(add), hooks=times, runner=runner)
        respond(app)
        assert wait_until(lambda: len(times.ends) == 2)
    finally:
        logger.removeHandler(moments)
        logger.setLevel(level)
    assert times.ends[0] <= moments.of_level[logging.WARNING][0]
    assert times.ends[1] <= moments.of_level[logging.ERROR][0]
    *_, of_error, of_end = moments.durations
    assert of_end == of_error
    assert all(wait is not None for wait in times.waits)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_tasks_that_are_run_by_hand_have_records_of_their_ends_too(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "wsgi_bg")
    tasks = BackgroundTasks()
    for function in (look, fail, fail_async):
        tasks.add_task(function)
    with pytest.raises(ValueError, match="a bug"):
        tasks()
    ends = [
        (vars(each)["wsgi_bg_task"].rpartition(".")[2], vars(each)["wsgi_bg_outcome"])
        for each in caplog.records
        if each.levelno == logging.DEBUG and __name__ in each.getMessage()
    ]
    all_ends = [("look", "succeeded"), ("fail", "failed"), ("fail_async", "failed")]
    assert ends == all_ends * (level == logging.DEBUG)


def test_a_record_about_a_task_that_is_no_object_has_all_fields_too() -> None:
    assert fields_of("name", "id").keys() == task_fields(BackgroundTask(look)).keys()


def test_each_context_is_left_if_leaving_another_raises() -> None:
    class Broken(Hooks):
        @contextmanager
        def around(self, record: TaskRecord) -> Iterator[None]:
            yield
            raise OSError("not saved")

    errors: list[BaseException] = []
    request(look, hooks=[Sync(), Broken()], on_error=lambda task, exc: errors.append(exc))
    assert seen == ["attempt 1", "left"]
    assert [str(exc) for exc in errors] == ["not saved"]
