"""Support for all tests: environs, real servers, a client that sees a response complete.

A thousand processes that tests start import this module, so it imports what takes long, such as
pytest, where that is used.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.runners import Runner
from wsgi_bg.runners.timer import Timer

TIMEOUT = 10.0
"""The bound of every wait, in seconds."""

Environ = dict[str, Any]
App = Callable[[Environ, Any], Iterable[bytes]]


class Server:
    """The server's side of a request, without a server."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.written: list[bytes] = []
        self.calls: list[tuple[Any, ...]] = []

    def start_response(self, *args: Any) -> Callable[[bytes], None]:
        self.calls.append(args)
        self.status, self.headers = args[0], args[1]
        return self.written.append

    def run(self, app: App, environ: Environ) -> bytes:
        """Handle a request as PEP 3333 describes, and return the body."""
        body = app(environ, self.start_response)
        try:
            return b"".join(self.written) + b"".join(body)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()


def make_environ(**extra: Any) -> Environ:
    """The environ of a test client."""
    environ: Environ = {"wsgi.input": io.BytesIO(), **extra}
    setup_testing_defaults(environ)
    return environ


def make_server_environ(**extra: Any) -> Environ:
    """The environ of a server that is known (waitress)."""
    return make_environ(
        **{
            "waitress.client_disconnected": lambda: False,
            "SERVER_SOFTWARE": "waitress",
            "wsgi.multithread": True,
            **extra,
        }
    )


def respond(app: App, environ: Environ | None = None) -> bytes:
    """Handle a request of a test client; return the body."""
    return Server().run(app, make_environ() if environ is None else environ)


def app_that(
    do: Callable[[Environ], object],
    *,
    status: str = "200 OK",
    headers: Iterable[tuple[str, str]] = (("Content-Length", "2"),),
    body: Callable[[], Iterable[bytes]] = lambda: [b"ok"],
) -> App:
    """An application that calls ``do(environ)`` and answers."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        do(environ)
        start_response(status, list(headers))
        return body()

    return app


def append_json(path: str, value: object) -> None:
    """Add a line to the file by one call of the system, so that threads' lines do not mix."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(value).encode() + b"\n")


def json_lines(path: Path) -> list[Any]:
    """The lines of :func:`append_json` that are whole: another process may be in the last."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


class Gate:
    """A task that waits until the client has the whole response."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._done = threading.Event()
        self.begun = threading.Event()
        self.passed: list[bool] = []

    def open(self) -> None:
        self._opened.set()

    def task(self) -> None:
        self.begun.set()
        self.passed.append(self._opened.wait(TIMEOUT / 2))
        self._done.set()

    async def async_task(self) -> None:
        import anyio.to_thread

        await anyio.to_thread.run_sync(self.task)

    def wait(self) -> None:
        assert self._done.wait(TIMEOUT), "the task did not run"


def wait_until(predicate: Callable[[], object], timeout: float = 2 * TIMEOUT) -> bool:
    """True if ``predicate`` comes true within ``timeout`` seconds."""
    pause = threading.Event()
    for _ in range(int(timeout / 0.01)):
        if predicate():
            return True
        pause.wait(0.01)
    return False


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


@contextmanager
def _in_thread(serve: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(TIMEOUT)
        assert not thread.is_alive()


@contextmanager
def waitress(app: App, threads: int = 2) -> Iterator[int]:
    from waitress.server import create_server

    server: Any = create_server(app, host="127.0.0.1", port=0, threads=threads)

    def stop() -> None:
        server.task_dispatcher.shutdown()
        with suppress(OSError):  # the loop was awake, and has closed the trigger already
            server.trigger.pull_trigger(server.close)

    with _in_thread(server.run, stop):
        yield server.effective_port


def lazy_module(source: str, **names: Any) -> dict[str, Any]:
    """The namespace of a module whose annotations are evaluated when they are read, or later.

    Before Python 3.14 they are strings.
    """
    if sys.version_info < (3, 14):
        source = f"from __future__ import annotations\n{source}"
    module: dict[str, Any] = {"__name__": "lazy", **names}
    exec(compile(source, "lazy.py", "exec", dont_inherit=True), module)
    return module


def run_python(
    code: str, *, timeout: float = 30.0, with_waits: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter.

    :param with_waits: keep the notices of a wait. On a busy machine each exit may take the
        second after which the notice is logged.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    if not with_waits:
        done.stdout, done.stderr = map(_without_waits, (done.stdout, done.stderr))
    return done


def _without_waits(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "the process ends, and waits for" not in line)


def submit(runner: Runner, *functions: Callable[[], Any], complete: bool = True) -> None:
    """Handle a request whose tasks go to ``runner``; the response is complete or not."""

    def add(environ: object) -> None:
        for function in functions:
            background_tasks.add_task(function)

    headers = [("Content-Length", "2")] if complete else []
    app = app_that(add, headers=headers)
    Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())


def events(count: int) -> list[threading.Event]:
    return [threading.Event() for _ in range(count)]


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that no other test process on this machine gets while this process lives.

    The port lies below the ports that the system gives to clients. An abstract Unix socket with
    the port's number in its name reserves the port: otherwise all processes of ``pytest -n``
    would find the port free until a server listens.
    """
    while True:
        # pytest-randomly gives random the same seed in each process of pytest -n.
        port = 16384 + secrets.randbelow(16384)
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0wsgi_bg-port-{port}")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
        else:
            _reserved.append(reservation)
            return port


@contextmanager
def no_threads() -> Iterator[None]:
    """Simulate that no thread can start: using up the real memory would end the tests."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


async def nothing() -> None:
    pass


class Wait:
    """Async tasks that wait on the loop and hold no thread."""

    def __init__(self) -> None:
        self.waiting = 0
        self.all_wait = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Event()

    def expect(self, count: int) -> Callable[[], Any]:
        async def task() -> None:
            self._loop = asyncio.get_running_loop()
            self.waiting += 1
            if self.waiting == count:
                self.all_wait.set()
            await asyncio.wait_for(self._gate.wait(), TIMEOUT)

        return task

    def open(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gate.set)


class Clock:
    """A clock that stands still until the test moves it, and the timer that reads it."""

    def __init__(self) -> None:
        self._time = time.monotonic()
        self.timer = Timer(self)

    def __call__(self) -> float:
        return self._time

    def advance(self, seconds: float) -> None:
        self._time += seconds
        self.timer.wake()


class Subject:
    """An argument of a task; the test sees when the argument is freed."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        weakref.finalize(self, self.freed.set)

    def touch(self) -> None:
        pass

    def fail(self) -> None:
        raise ValueError
