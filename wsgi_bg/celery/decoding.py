"""Decodes, on a worker, the text that :mod:`wsgi_bg.celery.encoding` has written.

The text may be forged, so the decoder returns plain data only, and refuses any text that the
encoder cannot have written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from wsgi_bg.celery.encoding import MARK, MICROSECOND, VERSION
from wsgi_bg.exceptions import MessageError

# The errors of the functions below for malformed text.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def decode(text: object) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments in ``text``.

    :raises ValueError: if :func:`encode` cannot have written it.
    """
    if type(text) is not str:
        raise MessageError("the arguments are not wsgi_bg's: no text")
    try:
        document = json.loads(text)
        if type(document) is not list or document[:1] != [VERSION]:
            raise MessageError(f"the arguments are not wsgi_bg's, version {VERSION}")
        _, args, kwargs = document
        args, kwargs = _unpack(args), _unpack(kwargs)
    except MessageError:
        raise
    except _UNREADABLE:
        raise MessageError("the arguments are not wsgi_bg's: they cannot be read") from None
    if type(args) is not list or type(kwargs) is not dict:
        raise MessageError("the arguments are not wsgi_bg's: no list and dictionary")
    return args, kwargs


def _unpack(packed: Any) -> Any:
    if type(packed) is list:
        return [_unpack(value) for value in packed]
    if type(packed) is not dict:
        return packed
    if not any(key.startswith(MARK) for key in packed):
        return {key: _unpack(value) for key, value in packed.items()}
    ((tag, value),) = packed.items()
    return _UNPACK[tag](value)


def _unpack_zone(zone: Any) -> Any:
    if zone is None:
        return None
    if type(zone) is str:
        return ZoneInfo(zone)
    return timezone(zone * MICROSECOND)


def _unpack_time(kind: Any) -> Callable[[Any], Any]:
    def unpack(packed: Any) -> Any:
        text, fold, zone = packed
        return kind.fromisoformat(text).replace(fold=fold, tzinfo=_unpack_zone(zone))

    return unpack


def _unpack_uuid(text: Any) -> UUID:
    return UUID(hex=text)


def _unpack_bytes(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)


def _unpack_decimal(text: Any) -> Decimal:
    if type(text) is not str:
        raise TypeError
    return Decimal(text)


def _unpack_int(text: Any) -> int:
    return int(text, 16)


def _unpack_pairs(pairs: Any) -> dict[str, Any]:
    return {_key(key): _unpack(value) for key, value in pairs}


def _key(key: Any) -> str:
    if type(key) is not str:
        raise TypeError
    return key


_UNPACK: dict[str, Callable[[Any], Any]] = {
    "$bytes": _unpack_bytes,
    "$datetime": _unpack_time(datetime),
    "$date": date.fromisoformat,
    "$time": _unpack_time(time),
    "$decimal": _unpack_decimal,
    "$uuid": _unpack_uuid,
    "$int": _unpack_int,
    "$dict": _unpack_pairs,
}
