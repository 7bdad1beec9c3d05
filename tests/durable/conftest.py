"""Fixtures of the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.durable.support import open_folder
from wsgi_bg._durable.folder import Folder, check_folder
from wsgi_bg._durable.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return check_folder(tmp_path / "tasks")


@pytest.fixture
def store(folder: Folder) -> Iterator[Store]:
    """The store of this process."""
    with open_folder(Path(folder.path)) as (_, store):
        yield store
