"""SIGTERM: which servers wait for the tasks, by themselves or with the page's additions.

A task waits at the gate while its server is asked to stop. The gate opens after the server has
begun to drain its runners.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.servers import commands, docs
from tests.servers.app import DRAIN
from tests.servers.control import Control
from tests.servers.fleet import start
from tests.servers.process import PATIENT, Process
from tests.servers.setups import HERE, MISSING, SETUPS, Setup
from tests.support import TIMEOUT
from tests.support.client import Connection, ask

ALONE, HOOK, _ = range(3)
"""The columns of the table "SIGTERM"."""

ROWS = docs.PAGE.rows("SIGTERM")

# Replaces the adapter in the code for uvicorn.
ADAPTERS = {
    "uvicorn-starlette": "starlette.middleware.wsgi import WSGIMiddleware",
    "uvicorn-asgiref": "asgiref.wsgi import WsgiToAsgi as WSGIMiddleware",
}


def drains_alone(setup: Setup) -> bool:
    return ROWS[setup.name][ALONE].startswith("drains")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_with_hook(stack: ExitStack, setup: Setup, control: Control, drain: str) -> Process:
    """Start the set-up with the addition from the table."""
    hook = ROWS[setup.name][HOOK]
    code, options = "", []
    if hook:
        title = docs.title_of(hook)
        code = docs.code_of(title)
        options = docs.uwsgi_options() if title == "uWSGI" and setup.forks else []
        if title == "gunicorn":
            options = ["-c", "python:configuration"]
    if setup.name.startswith("uvicorn"):
        setup = setup._replace(command=commands.uvicorn)
        adapter = ADAPTERS.get(setup.name)
        code = code.replace("a2wsgi import WSGIMiddleware", adapter) if adapter else code
    files = {
        "myproject.py": "from tests.servers.app import application\n",
        "configuration.py": code,
        "hooked.py": f"{code}\nfrom myproject import application\n",
    }
    return start(
        stack,
        setup,
        control,
        files=files,
        module="hooked",
        options=options,
        env={DRAIN: drain, **PATIENT},
    )


def hand_over(server: Process, control: Control) -> tuple[str, str]:
    """Make the server's pool run a plain and an async task; return when both wait."""
    server.wait_until_up()
    tokens = control.token(), control.token()
    for task, token in zip(("plain", "async"), tokens, strict=True):
        assert ask(server.port, path=f"/pool/length/{task}?{token}").body == b"ok"
        control.run(token)
    return tokens


@pytest.mark.column("SIGTERM")
@pytest.mark.parametrize("setup", HERE, ids=str)
def test_sigterm_waits_for_the_tasks(setup: Setup, control: Control, stack: ExitStack) -> None:
    """The server waits by itself, or with the addition of the documentation."""
    drain = control.token()
    server = start_with_hook(stack, setup, control, drain)
    tokens = hand_over(server, control)
    server.stop(signal.SIGINT if "SIGINT" in ROWS[setup.name][HOOK] else signal.SIGTERM)
    control.run(drain)  # the pool is draining, and the tasks have not ended
    for token in tokens:
        assert control.let_through(token)
    server.wait()
    assert "was not finished" not in server.output


@pytest.mark.parametrize("setup", [s for s in HERE if not drains_alone(s)], ids=str)
def test_sigterm_by_itself_ends_the_server_and_its_tasks(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    """A failure means that the server waits now: the documentation can say so."""
    drain = control.token()
    server = start(stack, setup, control, env={DRAIN: drain})
    tokens = hand_over(server, control)
    server.stop()
    assert [control.run(token).ended.result(TIMEOUT) for token in tokens] == ["", ""]
    server.wait()
    assert not control.runs(drain)


@pytest.mark.skipif(MISSING["uWSGI-master"] is not None, reason="uWSGI is not here")
def test_with_its_options_a_busy_uwsgi_finishes_the_request_and_drains(
    control: Control, stack: ExitStack
) -> None:
    setup = next(setup for setup in SETUPS if setup.name == "uWSGI-master")
    drain, stream = control.token(), control.token()
    server = start_with_hook(stack, setup, control, drain)
    tokens = hand_over(server, control)
    client = Connection(server.port)
    client.send(path=f"/pool/leave/plain?{stream}")
    control.run(stream + "-stream")
    server.stop()
    server.wait_until_it_says("Gracefully killing worker")
    client.leave()
    assert control.let_through(stream + "-stream")
    control.run(drain)
    for token in (*tokens, stream):
        assert control.let_through(token)
    server.wait()
