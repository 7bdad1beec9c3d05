"""The application that every server process of this suite imports.

Paths: ``/inline/KIND/TASK`` and ``/pool/KIND/TASK``, TASK being ``plain`` or ``async``; the
same with ``leave`` for KIND, a stream whose client disconnects; ``/bare``, without the
middleware; ``/about``. The query is the token of the request's task.

If the environment says so, requests are handled while the module is imported: in the parent of
the process that serves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.servers.gate import announce, visit, visit_async
from tests.servers.kinds import KINDS, OK, TEXT, TWO, Kind
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, PoolRunner, get_background_tasks
from wsgi_bg._request import servers

NONCE = "WSGI_BG_TEST_NONCE"
"""The environment variable by which a test recognises its server."""

DRAIN = "WSGI_BG_TEST_DRAIN"
"""The environment variable with the token that announces the drain of the pool."""

PARENT = "WSGI_BG_TEST_PARENT"
"""The environment variable with the token of the tasks that are handed over on import."""

Environ = dict[str, Any]

TASKS: dict[str, Callable[[str], object]] = {"plain": visit, "async": visit_async}


class Pool(PoolRunner):
    """A pool that tells the test when the pool is drained."""

    def drain(self, timeout: float) -> list[BackgroundTask]:
        if DRAIN in os.environ:
            announce(os.environ.pop(DRAIN))  # only once: another drain finds no token
        return super().drain(timeout)


def with_task(kind: Kind, task: Callable[[str], object]) -> Any:
    """Add the task and return the application that answers with a response of this kind."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        tasks = get_background_tasks(environ).using(run_on=kind.run_on)
        token = environ["QUERY_STRING"]
        return kind.answer(lambda: tasks.add_task(task, token), start_response)

    return app


def leave(environ: Environ, start_response: Any) -> Iterator[bytes]:
    """A finite stream that waits in the middle until the client has disconnected."""
    start_response(OK, [TEXT])
    yield b"before "
    visit(environ["QUERY_STRING"] + "-stream")
    for _ in range(16):
        yield bytes(65536)


def leave_with_task(task: Callable[[str], object]) -> Any:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        get_background_tasks(environ).add_task(task, environ["QUERY_STRING"])
        return leave(environ, start_response)

    return app


class Bare:
    """A body whose ``close()`` waits at the gate, without the middleware."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"ok"])

    def close(self) -> None:
        visit(self._token)


def bare(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response(OK, TWO)
    return Bare(environ["QUERY_STRING"])


def about(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """Describe the server as the package sees the server."""
    server = servers.recognise(environ)
    facts = {
        "nonce": os.environ[NONCE],
        "pid": os.getpid(),
        "recognised": server and server.name,
        "test client": servers.is_test_client(environ),
    }
    body = json.dumps(facts).encode()
    start_response(OK, [TEXT, ("Content-Length", str(len(body)))])
    return [body]


HANDLERS: dict[str, Any] = {}
for name, task in TASKS.items():
    HANDLERS[f"/leave/{name}"] = leave_with_task(task)
    for kind in KINDS:
        HANDLERS[f"/{kind}/{name}"] = with_task(KINDS[kind], task)


def handle(environ: Environ, start_response: Any) -> Any:
    return HANDLERS[environ["wsgi_bg_test.handler"]](environ, start_response)


APPS: dict[str, Any] = {
    "inline": BackgroundTasksMiddleware(handle, runner="inline"),
    "pool": BackgroundTasksMiddleware(handle, runner=Pool()),
    "parent": BackgroundTasksMiddleware(handle, runner=PoolRunner(threads=1)),
    "bare": bare,
    "about": about,
}


def application(environ: Environ, start_response: Any) -> Any:
    name, _, rest = environ["PATH_INFO"].removeprefix("/").partition("/")
    environ["wsgi_bg_test.handler"] = "/" + rest
    return APPS[name](environ, start_response)


def handle_in_parent(token: str) -> None:
    """Submit tasks that wait at the gate, and a task behind them; then wait at the gate too."""
    for path, name in (
        ("/inline/stream/async", "async"),
        ("/parent/stream/plain", "plain"),
        ("/parent/stream/plain", "queued"),
    ):
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": f"{token}-{name}",
            "wsgi.multithread": True,
        }
        body = application(environ, lambda *args: None)
        list(body)
        body.close()
    visit(token)


if PARENT in os.environ:
    handle_in_parent(os.environ[PARENT])
