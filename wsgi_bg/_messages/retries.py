"""The ``Retry`` of a single task in the headers of its message.

A worker imports no module that a message names: the classes of ``Retry.on`` are compared with
those of an error by their names.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wsgi_bg._messages import headers
from wsgi_bg._tasks.retry import Retry

RETRY = "x-wsgi-bg-retry"
"""The header. Celery keeps the headers of a message when it sends the task again."""

_FIELDS = ("attempts", "first", "factor", "longest", "jitter")


def to_text(retry: Retry) -> str:
    """Encode ``retry`` for :func:`find`."""
    classes = retry.on if isinstance(retry.on, tuple) else (retry.on,)
    fields: dict[str, Any] = {name: getattr(retry, name) for name in _FIELDS}
    return json.dumps({**fields, "on": [_name(each) for each in classes]})


def headers_of_call(retry: Retry | None) -> dict[str, str]:
    """Return the headers of a call that is added in the current context.

    :param retry: the ``Retry`` of this call; None for that of its function, which the worker
        knows.
    :raises TypeError: as :func:`wsgi_bg._messages.headers.current` does.
    """
    carried = headers.current()
    return carried if retry is None else {**carried, RETRY: to_text(retry)}


def find(header: object, of_function: Retry | None) -> Retry | None:
    """Return the ``Retry`` of a message, or else the one of its function.

    :param header: the value of the header; None if the message has none. A value that is no
        ``Retry`` is ignored, since a message may be forged.
    """
    with suppress(TypeError, ValueError, KeyError, RecursionError):
        if isinstance(header, str):
            fields = json.loads(header)
            names = frozenset(fields["on"])
            return _ByName(**{key: fields[key] for key in _FIELDS}, names=names)
    return of_function


@dataclass(frozen=True)
class _ByName(Retry):
    """A ``Retry`` whose exceptions are known by their names."""

    names: frozenset[str] = frozenset()

    def allows(self, attempt: int, exc: BaseException) -> bool:
        names = {_name(each) for each in type(exc).__mro__}
        return attempt < self.attempts and not names.isdisjoint(self.names)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
