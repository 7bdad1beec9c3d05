"""No response waits for its own tasks: on real servers, shown with a gate and not a clock.

The task waits for a gate that the client opens once it has the whole response. Were the
response to wait for the task, the task would not get through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from tests.support import SERVERS, App, Environ, Gate, ask, waitress
from wsgi_bg import BackgroundTasksMiddleware, get_background_tasks

Add = Callable[[Environ], None]


def answer(add: Add, status: str, headers: list[tuple[str, str]], body: Iterable[bytes]) -> App:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add(environ)
        start_response(status, headers)
        return body

    return app


def stream(add: Add) -> App:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"before "
        add(environ)
        yield b"after"

    return app


OK = "200 OK"
TEXT = ("Content-Type", "text/plain")
# Kind of response: the application, the request's method and HTTP version, what arrives.
Kind = tuple[Callable[[Add], App], str, str, bytes]
KINDS: dict[str, Kind] = {
    "length": (
        lambda add: answer(add, OK, [("Content-Length", "2")], [b"ok"]),
        "GET",
        "1.1",
        b"ok",
    ),
    "length, generator": (
        lambda add: answer(add, OK, [("Content-Length", "2")], (c for c in (b"o", b"k"))),
        "GET",
        "1.1",
        b"ok",
    ),
    "length 0": (
        lambda add: answer(add, OK, [("Content-Length", "0")], [b""]),
        "GET",
        "1.1",
        b"",
    ),
    "length 0, no chunk": (
        lambda add: answer(add, "201 CREATED", [("Content-Length", "0")], []),
        "GET",
        "1.1",
        b"",
    ),
    "list of one": (lambda add: answer(add, OK, [TEXT], [b"ok"]), "GET", "1.1", b"ok"),
    "stream": (stream, "GET", "1.1", b"before after"),
    "HTTP/1.0": (stream, "GET", "1.0", b"before after"),
    "HTTP/1.0, length": (
        lambda add: answer(add, OK, [("Content-Length", "2")], [b"ok"]),
        "GET",
        "1.0",
        b"ok",
    ),
    "HEAD": (
        lambda add: answer(add, OK, [("Content-Length", "2")], [b"ok"]),
        "HEAD",
        "1.1",
        b"",
    ),
    "204": (lambda add: answer(add, "204 NO CONTENT", [], []), "GET", "1.1", b""),
    "304": (
        lambda add: answer(add, "304 NOT MODIFIED", [("ETag", '"x"')], []),
        "GET",
        "1.1",
        b"",
    ),
    "empty": (lambda add: answer(add, OK, [TEXT], []), "GET", "1.1", b""),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", SERVERS)
def test_the_client_has_its_whole_response_before_its_task_goes_on(
    server: str, kind: str, is_async: bool
) -> None:
    gate = Gate()
    make, method, version, expected = KINDS[kind]

    def add(environ: Environ) -> None:
        get_background_tasks(environ).add_task(gate.async_task if is_async else gate.task)

    with SERVERS[server](BackgroundTasksMiddleware(make(add))) as port:
        _, body, _ = ask(port, method, version=version)
        gate.open()
        gate.wait()
    assert body == expected
    assert gate.passed == [True]


@pytest.mark.parametrize("server", SERVERS)
def test_an_application_that_raises_is_answered_for_before_its_tasks_go_on(server: str) -> None:
    gate = Gate()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        get_background_tasks(environ).add_task(gate.task)
        raise ValueError("a bug")

    with SERVERS[server](BackgroundTasksMiddleware(app, run_on="error")) as port:
        status, _, _ = ask(port)
        gate.open()
        gate.wait()
    assert status == 500
    assert gate.passed == [True]


@pytest.mark.parametrize("server", SERVERS)
def test_a_pool_runner_keeps_no_response_waiting(server: str) -> None:
    gate = Gate()
    app = KINDS["length"][0](lambda environ: get_background_tasks(environ).add_task(gate.task))
    with SERVERS[server](BackgroundTasksMiddleware(app, runner="pool")) as port:
        # The second request finds the server's thread free while the task still waits.
        assert ask(port)[0] == ask(port)[0] == 200
        gate.open()
        gate.wait()
    assert gate.passed[0]


def test_the_inline_runner_holds_the_servers_thread() -> None:
    """The honest limit that the README states; also shows that ``close()`` runs it."""
    import threading

    names: list[str] = []
    done = threading.Event()

    def task() -> None:
        names.append(threading.current_thread().name)
        done.set()

    app = KINDS["length"][0](lambda environ: get_background_tasks(environ).add_task(task))
    with waitress(BackgroundTasksMiddleware(app, runner="inline")) as port:
        ask(port)
        assert done.wait(10)
    assert names[0].startswith("waitress")
