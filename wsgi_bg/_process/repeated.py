"""Records about an event that may come thousands of times a second."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import safe_repr

INTERVAL = 60.0
"""Seconds that pass at least between two records of the same event."""

_MOST_TEXTS = 100  # of errors that are remembered: each request may cause another text


class RepeatedWarning:
    """A warning that is logged for the first event, and then at most once a minute.

    :param message: the first placeholder, a ``%d``, is the number of events since the last
        record.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._events = count(1)
        self._logged = 0  # events, up to the last record
        self._not_before = float("-inf")
        self._turn = [None]  # popped by the thread that logs

    def count(self, *args: Any) -> None:
        """Count an event, and log a record if the last one is a minute old.

        :param args: for the placeholders after the first.
        """
        events = next(self._events)
        if time.monotonic() < self._not_before:
            return
        try:
            self._turn.pop()
        except IndexError:  # another thread logs
            return
        try:
            now = time.monotonic()
            if now < self._not_before:  # another thread has logged meanwhile
                return
            self._not_before = now + INTERVAL
            new, self._logged = events - self._logged, events
            log.warning(self._message, new, *args)
        finally:
            self._turn.append(None)


class RepeatedError:
    """An error that is logged with its traceback, the same error at most once a minute.

    :param message: the text of the record, with its placeholders.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._until: dict[str, float] = {}  # the end of an error's minute, by its repr

    def log(self, exc: BaseException, *args: Any) -> None:
        """Log ``exc`` at ERROR, unless the last record of the same error is too young."""
        text, now = safe_repr(exc), time.monotonic()
        if now < self._until.get(text, now):
            return
        if len(self._until) >= _MOST_TEXTS:
            self._until.clear()
        self._until[text] = now + INTERVAL
        log.error(self._message, *args, exc_info=exc)
