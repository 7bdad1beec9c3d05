"""What SIGTERM and SIGINT do while ``serve`` runs: the first stops it, the second ends all."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from . import shutdown

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Handles both signals while it is entered; on the main thread.

    The handler raises nothing: it may have interrupted the server's loop anywhere.

    :param stop: called by the first signal.
    :ivar came: when the first signal came, by :func:`time.monotonic`.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.came: float | None = None
        self._stop = stop

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

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
        for each in SIGNALS:  # a third one does not even wait for the log
            signal.signal(each, signal.SIG_DFL)
        try:
            shutdown.name_all(f"before a second signal ({signal.Signals(number).name})")
        finally:
            signal.raise_signal(number)
