"""The package's logger, which is never silent by accident and never raises.

``logging.config.dictConfig`` and ``fileConfig`` disable every existing logger that the
configuration does not name. A record of this package reports a failed or lost task, so each
call in this module enables the logger again. Users silence the logger by its level.

Filters and handlers are the user's code. Their errors must not stop a batch, a worker or a
drain. Such an error is written to standard error, together with the record.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections import defaultdict
from functools import partial
from typing import Any

from wsgi_bg._process import per_process
from wsgi_bg._process.interrupts import is_from_signal_handler, safe_repr, type_name

logger: logging.Logger = logging.getLogger("wsgi_bg")

SAID = "said"


def is_debug() -> bool:
    """True if :func:`debug` makes a record.

    :raises BaseException: what a signal handler raises, or stops the server's worker;
        nothing else.
    """
    try:
        logger.disabled = False
        return logger.isEnabledFor(logging.DEBUG)
    except BaseException as exc:  # raised by a logger class of the user
        if is_from_signal_handler(exc):
            raise
        return False


def debug(message: str, *args: Any, extra: dict[str, Any] | None = None) -> None:
    """Log at DEBUG; see :func:`error`."""
    _log(logging.DEBUG, message, args, extra=extra)


def info(message: str, *args: Any, extra: dict[str, Any] | None = None) -> None:
    """Log at INFO; see :func:`error`."""
    _log(logging.INFO, message, args, extra=extra)


def warning(
    message: str,
    *args: Any,
    exc_info: BaseException | None = None,
    said: defaultdict[Any, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Log at WARNING; see :func:`error`."""
    _log(logging.WARNING, message, args, exc_info, said, extra)


def error(
    message: str,
    *args: Any,
    exc_info: BaseException | None = None,
    said: defaultdict[Any, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Log at ERROR.

    :param args: for the ``%`` placeholders of ``message``; an object whose ``repr()``
        raises is shown by its type.
    :param said: gets the key SAID in the moment in which the record is made, even if a
        signal handler raises right before or after.
    :param extra: attributes of the record.
    :raises BaseException: what a signal handler raises, or stops the server's worker;
        nothing else.
    """
    _log(logging.ERROR, message, args, exc_info, said, extra)


def _log(  # %r of a str adds quotes: placeholders are %s, %d and %g
    level: int,
    message: str,
    args: tuple[Any, ...],
    exc_info: BaseException | None = None,
    said: defaultdict[Any, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    said = defaultdict() if said is None else said
    generation = per_process.generation
    try:
        logger.disabled = False
        if not logger.isEnabledFor(level):
            return
        args = tuple(map(shown, args))
        if exc_info is not None and not format_error(exc_info):
            message += " (%s, whose traceback cannot be formatted)"
            args = (*args, safe_repr(exc_info))
            exc_info = None
        said.default_factory = partial(
            logger.log, level, message, *args, exc_info=exc_info, extra=extra, stacklevel=3
        )
        said[SAID]  # no bytecode comes between the record and the key
    except BaseException as exc:
        # or a handler of logging has forked
        if is_from_signal_handler(exc) or per_process.generation != generation:
            raise
        if SAID not in said:
            _print_instead(level, message, args, exc_info, exc)


def _print_instead(
    level: int,
    message: str,
    args: tuple[Any, ...],
    exc_info: BaseException | None,
    failure: BaseException,
) -> None:
    """Write the record to standard error, as :mod:`logging` does for a handler's error."""
    try:
        lines = [f"{logging.getLevelName(level)} wsgi_bg: {message % args}\n"]
        if exc_info is not None:
            lines += format_error(exc_info)
        lines += ["A filter or handler of logging raised for this record:\n"]
        lines += format_error(failure) or [f"{safe_repr(failure)}\n"]
        sys.stderr.write("".join(lines))
    except BaseException as exc:  # no standard error, or no file descriptor left
        if is_from_signal_handler(exc):
            raise


def shown(given: object) -> object:
    """Return an argument of a message: the text of an error, or of any other object."""
    kind = type(given)  # isinstance() would read __class__, which may raise
    if issubclass(kind, (str, float, int)):
        return given
    if not issubclass(kind, BaseException):
        return safe_repr(given)
    try:
        return str(given)
    except BaseException as exc:
        if is_from_signal_handler(exc):
            raise
        return type_name(given)


def format_error(exc: BaseException) -> list[str]:
    """Format the traceback; an empty list if that raises: a handler would drop the record.

    Python 3.15 imports a module for its first traceback, and the process may have no file
    descriptor left for that.
    """
    try:
        return traceback.format_exception(exc)
    except BaseException as failure:  # raised by a property of the error, too
        if is_from_signal_handler(failure):
            raise
        return []
