"""Fixtures of the tests with Django, which is imported for those tests only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings of a database in a file with a table of orders."""
    from django.db import connection, connections

    from tests.support.django import Order

    connections.close_all()
    options: dict[str, Any] = connections.settings["default"]
    monkeypatch.setitem(options, "NAME", str(tmp_path / "orders.sqlite3"))
    with connection.schema_editor() as editor:
        editor.create_model(Order)
    yield options
    connection.close()
