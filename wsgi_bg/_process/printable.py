"""``printable``: text from elsewhere as a line of a log or a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape each character that a terminal could obey, and line breaks."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
