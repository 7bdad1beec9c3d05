"""Tells a task's own exceptions from those that must reach the server.

A repr() runs users' code too; :func:`safe_repr` never raises an error of that code.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from inspect import CO_VARARGS
from types import CodeType, FrameType, TracebackType
from typing import Any

_TRACEBACK: Any = BaseException.__dict__["__traceback__"]


def stops_worker(exc: BaseException) -> bool:
    """True if ``exc``, raised while a task ran, stops the server's worker.

    Three exceptions stop a worker: a ``KeyboardInterrupt`` on the main thread; a
    ``SystemExit`` of a signal handler (Python runs handlers on the main thread only); the
    ``GreenletExit`` by which gevent and eventlet kill a greenlet. Any further exception is
    an error of the task, for example its own ``sys.exit()``.
    """
    kind = type(exc)  # isinstance() would read __class__, which may raise
    if issubclass(kind, Exception):
        return False
    if _is_greenlet_kill(kind):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    if issubclass(kind, KeyboardInterrupt):
        return True
    if not issubclass(kind, SystemExit):
        return False
    traceback = _traceback_of(exc)
    return _passes_a_handler(traceback) or _passes_a_former_handler(traceback)


def is_from_signal_handler(exc: BaseException) -> bool:
    """True if a signal handler has raised ``exc``, of any class, on this thread."""
    if stops_worker(exc):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    return _passes_a_handler(_traceback_of(exc))


def is_raised_here(exc: BaseException) -> bool:
    """True if ``exc`` was raised in the frame that catches it, by a call of a C function.

    If False, a Python function called from this frame has raised ``exc``, possibly a signal
    handler.
    """
    traceback = _traceback_of(exc)
    return traceback is None or traceback.tb_next is None


def _traceback_of(exc: BaseException) -> TracebackType | None:
    """The traceback of ``exc``, without the code of a class that has a property for it."""
    traceback: TracebackType | None = _TRACEBACK.__get__(exc)
    return traceback


def _is_greenlet_kill(kind: type[BaseException]) -> bool:
    # Until the module greenlet is imported, no greenlet exists.
    greenlet = sys.modules.get("greenlet")
    if greenlet is None or not issubclass(kind, greenlet.GreenletExit):
        return False
    return greenlet.getcurrent().parent is not None  # else this is a thread, and no greenlet


def _passes_a_handler(traceback: TracebackType | None) -> bool:
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _passes_a_former_handler(traceback: TracebackType | None) -> bool:
    # Only for exits: up to Python 3.12, reading f_locals keeps an error in a cycle.
    while traceback is not None:
        if _is_handlers(traceback.tb_frame):
            return True
        traceback = traceback.tb_next
    return False


def _is_handlers(frame: FrameType) -> bool:
    """True if Python has called the function of ``frame`` as a signal handler.

    Its arguments are then the number of a signal and the interrupted frame. The handler may
    have installed another handler since.
    """
    code = frame.f_code
    has_varargs = bool(code.co_flags & CO_VARARGS)
    if code.co_argcount < 2 and not has_varargs:
        return False
    values = frame.f_locals
    arguments: list[Any] = []
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + has_varargs]:
        value = values.get(name)
        arguments += value if type(value) is tuple else [value]
    return any(value is frame.f_back for value in arguments if value is not None) and any(
        isinstance(value, int) for value in arguments
    )


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__") and callable(handler):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)  # None for SIG_DFL and handlers set by C


def safe_repr(given: object) -> str:
    """``repr(given)``, or the name of its type if the object's ``__repr__`` raises."""
    try:
        return repr(given)
    except BaseException as exc:
        if is_from_signal_handler(exc):
            raise
        return f"<{type_name(given)} object, whose repr() raises>"


def type_name(given: object) -> str:
    """The qualified name of the type of ``given``, without asking the object or its type."""
    return str(type.__dict__["__qualname__"].__get__(type(given)))
