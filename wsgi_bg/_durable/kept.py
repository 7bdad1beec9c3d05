"""``Kept``: a durable task in this process, and the row that the file has or gets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextvars import ContextVar
from math import inf, nextafter
from typing import TYPE_CHECKING, NamedTuple

from wsgi_bg._messages import headers, retries
from wsgi_bg.runners.timer import delay_left

if TYPE_CHECKING:
    from wsgi_bg._store.rows import Row
    from wsgi_bg._store.store import Store
    from wsgi_bg._tasks.task import BackgroundTask


class Kept:
    """A durable task in this process.

    :ivar row: the task as stored, or as it will be stored.
    :ivar store: the file that holds the row; None if the row is not stored.
    :ivar children: the durable tasks that the running task has added; None unless it runs.
    :ivar began: when the call began, by :func:`time.time`.
    :ivar ended: when the last call ended that has raised.
    :ivar has_parent: True if the row will be stored with the end of the task that has added it.
    :ivar is_new: True if the row may be stored, or a thread stores the row now.
    """

    __slots__ = (
        "_right",
        "began",
        "children",
        "ended",
        "has_parent",
        "is_new",
        "row",
        "store",
    )

    def __init__(self, row: Row, store: Store | None = None) -> None:
        self.row: Row = row
        self.store: Store | None = store
        self.children: list[BackgroundTask] | None = None
        self.began: float = 0.0
        self.ended: float = 0.0
        self.has_parent: bool = False
        self.is_new: bool = store is None
        self._right = {"to store": True}

    @property
    def is_claimed(self) -> bool:
        """True if a thread stores the row now."""
        return self.is_new and not self._right

    def claim(self) -> bool:
        """Claim the right to store the row; True for a single caller only."""
        return self.is_new and self._right.pop("to store", False)  # one atomic step

    def unclaim(self) -> None:
        """Give the claim back: the row was not stored."""
        self._right["to store"] = True

    def settle(self) -> None:
        """Note that the row is stored, or is not to be stored any more."""
        self.is_new = False


running: ContextVar[Kept | None] = ContextVar("wsgi_bg._durable", default=None)
"""The durable task that runs in this context."""


class Place(NamedTuple):
    """The place of a row that is added to a stored request later."""

    request: int
    """The key of the first row of the request."""
    due: float
    """The time until which the request waits for a task that will be called again."""
    added: float
    """The row comes after rows with this time."""

    def row_of(self, task: BackgroundTask, now: float, before: float = inf) -> Row:
        """The row of a task that is added now.

        :param before: when the task after it was added, if that task is stored.
        """
        row = row_of(task)
        return row._replace(
            request=-self.request,
            due=max(row.due, self.due),
            added=min(max(now, self.added), nextafter(before, 0.0)),
        )


def durable_among(tasks: Iterable[BackgroundTask]) -> tuple[list[BackgroundTask], bool]:
    """Return the durable ones of ``tasks``, and True if one of them is not stored."""
    durable = []
    has_new = False
    for task in tasks:
        kept = task.message
        if isinstance(kept, Kept):
            durable.append(task)
            has_new = has_new or kept.is_new
    return durable, has_new


def row_of(task: BackgroundTask) -> Row:
    """The row to store: the delay of the task begins now, unless it has begun."""
    row: Row = task.message.row
    if headers.REQUEST not in row.context and (label := task.request) is not None:
        # Of a request_label, which was not called yet in add_task.
        context = {**json.loads(row.context or "{}"), headers.REQUEST: label}
        row = row._replace(context=json.dumps(context))
    return row._replace(due=time.time() + delay_left(task)) if task.options.delay else row


def options_of(task: BackgroundTask) -> str:
    retry = task.options.retry
    given = {
        "stop_on_error": task.options.stop_on_error,
        "retry": None if retry is None else retries.to_text(retry),
        "is_delayed": bool(task.options.delay),
    }
    return json.dumps(given)


def is_delayed(row: Row) -> bool:
    """True for a row with a delay."""
    return '"is_delayed": true' in row.options  # as options_of() has written it
