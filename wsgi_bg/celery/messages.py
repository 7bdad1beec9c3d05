"""The messages of registered functions, as a worker reads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wsgi_bg._messages import headers
from wsgi_bg._messages.codec import decode
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.registry import Registration
from wsgi_bg.celery.options import for_messages, override
from wsgi_bg.exceptions import ArgumentError, MessageError

HIDDEN = "(...)"
"""Celery's logs and headers show this text in place of arguments, which are data."""

CALL = "x-wsgi-bg-call"
"""The header that says how the arguments are written: ENCODED or PLAIN."""

ENCODED = "encoded"
PLAIN = "plain"

_PLAIN_CALLS = "a worker takes plain arguments with CeleryRunner(..., plain_calls=True)"


class Call(NamedTuple):
    """A registered function, and the arguments of a call.

    :ivar is_plain: True if Celery's own means have made the call.
    """

    registration: Registration
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    is_plain: bool


def headers_of(request: Any) -> dict[str, Any]:
    """The headers in Celery's request that are not Celery's own."""
    given = request.headers
    return given if isinstance(given, dict) else {}


def read(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    request: Any,
    *,
    plain_calls: bool,
) -> Call:
    """Return the call that a message asks for.

    :param name: the registered name of the function.
    :param request: Celery's request.
    :param plain_calls: True if the arguments may be plain.
    :raises MessageError: if the arguments cannot be read, or the function does not take them.
    """
    registration = registry.get(name)
    assert registration is not None, "each Celery task of ours has one, and none is removed"
    given = headers_of(request)
    kind = given.get(CALL)
    if kind is None:
        # Version 0.2 has sent no such header, but hidden its arguments.
        is_old = not plain_calls or getattr(request, "argsrepr", None) == HIDDEN
        kind = ENCODED if is_old else PLAIN
        request.headers = {**given, CALL: kind}  # for a retry
    if kind == ENCODED:
        if kwargs or len(args) != 1:
            raise MessageError(f"the arguments are not wsgi_bg's: not one text; {_PLAIN_CALLS}")
        args, kwargs = decode(args[0])
    elif not plain_calls:
        raise MessageError(f"the arguments are plain; {_PLAIN_CALLS}")
    try:
        registration.signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise MessageError(f"the function does not take the arguments: {exc}") from None
    return Call(registration, args, kwargs, is_plain=kind != ENCODED)


def for_plain_call(
    name: str, given: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the arguments of a call by ``delay()``, beat or a chain; return its options.

    These are the options that are given, the others of the function, and the headers.

    :param given: the positional arguments of Celery's ``apply_async``.
    :param options: the keyword arguments of ``apply_async``.
    :raises TypeError: if the function does not take the arguments.
    :raises ValueError: if the function has an option for its engine that Celery has not.
    """
    args = (given[0] if given else options.get("args")) or ()
    kwargs = (given[1] if len(given) > 1 else options.get("kwargs")) or {}
    registration = registry.get(name)
    assert registration is not None
    try:
        registration.signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise ArgumentError(name, "", str(exc)) from None
    carried = {**headers.current(), **(options.get("headers") or {}), CALL: PLAIN}
    return {**override(for_messages(registration), options), "headers": carried}


def hide_arguments_in_log() -> None:
    """Hide the arguments of our messages in Celery's log of messages with unknown names."""
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_hide)


def _hide(record: logging.LogRecord) -> bool:
    """Hide the body of a message whose own headers hide the arguments."""
    given = record.args
    if isinstance(given, tuple) and any(
        isinstance(each, dict) and each.get("argsrepr") == HIDDEN for each in given
    ):
        # Celery gives the error, the body, the headers and the delivery's data.
        record.args = (given[0], HIDDEN, *given[2:])
    return True
