"""Which tasks run after a failed request, and which after a successful request (rule 3)."""

from __future__ import annotations

import errno
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    App,
    Environ,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
    waitress,
)
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.runners import shutdown

SUCCESS, FAILURE = {"success", "always"}, {"error", "always"}


def add_one_of_each(seen: list[str]) -> Any:
    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        for word in ("success", "error", "always"):
            tasks.using(run_on=word).add_task(seen.append, word)

    return add


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("200 OK", SUCCESS),
        ("302 FOUND", SUCCESS),
        ("404 NOT FOUND", SUCCESS),
        ("499 CLIENT CLOSED REQUEST", SUCCESS),
        ("500 INTERNAL SERVER ERROR", FAILURE),
        ("503 SERVICE UNAVAILABLE", FAILURE),
        ("599 CUSTOM", FAILURE),
    ],
)
def test_a_status_of_500_or_more_is_a_failure(status: str, expected: set[str]) -> None:
    seen: list[str] = []
    respond(BackgroundTasksMiddleware(app_that(add_one_of_each(seen), status=status)))
    assert set(seen) == expected


def test_the_last_status_counts() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_one_of_each(seen)(environ)
        start_response("200 OK", [])
        start_response("500 OOPS", [], (ValueError, ValueError(), None))
        return [b"oops"]

    respond(BackgroundTasksMiddleware(app))
    assert set(seen) == FAILURE


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, SUCCESS), (500, FAILURE), (None, SUCCESS), (b"500 NO", FAILURE)],
)
def test_a_status_that_is_no_text_loses_no_task(status: Any, expected: set[str]) -> None:
    """A server may accept such a status."""
    assert run_with(status) == expected
    seen: list[str] = []
    app = BackgroundTasksMiddleware(app_that(add_one_of_each(seen), status=status))
    respond(app, make_server_environ())
    assert shutdown.wait(TIMEOUT) == []
    assert set(seen) == expected


@pytest.mark.parametrize(
    "headers", [[("Content-Length", "9" * 5000)], [("Content-Length", "1", "more")], [1]]
)
def test_headers_that_cannot_be_read_lose_no_task(headers: Any, log: Log) -> None:
    """A server may accept such headers; close() must not raise then."""
    seen: list[str] = []
    app = app_that(add_one_of_each(seen), headers=headers)
    respond(BackgroundTasksMiddleware(app), make_server_environ())
    assert shutdown.wait(TIMEOUT) == []
    assert set(seen) == SUCCESS
    assert log.errors == []


def test_an_application_that_raises_has_failed() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_one_of_each(seen)(environ)
        start_response("200 OK", [])
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        respond(BackgroundTasksMiddleware(app))
    assert set(seen) == FAILURE


class Raising:
    """An iterator that raises after its first chunk."""

    def __init__(self) -> None:
        self.left = 1

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("midway")
        return b"x"


def raising_generator() -> Iterator[bytes]:
    yield b"x"
    raise ValueError("midway")


def exiting_generator() -> Iterator[bytes]:
    yield b"x"
    raise SystemExit(1)


@pytest.mark.parametrize("make", [Raising, raising_generator, exiting_generator])
def test_a_body_that_raises_midway_is_a_failure(make: Any) -> None:
    seen: list[str] = []
    app = BackgroundTasksMiddleware(app_that(add_one_of_each(seen), body=make))
    with pytest.raises((ValueError, SystemExit)):
        respond(app)
    assert set(seen) == FAILURE


def chunks() -> Iterator[bytes]:
    yield b"a"
    yield b"b"


@pytest.mark.parametrize("take", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        chunks,
        lambda: iter([b"a", b"b"]),
        lambda: [b"a", b"b"],
        lambda: map(bytes, (b"a", b"b")),
    ],
)
def test_a_client_that_leaves_is_no_failure(make: Any, take: int) -> None:
    seen: list[str] = []
    app = BackgroundTasksMiddleware(app_that(add_one_of_each(seen), body=make))
    body: Any = app(make_environ(), Server().start_response)
    iterator = iter(body)
    for _ in range(take):
        next(iterator)
    body.close()
    assert set(seen) == SUCCESS


def test_a_client_that_leaves_a_real_server_is_no_failure() -> None:
    """waitress notices in one of the next writes, and calls ``close()`` midway."""
    seen: list[str] = []
    done, gone = threading.Event(), threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        tasks = get_background_tasks(environ)
        tasks.add_task(seen.append, "ran")
        tasks.add_task(done.set)
        start_response("200 OK", [])
        yield b"x"
        assert gone.wait(TIMEOUT)
        for _ in range(10_000):
            yield b"x" * 65536
        raise AssertionError("the server has not noticed")

    with waitress(BackgroundTasksMiddleware(app)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.recv(1)
        gone.set()
        assert done.wait(TIMEOUT)
    assert seen == ["ran"]


def test_a_client_that_leaves_while_the_application_writes_is_no_failure() -> None:
    seen: list[str] = []
    done, gone = threading.Event(), threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_one_of_each(seen)(environ)
        background_tasks.using(run_on="always").add_task(done.set)
        write = start_response("200 OK", [])
        write(b"x")
        assert gone.wait(TIMEOUT)
        for _ in range(10_000):
            write(b"x" * 65536)
        raise AssertionError("the server has not noticed")

    with waitress(BackgroundTasksMiddleware(app)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.recv(1)
        gone.set()
        assert done.wait(TIMEOUT)
    assert set(seen) == SUCCESS


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (BrokenPipeError(), SUCCESS),
        (ConnectionResetError(), SUCCESS),
        (TimeoutError(), SUCCESS),
        (OSError(errno.ENOSPC, "no space left for the server's buffer"), FAILURE),
        (ValueError("more bytes than Content-Length"), FAILURE),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("status", ["200 OK", None], ids=["first", "again"])
def test_only_a_lost_connection_in_write_is_no_failure(
    exc: Exception, expected: set[str], status: str | None
) -> None:
    seen: list[str] = []
    done = threading.Event()

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        def write(data: bytes) -> None:
            raise exc

        return write

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_one_of_each(seen)(environ)
        background_tasks.using(run_on="always").add_task(done.set)
        write = start_response("200 OK", [])
        if status is None:  # the second call has an exc_info, and a write() of its own
            try:
                raise KeyError
            except KeyError:
                write = start_response("200 OK", [], sys.exc_info())
        write(b"x")
        raise AssertionError

    with pytest.raises(type(exc)):
        BackgroundTasksMiddleware(app)(make_server_environ(), start_response)
    assert done.wait(TIMEOUT)
    assert set(seen) == expected


@pytest.mark.parametrize("starts", [True, False])
def test_a_connection_that_the_application_itself_loses_is_a_failure(starts: bool) -> None:
    seen: list[str] = []
    done = threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_one_of_each(seen)(environ)
        background_tasks.using(run_on="always").add_task(done.set)
        if starts:
            start_response("200 OK", [])
        raise ConnectionResetError("the database is gone")

    with pytest.raises(ConnectionResetError, match="database"):
        BackgroundTasksMiddleware(app)(make_server_environ(), Server().start_response)
    assert done.wait(TIMEOUT)
    assert set(seen) == FAILURE


@pytest.mark.parametrize(
    ("run_on", "status", "ending"),
    [
        ("success", "500 OOPS", "failed with 500"),
        ("error", "200 OK", "succeeded with 200"),
        ("error", "OK", "succeeded"),
    ],
)
def test_a_task_that_does_not_run_is_named_with_the_reason(
    log: Log, run_on: Any, status: str, ending: str
) -> None:
    runner = InlineRunner()
    app = app_that(lambda e: background_tasks.add_task(print, "secret"), status=status)
    respond(BackgroundTasksMiddleware(app, run_on=run_on, runner=runner))
    assert log.warnings == [
        "background task builtins.print was not run: "
        f"the request {ending}, and run_on is '{run_on}'"
    ]
    assert runner.statistics().discarded == 1


def test_a_task_that_does_not_run_since_the_application_raised_is_named(log: Log) -> None:
    def add_and_raise(environ: Environ) -> None:
        background_tasks.add_task(print, "secret")
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        respond(BackgroundTasksMiddleware(app_that(add_and_raise)))
    assert log.warnings == [
        "background task builtins.print was not run: the request failed, and run_on is "
        "'success'"
    ]


def run_with(status: Any, **options: Any) -> set[str]:
    seen: list[str] = []
    app = app_that(add_one_of_each(seen), status=status)
    respond(BackgroundTasksMiddleware(app, **options))
    return set(seen)


def test_failed_from_is_the_lowest_status_of_a_failed_request(log: Log) -> None:
    assert run_with("404 NOT FOUND", failed_from=400) == FAILURE
    assert log.warnings[0].endswith("the request failed with 404, and run_on is 'success'")
    assert run_with("400 BAD REQUEST", failed_from=400) == FAILURE
    assert run_with("399 NONE", failed_from=400) == SUCCESS
    assert run_with("100 CONTINUE", failed_from=100) == FAILURE
    assert run_with("599 CUSTOM", failed_from=600) == SUCCESS
    assert run_with("500 OOPS", failed_from=HTTPStatus.NOT_IMPLEMENTED) == SUCCESS


def test_an_application_that_raises_has_failed_with_any_failed_from() -> None:
    seen: list[str] = []
    app = app_that(add_one_of_each(seen), status="200 OK", body=raising_generator)
    with pytest.raises(ValueError, match="midway"):
        respond(BackgroundTasksMiddleware(app, failed_from=600))
    assert set(seen) == FAILURE


def test_failed_from_may_differ_from_task_to_task() -> None:
    seen: list[str] = []

    def later() -> None:
        background_tasks.using(failed_from=600).add_task(seen.append, "added later")
        background_tasks.using(failed_from=400).add_task(seen.append, "never")

    def add(environ: Environ) -> None:
        background_tasks.add_task(seen.append, "as further out")
        background_tasks.using(failed_from=400).add_task(seen.append, "never")
        background_tasks.using(failed_from=405).using(run_on="error").add_task(print)
        background_tasks.using(failed_from=405).add_task(later)

    respond(BackgroundTasksMiddleware(app_that(add, status="404 NOT FOUND")))
    assert seen == ["as further out", "added later"]


@pytest.mark.parametrize("outer", [None, 300])
def test_failed_from_of_an_inner_layer_holds(outer: int | None) -> None:
    seen: list[str] = []
    inner = BackgroundTasksMiddleware(
        app_that(add_one_of_each(seen), status="404 NOT FOUND"), failed_from=400
    )
    respond(BackgroundTasksMiddleware(inner, failed_from=outer))
    assert set(seen) == FAILURE
    seen.clear()
    unset = BackgroundTasksMiddleware(
        app_that(add_one_of_each(seen), status="404 NOT FOUND"), run_on="error"
    )
    respond(BackgroundTasksMiddleware(unset, failed_from=outer))
    assert set(seen) == (FAILURE if outer else SUCCESS)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (True, "failed_from must be a whole number; got True"),
        (400.0, "failed_from must be a whole number; got 400.0"),
        ("400", "failed_from must be a whole number; got '400'"),
        (99, "failed_from must be 100 to 600; got 99"),
        (601, "failed_from must be 100 to 600; got 601"),
        (-1, "failed_from must be 100 to 600; got -1"),
    ],
)
def test_failed_from_is_a_status(value: Any, error: str) -> None:
    is_of_type = type(value) is int
    with pytest.raises(OptionValueError if is_of_type else OptionTypeError, match=error):
        BackgroundTasksMiddleware(app_that(print), failed_from=value)
    with pytest.raises(OptionValueError if is_of_type else OptionTypeError, match=error):
        BackgroundTasks().using(failed_from=value)


def test_a_task_that_a_task_adds_follows_the_outcome_too(log: Log) -> None:
    seen: list[str] = []

    def first() -> None:
        background_tasks.using(run_on="success").add_task(seen.append, "no")
        background_tasks.using(run_on="error").add_task(seen.append, "yes")

    app = app_that(lambda e: background_tasks.add_task(first), status="500 OOPS")
    respond(BackgroundTasksMiddleware(app, run_on="error"))
    assert seen == ["yes"]
    assert len(log.warnings) == 1


def test_a_failed_request_with_nothing_to_run_submits_no_batch(log: Log) -> None:
    runner = InlineRunner()
    app: App = app_that(lambda e: background_tasks.add_task(print), status="500 OOPS")
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
    assert len(log.warnings) == 1
    assert runner.drain(0) == []
    assert runner.statistics().discarded == 1
