"""Daemon threads that live as long as the process, or for many requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any


def start_daemon(target: Callable[..., object], name: str, *args: Any) -> threading.Thread:
    """Call ``target(*args)`` on a new daemon thread, with no context variable set.

    Free-threaded Python 3.14 and Sentry give a new thread a copy of the context in which
    ``start()`` is called. With that copy the thread would keep the first request alive as long
    as the thread lives, and Sentry would add that request to each record of the thread.

    :raises RuntimeError: if no thread can be started: there is no memory for a stack, or the
        interpreter exits.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    Context().run(thread.start)
    return thread
