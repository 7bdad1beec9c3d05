"""Nothing is silent by accident, and no exception of a user's code harms another task."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import flask
import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Server, app_that, make_server_environ, respond, run_python
from tests.support.command import MODULE, running, write
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    registered_task,
)
from wsgi_bg._process import log as logs
from wsgi_bg.exceptions import RegistrationError
from wsgi_bg.flask import Background
from wsgi_bg.hooks.base import HOOKS, Hooks

SETUP = """
import logging, logging.config, sys, threading
from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, InlineRunner, PoolRunner, background_tasks

def fails(): raise ValueError
def skipped(): pass

def request(*functions, runner="inline", complete=True, run_on=None):
    def add(environ):
        for func in functions:
            background_tasks.using(run_on=run_on).add_task(func)
    app = app_that(add, headers=[("Content-Length", "2")] if complete else [])
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())

CONFIG = {
    "version": 1,
    "formatters": {"f": {"format": "%(levelname)s %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout",
                         "formatter": "f"}},
    "root": {"handlers": ["out"], "level": "INFO"},
}
"""

DICT_CONFIG = "logging.config.dictConfig(CONFIG)\n"

FILE_CONFIG = """
import io
logging.config.fileConfig(io.StringIO('''
[loggers]
keys=root
[handlers]
keys=out
[formatters]
keys=f
[logger_root]
level=INFO
handlers=out
[handler_out]
class=StreamHandler
formatter=f
args=(sys.stdout,)
[formatter_f]
format=%(levelname)s %(message)s
'''))
"""

EVERYTHING = """
request(fails)
request(skipped, run_on="error")
begun = threading.Event()
def stuck():
    begun.set()
    threading.Event().wait()
request(stuck, runner=PoolRunner(drain_timeout=0.1))
assert begun.wait(10)
"""
"""A task that fails, a task that is not run, a task that is lost at the end of the process."""


def run(code: str) -> list[str]:
    """Run a process that must succeed; return its records on standard output."""
    done = run_python(SETUP + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    levels = ("ERROR", "WARNING", "CRITICAL", "INFO", "DEBUG background task")
    return [line for line in done.stdout.splitlines() if line.startswith(levels)]


RECORDS = [
    "ERROR background task __main__.fails raised ValueError",
    "WARNING background task __main__.skipped was not run",
    "ERROR background task __main__.stuck was not finished",
]


def check_records(lines: list[str], wanted: list[str]) -> None:
    assert len(lines) == len(wanted), lines
    for line, beginning in zip(lines, wanted, strict=True):
        assert line.startswith(beginning)


# 1. Configurations that disable every logger without an entry.


@pytest.mark.parametrize("configure", [DICT_CONFIG, FILE_CONFIG, DICT_CONFIG + FILE_CONFIG])
def test_a_configuration_after_the_import_does_not_silence(configure: str) -> None:
    check_records(run(configure + EVERYTHING), RECORDS)


def test_a_configuration_between_two_requests_does_not_silence() -> None:
    lines = run(
        "logging.disable(logging.CRITICAL)\nrequest(fails)\nlogging.disable(logging.NOTSET)\n"
        + DICT_CONFIG
        + "request(fails)\n"
        + DICT_CONFIG
        + "request(fails)\n"
    )
    check_records(lines, RECORDS[:1] * 2)


def test_a_configuration_at_debug_does_not_silence_the_ends_of_tasks() -> None:
    lines = run('CONFIG["root"]["level"] = "DEBUG"\n' + DICT_CONFIG + "request(skipped)\n")
    check_records(lines, ["DEBUG background task __main__.skipped has succeeded"])


NAMED = {
    "a level in the configuration": """
        CONFIG["loggers"] = {"wsgi_bg": {"level": "CRITICAL"}}
        logging.config.dictConfig(CONFIG)
    """,
    "no propagation": """
        CONFIG["loggers"] = {"wsgi_bg": {"handlers": [], "propagate": False}}
        logging.lastResort = None
        logging.config.dictConfig(CONFIG)
    """,
    "a level set before": """
        logging.getLogger("wsgi_bg").setLevel(logging.CRITICAL)
        logging.config.dictConfig(CONFIG)
    """,
    "a level set after": """
        logging.config.dictConfig(CONFIG)
        logging.getLogger("wsgi_bg").setLevel(logging.CRITICAL)
    """,
    "all of logging disabled": """
        logging.config.dictConfig(CONFIG)
        logging.disable(logging.CRITICAL)
    """,
}


@pytest.mark.parametrize("way", NAMED)
def test_a_user_who_names_the_logger_or_sets_its_level_is_obeyed(way: str) -> None:
    assert run(textwrap.dedent(NAMED[way]) + EVERYTHING) == []


def test_a_user_who_names_the_logger_without_a_level_hears_all() -> None:
    code = 'CONFIG["loggers"] = {"wsgi_bg": {}}\n'
    check_records(run(code + DICT_CONFIG + EVERYTHING), RECORDS)


def test_a_configuration_of_the_module_does_not_silence_the_command(tmp_path: Path) -> None:
    """The command imports the package before the module, which configures logging."""
    write(
        tmp_path,
        "shop",
        """
        import logging.config
        from wsgi_bg import BackgroundTasksMiddleware, background_tasks

        logging.config.dictConfig({
            "version": 1,
            "formatters": {"f": {"format": "%(levelname)s %(message)s"}},
            "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "f",
                                 "stream": "ext://sys.stderr"}},
            "root": {"handlers": ["out"], "level": "INFO"},
        })

        def fails(): raise ValueError

        def app(environ, start_response):
            background_tasks.add_task(fails)
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]
        """,
    )
    with running([*MODULE, "shop:app", "--port", "0"], tmp_path) as command:
        assert command.ask("/").read() == b"ok"
        command.send(signal.SIGTERM)
        code, lines = command.end()
    assert code == 0
    assert "ERROR background task shop.fails raised ValueError" in lines


# 2. Users' code that raises.


class RaisingFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise AttributeError("g has no request_id")


class Quiet(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        pass


class RaisingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no space left on device")


@contextmanager
def raising_handler_filter() -> Iterator[dict[str, Any]]:
    with handler(Quiet()) as added:
        added.addFilter(RaisingFilter())
        yield {}


@contextmanager
def raising_logger_filter() -> Iterator[dict[str, Any]]:
    logger, raising = logging.getLogger("wsgi_bg"), RaisingFilter()
    logger.addFilter(raising)
    try:
        yield {}
    finally:
        logger.removeFilter(raising)


@contextmanager
def raising_handler() -> Iterator[dict[str, Any]]:
    with handler(RaisingHandler()):
        yield {}


@contextmanager
def handler(added: logging.Handler) -> Iterator[logging.Handler]:
    logger = logging.getLogger("wsgi_bg")
    logger.addHandler(added)
    try:
        yield added
    finally:
        logger.removeHandler(added)


@contextmanager
def raising_on_error() -> Iterator[dict[str, Any]]:
    def on_error(task: object, error: object) -> None:
        raise SystemExit(1)

    yield {"on_error": on_error}


MOMENTS = [name for name in HOOKS if name != "around"]  # whose error is the task's


def raising_hook(name: str, error: type[BaseException]) -> Any:
    @contextmanager
    def hook() -> Iterator[dict[str, Any]]:
        def fail(self: object, record: object) -> None:
            raise error("in a hook")

        yield {"hooks": type("Raising", (Hooks,), {name: fail})()}

    return hook


def raising_logger(error: type[BaseException]) -> Any:
    """A logger class of the user, of which no method works."""

    @contextmanager
    def broken() -> Iterator[dict[str, Any]]:
        logger = logging.getLogger("wsgi_bg")

        def fail(*args: Any) -> Any:
            raise error("the logger is broken")

        logger.isEnabledFor = fail  # type: ignore[assignment,method-assign]
        try:
            yield {}
        finally:
            del logger.isEnabledFor

    return broken


BREAKERS: dict[str, Any] = {
    "a handler's filter": raising_handler_filter,
    "the logger's filter": raising_logger_filter,
    "a handler": raising_handler,
    "the logger with an error": raising_logger(ValueError),
    "the logger with an exit": raising_logger(SystemExit),
    "on_error": raising_on_error,
    **{f"{name} with an error": raising_hook(name, ValueError) for name in MOMENTS},
    **{f"{name} with an exit": raising_hook(name, SystemExit) for name in MOMENTS},
}


def fail() -> None:
    raise ValueError


async def fail_async() -> None:
    await asyncio.sleep(0)
    raise ValueError


class Odd:
    """A callable object that raises in each call."""

    def __call__(self, *args: Any) -> None:
        raise ValueError


def odd(name: str, answer: Callable[[], Any]) -> Any:
    """Make an object that returns ``answer()`` for the attribute ``name``."""

    def ask(self: object, asked: str) -> Any:
        return answer() if asked == name else object.__getattribute__(self, asked)

    return type("Asked", (Odd,), {"__getattribute__": ask})()


def refuse() -> Any:
    raise ValueError("no name")


class NoRepr(Odd):
    def __repr__(self) -> str:
        raise ValueError("no repr")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__qualname__", "__name__", "__module__"):
            raise ValueError("no name")
        return super().__getattribute__(name)


class OfMeta(Odd, metaclass=Meta):
    pass


class Closed(type):
    def __getattribute__(cls, name: str) -> Any:
        raise ValueError("no attribute")


class OfClosed(Odd, metaclass=Closed):
    def __new__(cls) -> Self:
        raise ValueError("no object")


class ClosedPartial(functools.partial[Any]):
    @property
    def func(self) -> Any:
        raise ValueError("no function")


class Nameless(Exception, metaclass=Meta):  # noqa: N818
    pass


def fail_namelessly() -> None:
    raise Nameless


class NoText(str):
    __slots__ = ()

    def __format__(self, spec: str) -> str:
        raise ValueError("no text")


def with_a_name_without_a_text() -> Callable[[], Any]:
    def fail() -> None:
        raise ValueError

    fail.__qualname__ = NoText("with_a_name.<locals>.fail")
    return fail


NAMELESS: dict[str, Callable[[], Any]] = {
    "a function with a name without a text": with_a_name_without_a_text,
    "an object that raises for its __class__": lambda: odd("__class__", refuse),
    "a method of a str": lambda: "x".__mul__,
    "a method of a list": lambda: [].pop,
    "an object that raises for its __qualname__": lambda: odd("__qualname__", refuse),
    "an object that exits for its __qualname__": lambda: odd("__qualname__", sys.exit),
    "an object with a number for its __qualname__": lambda: odd("__qualname__", lambda: 7),
    "an object that raises for its __module__": lambda: odd("__module__", refuse),
    "an object with a number for its __module__": lambda: odd("__module__", lambda: 7),
    "an object that raises for its repr": NoRepr,
    "an object of a class without a name": OfMeta,
    "an object of a class that raises for each attribute": lambda: object.__new__(OfClosed),
    "a class that raises for each attribute": lambda: OfClosed,
    "a partial that hides its function": lambda: ClosedPartial(refuse),
    "a partial of one": lambda: functools.partial(odd("__qualname__", refuse)),
    "a method of one": lambda: NoRepr().__call__,
}

RUNNERS: dict[str, Callable[[], Any]] = {
    "pool": lambda: PoolRunner(threads=2),
    "inline": InlineRunner,
}


def check_four_requests(runner: str, failing: Callable[[], Any], options: Any) -> None:
    """Four requests whose first task fails, then two whose tasks do not; two threads."""
    own = RUNNERS[runner]()
    seen: list[str] = []

    async def then_async() -> None:
        seen.append("async")

    def add(environ: dict[str, Any]) -> None:
        if environ["PATH_INFO"] == "/fails":
            background_tasks.add_task(failing())
        background_tasks.add_task(seen.append, "plain")
        background_tasks.add_task(then_async)
        background_tasks.using(run_on="error").add_task(seen.append, "not to run")

    headers = [("Content-Length", "2")]
    app = BackgroundTasksMiddleware(app_that(add, headers=headers), runner=own, **options)
    for path in ["/fails"] * 4 + ["/"] * 2:
        Server().run(app, make_server_environ(PATH_INFO=path))
    assert own.drain(TIMEOUT) == []
    assert sorted(seen) == ["async"] * 6 + ["plain"] * 6
    numbers = own.statistics()
    assert (numbers.pending, numbers.running) == (0, 0)
    assert (numbers.succeeded, numbers.failed, numbers.discarded) == (12, 4, 6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("failing", [fail, fail_async, fail_namelessly])
@pytest.mark.parametrize("breaker", BREAKERS)
def test_following_tasks_and_requests_run_although_users_code_raises(
    breaker: str, failing: Callable[[], Any], runner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with BREAKERS[breaker]() as options:
        check_four_requests(runner, lambda: failing, options)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", NAMELESS)
def test_following_tasks_and_requests_run_after_a_callable_without_a_name(
    log: Log, kind: str, runner: str
) -> None:
    told: list[str] = []
    check_four_requests(
        runner, NAMELESS[kind], {"on_error": lambda task, error: told.append(task.name)}
    )
    assert len(log.errors) == len(told) == 4
    assert all(isinstance(name, str) and name for name in told)
    assert all(told[0] in message for message in log.errors)


@pytest.mark.parametrize("kind", NAMELESS)
def test_a_callable_without_a_name_cannot_be_registered(kind: str) -> None:
    with pytest.raises(RegistrationError, match="cannot be registered"):
        registered_task(NAMELESS[kind]())


@pytest.mark.parametrize("kind", NAMELESS)
def test_a_task_without_a_name_has_a_repr(kind: str) -> None:
    assert repr(BackgroundTask(NAMELESS[kind]())).startswith("<BackgroundTask ")


# Contexts.


def wait_until_idle(runner: Any) -> None:
    pause = threading.Event()
    for _ in range(int(TIMEOUT / 0.001)):
        numbers = runner.statistics()
        if not (numbers.pending or numbers.running):
            return
        pause.wait(0.001)
    raise AssertionError(f"{runner} is not idle: {numbers}")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("moment", ["pushed", "torn down"])
def test_an_application_context_that_raises_fails_that_task_alone(
    log: Log, moment: str, error: type[BaseException], runner: str
) -> None:
    seen: list[str] = []
    own = RUNNERS[runner]()
    app = flask.Flask("shop")
    inner, raises = app.wsgi_app, [False]

    def fail(*args: object, **options: object) -> None:
        if raises[0]:
            raise error(f"as the context is {moment}")

    if moment == "pushed":
        flask.appcontext_pushed.connect(fail, app)
    else:
        app.teardown_appcontext(fail)

    @app.route("/<word>")
    def view(word: str) -> str:
        background_tasks.add_task(plain)
        background_tasks.add_task(coroutine)
        return "ok"

    def plain() -> None:
        seen.append("plain")

    async def coroutine() -> None:
        seen.append("async")

    def around(environ: Any, start_response: Any) -> Any:
        """The contexts of tasks raise; the contexts of requests do not."""
        raises[0] = False
        try:
            return inner(environ, start_response)
        finally:
            raises[0] = environ["PATH_INFO"] == "/fails"

    app.wsgi_app = around  # type: ignore[method-assign]
    Background(app, runner=own)
    for path in ["/fails"] * 4 + ["/works"]:
        Server().run(app.wsgi_app, make_server_environ(PATH_INFO=path))
        wait_until_idle(own)
    assert own.drain(TIMEOUT) == []
    calls = 1 if moment == "pushed" else 5
    assert sorted(seen) == ["async"] * calls + ["plain"] * calls
    numbers = own.statistics()
    assert (numbers.pending, numbers.running) == (0, 0)
    assert numbers.succeeded == 2
    assert numbers.failed == len(log.errors) == 8


# Threads that live as long as the process, and its end.


def test_the_thread_for_freed_responses_survives_a_filter_that_raises() -> None:
    done = run_python(
        SETUP
        + """
class Raising(logging.Filter):
    def filter(self, record):
        raise AttributeError("no request_id")

logging.basicConfig(stream=sys.stdout)
logging.getLogger("wsgi_bg").addFilter(Raising())

def free(*functions):
    def add(environ):
        for func in functions:
            background_tasks.add_task(func)
    app = BackgroundTasksMiddleware(app_that(add, headers=()), runner=PoolRunner(threads=2))
    for chunk in app(make_server_environ(), Server().start_response):
        pass

for number in range(3):
    ran = threading.Event()
    free(fails, ran.set)
    assert ran.wait(10)
    print("ran", number)
"""
    )
    assert done.stdout.splitlines() == ["ran 0", "ran 1", "ran 2"], done.stderr
    assert "a response without calling its close()" in done.stderr
    assert done.returncode == 0


AT_EXIT = {
    "a filter": """
class Raising(logging.Filter):
    def filter(self, record):
        if "first" in record.getMessage():
            raise AttributeError("no request_id")
        return True
logging.getLogger("wsgi_bg").addFilter(Raising())
""",
    "a hook": """
from wsgi_bg.hooks import Hooks
class Raising(Hooks):
    def task_discarded(self, record):
        if "first" in record.task.name:
            raise SystemExit(3)
hooks = Raising()
""",
    "a repr": """
class Runner(PoolRunner):
    def __repr__(self):
        raise ValueError("no repr")
PoolRunner = Runner
""",
}


@pytest.mark.parametrize("what", AT_EXIT)
def test_all_further_tasks_are_named_at_exit_although_a_task_cannot_be(what: str) -> None:
    done = run_python(
        SETUP
        + "hooks = None\n"
        + AT_EXIT[what]
        + """
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
begun = threading.Barrier(3)

def first():
    begun.wait(10)
    threading.Event().wait()

def second():
    begun.wait(10)
    threading.Event().wait()

def third(): pass

for functions in ((first, third), (second, third)):
    def add(environ):
        for func in functions:
            background_tasks.add_task(func)
    Server().run(
        BackgroundTasksMiddleware(
            app_that(add), runner=PoolRunner(drain_timeout=0.1), hooks=hooks
        ),
        make_server_environ(),
    )
begun.wait(10)
"""
    )
    assert done.returncode == 0, done.stderr
    named = done.stdout + done.stderr  # a record goes there if a filter raises
    for name, times in (("first", 1), ("second", 1), ("third", 2)):
        assert named.count(f"background task __main__.{name} was not finished") == times, named


# 5. Requests that are unfinished as the process ends.


@pytest.mark.parametrize("runner", ["InlineRunner", "PoolRunner"])
@pytest.mark.parametrize("how", ["streams", "is in its view"])
def test_the_tasks_of_an_unfinished_request_are_named_at_exit(how: str, runner: str) -> None:
    done = run_python(
        SETUP
        + f"""
from tests.support.client import Connection
from waitress.server import create_server

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
begun = threading.Event()

def first(): print("first ran")
def second(): print("second ran")

def wait():
    begun.set()
    threading.Event().wait()

def app(environ, start_response):
    background_tasks.add_task(first)
    background_tasks.add_task(second)
    if {how!r} != "streams":
        wait()
    start_response("200 OK", [])
    return stream()

def stream():
    yield b"one"
    wait()
    yield b"two"

runner = {runner}()
runner.drain_timeout = 0.2
app = BackgroundTasksMiddleware(app, runner=runner)
server = create_server(app, host="127.0.0.1", port=0, threads=2)
threading.Thread(target=server.run, daemon=True).start()
connection = Connection(server.effective_port)
connection.send()
assert begun.wait(10)
"""
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert len(lines) == 2, done.stdout + done.stderr
    for line, name in zip(lines, ("first", "second"), strict=True):
        assert line.startswith(f"ERROR background task __main__.{name} was not")


def test_the_tasks_of_a_request_that_the_command_does_not_finish_are_named(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        "shop",
        """
        import logging
        import os
        import threading
        from wsgi_bg import BackgroundTasksMiddleware, background_tasks

        logging.basicConfig(format="%(levelname)s %(message)s")

        def task(): pass

        def app(environ, start_response):
            background_tasks.add_task(task)
            os.write(1, b"begun\\n")
            threading.Event().wait()
        """,
    )
    arguments = [*MODULE, "shop:app", "--port", "0", "--drain-timeout", "0.2"]
    with running(arguments, tmp_path) as command:
        command.request("/")
        assert command.line() == "begun"
        command.send(signal.SIGTERM)
        _, lines = command.end()
    assert any(line.startswith("ERROR background task shop.task was not") for line in lines)


class Raising:
    """A command whose attributes cannot be read, but which can be called."""

    def __init__(self, error: BaseException) -> None:
        self.__dict__["error"] = error

    def __getattr__(self, name: str) -> Any:
        raise self.__dict__["error"]

    def __call__(self) -> None:
        self.__dict__["called"] = True


@pytest.mark.parametrize("error", [KeyError("d"), SystemExit(), RuntimeError("unbound")])
def test_an_object_whose_attributes_cannot_be_read_runs_as_a_task(error: BaseException) -> None:
    command = Raising(error)
    task = BackgroundTask(command)
    task()
    assert command.__dict__["called"]


@pytest.mark.parametrize("kind", [SystemExit, KeyError])
def test_an_error_whose_cause_cannot_be_read_is_logged_by_its_name(
    kind: type[BaseException], log: Log
) -> None:
    class CausedError(Exception):
        @property
        def __cause__(self) -> Any:  # type: ignore[override]
            raise kind

    def fail() -> None:
        raise CausedError

    runner = PoolRunner()
    respond(
        BackgroundTasksMiddleware(
            app_that(lambda environ: background_tasks.add_task(fail)), runner=runner
        )
    )
    assert runner.drain(TIMEOUT) == []
    (error,) = log.errors
    assert "raised CausedError" in error


def test_a_stop_while_an_error_is_formatted_goes_through() -> None:
    class CausedError(Exception):
        @property
        def __cause__(self) -> Any:  # type: ignore[override]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logs.error("an error", exc_info=CausedError())


def test_a_stop_while_an_object_is_looked_at_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        BackgroundTask(Raising(KeyboardInterrupt()))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_generator_function_is_no_on_error_and_no_hook(is_async: bool) -> None:
    """Calling such a function runs nothing."""

    def plain(*args: object) -> Iterator[None]:
        yield

    async def coroutine(*args: object) -> AsyncIterator[None]:
        yield

    function: Any = coroutine if is_async else plain
    with pytest.raises(TypeError, match="on_error must be a plain function"):
        BackgroundTasksMiddleware(app_that(bool), on_error=function)
    hooks = type("Generating", (Hooks,), {"task_failed": function})()
    with pytest.raises(TypeError, match="hooks must be of plain functions"):
        BackgroundTasksMiddleware(app_that(bool), hooks=hooks)
