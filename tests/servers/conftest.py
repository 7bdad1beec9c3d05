"""Each set-up is a single process, which lasts for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.servers import table
from tests.servers.control import Control
from tests.servers.fleet import Fleet


@pytest.fixture(scope="session")
def control() -> Iterator[Control]:
    with closing(Control()) as control:
        yield control
        assert control.repeated() == [], "a task ran twice"


@pytest.fixture(scope="session")
def fleet(control: Control) -> Iterator[Fleet]:
    with closing(Fleet(control)) as fleet:
        yield fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        table.note(item)
