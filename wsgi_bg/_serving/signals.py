"""The stop signals of ``serve``: the first stops the server, a second ends the process.

SIGHUP is a stop signal, so closing a terminal loses no task. A process that ignores SIGHUP,
as under ``nohup``, goes on ignoring SIGHUP.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from wsgi_bg.runners import shutdown

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

SECOND = "a second signal"


class StopSignals:
    """A context manager that handles the stop signals; enter it on the main thread.

    The handler raises no exception, because it may interrupt the server's loop anywhere.

    :param stop: called by the first signal.
    :ivar came: when the first signal came, by :func:`time.monotonic`.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.came: float | None = None
        self._stop = stop

    def __enter__(self) -> None:
        numbers = [
            number
            for number in SIGNALS
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that C code has set, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.came = time.monotonic()
            self._stop()
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        for each in self._previous:  # a third signal does not wait for the log
            signal.signal(each, signal.SIG_DFL)
        try:
            shutdown.log_all_unfinished(f"before {SECOND} ({signal.Signals(number).name})")
        finally:
            signal.raise_signal(number)
            # Reached as PID 1 of a container: the kernel ignores a signal to PID 1 without a
            # handler. No flush: it might block, and the default action does not flush either.
            os._exit(128 + number)
