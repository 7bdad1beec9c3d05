"""The numbers of the page as JSON: a part of a snapshot whose size is bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from wsgi_bg._status.model import Failure, NameCounts, Snapshot
from wsgi_bg._status.stored import MAX_SHOWN

ROWS = 200
"""The most rows of a list. The page shows how many more there are."""

NAMES = 100
"""The most functions with numbers of their own; the page has a filter for the rest."""

_LONGEST = 300  # characters of a name, a request or a command line
_LONGEST_ERROR = 20_000  # characters of a message or a traceback
_LONGEST_FILTER = 200  # characters

_SORTS: dict[str, Callable[[NameCounts], tuple[Any, ...]]] = {
    "active": lambda each: (-each.running - each.waiting, -_ended(each)),
    "ended": lambda each: (-_ended(each),),
    "failed": lambda each: (-each.failed - each.aside - each.lost,),
    "wait": lambda each: (-each.wait.p95,),
    "run": lambda each: (-each.run.p95,),
    "name": lambda each: (),
}


class Query(NamedTuple):
    """The part of a snapshot that the page asks for."""

    text: str = ""
    """Functions whose names have this text, whatever the case."""
    sort: str = "active"
    """The order of the functions."""

    @classmethod
    def of(cls, text: str) -> Query:
        """Read a query string; an unknown order becomes the default."""
        fields = parse_qs(text, errors="replace")
        sort = fields.get("sort", ["active"])[0]
        return cls(
            fields.get("name", [""])[0][:_LONGEST_FILTER], sort if sort in _SORTS else "active"
        )


def overview(snapshot: Snapshot, query: Query) -> dict[str, Any]:
    """Return the numbers of the page. Of an error they have the class alone."""
    text = query.text.casefold()
    names = [each for each in snapshot.names if text in each.name.casefold()]
    names.sort(key=lambda each: (*_SORTS[query.sort](each), each.name))
    waiting = sorted(snapshot.waiting.items(), key=lambda item: (-item[1], item[0]))
    counts = snapshot.counts
    durable = _part(snapshot.durable)
    if len(snapshot.durable) >= MAX_SHOWN:
        durable["total"] = None  # there may be more, which nobody has counted
    return {
        "taken": snapshot.taken,
        "counts": asdict(counts),
        "minutes": [asdict(each) for each in snapshot.minutes[-60:]],
        "running": _part(snapshot.running, total=counts.running),
        "waiting": _part(waiting, _waiting),
        "failures": _part(snapshot.failures, _failure, total=counts.failed),
        "lost": _part(snapshot.lost, total=counts.lost),
        "processes": _part(snapshot.processes),
        "durable": durable,
        "names": {**_part(names, most=NAMES), "all": len(snapshot.names)},
    }


def find_error(snapshot: Snapshot, key: str) -> dict[str, str] | None:
    """Return message and traceback of a failure; None if newer ones have displaced it."""
    for each in snapshot.failures:
        if _key(each) == key:
            return {
                "message": each.message[:_LONGEST_ERROR],
                "traceback": each.traceback[-_LONGEST_ERROR:],
            }
    return None


def _part(
    rows: Sequence[Any],
    convert: Callable[[Any], dict[str, Any]] = asdict,
    *,
    most: int = ROWS,
    total: int = 0,
) -> dict[str, Any]:
    """Return the first rows, and the number of all; long texts are cut.

    :param total: the number of all, if the snapshot has only some of the rows.
    """
    shown = [
        {
            name: _cut(value) if isinstance(value, str) else value
            for name, value in convert(row).items()
        }
        for row in rows[:most]
    ]
    return {"total": max(total, len(rows)), "rows": shown}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _waiting(item: tuple[str, int]) -> dict[str, Any]:
    name, count = item
    return {"name": name, "count": count}


def _failure(failure: Failure) -> dict[str, Any]:
    row = asdict(failure)
    del row["message"], row["traceback"]
    return {"key": _key(failure), **row}


def _key(failure: Failure) -> str:
    """Return a text that names the failure: a task without an id has one, too."""
    parts = (failure.pid, failure.ended, failure.id, failure.attempt, failure.name)
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:24]


def _ended(counts: NameCounts) -> int:
    return counts.succeeded + counts.failed + counts.discarded + counts.sent
