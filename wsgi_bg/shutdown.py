"""The end of the process: waits for the tasks that were taken in, and names the others."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from . import ending, log, portal, report, uwsgi

if TYPE_CHECKING:
    from .runners.base import Runner
    from .task import BackgroundTask

DRAIN_TIMEOUT = 30.0
"""How long exit waits for a runner that has no ``drain_timeout``, in seconds."""

# How long the portal's thread may take to end once its tasks are cancelled, in seconds.
_PORTAL_TIMEOUT = 0.5

# By id, and held: a runner that no one holds any more may still have work.
_runners: dict[int, Runner] = {}
# Those that were given their time, and the tasks that were named: wsgi_bg.serve() leaves
# before the interpreter exits, and neither is to come twice.
_drained: dict[int, Runner] = {}
_named: dict[int, BackgroundTask] = {}
# The processes that are ending; a forked child is another one.
_leaving: set[int] = set()


def register(runner: Runner) -> None:
    """Have interpreter exit drain ``runner``."""
    _runners[id(runner)] = runner


def arm(flush: Callable[[], None]) -> None:
    """Call :func:`leave` at the end of this process, after ``flush()``.

    Called with the first task. What the application has registered with :mod:`atexit`, such
    as the end of a database pool, runs after the tasks that need it.
    """
    ending.when_it_comes(partial(_leave_in, os.getpid(), flush))
    atexit.register(_leave_in, os.getpid(), flush)
    uwsgi.call_at_exit(partial(_leave_in, os.getpid(), flush))


def _leave_in(pid: int, flush: Callable[[], None]) -> None:
    """Leave, or where that goes on, with the exit that waited for it interrupted, end it."""
    if pid != os.getpid():  # a forked child inherits the registration, but no threads
        return
    if pid in _leaving:
        name_all("before the wait for it was interrupted")
        return
    _leaving.add(pid)
    try:
        flush()
        leave()
    finally:
        _leaving.discard(pid)


def leave(*, limit: float | None = None, began: float | None = None) -> list[BackgroundTask]:
    """Drain every runner, name at ERROR what was not finished, leave the portal.

    Blocks for the longest ``drain_timeout`` at most, and half a second for the portal. A
    second call does not wait for a runner again.

    :param limit: how long to wait, in seconds, in place of each runner's own limit.
    :param began: when that time began, by :func:`time.monotonic`; None for now.
    :return: the tasks that were named.
    :raises KeyboardInterrupt: if that ends the wait; the tasks are named all the same.
    """
    if began is None:
        began = time.monotonic()
    waiting = [runner for key, runner in list(_runners.items()) if key not in _drained]
    left: list[BackgroundTask] = []
    try:
        for runner in waiting:
            _drain(runner, began + _limit_of(runner, limit) - time.monotonic())
    finally:
        # What came in meanwhile is named too; a batch that two runners know of, once.
        for key, runner in list(_runners.items()):
            _drained[key] = runner
            reason = f"within the drain time of {_limit_of(runner, limit):g} seconds"
            left += _name(runner, reason)
        portal.stop(_PORTAL_TIMEOUT if waiting else 0.0)
    return left


def name_all(reason: str) -> None:
    """Let no task begin any more and name at ERROR those not finished; does not wait."""
    for runner in list(_runners.values()):
        _name(runner, reason)


def longest_limit() -> float:
    """The longest time that a runner wants for its tasks, in seconds."""
    return max(_limit_of(runner) for runner in list(_runners.values()))


def _drain(runner: Runner, timeout: float) -> None:
    try:
        runner.drain(max(0.0, timeout))
    except Exception as exc:  # a user's runner; the others have tasks too
        log.error("%s could not be drained", runner, exc_info=exc)


def _name(runner: Runner, reason: str) -> list[BackgroundTask]:
    left = [task for task in _left_of(runner) if id(task) not in _named]
    for task in left:
        _named[id(task)] = task
        report.unfinished(task, reason)
    return left


def _left_of(runner: Runner) -> list[BackgroundTask]:
    abandon: Callable[[], list[BackgroundTask]] | None = getattr(runner, "abandon", None)
    if abandon is not None:
        try:
            return abandon()
        except Exception as exc:  # as in _drain()
            log.error("%s could not say what it left undone", runner, exc_info=exc)
            return []
    with suppress(Exception):  # that it cannot be drained was said
        return runner.drain(0.0)
    return []


def _limit_of(runner: Runner, limit: float | None = None) -> float:
    return float(getattr(runner, "drain_timeout", DRAIN_TIMEOUT)) if limit is None else limit
