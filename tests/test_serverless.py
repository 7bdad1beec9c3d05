"""Handlers whose process is frozen when they return."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from werkzeug.wsgi import ClosingIterator

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    App,
    Clock,
    Environ,
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    run_python,
)
from tests.support.celery import filesystem, messages
from tests.support.celery_shop import note
from tests.support.lambda_process import EVENT, HANDLERS
from tests.support.pages import Page
from tests.support.recording import recording
from tests.support.retry import SOON
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._request import invocation
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.callables import name_of
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners import Statistics
from wsgi_bg.runners.pool import shared_pool
from wsgi_bg.serverless import finish_tasks

WARNING = "background tasks may be frozen in the middle"


PAGE = Page("docs/how-to/serverless.md")
BLOCKS = PAGE.blocks("python")
ROWS = PAGE.rows("AWS Lambda")
CLOSES = 0
"""The column of the table."""


class Frozen:
    """``tests.support.lambda_process``, which is stopped between two invocations."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.lambda_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9"},
        )

    def invoke(self) -> list[str]:
        """Handle a request; return the output until the process was stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), self._process.stdout.read()
        os.set_blocking(self._process.stdout.fileno(), False)
        return (self._process.stdout.read() or b"").decode().splitlines()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def frozen(*arguments: str) -> Iterator[Frozen]:
    process = Frozen(*arguments)
    try:
        yield process
    finally:
        process.end()


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("adapter", HANDLERS)
def test_all_tasks_are_done_when_the_process_is_frozen(adapter: str, runner: str) -> None:
    with frozen(adapter, runner, "decorated") as process:
        for _ in range(2):
            lines = [line for line in process.invoke() if "freed a response" not in line]
            assert lines == ["plain", "async", "plain", "200"]


@pytest.mark.parametrize("adapter", HANDLERS)
def test_a_warning_names_the_decorator_if_tasks_are_frozen(adapter: str) -> None:
    lines: list[str] = []
    with frozen(adapter, "pool") as process:
        while not any(WARNING in line for line in lines):  # its thread may be frozen first
            assert lines.count("200") < 500
            lines += process.invoke()
        lines += process.invoke()
    assert lines.count("plain") + lines.count("async") < 3 * lines.count("200")
    (warning,) = [line for line in lines if WARNING in line]
    assert warning.startswith("WARNING ")
    assert "@wsgi_bg.serverless.finish_tasks" in warning


def invoke(app: App, environ: Environ | None = None) -> Any:
    """Act like an adapter that closes nothing; the response stays open in a cycle."""
    body = app(make_environ() if environ is None else environ, Server().start_response)
    cycle: list[Any] = [body]
    cycle.append(cycle)
    return b"".join(body)


def adding(*functions: Callable[[], Any], **options: Any) -> App:
    def add(environ: Environ) -> None:
        for function in functions:
            background_tasks.add_task(function)

    return BackgroundTasksMiddleware(app_that(add), **options)


@pytest.fixture
def on_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation, "freezes", True)
    monkeypatch.setattr(invocation, "_warned", set())


@pytest.mark.usefixtures("on_lambda")
@pytest.mark.parametrize(
    "environ",
    [
        make_server_environ(),
        make_environ(**{"asgi.scope": {"type": "http"}, "wsgi.multithread": True}),
    ],
    ids=["waitress", "uvicorn"],
)
def test_no_warning_comes_if_a_real_server_runs_inside(environ: Environ, log: Log) -> None:
    Server().run(adding(int), environ)
    assert log.warnings == []


@pytest.mark.usefixtures("on_lambda")
def test_the_warning_comes_once_and_not_under_the_decorator(log: Log) -> None:
    app = adding(int)
    finish_tasks(Server().run)(app, make_environ())
    assert log.warnings == []
    Server().run(app, make_environ())
    Server().run(app, make_environ())
    assert len(log.warnings) == 1


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.usefixtures("no_collection")
def test_an_open_response_needs_no_collection(runner: str) -> None:
    seen: list[str] = []

    async def task() -> None:
        seen.append("async")

    app = adding(lambda: seen.append("plain"), task, runner=runner)
    assert finish_tasks(invoke)(app) == b"ok"
    assert seen == ["plain", "async"]


@pytest.mark.usefixtures("no_collection")
def test_the_label_of_an_open_response_is_not_asked_for(log: Log) -> None:
    """Its environ is not known: the function would raise for an empty one."""
    seen: list[str | None] = []
    app = BackgroundTasksMiddleware(
        app_that(lambda _: background_tasks.add_task(int, "one")),
        request_label=lambda environ: str(environ["PATH_INFO"]),
        on_error=lambda task, exc: seen.append(task.request),
    )
    finish_tasks(invoke)(app)
    assert seen == [None]
    assert log.errors == ["background task builtins.int raised ValueError"]


@pytest.mark.usefixtures("no_collection")
def test_a_handler_that_raises_has_failed_and_its_tasks_run_first() -> None:
    seen: list[str] = []

    def add(environ: Environ) -> None:
        for word in ("success", "error"):
            get_background_tasks(environ).using(run_on=word).add_task(seen.append, word)

    def body() -> Iterator[bytes]:
        yield b"o"
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        finish_tasks(invoke)(BackgroundTasksMiddleware(app_that(add, body=body)))
    assert seen == ["error"]


def test_a_task_that_is_not_done_in_time_is_named_and_goes_on(log: Log, gate: Gate) -> None:
    assert finish_tasks(timeout=0)(invoke)(adding(gate.task, runner="pool")) == b"ok"
    (error,) = log.errors
    assert error.startswith(
        "background task tests.support.Gate.task was not finished when its handler returned, "
        "after a wait of "
    )
    assert error.endswith("seconds: it goes on only if this process does")
    finish_tasks(invoke)(adding(int))  # does not wait for the task of another invocation
    gate.open()
    gate.wait()
    assert len(log.errors) == 1


@pytest.mark.parametrize("make", [make_environ, make_server_environ])
def test_the_limit_holds_for_a_task_that_would_run_in_close(
    make: Callable[[], Environ], log: Log, gate: Gate
) -> None:
    """Under a2wsgi, which Mangum calls, the response is complete before ``close()``."""
    finish_tasks(timeout=0)(Server().run)(adding(gate.task, runner="inline"), make())
    (error,) = log.errors
    assert "Gate.task was not finished when its handler returned" in error
    gate.open()
    gate.wait()
    assert gate.passed == [True]


def fail() -> None:
    raise ValueError


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize(
    ("function", "options"), [(int, {"delay": 60}), (fail, {"retry": SOON})]
)
def test_a_task_that_waits_for_its_time_is_named_and_not_waited_for(
    log: Log, clock: Clock, function: Callable[[], Any], options: Any, runner: Any
) -> None:
    def add(environ: Environ) -> None:
        background_tasks.using(**options).add_task(function)

    app = BackgroundTasksMiddleware(app_that(add), runner=runner)
    assert finish_tasks(invoke)(app) == b"ok"
    (error,) = log.errors
    name = name_of(function)
    assert error.startswith(
        f"background task {name} was not finished when its handler returned"
    )


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_task_whose_time_comes_during_the_invocation_belongs_to_it(
    log: Log, clock: Clock, gate: Gate, runner: Any
) -> None:
    begun = threading.Event()

    def delayed() -> None:
        begun.set()
        gate.task()

    def add(environ: Environ) -> None:
        background_tasks.using(delay=60).add_task(delayed)
        background_tasks.add_task(clock.advance, 60)

    def handler(app: App) -> None:
        Server().run(app, make_server_environ())
        assert begun.wait(TIMEOUT)

    finish_tasks(timeout=0)(handler)(BackgroundTasksMiddleware(app_that(add), runner=runner))
    (error,) = log.errors
    assert "delayed was not finished when its handler returned" in error
    gate.open()
    gate.wait()


@pytest.mark.parametrize("timeout", [None, 1e9])
def test_the_wait_ends_before_lambda_does(log: Log, gate: Gate, timeout: float | None) -> None:
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 400)

    def handler(event: object, context: object) -> None:
        invoke(adding(gate.task, runner="pool"))

    finish_tasks(timeout=timeout)(handler)(None, context=context)
    assert "Gate.task was not finished" in log.errors[0]


def test_a_mock_of_the_context_sets_no_limit(log: Log) -> None:
    def handler(event: object, context: object) -> None:
        invoke(adding(int, runner="pool"))

    finish_tasks(handler)({}, MagicMock())
    assert log.errors == []


def test_a_context_that_raises_sets_no_limit() -> None:
    class Context:
        def get_remaining_time_in_millis(self) -> float:
            raise RuntimeError("mock")

    seen: list[str] = []
    app = adding(lambda: seen.append("ran"), runner="pool")
    assert finish_tasks(lambda event, context: invoke(app))(None, Context()) == b"ok"
    assert seen == ["ran"]


def test_a_wait_that_is_interrupted_names_the_tasks() -> None:
    done = run_python(
        """
        import os, signal, sys, threading
        from tests.test_serverless import adding, finish_tasks, invoke

        def stuck():
            main = threading.main_thread().ident
            while sys._current_frames()[main].f_code.co_name != "wait":
                pass
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            threading.Event().wait()

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            finish_tasks(invoke)(adding(stuck, runner="pool"))
        except KeyboardInterrupt:
            os._exit(3)
        """
    )
    assert (done.returncode, done.stdout) == (3, "")
    # A garbage collection may free the response first, which a WARNING names.
    assert "background task __main__.stuck was not finished when its" in done.stderr


def test_tasks_that_two_threads_submit_at_once_are_waited_for(gate: Gate, log: Log) -> None:
    """A thread submits the freed response while the end of the handler submits it too."""
    requests: list[Any] = []

    class Runner(InlineRunner):
        def submit(self, batch: Batch) -> None:
            if requests:
                requests.pop().end_unclosed(failed=False)
                assert gate.begun.wait(TIMEOUT)
                batch.run()  # too late: the tasks run already
            else:
                shared_pool.submit(batch)

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        requests.append(get_background_tasks(environ))
        background_tasks.add_task(gate.task)
        start_response("200 OK", [])
        return [b""]

    finish_tasks(timeout=0.0)(invoke)(BackgroundTasksMiddleware(app, runner=Runner()))
    (error,) = log.errors
    assert "Gate.task was not finished when its handler returned" in error


def test_an_async_handler_waits_without_blocking_its_loop() -> None:
    seen: list[str] = []

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        answered = threading.Event()

        def task() -> None:
            loop.call_soon_threadsafe(answered.set)
            if answered.wait(TIMEOUT):
                seen.append("the loop runs meanwhile")

        @finish_tasks
        async def handler() -> bytes:
            return bytes(invoke(adding(task, runner="pool")))

        return await handler()

    assert asyncio.run(main()) == b"ok"
    assert seen == ["the loop runs meanwhile"]


def test_a_cancelled_async_handler_names_the_tasks_that_it_does_not_await(
    log: Log, gate: Gate
) -> None:
    """As by ``asyncio.wait_for()``, while the handler waits for the tasks."""

    @finish_tasks
    async def handler() -> None:
        invoke(adding(gate.task, runner="pool"))

    async def main() -> None:
        running = asyncio.ensure_future(handler())
        assert await asyncio.to_thread(gate.begun.wait, TIMEOUT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        (error,) = log.errors
        assert "Gate.task was not finished when its handler returned" in error
        gate.open()

    asyncio.run(main())
    gate.wait()
    assert wsgi_bg.wait(TIMEOUT) == []
    assert len(log.errors) == 1


def test_an_async_handler_that_a_plain_decorator_hides_is_awaited() -> None:
    """Many decorators of handlers are plain functions that return the coroutine."""
    seen: list[str] = []

    async def handler() -> bytes:
        return bytes(invoke(adding(lambda: seen.append("ran"), runner="pool")))

    def hiding() -> Any:
        return handler()

    assert asyncio.run(finish_tasks(hiding)()) == b"ok"
    assert seen == ["ran"]


class Mine:
    """A runner of a user's, with the methods of the protocol only."""

    def submit(self, batch: Batch) -> None:
        threading.Thread(target=batch.run).start()

    def drain(self, timeout: float) -> list[BackgroundTask]:
        return []

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0)


def test_a_runner_of_the_users_own_is_awaited() -> None:
    seen: list[str] = []
    pause = threading.Event()

    def slow() -> None:
        pause.wait(0.05)
        seen.append("done")

    finish_tasks(invoke)(adding(slow, runner=Mine()))
    assert seen == ["done"]


class Broken(Mine):
    """Refuses each batch, but keeps the batch."""

    def __init__(self) -> None:
        self.kept: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self.kept.append(batch)
        raise OSError("no broker")


@pytest.mark.usefixtures("no_collection")  # else another thread may submit the tasks too
def test_tasks_that_a_runner_does_not_take_are_awaited(log: Log, gate: Gate) -> None:
    runner = Broken()

    def run_again() -> None:
        runner.kept[0].run()  # runs nothing and logs that: the shared pool has the tasks
        threading.Timer(0.05, gate.open).start()

    finish_tasks(invoke)(adding(run_again, gate.task, runner=runner))
    assert gate.passed == [True]
    assert len(log.errors) == 1  # the record names the refusal


def test_a_registered_task_is_sent_before_the_handler_returns(tmp_path: Any) -> None:
    broker = filesystem(tmp_path)

    def add(environ: Environ) -> None:
        background_tasks.add_task(note, "path")

    finish_tasks(invoke)(BackgroundTasksMiddleware(app_that(add), runner=broker.runner()))
    assert len(messages(broker)) == 1


def test_a_task_that_another_thread_adds_belongs_to_the_invocation(gate: Gate) -> None:
    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        thread = threading.Thread(target=tasks.add_task, args=(gate.task,))
        thread.start()
        thread.join(TIMEOUT)

    app = BackgroundTasksMiddleware(app_that(add), runner="pool")
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    finish_tasks(invoke)(app)
    assert gate.passed == [True]


def test_an_invocation_neither_ends_nor_awaits_the_requests_of_another(gate: Gate) -> None:
    in_view, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def view(environ: Environ) -> None:
        background_tasks.add_task(gate.task)
        in_view.set()
        assert go_on.wait(TIMEOUT)
        background_tasks.add_task(seen.append, "added after another invocation")

    with ThreadPoolExecutor(1) as executor:
        app = BackgroundTasksMiddleware(app_that(view), runner="pool")
        other = executor.submit(finish_tasks(invoke), app)
        assert in_view.wait(TIMEOUT)
        finish_tasks(invoke)(adding(lambda: seen.append("first"), runner="pool"))
        assert seen == ["first"]
        assert not gate.begun.is_set()
        go_on.set()
        assert gate.begun.wait(TIMEOUT)
        finish_tasks(invoke)(adding(lambda: seen.append("second"), runner="pool"))
        assert not other.done()
        gate.open()
        assert other.result(TIMEOUT) == b"ok"
    assert seen == ["first", "second", "added after another invocation"]


def test_a_handler_does_not_wait_for_tasks_that_a_test_records(log: Log) -> None:
    seen: list[str] = []
    app = adding(lambda: seen.append("plain"), runner="pool")
    with recording("record") as tasks:
        assert finish_tasks(timeout=0.01)(invoke)(app) == b"ok"
        assert not log.errors
        tasks.run()
    assert seen == ["plain"]


def test_the_name_of_the_handler_stays() -> None:
    @finish_tasks(timeout=5)
    def handler(event: object, context: object) -> str:
        """Handles."""
        return f"{event} {context}"

    assert (handler.__name__, handler.__doc__, handler(1, context=2)) == (
        "handler",
        "Handles.",
        "1 2",
    )


@pytest.mark.parametrize(
    ("timeout", "error"), [("5", TypeError), (True, TypeError), (-1, ValueError)]
)
def test_a_timeout_that_is_none_is_refused(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout must be"):
        finish_tasks(timeout=timeout)


@pytest.mark.parametrize("handler", [5, None])
def test_an_object_that_is_no_handler_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"handler must be a function: handler\(event, context"):
        finish_tasks(handler)


def test_a_generator_function_is_refused_since_its_body_runs_later() -> None:
    def handler(event: object, context: object) -> Iterator[bytes]:
        yield b""

    with pytest.raises(TypeError, match="handler must be a function that returns a response"):
        finish_tasks(handler)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_belongs_to_an_invocation_that_is_over(raises: bool) -> None:
    def handler() -> None:
        assert invocation.current() is not None
        if raises:
            raise ValueError

    with suppress(ValueError):
        finish_tasks(handler)()
    assert invocation.current() is None


def test_the_page_has_the_adapters() -> None:
    assert list(ROWS) == list(HANDLERS)


@pytest.fixture
def main_loop() -> Iterator[None]:
    """A loop for Mangum, which otherwise makes a loop and leaves that open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("main_loop")
@pytest.mark.parametrize("adapter", HANDLERS)
def test_the_page_names_the_adapters_that_close_a_response(adapter: str) -> None:
    closed: list[bool] = []

    def app(environ: Environ, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return ClosingIterator([b"ok"], lambda: closed.append(True))

    HANDLERS[adapter](app)(EVENT, None)
    assert closed == [True] * (ROWS[adapter][CLOSES] == "yes")


@pytest.mark.parametrize("block", BLOCKS)
def test_each_python_block_on_lambda_waits_for_tasks(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    pause = threading.Event()

    def slow() -> None:
        pause.wait(0.05)
        seen.append("done")

    def add(environ: Environ) -> None:
        background_tasks.add_task(slow)

    app = BackgroundTasksMiddleware(app_that(add), runner="pool")
    monkeypatch.setitem(sys.modules, "myproject", SimpleNamespace(application=app))
    namespace: dict[str, Any] = {}
    exec(compile(block, PAGE.path, "exec"), namespace)
    assert namespace["handler"](EVENT, None)["statusCode"] == 200
    assert seen == ["done"]


def test_the_handler_waits_for_hooks_of_tasks_that_are_done() -> None:
    seen: list[str] = []
    main = threading.get_ident()
    begun = threading.Event()

    class Slow(Hooks):
        def task_finished(self, record: TaskRecord) -> None:
            begun.set()
            while not is_at_its_end():
                pass
            seen.append("hook")

    def is_at_its_end() -> bool:
        frame: Any = sys._current_frames()[main]
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        return names[0] == "wait" and "finish" in names

    @finish_tasks
    def handler() -> None:
        app = adding(int, runner="pool", hooks=Slow())
        Server().run(app, make_server_environ())
        assert begun.wait(TIMEOUT)

    handler()
    assert seen == ["hook"]


def test_a_context_that_outlives_its_invocation_belongs_to_the_next_one(gate: Gate) -> None:
    contexts: list[Context] = []

    def remember(event: object) -> None:
        contexts.append(copy_context())

    finish_tasks(remember)(None)

    @finish_tasks(timeout=0.0)
    def handler() -> None:
        contexts[0].run(invoke, adding(gate.task, runner="pool"))
        assert next(iter(invocation.running))._left()

    handler()


def test_an_async_handler_whose_executor_is_busy_returns_in_time(gate: Gate, log: Log) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        waits = loop.run_in_executor(None, gate.task)

        @finish_tasks(timeout=0.0)
        async def handler() -> None:
            invoke(adding(int, runner="pool"))

        await handler()
        gate.open()
        await waits

    asyncio.run(main())
    assert gate.passed == [True]
