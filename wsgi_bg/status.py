"""The state of the tasks of this process, or of all processes of the machine."""

from __future__ import annotations

import os

from wsgi_bg._status.ledgers import snapshot_of_ledgers
from wsgi_bg._status.model import (
    DurableTask,
    Failure,
    LostTask,
    Minute,
    NameCounts,
    ProcessStatus,
    RunningTask,
    Snapshot,
    State,
    Times,
)

__all__ = [
    "DurableTask",
    "Failure",
    "LostTask",
    "Minute",
    "NameCounts",
    "ProcessStatus",
    "RunningTask",
    "Snapshot",
    "State",
    "Times",
    "of",
    "snapshot",
]


def snapshot(path: str | os.PathLike[str] | None = None) -> Snapshot:
    """Return the state of the tasks.

    :param path: a folder that was given as ``status_path``; None for this process alone.
    """
    return snapshot_of_ledgers()


def of(id: str, path: str | os.PathLike[str] | None = None) -> State | None:  # noqa: A002
    """Return the state of the task that has the id; None if no such task is known.

    :param path: a folder that was given as ``status_path``; None for this process alone.
    """
    return None
