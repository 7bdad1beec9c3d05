"""Which exceptions are not the task's own and have to reach the server."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from types import CodeType, TracebackType
from typing import Any


def goes_through(exc: BaseException) -> bool:
    """Whether ``exc``, raised while a task ran, is a stop sent to the server's worker.

    That is a ``KeyboardInterrupt`` on the main thread, a ``SystemExit`` that a signal
    handler raised there (Python runs handlers on the main thread only), and the
    ``GreenletExit`` by which gevent and eventlet kill a greenlet. All else, a task's
    own ``sys.exit()`` among it, is an error of the task.
    """
    if isinstance(exc, Exception):
        return False
    if _is_greenlet_kill(exc):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(exc, KeyboardInterrupt):
        return True
    return isinstance(exc, SystemExit) and _passes_a_handler(exc.__traceback__)


def is_from_signal_handler(exc: BaseException) -> bool:
    """Whether a signal handler has raised ``exc`` on this thread, whatever its class is."""
    if goes_through(exc):
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    return _passes_a_handler(exc.__traceback__)


def is_raised_here(exc: BaseException) -> bool:
    """Whether the frame that catches ``exc`` has raised it, by a call of a function in C.

    If not, a Python function that this frame has called did: a signal handler, perhaps.
    """
    return exc.__traceback__ is None or exc.__traceback__.tb_next is None


def _is_greenlet_kill(exc: BaseException) -> bool:
    # Without the import no greenlet exists, and none can be killed.
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(exc, greenlet.GreenletExit)


def _passes_a_handler(traceback: TracebackType | None) -> bool:
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__") and callable(handler):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)  # None for SIG_DFL and what C code has set
