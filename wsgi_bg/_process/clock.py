"""Moments of the monotonic clock by the clock on the wall."""

from __future__ import annotations

import time


def on_the_wall(moment: float) -> float:
    """Return the :func:`time.time` of a moment of :func:`time.monotonic`."""
    return time.time() - (time.monotonic() - moment)
