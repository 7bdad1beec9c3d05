"""Fixtures of the tests of the store."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.durable.support import open_folder
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.store import Store


class Interrupted(BaseException):
    pass


class UsualError(ValueError, IndexError, RuntimeError):
    """An exception of classes that the store catches for reasons of its own."""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return check_folder(tmp_path / "tasks")


@pytest.fixture
def store(folder: Folder) -> Iterator[Store]:
    """The store of this process."""
    with open_folder(Path(folder.path)) as (_, store):
        yield store


@pytest.fixture(params=[Interrupted, UsualError])
def error(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """The class of an error, which the handler of SIGUSR1 raises."""
    error: type[BaseException] = request.param

    def handler(number: int, frame: object) -> None:
        raise error

    previous = signal.signal(signal.SIGUSR1, handler)
    yield error
    signal.signal(signal.SIGUSR1, previous)
