"""Exactly once, at whatever bytecode a signal handler raises (rule 7).

A tracer raises one exception in each request: first at the first line or bytecode of the
package that runs after the view has returned, in the next request at the second, until a
request has no such line or bytecode. Each task must have run to its end or be named in the log.
"""

from __future__ import annotations

import asyncio
import ctypes
import dis
import gc
import itertools
import logging
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any

import pytest
from flask import Flask

import wsgi_bg
from tests.support import TIMEOUT, Environ, Server, make_server_environ
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    get_background_tasks,
)
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks
from wsgi_bg.outbox import Message, OutboxRunner
from wsgi_bg.runners.ledger import batches_under_way

pytestmark = [
    pytest.mark.usefixtures("alone_on_3_11", "no_request_left", "no_handled_error_left"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def alone_on_3_11(request: pytest.FixtureRequest) -> None:
    """Skip a test of this module on Python 3.11 if the process runs other modules too.

    CPython 3.11.7 may crash under a tracer then: some other test, together with exceptions
    from the tracer, leaves the interpreter with a trace function that is freed. A process
    that runs this module alone has crashed in the slow cases only.
    """
    others = {item.path for item in request.session.items} - {request.path}
    if sys.version_info < (3, 12) and others:
        pytest.skip(
            "CPython 3.11 may crash here: run tests/request/test_interrupted.py by itself"
        )


@pytest.fixture
def no_handled_error_left(request: pytest.FixtureRequest) -> None:
    """Tell CPython after the test that no error is handled any more.

    An exception at a bytecode that ends an except block leaves the error of the block behind:
    errors of later tests of the process would have it as their context. (A finalizer and no
    generator, which has a record of handled errors of its own.)
    """

    def forget() -> None:
        ctypes.pythonapi.PyErr_SetHandledException(ctypes.py_object(None))

    request.addfinalizer(forget)  # noqa: PT021


PACKAGE = os.path.dirname(wsgi_bg.__file__) + os.sep

SETTLING = 0.5
"""How long a request's tasks are waited for before the next request, in seconds.

The verdict does not depend on that: the tasks of all requests are looked at in the end.
"""

MAX_LATE = 10
"""A case ends when the tasks of so many requests have not come to their end in time."""

LENGTH = [("Content-Length", "4")]

Ran = Counter[str]


class TimeLimit(Exception):  # noqa: N818
    """An ordinary exception, such as a handler of SIGALRM raises."""


class UsualLimit(IndexError, KeyError, RuntimeError, ValueError):  # noqa: N818
    """An exception of several classes, which the package catches for reasons of its own."""


def exit_for(number: int, frame: object) -> None:
    sys.exit(1)


def limit_for(number: int, frame: object) -> None:
    raise TimeLimit


def usual_limit_for(number: int, frame: object) -> None:
    raise UsualLimit


@contextmanager
def handler_of(kind: str) -> Iterator[Callable[[], object]]:
    """Yield a function that raises ``kind`` by a signal on the main thread."""
    handlers: dict[str, Any] = {
        "KeyboardInterrupt": signal.default_int_handler,
        "SystemExit": exit_for,
        "TimeLimit": limit_for,
        "UsualLimit": usual_limit_for,
    }
    previous = signal.signal(signal.SIGUSR1, handlers[kind])
    try:
        yield lambda: signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)


class Tracer:
    """Calls ``interrupt()`` at the ``n``-th line or bytecode of the package, on this thread."""

    def __init__(self, n: int, interrupt: Callable[[], object]) -> None:
        self._left = n
        self._interrupt = interrupt
        self.place = ""

    def start(self) -> None:
        """Trace from here on, including the package's functions further up on the stack."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if is_ours(frame.f_code):
                frame.f_trace_opcodes = True
                frame.f_trace = self._count
            frame = frame.f_back
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if not is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        return self._count

    def _count(self, frame: FrameType, event: str, argument: object) -> Any:
        if event in ("line", "opcode"):
            self._left -= 1
            if self._left == 0:
                self.place = place_of(frame, event)
                self._interrupt()
        return self._count


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE)


def place_of(frame: FrameType, event: str) -> str:
    code = frame.f_code
    name = dis.opname[code.co_code[frame.f_lasti]] if event == "opcode" else "line"
    file = code.co_filename.removeprefix(PACKAGE)
    return f"{file}:{frame.f_lineno} {code.co_name} {name}"


class Names(logging.Handler):
    """The names of tasks in warnings and errors, except of tasks that are still to run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: Ran = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.read(record.getMessage())

    def read(self, message: str) -> None:
        if "which run in this process" not in message and "is called again" not in message:
            self.said.update(re.findall(r"task_\d+_\d", message))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """Collect the names of logged tasks; errors of finalizers are dropped, as in a server."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    logger = logging.getLogger("wsgi_bg")
    names = Names()
    logger.addHandler(names)
    monkeypatch.setattr(logger, "propagate", False)
    yield names
    logger.removeHandler(names)


def make_task(name: str, is_async: bool, ran: Ran) -> Callable[[], Any]:
    def task() -> None:
        ran[name] += 1

    async def async_task() -> None:
        await asyncio.sleep(0)
        task()

    made: Any = async_task if is_async else task
    made.__name__ = made.__qualname__ = name
    return made  # type: ignore[no-any-return]


KINDS = {
    "plain": (False, False, False),
    "async": (True, True, True),
    "mixed": (False, True, False),
}
"""Which of the three tasks of a request are async."""


class View:
    """Adds the tasks of each request and answers in one of :data:`RESPONSES`."""

    def __init__(self, response: str, tasks: str) -> None:
        self._response = response
        self._kinds = KINDS[tasks]
        self.ran: Ran = Counter()
        self.tracer: Tracer | None = None
        self.number = 0

    def names_of(self, number: int) -> list[str]:
        return [f"task_{number}_{index}" for index in range(len(self._kinds))]

    def add(self, environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        if self._response == "raises":  # the first task must not run then
            tasks = tasks.using(run_on="always")
        for name, is_async in zip(self.names_of(self.number), self._kinds, strict=True):
            batch = get_background_tasks(environ) if name.endswith("_0") else tasks
            batch.add_task(make_task(name, is_async, self.ran))

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        self.add(environ)
        return self.answer(start_response)

    def answer(self, start_response: Any) -> Iterable[bytes]:
        if self._response == "raises":
            raise ValueError("the view's own")
        start_response("200 OK", [] if self._response == "stream" else LENGTH)
        if self._response in ("list", "unclosed"):
            return [b"okok"]
        return (chunk for chunk in (b"ok", b"ok"))

    def traced(self, app: Any) -> Any:
        """Wrap ``app``: the tracer starts as soon as ``app`` has returned or raised."""

        def wrapped(environ: Environ, start_response: Any) -> Any:
            try:
                return app(environ, start_response)
            finally:
                if self.tracer is not None:
                    self.tracer.start()

        return wrapped


class Discarding(View):
    """Adds tasks that do not run, since each request succeeds."""

    def add(self, environ: Environ) -> None:
        tasks = get_background_tasks(environ).using(run_on="error")
        for name, is_async in zip(self.names_of(self.number), self._kinds, strict=True):
            tasks.add_task(make_task(name, is_async, self.ran))


class PuttingOff(View):
    """Adds tasks that wait for a short time, or fail once and are called again.

    :param tasks: a word of :data:`PUT_OFF`.
    """

    def __init__(self, response: str, tasks: str) -> None:
        super().__init__(response, "mixed")
        self._put_off = PUT_OFF[tasks]
        self._failed: set[str] = set()

    def add(self, environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        for index, name in enumerate(self.names_of(self.number)):
            made = make_task(name, index == 1, self.ran)
            options = self._put_off[index]
            if "retry" in options:
                made = self.failing_once(name, made)
            tasks.using(**options).add_task(made)

    def failing_once(self, name: str, task: Callable[[], Any]) -> Callable[[], Any]:
        def fail() -> Any:
            if name not in self._failed:
                self._failed.add(name)
                raise ValueError("the task's own")
            return task()

        fail.__name__ = fail.__qualname__ = name
        return fail


RETRIED: dict[str, Any] = {"retry": Retry(first=0)}
DELAYED: dict[str, Any] = {"delay": 0.001}
PUT_OFF: dict[str, tuple[dict[str, Any], ...]] = {
    "retried": ({}, RETRIED, RETRIED),
    "delayed": (DELAYED, DELAYED, {}),
    "held": ({**RETRIED, "stop_on_error": True}, {}, DELAYED),
}
"""The options of the three tasks of a request."""

RESPONSES = ("list", "generator", "stream", "raises", "unclosed")


def serve(app: Any, environ: Environ, *, close: bool) -> None:
    """The server's side; the response is freed when this function has returned or raised."""
    body = app(environ, Server().start_response)
    try:
        for _ in body:
            pass
    finally:
        if close and hasattr(body, "close"):
            body.close()


class Case:
    """Requests of the same kind, each interrupted at the next place."""

    def __init__(self, view: View, app: Any, names: Names, *, close: bool) -> None:
        self._view = view
        self._app = app
        self._names = names
        self._close = close
        self._places: dict[int, str] = {}
        self.is_complete = False

    def interrupt_everywhere(self, kinds: list[str]) -> None:
        """Make a request for each place; the kinds of exception take turns."""
        late = number = 0
        while late < MAX_LATE:
            number += 1
            kind = kinds[number % len(kinds)]
            tracer = self._interrupt_at(number, kind)
            if not tracer.place:
                self.is_complete = True
                return
            self._places[number] = f"{number}. {kind} at {tracer.place}"
            late += not self._is_settled(number, SETTLING)

    def _interrupt_at(self, number: int, kind: str) -> Tracer:
        self._view.number = number
        previous = sys.gettrace()  # coverage's
        environ = make_server_environ()
        with handler_of(kind) as interrupt:
            self._view.tracer = tracer = Tracer(number, interrupt)
            # ValueError: the view's own. Each of these may leave the package, or be swallowed.
            try:
                with suppress(KeyboardInterrupt, SystemExit, TimeLimit, ValueError):
                    try:
                        serve(self._app, environ, close=self._close)
                    finally:
                        environ.clear()
            finally:
                sys.settrace(previous)
        return tracer

    def ends_of(self, name: str) -> int:
        """Number of ends of a task: the task ran, or the log names the task."""
        return self._view.ran[name] + self._names.said[name]

    def _is_settled(self, number: int, timeout: float) -> bool:
        pause, names = threading.Event(), self._view.names_of(number)
        for turn in range(int(timeout / 0.001)):
            if all(self.ends_of(name) for name in names):
                return True
            if turn == 50:
                gc.collect()  # a cycle may hold the response
            pause.wait(0.001)
        return False

    def work_still(self) -> bool:
        """True if a request without an interruption still runs its tasks."""
        number = len(self._places) + 1000
        self._view.tracer, self._view.number = None, number
        with suppress(ValueError):
            serve(self._app, make_server_environ(), close=True)
        return self._is_settled(number, TIMEOUT) and not self.faults([number])

    def faults(self, numbers: Iterable[int] | None = None) -> list[str]:
        """Requests with a task that did not end exactly once, each with its interruption."""
        return [
            f"{self._places.get(number)}: ran {[self._view.ran[name] for name in names]}, "
            f"named {[self._names.said[name] for name in names]}"
            for number in (self._places if numbers is None else numbers)
            for names in [self._view.names_of(number)]
            if any(self.ends_of(name) != 1 for name in names)
        ]

    @property
    def count(self) -> int:
        return len(self._places)


class Sending(OutboxRunner):
    """Calls each task on a thread of the outbox, in place of an engine's worker."""

    def message(self, task: BackgroundTask) -> Message | None:
        return Message(task.name, task.func)

    def connect(self) -> Calling:
        return Calling()


class Calling:
    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        for index, message in enumerate(messages):
            message.data()
            confirmed(index)

    def is_lost(self, exc: Exception) -> bool:
        return False

    def close(self) -> None:
        pass


RUNNERS: dict[str, Callable[[], Any]] = {
    "inline": InlineRunner,
    "pool": lambda: PoolRunner(threads=2),
    "shared pool": lambda: "pool",
    "outbox": Sending,
}


class Watch(Hooks):
    """Hooks that have an effect."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def task_added(self, record: Any) -> None:
        self.seen.append("added")

    def task_started(self, record: Any) -> None:
        self.seen.append("started")

    def task_finished(self, record: Any) -> None:
        self.seen.append("finished")

    def task_discarded(self, record: Any) -> None:
        self.seen.append("discarded")


def flask_app(view: View, runner: Any) -> Any:
    flask = Flask("shop")
    flask.config["PROPAGATE_EXCEPTIONS"] = True

    @flask.route("/")
    def index() -> Any:
        from flask import Response, request

        view.add(request.environ)
        answered: list[Any] = []
        body = view.answer(lambda *args: answered.extend(args))
        return Response(body, headers=answered[1])

    flask.wsgi_app = view.traced(flask.wsgi_app)  # type: ignore[method-assign]
    Background(flask, runner=runner)
    return flask.wsgi_app


def check(
    names: Names,
    *,
    response: str,
    runner: str,
    tasks: str,
    kinds: list[str],
    layer: str,
    view_type: type[View] = View,
) -> None:
    view = view_type(response, tasks)
    own = RUNNERS[runner]()
    if layer == "flask":
        app = flask_app(view, own)
    else:
        hooks = Watch() if layer == "hooks" else None
        status = layer == "status"
        app = BackgroundTasksMiddleware(
            view.traced(view), runner=own, hooks=hooks, status=status
        )
    case = Case(view, app, names, close=response != "unclosed")
    case.interrupt_everywhere(kinds)
    assert case.work_still()  # behind all responses in the queue for freed responses
    if not isinstance(own, str):
        assert own.drain(TIMEOUT) == []
        assert not batches_under_way()  # the end of the process would wait for them
    faults = case.faults()
    print(f"{case.count} places, {len(faults)} faults")
    assert not faults, "\n".join(faults[:20])
    assert case.is_complete
    assert case.count > 20


ORDERS = {
    "first": ["KeyboardInterrupt", "SystemExit", "TimeLimit"],
    "second": ["SystemExit", "TimeLimit", "KeyboardInterrupt"],
    "third": ["TimeLimit", "KeyboardInterrupt", "SystemExit"],
}
"""Which kind of exception comes at which place: with all three, each comes at each."""

USUAL = {
    "middleware-inline-list-mixed-first",
    "middleware-inline-list-plain-second",
    "middleware-inline-raises-mixed-third",
    "middleware-inline-unclosed-mixed-second",
    "middleware-pool-generator-async-first",
    "middleware-pool-list-mixed-third",
    "middleware-pool-unclosed-plain-first",
    "middleware-shared pool-stream-mixed-second",
    "hooks-inline-generator-mixed-third",
    "flask-inline-list-mixed-first",
    "status-inline-list-mixed-second",
    "middleware-outbox-list-plain-first",
}
"""The cases that are not slow together; they have each value of each parameter."""


def cases() -> Iterator[Any]:
    own, layers = ("inline", "pool"), ("hooks", "flask", "status")
    every = itertools.product(("middleware",), own, RESPONSES, KINDS, ORDERS)
    shared = itertools.product(("middleware",), ("shared pool",), RESPONSES, ("mixed",), ORDERS)
    others = itertools.product(layers, own, RESPONSES, ("mixed",), ORDERS)
    sent = itertools.product(
        ("middleware", "hooks"), ("outbox",), RESPONSES, ("plain",), ORDERS
    )
    for case in itertools.chain(every, shared, others, sent):
        name = "-".join(case)
        yield pytest.param(*case, id=name, marks=() if name in USUAL else pytest.mark.slow)


@pytest.mark.parametrize(("layer", "runner", "response", "tasks", "order"), [*cases()])
def test_each_task_runs_or_is_named_once_wherever_an_exception_comes(
    names: Names, layer: str, runner: str, response: str, tasks: str, order: str
) -> None:
    kinds = ORDERS[order]
    check(names, layer=layer, response=response, runner=runner, tasks=tasks, kinds=kinds)


@pytest.mark.parametrize(
    ("layer", "runner", "response", "tasks"),
    [
        ("middleware", "inline", "list", "mixed"),
        ("middleware", "pool", "list", "plain"),
        pytest.param("hooks", "pool", "raises", "mixed", marks=pytest.mark.slow),
        pytest.param("hooks", "inline", "generator", "async", marks=pytest.mark.slow),
        pytest.param("flask", "inline", "list", "mixed", marks=pytest.mark.slow),
        pytest.param("middleware", "shared pool", "unclosed", "plain", marks=pytest.mark.slow),
    ],
)
def test_each_task_runs_or_is_named_once_although_the_package_catches_such_exceptions(
    names: Names, layer: str, runner: str, response: str, tasks: str
) -> None:
    kinds = ["UsualLimit"]
    check(names, layer=layer, response=response, runner=runner, tasks=tasks, kinds=kinds)


def cases_put_off() -> Iterator[Any]:
    usual = {"middleware-list-delayed-second", "hooks-list-held-third"}
    if sys.version_info < (3, 12):  # later Pythons trace slowly: it takes two minutes there
        usual.add("middleware-list-retried-first")
    every = itertools.product(("middleware", "hooks"), ("list", "generator"), PUT_OFF, ORDERS)
    for case in every:
        name = "-".join(case)
        yield pytest.param(*case, id=name, marks=() if name in usual else pytest.mark.slow)


@pytest.mark.parametrize(("layer", "response", "tasks", "order"), [*cases_put_off()])
def test_each_task_that_is_put_off_runs_or_is_named_once(
    names: Names, layer: str, response: str, tasks: str, order: str
) -> None:
    check(
        names,
        layer=layer,
        response=response,
        runner="inline",
        tasks=tasks,
        kinds=ORDERS[order],
        view_type=PuttingOff,
    )


@pytest.mark.parametrize(
    "order",
    ["first", *(pytest.param(each, marks=pytest.mark.slow) for each in ("second", "third"))],
)
def test_each_task_that_is_discarded_is_named_once(names: Names, order: str) -> None:
    check(
        names,
        layer="middleware",
        response="list",
        runner="inline",
        tasks="mixed",
        kinds=ORDERS[order],
        view_type=Discarding,
    )
