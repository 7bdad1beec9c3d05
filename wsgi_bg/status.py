"""The state of the tasks of this process, or of all processes that share a folder.

Turn the recording on by ``status=True`` or ``status_path=`` of the middleware: see
``docs/reference/status.md``.
"""

from __future__ import annotations

import os

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
from wsgi_bg._status.snapshots import find_state, take_snapshot
from wsgi_bg.exceptions import OptionTypeError

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
    """Return what runs, waits and failed, and the numbers of the tasks that have ended.

    Call this function on any thread; it reads files, and may take some milliseconds. If no
    middleware of this process has the option ``status`` or ``status_path``, a snapshot without
    a path has the tasks that run and wait, and the sum of those that have ended, without times.

    :param path: the folder that was given as ``status_path``: the snapshot has all processes
        that use the folder. The numbers of other processes are up to a second old. None for
        this process, and the files of its durable runner.
    :raises TypeError: if ``path`` is not a path.
    :raises ValueError: if no process has ever used that folder.
    :raises OSError: or ``StoreError``, if the files cannot be read, for example since too many
        files are open.
    """
    return take_snapshot(path)


def of(id: str, path: str | os.PathLike[str] | None = None) -> State | None:  # noqa: A002
    """Return the state of the task that has the id.

    - ``"waiting"``: the task has not begun; its request may not have ended.
    - ``"running"``.
    - ``"retrying"``: a call has raised, and the task waits for its next attempt.
    - ``"succeeded"`` or ``"failed"``.
    - ``"discarded"``: the task has not run, and will not.
    - ``"sent"``: another process has the task, for example a worker of Celery.
    - ``"aside"``: a durable task was put aside, or a message was not accepted.
    - ``"lost"``: the process was killed while the task ran or waited.

    This process, and the files of durable tasks and messages, are asked at once. Other
    processes write the ids of sent tasks at once, and all other states once a second. An ended
    task is known as long as ``keep_done`` of the ``DurableRunner`` says; without such a runner
    for an hour, and among the last 10,000 of its process at least.

    :param id: ``task.id``, which has to be read before the task begins.
    :param path: see :func:`snapshot`.
    :return: None if no task with that id is known, or is known any more.
    :raises TypeError: if ``id`` is no text, or ``path`` is not a path.
    :raises ValueError: if no process has ever used the folder ``path``.
    :raises OSError: or ``StoreError``, as :func:`snapshot` does.
    """
    if not isinstance(id, str):
        raise OptionTypeError("id", id, "the id of a task, a text")
    return find_state(id, path)
