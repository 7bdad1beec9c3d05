"""Durable tasks on the page: details of a task, and orders to retry and discard.

The monitor writes no store: the process that owns a task obeys the order, as with
``wsgi-bg tasks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wsgi_bg._messages.codec import describe
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._status.stored import state_of
from wsgi_bg._store.folder import Folder, is_of_parent
from wsgi_bg._store.inspection import ORDERS, Found, list_tasks, order
from wsgi_bg._store.writer import Turns
from wsgi_bg.exceptions import StoreError

_LONGEST = 2_000  # characters of an argument
_MOST = 100  # arguments
_LONGEST_TRACEBACK = 20_000  # characters

_TIMEOUT = 5.0  # seconds to wait while another thread reads

_turns = PerProcess(Turns)  # for a fork waits until no thread is inside SQLite


class RefusedError(Exception):
    """The request cannot be answered, for a reason that the page shows.

    :ivar status: the status of the response.
    :ivar reason: the text for the page.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def details(
    folders: Sequence[Folder],
    id: str,  # noqa: A002
    *,
    has_arguments: bool,
    has_traceback: bool,
) -> dict[str, Any]:
    """Return the details of a task that the page may show.

    :param folders: those of durable tasks.
    :raises RefusedError: if no task has the id.
    """
    _, task = _find(folders, id, is_brief=False)[-1]
    shown: dict[str, Any] = {}
    if has_arguments:
        shown["arguments"] = _arguments(task.outcome.row.arguments)
    if has_traceback:
        shown["traceback"] = task.outcome.traceback[-_LONGEST_TRACEBACK:]
    return shown


def give_order(folders: Sequence[Folder], id: str, what: str) -> str:  # noqa: A002
    """Order the owner of a task to ``"retry"`` or to ``"discard"`` it; return the task's name.

    :param folders: those of durable tasks.
    :raises RefusedError: if no task has the id, or the state of the task does not allow that.
    """
    found = _find(folders, id, is_brief=True)
    matching = [each for each in found if each[1].outcome.state in ORDERS[what]]
    if not matching:
        state = found[-1][1].outcome.state
        raise RefusedError("409 Conflict", f"The task is {state} now: too late to {what}.")
    try:
        for folder, task in matching:
            order(folder, task, what)
    except StoreError as exc:
        raise RefusedError("409 Conflict", str(exc)) from exc
    return matching[-1][1].outcome.row.name


def _find(
    folders: Sequence[Folder],
    id: str,  # noqa: A002
    *,
    is_brief: bool,
) -> list[tuple[Folder, Found]]:
    """Return the tasks that have the id, with their folders."""
    turn = _turns.get().take(_TIMEOUT)
    if turn is None:
        raise RefusedError("503 Service Unavailable", "The folder is busy: try again.")
    found: list[tuple[Folder, Found]] = []
    with turn:
        for folder in folders:
            tasks = list_tasks(folder, lambda each: each.row.id == id, is_brief=is_brief)
            found += [(folder, task) for task in tasks]
    if not found:
        files = [folder.file(number) for folder in folders for number in folder.numbers()]
        if any(map(is_of_parent, files)):
            # SQLite would take the locks of the parent for its own.
            instead = "use the command wsgi-bg tasks"
            raise RefusedError(
                "503 Service Unavailable",
                f"This process was forked while it had a file of the folder open: {instead}.",
            )
        if any(state_of(folder, id) not in (None, "discarded") for folder in folders):
            # Its owner has noted the end of the task, and writes the details within a second.
            raise RefusedError(
                "503 Service Unavailable", "The task is being written: try again."
            )
        raise RefusedError("404 Not Found", "The task is not there any more.")
    return found


def _arguments(text: str) -> list[str] | None:
    """Return a text for each argument; rows may be forged.

    :return: None if the arguments are not kept: those of a task that has succeeded.
    """
    if not text:
        return None
    return [each[:_LONGEST] for each in describe(text)[:_MOST]]
