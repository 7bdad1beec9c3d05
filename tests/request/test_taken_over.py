"""Views that take the connection over end as the server asks, which is no failure."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from simple_websocket import Client, ConnectionClosed
from werkzeug.serving import make_server

from tests.support import (
    TIMEOUT,
    Environ,
    Server,
    free_port,
    make_server_environ,
    text_of,
    wait_until,
)
from tests.support.client import ask
from tests.support.taken_over_app import add_tasks, sock
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg._request.servers import is_asked_for

SUCCESS = "the task of success"
UWSGI = Path(sys.executable).with_name("uwsgi")
NOT_RUN = (
    "background task tests.support.taken_over_app.say was not run: the request succeeded, and "
    "run_on is 'error'"
)


@contextmanager
def served(log: Path, up: str, *command: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        assert wait_until(lambda: up in text_of(log)), text_of(log)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT)


@contextmanager
def gunicorn(worker: str, app: str, log: Path) -> Iterator[int]:
    options = ["-b", "127.0.0.1:0", "-k", worker, "--threads", "2"]
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        *options,
        f"tests.support.taken_over_app:{app}",
    ]
    with served(log, "Booting worker", *command):
        yield int(text_of(log).split("http://127.0.0.1:")[1].split()[0])


def exchange(port: int) -> str:
    client = Client(f"ws://127.0.0.1:{port}/")
    client.send("hello")
    answer = client.receive(TIMEOUT)
    with suppress(ConnectionClosed, OSError):  # the server has closed first
        client.close()
    return answer if isinstance(answer, str) else bytes(answer).decode()


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_a_websocket_under_gunicorn_is_a_success(worker: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with gunicorn(worker, "sock", log) as port:
        assert exchange(port) == "hello"
        assert wait_until(lambda: SUCCESS in text_of(log)), text_of(log)
        assert wait_until(lambda: NOT_RUN in text_of(log)), text_of(log)
    assert text_of(log).count(NOT_RUN) == 1
    assert "Traceback" not in text_of(log)


def test_a_websocket_under_werkzeug_is_a_success(capfd: pytest.CaptureFixture[str]) -> None:
    server = make_server("127.0.0.1", 0, sock, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert exchange(server.port) == "hello"
        said = ""

        def has_run() -> bool:
            nonlocal said
            said += capfd.readouterr().out
            return SUCCESS in said

        assert wait_until(has_run)
    finally:
        server.shutdown()
        thread.join(TIMEOUT)
    assert "the task of error" not in said


@pytest.mark.skipif(not UWSGI.exists(), reason="uWSGI is missing: pip install pyuwsgi")
def test_a_websocket_under_uwsgi_is_a_success(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    options = ["--http-socket", f"127.0.0.1:{port}", "--enable-threads", "--threads", "2"]
    module = ["--module", "tests.support.taken_over_app:by_uwsgi"]
    with served(log, "spawned uWSGI worker 1", str(UWSGI), *options, *module):
        assert exchange(port) == "hello"
        assert wait_until(lambda: SUCCESS in text_of(log)), text_of(log)
        not_run = NOT_RUN.replace("succeeded", "succeeded with 101")
        assert wait_until(lambda: not_run in text_of(log)), text_of(log)
    assert text_of(log).count(not_run) == 1


@pytest.mark.parametrize(
    ("environ", "exc"),
    [
        ({"uwsgi.version": b"2.0"}, OSError("unable to complete websocket handshake")),
        ({"uwsgi.version": b"2.0"}, OSError("no space left")),
        ({}, OSError("unable to receive websocket message")),
        ({"uwsgi.version": b"2.0"}, StopIteration()),
    ],
)
def test_an_error_is_not_an_ending_that_a_server_asks_for(
    environ: Environ, exc: BaseException
) -> None:
    assert not is_asked_for(environ, exc)


def test_a_client_that_leaves_during_the_write_of_uwsgi_is_no_failure() -> None:
    assert is_asked_for({"uwsgi.version": b"2.0"}, OSError("write error"))


def test_a_socket_on_which_the_application_has_answered_is_a_success(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with gunicorn("gevent", "handled", log) as port:
        assert ask(port).body == b"ok"
        assert wait_until(lambda: SUCCESS in text_of(log)), text_of(log)
    assert text_of(log).count(NOT_RUN) == 1
    assert "Traceback" not in text_of(log)


def test_a_response_that_cannot_be_iterated_goes_back_to_the_server_unchanged() -> None:
    handled, ran = object(), threading.Event()

    def app(environ: Environ, start_response: Any) -> Any:
        background_tasks.add_task(ran.set)
        return handled

    wrapped: Any = BackgroundTasksMiddleware(app)
    assert wrapped(make_server_environ(), Server().start_response) is handled
    assert ran.wait(TIMEOUT)


def test_an_error_whose_class_cannot_be_read_reaches_the_server() -> None:
    class WrongError(Exception):
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise RuntimeError

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        raise WrongError

    raised: type[BaseException] | None = None
    try:
        Server().run(BackgroundTasksMiddleware(app), make_server_environ())
    except Exception as exc:  # pytest could not show the error
        raised = type(exc)
    assert raised is WrongError


def test_elsewhere_a_stop_iteration_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        add_tasks()
        raise StopIteration

    done = ""
    with pytest.raises(StopIteration):
        Server().run(BackgroundTasksMiddleware(app), make_server_environ())

    def has_run() -> bool:
        nonlocal done
        done += capfd.readouterr().out
        return bool(done)

    assert wait_until(has_run)
    assert done == "the task of error\n"
