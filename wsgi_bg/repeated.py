"""Warnings about an event that may come thousands of times a second."""

from __future__ import annotations

import threading
import time
from typing import Any

from . import log

INTERVAL = 60.0
"""The least time between two records of one warning, in seconds."""

clock = time.monotonic
"""Tells the time, in seconds; tests replace it."""


class RepeatedWarning:
    """A warning that is logged at its first event, and then at most once a minute.

    :param message: its first placeholder, a ``%d``, is the number of events since the last
        record.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        # Guards all below. Its lock can be taken again: a signal handler may have
        # interrupted its holder.
        self._lock = threading.RLock()
        self._events = 0
        self._not_before = float("-inf")

    def count(self, *args: Any) -> None:
        """Count an event, and log a record if the last one is a minute old; see :mod:`.log`.

        :param args: for the placeholders after the first.
        """
        with self._lock:
            self._events += 1
            now = clock()
            if now < self._not_before:
                return
            events, self._events = self._events, 0
            self._not_before = now + INTERVAL
        log.warning(self._message, events, *args)
