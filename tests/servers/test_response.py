"""No response waits for its own task, and each task runs once: on real servers.

Order is shown with a gate and not with a clock. A task waits at the gate, and the test opens
the gate after the client has the whole response: if the response waited for its task, the task
would not pass in time. conftest.py checks that no task has run twice, after all servers have
stopped.
"""

from __future__ import annotations

import h11
import pytest

from tests.servers.control import Control
from tests.servers.fleet import Fleet
from tests.servers.kinds import KINDS
from tests.servers.setups import CLOSES, HERE, SILENT, Setup
from tests.support.client import Connection, ask, connect


@pytest.mark.parametrize("task", ["plain", "async"])
@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", HERE, ids=str)
def test_the_client_has_the_whole_response_before_the_task_goes_on(
    fleet: Fleet, control: Control, setup: Setup, kind: str, runner: str, task: str
) -> None:
    server, token, expected = fleet.get(setup), control.token(), KINDS[kind]
    request = expected.method, f"/{runner}/{kind}/{task}?{token}", expected.version
    instead = setup.instead.get(kind)
    with connect(server.port) as client:
        if instead == SILENT:
            client.send(*request)
        elif instead == CLOSES:
            with pytest.raises(h11.RemoteProtocolError):
                client.ask(*request)
        else:
            response = client.ask(*request)
            assert response.status == (instead or expected.status)
            assert response.body == expected.body or instead or expected.body is None
        assert control.let_through(token), "the response has waited for its task"


@pytest.mark.column("keep-alive")
@pytest.mark.parametrize("task", ["plain", "async"])
@pytest.mark.parametrize("setup", HERE, ids=str)
def test_with_the_pool_the_next_request_does_not_wait_for_the_task(
    fleet: Fleet, control: Control, setup: Setup, task: str
) -> None:
    """The next request uses the same connection if the server keeps connections alive."""
    server, first, second = fleet.get(setup), control.token(), control.token()
    with connect(server.port) as client:
        assert client.ask(path=f"/pool/length/{task}?{first}").body == b"ok"
        control.run(first)  # the task waits at the gate from here on
        path = f"/pool/length/{task}?{second}"
        if setup.keeps_alive:
            assert client.is_kept_alive
            assert client.ask(path=path).body == b"ok"
        else:
            assert ask(server.port, path=path).body == b"ok"
        assert control.let_through(first)
        assert control.let_through(second)


@pytest.mark.column("client-leaves")
@pytest.mark.parametrize("task", ["plain", "async"])
@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("setup", HERE, ids=str)
def test_the_task_of_a_client_that_leaves_in_the_middle_of_a_stream_runs(
    fleet: Fleet, control: Control, setup: Setup, runner: str, task: str
) -> None:
    server, token = fleet.get(setup), control.token()
    client = Connection(server.port)
    client.send(path=f"/{runner}/leave/{task}?{token}")
    control.run(token + "-stream")  # the stream waits in the middle
    client.leave()
    assert control.let_through(token + "-stream")
    assert control.let_through(token)


@pytest.mark.column("close")
@pytest.mark.parametrize("setup", [s for s in HERE if s.mark], ids=str)
def test_a_server_that_is_known_writes_a_declared_length_before_close(
    fleet: Fleet, control: Control, setup: Setup
) -> None:
    """The middleware relies on this order to run tasks in ``close()``; tested without it."""
    server, token = fleet.get(setup), control.token()
    with connect(server.port) as client:
        assert client.ask(path=f"/bare?{token}").body == b"ok"
        assert control.let_through(token), "the response has waited for close()"


@pytest.mark.parametrize("setup", HERE, ids=str)
def test_a_server_is_recognised_by_its_mark_in_the_environ(fleet: Fleet, setup: Setup) -> None:
    facts = fleet.get(setup).facts
    assert facts["recognised"] == setup.mark
    assert not facts["test client"]
