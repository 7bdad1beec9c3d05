"""The stop signals of ``serve``: the first stops the server, a second ends the process.

SIGHUP is one of them: a terminal that is closed loses no task. A process that ignores it,
as under ``nohup``, goes on ignoring it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from . import shutdown

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

SECOND = "a second signal"


class StopSignals:
    """Handles the signals while it is entered; on the main thread.

    The handler raises nothing: it may have interrupted the server's loop anywhere.

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
            # Python has no name for a handler that C code has set, and cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.came = time.monotonic()
            self._stop()
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        for each in self._previous:  # a third one does not even wait for the log
            signal.signal(each, signal.SIG_DFL)
        try:
            shutdown.name_all(f"before {SECOND} ({signal.Signals(number).name})")
        finally:
            signal.raise_signal(number)
            # Still here: as PID 1 of a container, for which the kernel ignores a signal
            # without a handler. No flush, which might block and does not come else either.
            os._exit(128 + number)
