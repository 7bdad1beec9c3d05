"""The end of the process: waits for the tasks that were taken in, and names the others."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import portal
from .report import logger

if TYPE_CHECKING:
    from .runners.base import Runner
    from .task import BackgroundTask

DRAIN_TIMEOUT = 30.0
"""How long exit waits for a runner that has no ``drain_timeout``, in seconds."""

# How long the portal's thread may take to end once its tasks are cancelled, in seconds.
_PORTAL_TIMEOUT = 0.5

# By id, and held: a runner that no one holds any more may still have work.
_runners: dict[int, Runner] = {}


def register(runner: Runner) -> None:
    """Have interpreter exit drain ``runner``."""
    _runners[id(runner)] = runner


def arm(flush: Callable[[], None]) -> None:
    """Call :func:`leave` at the exit of this process, after ``flush()``.

    Called with the first task and not on import: what the application registers with
    :mod:`atexit` while it is imported, such as the end of a database pool, then runs
    after the tasks that need it.
    """
    atexit.register(_leave_if_in, os.getpid(), flush)


def _leave_if_in(pid: int, flush: Callable[[], None]) -> None:
    if pid == os.getpid():  # a forked child inherits the registration, but no threads
        flush()
        leave()


def leave() -> None:
    """Drain every runner, name at ERROR what was not finished, leave the portal.

    Blocks for the longest ``drain_timeout`` at most, and half a second for the portal.

    :raises KeyboardInterrupt: if that ends the wait; the tasks are named all the same.
    """
    began = time.monotonic()
    runners = list(_runners.values())
    try:
        for runner in runners:
            _drain(runner, began + _limit_of(runner) - time.monotonic())
    finally:
        # What came in meanwhile is named too; a batch that two runners know of, once.
        for runner in runners:
            _name(runner, getattr(runner, "abandon", list)())
        portal.stop(_PORTAL_TIMEOUT)


def _drain(runner: Runner, timeout: float) -> None:
    try:
        left = runner.drain(max(0.0, timeout))
    except Exception as exc:  # a user's runner; the others have tasks too
        logger.error("%r could not be drained", runner, exc_info=exc)
        return
    if not hasattr(runner, "abandon"):
        _name(runner, left)


def _name(runner: Runner, tasks: list[BackgroundTask]) -> None:
    for task in tasks:
        logger.error(
            "background task %s was not finished within the drain time of %g seconds: "
            "the process ends without it",
            task.name,
            _limit_of(runner),
        )


def _limit_of(runner: Runner) -> float:
    return float(getattr(runner, "drain_timeout", DRAIN_TIMEOUT))
