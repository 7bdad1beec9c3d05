"""Durable tasks on the page: details of a task, and orders to retry and discard.

The monitor writes no store: the process that owns a task obeys the order, as with
``wsgi-bg tasks``.
"""

from __future__ import annotations

import os
from typing import Any

from wsgi_bg._durable.folder import Folder, check_folder
from wsgi_bg._durable.inspection import ORDERS, Found, list_tasks, order
from wsgi_bg._messages.codec import decode
from wsgi_bg.exceptions import MessageError, StoreError

_LONGEST = 2_000  # characters of an argument
_MOST = 100  # arguments
_LONGEST_TRACEBACK = 20_000  # characters


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
    path: str | None,
    id: str,  # noqa: A002
    *,
    has_arguments: bool,
    has_traceback: bool,
) -> dict[str, Any]:
    """Return the details of a task that the page may show.

    :param path: the folder of the durable tasks, if there is one.
    :raises RefusedError: if no task has the id.
    """
    task = _find(_folder(path), id, is_brief=False)[-1]
    shown: dict[str, Any] = {}
    if has_arguments:
        shown["arguments"] = _arguments(task.outcome.row.arguments)
    if has_traceback:
        shown["traceback"] = task.outcome.traceback[-_LONGEST_TRACEBACK:]
    return shown


def give_order(path: str | None, id: str, what: str) -> str:  # noqa: A002
    """Order the owner of a task to ``"retry"`` or to ``"discard"`` it; return the task's name.

    :param path: the folder of the durable tasks, if there is one.
    :raises RefusedError: if no task has the id, or the state of the task does not allow that.
    """
    folder = _folder(path)
    found = _find(folder, id, is_brief=True)
    matching = [task for task in found if task.outcome.state in ORDERS[what]]
    if not matching:
        state = found[-1].outcome.state
        raise RefusedError("409 Conflict", f"The task is {state} now: too late to {what}.")
    try:
        for task in matching:
            order(folder, task, what)
    except StoreError as exc:
        raise RefusedError("409 Conflict", str(exc)) from exc
    return matching[-1].outcome.row.name


def _folder(path: str | None) -> Folder:
    # check_folder() would make the folder.
    if path is None or not os.path.isdir(path):
        raise RefusedError("404 Not Found", "There is no folder of durable tasks.")
    return check_folder(path)


def _find(folder: Folder, id: str, *, is_brief: bool) -> list[Found]:  # noqa: A002
    found = list_tasks(folder, lambda outcome: outcome.row.id == id, is_brief=is_brief)
    if not found:
        raise RefusedError("404 Not Found", "The task is not there any more.")
    return found


def _arguments(text: str) -> list[str]:
    """Return a text for each argument; rows may be forged."""
    if not text:
        return []
    try:
        args, kwargs = decode(text)
    except MessageError:
        return ["(cannot be read)"]
    shown = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    return [each[:_LONGEST] for each in shown[:_MOST]]
