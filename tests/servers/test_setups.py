"""The list of set-ups: required servers are installed, and missing servers are named."""

from __future__ import annotations

import os

import pytest

from tests.servers.setups import MISSING, SETUPS
from wsgi_bg._request.servers import SERVERS

REQUIRED = os.environ.get("WSGI_BG_REQUIRE_SERVERS", "")
"""Names of servers, separated by commas; the suite fails if any of them cannot run."""


@pytest.mark.parametrize("name", MISSING)
def test_a_set_up_is_run_or_named(name: str) -> None:
    if why := MISSING[name]:
        assert name.partition("-")[0] not in REQUIRED.split(","), why
        pytest.skip(f"{name}: {why}")


def test_every_required_server_has_a_set_up() -> None:
    assert {*filter(None, REQUIRED.split(","))} <= {s.name.partition("-")[0] for s in SETUPS}


def test_every_server_that_is_recognised_has_a_set_up() -> None:
    assert {server.name for server in SERVERS} <= {setup.mark for setup in SETUPS}
