"""Options of the middleware that a framework's configuration overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from wsgi_bg.exceptions import OptionError

M = TypeVar("M")


def make_configured(
    make: Callable[..., M], options: Mapping[str, Any], read: Callable[[str], Any]
) -> M:
    """Return ``make(**options)``; values of the configuration override ``options``.

    :param make: makes the middleware.
    :param read: returns the configuration's value of a key, such as ``WSGI_BG_RUNNER`` for
        the option ``runner``; None if the configuration has no such key.
    :raises TypeError: if an option has the wrong type. The message names the option, or the
        key that has set the option.
    :raises ValueError: if an option is an unknown word, or a number out of range.
    """
    keys = {option: f"WSGI_BG_{option.upper()}" for option in options}
    configured = {
        option: value for option, key in keys.items() if (value := read(key)) is not None
    }
    try:
        return make(**{**options, **configured})
    except OptionError as exc:
        if exc.option not in configured:
            raise
        raise type(exc)(keys[exc.option], exc.given, exc.wanted) from None
