"""Checks of options that several modules have: numbers, dictionaries, ``when_unsent``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Literal, get_args

from wsgi_bg.exceptions import OptionTypeError, OptionValueError

_FOR_EVER = 1e300  # seconds; a time of the clock can be added without overflow

_MOST = 1e15  # brokers multiply by 1,000, and have 63 bits

Kind = tuple[tuple[type, ...], str] | tuple[tuple[type, ...], str, Callable[[Any], bool]]
"""The types of an option, the words for them in an error message, and a function that says
whether a value is in range."""

WhenUnsent = Literal["hold", "local", "discard"]
"""For a task that cannot be sent: keep it, run it in this process, or give it up."""


def whole_number(
    option: str, given: object, *, least: int, most: float = inf, or_none: bool = False
) -> None:
    """Raise unless ``given`` is an int from ``least`` to ``most``; a bool is not an int here.

    :raises TypeError: if ``given`` is of another type.
    :raises ValueError: if ``given`` is out of range.
    """
    if or_none and given is None:
        return
    if isinstance(given, bool) or not isinstance(given, int):
        raise OptionTypeError(option, given, f"a whole number{' or None' * or_none}")
    if not least <= given <= most:
        wanted = f"{least} or more" if most == inf else f"{least} to {most}"
        raise OptionValueError(option, given, f"{wanted}{', or None' * or_none}")


def seconds(
    option: str,
    given: object,
    *,
    above_zero: bool = False,
    most: float = inf,
    or_none: bool = False,
) -> None:
    """Raise unless ``given`` is a number of seconds from 0 to ``most``; refuses NaN and bools.

    :param above_zero: True to refuse 0 too.
    :raises TypeError: if ``given`` is neither an int nor a float.
    :raises ValueError: if ``given`` is out of range.
    """
    if or_none and given is None:
        return
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        wanted = f"a number of seconds{' or None' * or_none}"
        if hasattr(given, "total_seconds"):  # a timedelta
            wanted += f": write {option}=....total_seconds()"
        raise OptionTypeError(option, given, wanted)
    if not given >= 0 or (above_zero and given == 0):
        wanted = "more than 0 seconds" if above_zero else "0 seconds or more"
        raise OptionValueError(option, given, f"{wanted}{', or None' * or_none}")
    if given > most:
        raise OptionValueError(option, given, "a bounded time")


def bounded(given: float) -> float:
    """``given`` as a float; infinite if the number, perhaps an int, is too large for that."""
    return inf if given > _FOR_EVER else float(given)


def entries(option: str, given: Mapping[str, object], known: Mapping[str, Kind]) -> None:
    """Raise unless each key of ``given`` is in ``known``, and each value is of a known type.

    A bool is a number here only if ``bool`` is among the types.

    :raises TypeError: if a value has the wrong type.
    :raises ValueError: if a key is unknown, a number is NaN or more than 1e15, or a value is
        out of range.
    """
    for name, value in given.items():
        if name not in known:
            wanted = f"a dict with keys of {', '.join(sorted(known))}"
            raise OptionValueError(option, name, wanted)
        types, words, *allows = known[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise OptionTypeError(f"{option}[{name!r}]", value, words)
        if isinstance(value, (int, float)) and not abs(value) <= _MOST:
            raise OptionValueError(
                f"{option}[{name!r}]", value, "a finite number, 1e15 at most"
            )
        if not all(allow(value) for allow in allows):
            raise OptionValueError(f"{option}[{name!r}]", value, words)


def check_when_unsent(given: object) -> None:
    """Raise ``ValueError`` unless ``given`` is a value of ``when_unsent``."""
    if given not in get_args(WhenUnsent):
        raise OptionValueError("when_unsent", given, "'hold', 'local' or 'discard'")
