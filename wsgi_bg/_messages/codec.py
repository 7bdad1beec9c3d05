"""Encodes the arguments of a registered function as text, and decodes the text elsewhere.

The text is JSON, with ``{"$bytes": ...}`` and the like for types that JSON lacks. The decoder
returns equal values of the same types; the encoder refuses a value that would change on the
way. The text may be forged, so the decoder returns plain data only, and refuses any text that
the encoder cannot have written.

A message must carry the text as one string: kombu, for example, would turn a dictionary with
its own mark for special types (``__type__``) into an object of such a type.
"""

from __future__ import annotations

import base64
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial
from inspect import Parameter, Signature
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from wsgi_bg._tasks.registry import POSITIONAL, Registration
from wsgi_bg.exceptions import ArgumentError, MessageError

VERSION = 1
"""The first item of each text; a worker refuses a text of an unknown version."""

MAX_DEPTH = 100
"""The greatest nesting depth of lists and dictionaries."""

_MARK = "$"  # the first character of keys that name a type that JSON lacks
_MICROSECOND = timedelta(microseconds=1)
_SMALL = 2**63  # larger numbers are sent in hexadecimal: Python limits decimal digits
_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

# The errors of reading malformed text.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


class _RefusedError(Exception):
    """A value cannot be sent; ``path`` has the argument and the keys that lead to the value."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[Any] = []


def encode(registration: Registration, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Encode the arguments of a call of a registered function as ASCII text.

    :raises TypeError: if the function does not accept the arguments, or an argument cannot
        be sent. The message names the argument and the reason, never the value.
    """
    name, signature = registration.name, registration.signature
    if kwargs or len(args) not in registration.positional:  # bind() takes as long as the rest
        try:
            signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise ArgumentError(name, "", str(exc)) from None
    try:
        return _dumps([VERSION, _pack_list(args, 0), _pack_named(kwargs) if kwargs else {}])
    except _RefusedError as exc:
        argument, *keys = exc.path
        where = argument if isinstance(argument, str) else _positional(signature, argument)
        where += "".join(f"[{reprlib.repr(key)}]" for key in keys)
        raise ArgumentError(name, where, exc.reason) from None


def decode(text: object) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments in ``text``.

    :raises ValueError: if :func:`encode` cannot have written ``text``.
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


def describe(text: str) -> list[str]:
    """Return a text for each argument; a single text if ``text`` cannot be shown as arguments.

    The text is the message for an engine then, in the folder of an outbox, or the text is
    damaged, or an argument is an integer with more digits than Python shows.
    """
    try:
        args, kwargs = decode(text)
        return [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    except ValueError:
        return [f"stored as: {text}"]


def _positional(signature: Signature, index: int) -> str:
    """Name the parameter of a positional argument; bind() has checked that it exists."""
    parameters = signature.parameters.values()
    names = [each.name for each in parameters if each.kind in POSITIONAL]
    if index < len(names):
        return names[index]
    rest = next(each.name for each in parameters if each.kind is Parameter.VAR_POSITIONAL)
    return f"{rest}[{index - len(names)}]"


def _pack(value: Any, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is str:
        return _text(value)
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"$int": hex(value)}
    if kind is list or kind is dict:
        if depth == MAX_DEPTH:
            raise _RefusedError(
                f"it is nested more than {MAX_DEPTH} levels deep, or contains itself"
            )
        return _pack_list(value, depth + 1) if kind is list else _pack_dict(value, depth + 1)
    if kind in _TYPES:
        tag, pack, _ = _TYPES[kind]
        return {tag: pack(value)}
    raise _RefusedError(_why_not(value))


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _RefusedError("it has half of a surrogate pair, which is no text") from None
    return value


def _pack_list(values: Sequence[Any], depth: int) -> list[Any]:
    packed: list[Any] = []
    try:
        for value in values:
            packed.append(_pack(value, depth))
    except _RefusedError as exc:
        exc.path.insert(0, len(packed))
        raise
    return packed


def _pack_dict(values: dict[Any, Any], depth: int) -> dict[str, Any]:
    packed = {}
    for key, value in values.items():
        if type(key) is not str:
            raise _RefusedError(
                f"it has a key of type {type(key).__qualname__}, and keys come back as str"
            )
        try:
            packed[_text(key)] = _pack(value, depth)
        except _RefusedError as exc:
            exc.path.insert(0, key)
            raise
    return _escape(packed)


def _pack_named(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    # A name may be of a subclass of str.
    return _pack_dict({str.__str__(name): value for name, value in kwargs.items()}, 0)


def _escape(packed: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary that the decoder cannot mistake for a special type."""
    if any(key.startswith(_MARK) for key in packed):
        return {"$dict": [[key, value] for key, value in packed.items()]}
    return packed


def _why_not(value: Any) -> str:
    kind = type(value)
    shown = kind.__qualname__
    if isinstance(value, Enum):
        return f"{shown} is an Enum, which a worker would not get back: give its value"
    if kind is tuple:
        return "a tuple would come back as a list: give a list"
    if isinstance(value, (set, frozenset)):
        return f"a {shown} would come back as a list: give a list"
    for plain in (str, int, float, list, dict, *_TYPES):
        if isinstance(value, plain):
            name = plain.__name__
            return f"{shown} is a subclass of {name} and would come back as {name}"
    return f"a worker cannot be given an object of type {shown}: pass what it needs of it"


def _pack_zone(zone: Any) -> str | int | None:
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key:
        return zone.key
    if type(zone) is timezone:
        offset = zone.utcoffset(None)
        if repr(zone) == repr(timezone(offset)):  # else the zone has a name
            return offset // _MICROSECOND
    raise _RefusedError(
        "its time zone is neither a ZoneInfo with a key nor a timezone without a name"
    )


def _pack_time(value: Any) -> list[Any]:
    return [value.replace(tzinfo=None).isoformat(), value.fold, _pack_zone(value.tzinfo)]


def _unpack(packed: Any) -> Any:
    if type(packed) is list:
        return [_unpack(value) for value in packed]
    if type(packed) is not dict:
        return packed
    if not any(key.startswith(_MARK) for key in packed):
        return {key: _unpack(value) for key, value in packed.items()}
    ((tag, value),) = packed.items()
    return _UNPACK[tag](value)


def _unpack_zone(zone: Any) -> ZoneInfo | timezone | None:
    if zone is None:
        return None
    if type(zone) is str:
        return ZoneInfo(zone)
    return timezone(zone * _MICROSECOND)


def _unpack_time(kind: Any, packed: Any) -> Any:
    text, fold, zone = packed
    return kind.fromisoformat(text).replace(fold=fold, tzinfo=_unpack_zone(zone))


def _unpack_dict(pairs: Any) -> dict[str, Any]:
    return {_str(key): _unpack(value) for key, value in pairs}


def _str(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


# The tag of each type that JSON lacks, its encoder and its decoder.
_TYPES: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: (
        "$bytes",
        lambda value: base64.b64encode(value).decode(),
        lambda text: base64.b64decode(text, validate=True),
    ),
    datetime: ("$datetime", _pack_time, partial(_unpack_time, datetime)),
    date: ("$date", date.isoformat, date.fromisoformat),
    time: ("$time", _pack_time, partial(_unpack_time, time)),
    Decimal: ("$decimal", str, lambda text: Decimal(_str(text))),
    UUID: ("$uuid", lambda value: value.hex, lambda text: UUID(hex=text)),
}

_UNPACK: dict[str, Callable[[Any], Any]] = {
    **{tag: unpack for tag, _, unpack in _TYPES.values()},
    "$int": lambda text: int(text, 16),
    "$dict": _unpack_dict,
}
