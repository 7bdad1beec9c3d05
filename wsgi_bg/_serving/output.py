"""Text for a terminal: nothing that a file holds can reach the terminal as a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from wsgi_bg._process.printable import printable

_WIDEST = 80  # characters of a cell of a table


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the rows below their titles, in columns of equal widths."""
    lines = [titles, *([cell(each) for each in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(each.ljust(width) for each, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cell(text: str) -> str:
    """Return ``text`` as the cell of a table: escaped, and cut if it is long."""
    # Escaped before cut, so that a huge text of a forged row is not escaped as a whole.
    found = printable(text[:_WIDEST])
    if len(text) > _WIDEST or len(found) > _WIDEST:
        found = found[: _WIDEST - 3] + "..."
    return found or "-"


def local_time(seconds: float) -> str:
    """Return a time as a text; empty for 0.0."""
    time_of_day = moment(seconds)
    return "" if time_of_day is None else f"{time_of_day.astimezone():%Y-%m-%d %H:%M:%S}"


def moment(seconds: float) -> datetime | None:
    """Return a time; None for 0.0, and for a forged time that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC) if seconds > 0.0 else None
    except (OverflowError, ValueError, OSError):
        return None


def say(text: str) -> None:
    """Print ``text``; ignore that the reader has gone.

    :raises OSError: if the text cannot be written, for example because the disk is full.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as exc:
        null = os.open(os.devnull, os.O_WRONLY)  # or Python writes the text again at its exit
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not isinstance(exc, BrokenPipeError):  # the reader has seen enough, as with "| head"
            raise
