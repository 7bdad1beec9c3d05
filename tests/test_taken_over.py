"""Views that take the connection over end as the server asks, which is no failure."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from simple_websocket import Client
from werkzeug.serving import make_server

from tests.client import ask
from tests.support import TIMEOUT, Environ, Server, make_server_environ
from tests.taken_over_app import add_tasks, sock
from tests.test_examples import text_of, wait_until
from wsgi_bg import BackgroundTasksMiddleware

SUCCESS = "the task of success"
NOT_RUN = (
    "background task tests.taken_over_app.say was not run: the request succeeded, and run_on "
    "is 'error'"
)


@contextmanager
def gunicorn(worker: str, app: str, log: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", "-k", worker]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--threads", "2", f"tests.taken_over_app:{app}"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        assert wait_until(lambda: "Booting worker" in text_of(log)), text_of(log)
        yield int(text_of(log).split("http://127.0.0.1:")[1].split()[0])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0


def exchange(port: int) -> str:
    client = Client(f"ws://127.0.0.1:{port}/")
    client.send("hello")
    return str(client.receive(TIMEOUT))


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_a_websocket_under_gunicorn_is_a_success(worker: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with gunicorn(worker, "sock", log) as port:
        assert exchange(port) == "hello"
        assert wait_until(lambda: SUCCESS in text_of(log)), text_of(log)
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


def test_a_socket_on_which_the_application_has_answered_is_a_success(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with gunicorn("gevent", "handled", log) as port:
        assert ask(port).body == b"ok"
        assert wait_until(lambda: SUCCESS in text_of(log)), text_of(log)
    assert text_of(log).count(NOT_RUN) == 1
    assert "Traceback" not in text_of(log)


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
