"""``Row``, ``Outcome`` and ``Settings``: the data of a store, without a file."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

OF_ROW = (*(str,) * 4, float, int, int, str, float, int, int)
"""The types of the values of a ``Row``."""

OF_DONE = (str, str, float, float, float)
"""The types of the id, the name and the times of a done task."""

DISCARDED = -1.0
"""The begin of a task that was discarded by hand, whose id is kept as those of done tasks."""

NO_LIMIT = 2**63 - 1
"""For any number of tasks: the greatest number of SQLite."""


def typed(values: Iterable[Any], types: Iterable[type]) -> list[Any]:
    """Return the values of a row of a file, which may be forged.

    A value of a wrong type becomes ``""`` or 0, and so does an infinite number.
    """
    return [
        value if type(value) is kind and value not in (inf, -inf) else kind()
        for value, kind in zip(values, types, strict=False)
    ]


def text_of(stored: bytes) -> str:
    """Decode a text of a file, which may be forged: the ``text_factory`` of a connection."""
    return stored.decode("utf-8", "replace")


class Row(NamedTuple):
    """A task as stored. ``options`` and ``context`` are texts that the store does not read."""

    name: str
    """The registered name of the function."""
    arguments: str
    """The arguments, encoded by the codec."""
    options: str = ""
    context: str = ""
    due: float = 0.0
    """The time from which the task may run (``time.time()``); 0.0 for at once."""
    attempts: int = 0
    """Calls made that raised and are to be repeated."""
    crashes: int = 0
    """Deaths of the process while the task ran."""
    id: str = ""
    """The id of the task; if empty, ``add`` makes one that no other task of the folder has."""
    added: float = 0.0
    """Set by ``add`` if 0.0. Rows of a request run in this order."""
    key: int = 0
    """Set by ``add``: a counter within the file, never used again."""
    request: int = 0
    """Set by ``add``: the key of the first row of the same ``add``. A row that is added to a
    request later has that key with a minus."""


class Outcome(NamedTuple):
    """How a task has ended."""

    row: Row
    state: str = "done"
    """``"done"``, ``"failed"`` or ``"aside"`` (put aside after too many crashes)."""
    begun: float = 0.0
    ended: float = 0.0
    error: str = ""
    """The name of the error's class."""
    traceback: str = ""
    """The formatted traceback, with the message."""


class Settings(NamedTuple):
    """How a store writes, and how long it keeps tasks that have ended."""

    synchronous: str = "normal"
    """``"normal"``: survives the death of the process; ``"full"``: of the machine, too."""
    timeout: float = 5.0
    """Seconds after which ``add`` gives up."""
    keep_failed: tuple[int, float] = (1000, 7 * 86400.0)
    """Number, and age in seconds, of the failed and put-aside tasks that are kept."""
    keep_done: tuple[int, float] = (10_000, 3600.0)
