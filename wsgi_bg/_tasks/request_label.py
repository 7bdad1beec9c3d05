"""The label of a request: how logs, hooks and the status name the request of a task."""

from __future__ import annotations

from wsgi_bg._process.printable import printable

_LONGEST = 500  # characters


def request_label(method: str, script_name: str | None, path_info: str | None) -> str:
    """Return method and path, without the query: ``"GET /orders/7"``.

    The path is that of the environ, which has bytes as Latin-1 text (PEP 3333).
    """
    path = (script_name or "") + (path_info or "")
    if not path.isascii():
        path = path.encode("latin-1", "replace").decode("utf-8", "replace")
    return shortened(f"{method} {path}")


def shortened(label: str) -> str:
    """Return ``label``, at most 500 characters, with escapes for line breaks and controls."""
    return printable(label[:_LONGEST])[:_LONGEST]
