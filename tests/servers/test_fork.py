"""Servers that import the application before they fork: each process runs its own tasks."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.servers.app import PARENT
from tests.servers.control import Control
from tests.servers.fleet import start
from tests.servers.process import PATIENT
from tests.servers.setups import HERE, Setup
from tests.support.client import ask


@pytest.mark.column("fork")
@pytest.mark.parametrize("setup", [setup for setup in HERE if setup.forks], ids=str)
def test_a_worker_runs_its_own_tasks_and_none_of_its_parents(
    setup: Setup, control: Control
) -> None:
    """The parent has a thread, a loop and a queue when it forks, and tasks in each."""
    token = control.token()
    tasks = [f"{token}-{name}" for name in ("plain", "async", "queued")]
    with ExitStack() as stack:
        server = start(stack, setup, control, env={PARENT: token, **PATIENT})
        parents = {control.run(task).pid for task in tasks[:2]}
        assert control.let_through(token)  # the import goes on, and the fork follows

        server.wait_until_up()
        assert server.facts["pid"] not in parents
        for path in ("inline/stream", "inline/length", "pool/length", "parent/length"):
            for kind in ("plain", "async"):
                own = control.token()
                ask(server.port, path=f"/{path}/{kind}?{own}")
                assert control.let_through(own)
                assert control.run(own).pid == server.facts["pid"]

        for task in tasks:
            control.go(task)
        assert all(control.run(task).passed for task in tasks)
        server.stop()
        server.wait()
        assert "was not finished" not in server.output
    assert {run.pid for task in tasks for run in control.runs(task)} == parents
