"""``slow_after``: a WARNING with the stack of a task that still runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import TIMEOUT, Gate, app_that, make_environ, respond, run_python, wait_until
from wsgi_bg import BackgroundTasksMiddleware, Retry, background_tasks, portal
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg.exceptions import OptionError
from wsgi_bg.hooks import Hooks, TaskRecord, slow


def request(*functions: Any, slow_after: float = 0.02, **options: Any) -> None:
    def add(environ: object) -> None:
        for function in functions:
            background_tasks.add_task(function)

    app = app_that(add)
    respond(BackgroundTasksMiddleware(app, runner="pool", slow_after=slow_after, **options))


def warning(log: Log) -> str:
    assert wait_until(lambda: bool(log.warnings))
    assert len(log.warnings) == 1, log.warnings
    return log.warnings[0]


def open_gate(gate: Gate) -> None:
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []


def test_a_plain_task_is_shown_with_the_stack_of_its_thread(gate: Gate, log: Log) -> None:
    def slow() -> None:
        gate.task()

    request(slow)
    message = warning(log)
    assert "<locals>.slow still runs after 0.02 seconds:\n" in message
    lines = message.splitlines()
    assert lines[1].endswith(", in slow")  # and no frame of the package
    assert lines[2].strip() == "gate.task()"
    open_gate(gate)
    assert len(log.warnings) == 1


class Waiting:
    """Async functions that wait until the test goes on."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    async def innermost(self) -> None:
        self._event = asyncio.Event()
        await self._event.wait()

    async def middle(self) -> None:
        await self.innermost()

    def go_on(self) -> None:
        assert wait_until(lambda: self._event is not None)
        event: Any = self._event
        portal().call(event.set)
        assert wsgi_bg.wait(TIMEOUT) == []


class Around(Hooks):
    @contextmanager
    def around(self, record: TaskRecord) -> Iterator[None]:
        yield


@pytest.mark.parametrize("hooks", [None, Around()])
def test_a_coroutine_is_shown_with_all_that_it_waits_for(log: Log, hooks: Any) -> None:
    waiting = Waiting()
    request(waiting.middle, hooks=hooks)
    message = warning(log)
    assert wait_until(lambda: waiting._event is not None)
    places = [line.partition(", in ")[2] for line in message.splitlines() if ", in " in line]
    assert places[:2] == ["middle", "innermost"]
    waiting.go_on()


@pytest.mark.parametrize("hooks", [None, Around()])
def test_a_function_that_returned_a_coroutine_is_shown_as_one(log: Log, hooks: Any) -> None:
    waiting = Waiting()
    request(lambda: waiting.middle(), hooks=hooks)
    assert ", in middle" in warning(log)
    waiting.go_on()


class Session:
    """An async context manager that waits when a call begins or ends."""

    def __init__(self, enter: Any, leave: Any) -> None:
        self._enter, self._leave = enter, leave

    async def __aenter__(self) -> None:
        await self._enter()

    async def __aexit__(self, *error: object) -> None:
        await self._leave()


@asynccontextmanager
async def session(enter: Any, leave: Any) -> AsyncIterator[None]:
    await enter()
    yield
    await leave()


async def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda wait: Session(wait, nothing), ["__aenter__", "middle", "innermost"]),
        (lambda wait: Session(nothing, wait), ["__aexit__", "middle", "innermost"]),
        (lambda wait: session(wait, nothing), ["__aenter__", "session", "middle", "innermost"]),
        (lambda wait: session(nothing, wait), ["__aexit__", "session", "middle", "innermost"]),
    ],
)
def test_an_async_hook_around_the_call_is_shown_while_it_waits(
    make: Any, names: list[str], log: Log
) -> None:
    class Sessions(Hooks):
        def around(self, record: TaskRecord) -> Any:
            return make(waiting.middle)

    waiting = Waiting()
    request(nothing, hooks=Sessions())
    message = warning(log)
    places = [line.partition(", in ")[2] for line in message.splitlines() if ", in " in line]
    assert places[: len(names)] == names
    waiting.go_on()


def test_the_task_is_shown_inside_of_an_async_hook(log: Log) -> None:
    class Sessions(Hooks):
        def around(self, record: TaskRecord) -> Any:
            return session(nothing, nothing)

    waiting = Waiting()
    request(waiting.middle, hooks=Sessions())
    message = warning(log)
    places = [line.partition(", in ")[2] for line in message.splitlines() if ", in " in line]
    assert places[:2] == ["middle", "innermost"]
    waiting.go_on()


def test_a_coroutine_that_computes_is_shown_with_its_thread(gate: Gate, log: Log) -> None:
    async def computes() -> None:
        gate.task()

    request(computes)
    lines = warning(log).splitlines()
    assert lines[1].endswith(", in computes")
    assert any(line.endswith(", in task") for line in lines)
    open_gate(gate)


def test_a_coroutine_of_a_class_of_its_own_has_no_stack(log: Log) -> None:
    ended = threading.Event()
    begun = threading.Event()

    class Own:
        def __await__(self) -> Any:
            begun.set()
            while not ended.is_set():
                yield from asyncio.sleep(0.001).__await__()

    request(lambda: Own())
    assert begun.wait(TIMEOUT)
    assert "still runs after 0.02 seconds:" in warning(log)
    ended.set()
    assert wsgi_bg.wait(TIMEOUT) == []


def _raise(own: object, name: str) -> Any:
    raise RuntimeError(name)


@pytest.mark.parametrize("attribute_of", [_raise, lambda own, name: own])
def test_an_awaitable_with_any_attribute_does_not_end_the_watch(
    attribute_of: Any, gate: Gate, log: Log
) -> None:
    class Own:
        __getattr__ = attribute_of

        def __await__(self) -> Any:
            gate.task()
            yield from asyncio.sleep(0).__await__()

    request(lambda: Own(), gate.task)
    assert "still runs after 0.02 seconds:" in warning(log)
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []


def test_quick_tasks_are_not_shown(gate: Gate, log: Log) -> None:
    def fails() -> None:
        raise ValueError

    request(lambda: None, fails, slow_after=30)
    request(gate.task)  # a later task, whose time is up earlier
    assert "Gate.task still runs" in warning(log)
    open_gate(gate)
    assert len(log.warnings) == 1


def test_a_task_that_is_called_again_or_discarded_is_watched_no_longer(
    gate: Gate, log: Log
) -> None:
    def fails() -> None:
        raise ValueError

    def add(environ: object) -> None:
        background_tasks.using(retry=Retry(2, first=0.0)).add_task(fails)
        background_tasks.using(run_on="error").add_task(fails)

    # Longer than a call that fails may take on a busy machine.
    respond(BackgroundTasksMiddleware(app_that(add), runner="pool", slow_after=0.5))
    assert wait_until(lambda: bool(log.errors))
    request(gate.task, slow_after=0.5)
    assert wait_until(lambda: "still runs" in "".join(log.warnings))
    open_gate(gate)
    assert [each for each in log.warnings if "still runs" in each] == [
        each for each in log.warnings if "Gate.task still runs" in each
    ]


def test_each_task_has_a_time_of_its_own(log: Log) -> None:
    first, second = Gate(), Gate()
    app = BackgroundTasksMiddleware(
        app_that(lambda environ: background_tasks.add_task(environ["gate"].task)),
        runner="pool",
        slow_after=0.3,
    )
    respond(app, make_environ(gate=first))
    # The thread waits for the first to be slow, and needs no wake for the second.
    assert wait_until(lambda: slow._watches.get()._next_look < math.inf)
    respond(app, make_environ(gate=second))
    assert wait_until(lambda: len(log.warnings) == 2)
    first.open()
    second.open()
    assert wsgi_bg.wait(TIMEOUT) == []


def test_all_middlewares_share_a_thread(log: Log) -> None:
    first, second = Gate(), Gate()
    before = slow_threads()
    request(first.task, slow_after=600.0)
    assert wait_until(lambda: slow._watches.get()._next_look < math.inf)
    request(second.task, slow_after=0.02)  # slow before the thread would look again
    assert "after 0.02 seconds" in warning(log)
    assert len(slow_threads() - before) <= 1
    first.open()
    open_gate(second)


def slow_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "wsgi_bg-slow"}


def test_the_option_of_an_outer_layer_holds_beside_hooks_of_an_inner_layer(
    gate: Gate, log: Log
) -> None:
    inner = BackgroundTasksMiddleware(
        app_that(lambda _: background_tasks.add_task(gate.task)), hooks=Around()
    )
    respond(BackgroundTasksMiddleware(inner, runner="pool", slow_after=0.02))
    assert "still runs" in warning(log)
    open_gate(gate)


def test_the_record_names_the_request(
    gate: Gate, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    request(gate.task)
    warning(log)
    [record] = [vars(each) for each in caplog.records if each.levelname == "WARNING"]
    assert record["wsgi_bg_request"] == "GET /"
    assert record["wsgi_bg_outcome"] == "running"
    assert record["wsgi_bg_duration"] >= 0.02
    open_gate(gate)


request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


@pytest.mark.parametrize(
    ("make", "thread"),
    [
        (lambda waiting, gate: gate.task, "wsgi_bg-pool-"),
        (lambda waiting, gate: waiting.middle, "wsgi_bg-portal"),
        (lambda waiting, gate: lambda: waiting.middle(), "wsgi_bg-portal"),
    ],
)
def test_the_record_is_made_in_the_context_of_the_task_and_names_its_thread(
    make: Any, thread: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = Waiting()
    seen: list[tuple[logging.LogRecord, str | None]] = []

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record, request_id.get()))

    def add(environ: object) -> None:
        request_id.set("a1")
        background_tasks.add_task(make(waiting, gate))

    handler = Seen(logging.WARNING)
    logger = logging.getLogger("wsgi_bg")
    logger.addHandler(handler)
    token = request_id.set(None)
    try:
        app = BackgroundTasksMiddleware(app_that(add), runner="pool", slow_after=0.02)
        respond(app)
        assert wait_until(lambda: bool(seen))
    finally:
        logger.removeHandler(handler)
        request_id.reset(token)
        gate.open()
        if thread == "wsgi_bg-portal":
            waiting.go_on()
        assert wsgi_bg.wait(TIMEOUT) == []
    [(record, id_in_context)] = seen
    assert id_in_context == "a1"
    assert vars(record)["wsgi_bg_thread"].startswith(thread)
    assert vars(record)["wsgi_bg_ended"] is None


@pytest.mark.parametrize("hooks", [None, Around()])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_watch_keeps_no_request_alive_that_has_ended(
    gate: Gate, log: Log, hooks: Any, is_async: bool
) -> None:
    async def task() -> None:
        gate.task()

    class Value:
        pass

    def add(environ: object) -> None:
        value = Value()
        values.append(weakref.ref(value))
        held.set(value)
        background_tasks.add_task(task if is_async else gate.task)

    values: list[weakref.ref[Value]] = []
    held: ContextVar[Value] = ContextVar("held")
    app = BackgroundTasksMiddleware(app_that(add), runner="pool", slow_after=0.02, hooks=hooks)
    gc.disable()
    try:
        copy_context().run(respond, app)
        warning(log)
        open_gate(gate)
        assert wait_until(lambda: values[0]() is None)
    finally:
        gc.enable()


def test_without_memory_for_a_thread_the_next_task_tries_again(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, log: Log
) -> None:
    from wsgi_bg._process.greenlets import start_daemon

    fails = [True]

    def start_later(*args: Any) -> Any:
        if fails:
            fails.clear()
            raise RuntimeError("can't start new thread")
        return start_daemon(*args)

    monkeypatch.setattr(slow, "start_daemon", start_later)
    monkeypatch.setattr(slow, "_watches", PerProcess(slow._Watch))
    request(gate.task)
    assert "still runs" in warning(log)
    assert not fails
    assert log.errors == []
    open_gate(gate)


@pytest.mark.parametrize("given", [-1, "1", float("nan"), float("inf"), 1e12, True])
def test_a_wrong_number_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="slow_after"):
        BackgroundTasksMiddleware(app_that(print), slow_after=given)


def test_a_task_that_ends_while_its_stack_is_read_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, log: Log
) -> None:
    read = threading.Event()

    def stack_of(record: TaskRecord) -> str:
        open_gate(gate)
        read.set()
        return "too late"

    monkeypatch.setattr("wsgi_bg.hooks.slow._stack_of", stack_of)
    request(gate.task)
    assert read.wait(TIMEOUT)
    monkeypatch.undo()
    late = Gate()
    request(late.task)  # the same thread has looked again
    assert wait_until(lambda: bool(log.warnings))
    open_gate(late)
    assert "too late" not in log.warnings[0]


GEVENT = """
from gevent import monkey
monkey.patch_all()
import logging, sys, time
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from tests.hooks.test_slow import *

def slow():
    time.sleep(0.2)

request(slow)
assert wsgi_bg.wait(TIMEOUT) == []
"""


def test_under_gevent_the_record_says_that_there_is_no_stack() -> None:
    pytest.importorskip("gevent")
    done = run_python(GEVENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "background task __main__.slow still runs after 0.02 seconds:",
        "(the stack is not known under gevent)",
    ]


def test_under_gevent_the_thread_of_the_loop_has_its_name() -> None:
    pytest.importorskip("gevent")
    code = GEVENT.replace("def slow", "async def slow").replace("message", "wsgi_bg_thread")
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["wsgi_bg-portal"]


def test_the_module_is_not_imported_without_the_option() -> None:
    done = run_python("import sys, wsgi_bg; assert 'wsgi_bg.hooks.slow' not in sys.modules")
    assert done.returncode == 0, done.stderr
