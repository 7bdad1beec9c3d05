"""The hooks of ``wsgi_bg.gunicorn``, as the page about servers shows them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.servers import docs
from tests.servers.app import DRAIN
from tests.servers.control import Control
from tests.servers.fleet import start
from tests.servers.process import PATIENT, Process
from tests.servers.setups import HERE, Setup
from tests.support.client import ask

HOOKS, OWN_HOOKS = docs.PAGE.blocks("python", "gunicorn")

SETUPS = [s for s in HERE if s.name.startswith("gunicorn") and not s.forks]

BEATS = "WSGI_BG_TEST_BEATS"
"""The environment variable with the token that announces each worker, by its age."""

ANNOUNCE = f"""
import os
from tests.servers.gate import announce

def post_worker_init(worker):
    worker.notify()
    announce(os.environ[{BEATS!r}] + f"-{{worker.age}}")
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_with(
    stack: ExitStack,
    setup: Setup,
    control: Control,
    configuration: str,
    *options: str,
    **env: str,
) -> Process:
    """Start gunicorn with the configuration; return when gunicorn answers."""
    process = start(
        stack,
        setup,
        control,
        files={"configuration.py": configuration},
        # One thread, which the first request starts: gunicorn's gthread holds a lock while it
        # waits for a new thread, and hangs if SIGQUIT comes then.
        options=["-c", "python:configuration", "--threads", "1", *options],
        env={**env, **PATIENT},
    )
    process.wait_until_up()
    return process


def hand_over(server: Process, control: Control) -> str:
    """Make the server's pool run a task, which waits at the gate then."""
    token = control.token()
    assert ask(server.port, path=f"/pool/length/plain?{token}").body == b"ok"
    control.run(token)
    return token


def assert_drained_until_graceful_timeout(server: Process) -> None:
    server.wait()
    assert "gate.visit was not finished before" in server.output
    assert "interrupted (GracefulTimeout)" in server.output
    assert "was sent SIGKILL" not in server.output


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_worker_drains_for_longer_than_the_timeout(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    """The arbiter kills only the second worker for its silence, which began later."""
    beats = control.token()
    options = ("--timeout", "2", "--workers", "2")
    server = start_with(stack, setup, control, HOOKS + ANNOUNCE, *options, **{BEATS: beats})
    workers = {control.run(f"{beats}-{age}").pid for age in (1, 2)}
    token = hand_over(server, control)
    draining = control.run(token).pid
    os.kill(draining, signal.SIGTERM)
    server.wait_until_it_says(f"Worker exiting (pid: {draining})")
    [other] = workers - {draining}
    os.kill(other, signal.SIGSTOP)
    server.wait_until_it_says(f"WORKER TIMEOUT (pid:{other})")
    assert control.let_through(token)
    assert f"WORKER TIMEOUT (pid:{draining})" not in server.output
    with suppress(ProcessLookupError):  # or the exit would wait for this task
        os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_unfinished_tasks_are_named_before_gunicorn_kills_its_workers(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    server = start_with(stack, setup, control, HOOKS, "--graceful-timeout", "3")
    hand_over(server, control)
    server.stop()
    server.wait()
    assert "gate.visit was not finished" in server.output
    assert "was sent SIGKILL" not in server.output


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_ctrl_c_that_comes_to_all_processes_leaves_the_drain_its_time(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    server = start_with(stack, setup, control, HOOKS, "--graceful-timeout", "3")
    hand_over(server, control)
    os.killpg(server.pid, signal.SIGINT)
    assert_drained_until_graceful_timeout(server)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_ctrl_c_may_reach_the_worker_after_the_arbiters_own_signal(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    server = start_with(stack, setup, control, HOOKS, "--graceful-timeout", "3")
    worker = control.run(hand_over(server, control)).pid
    server.stop(signal.SIGINT)
    server.wait_until_it_says(f"Worker exiting (pid: {worker})")
    os.kill(worker, signal.SIGINT)
    assert_drained_until_graceful_timeout(server)


@pytest.mark.parametrize("setup", [s for s in SETUPS if "uvicorn" in s.name], ids=str)
def test_uvicorns_worker_drains_if_gunicorn_is_interrupted(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    server = start_with(stack, setup, control, HOOKS, "--graceful-timeout", "3")
    hand_over(server, control)
    server.stop(signal.SIGINT)
    server.wait()
    assert "gate.visit was not finished" in server.output
    assert "was sent SIGKILL" not in server.output


# uvicorn counts a request of a2wsgi only while its client is connected.
@pytest.mark.parametrize("setup", [s for s in SETUPS if "uvicorn" not in s.name], ids=str)
def test_a_drain_at_max_requests_ends_earlier_if_gunicorn_is_stopped(
    setup: Setup, control: Control, stack: ExitStack
) -> None:
    options = ("--graceful-timeout", "3", "--max-requests", "2")
    server = start_with(stack, setup, control, HOOKS, *options)
    token = hand_over(server, control)
    server.wait_until_it_says(f"Worker exiting (pid: {control.run(token).pid})")
    server.stop()
    server.wait()
    assert "gate.visit was not finished" in server.output
    assert "was sent SIGKILL" not in server.output


@pytest.mark.skipif(not SETUPS, reason="gunicorn is not here")
def test_the_users_own_hooks_are_called_too(control: Control, stack: ExitStack) -> None:
    drain = control.token()
    server = start_with(stack, SETUPS[0], control, OWN_HOOKS, **{DRAIN: drain})
    token = hand_over(server, control)
    worker = control.run(token).pid
    assert f"worker {worker} has started" in server.output
    server.stop()
    control.run(drain)
    assert f"worker {worker} has drained" not in server.output
    assert control.let_through(token)
    server.wait()
    assert f"worker {worker} has drained" in server.output
    assert "was not finished" not in server.output
