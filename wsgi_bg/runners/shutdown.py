"""Process exit: wait for submitted tasks, and log those that are unfinished."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakSet, WeakValueDictionary

from wsgi_bg._loop import portal
from wsgi_bg._process import greenlets, log, uwsgi
from wsgi_bg._process.exit import call_before_exit
from wsgi_bg._process.interrupts import stops_worker
from wsgi_bg._tasks import checks, task_log
from wsgi_bg._tasks.task import BackgroundTask, current
from wsgi_bg.exceptions import InsideTaskError
from wsgi_bg.runners.ledger import (
    LedgerRunner,
    batches_under_way,
    ledger_of,
    ledgers_here,
    tasks_to_send,
)
from wsgi_bg.runners.waiting import Notice, wait_for

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg.runners.base import Runner

DRAIN_TIMEOUT = 30.0
"""How long exit waits for a runner that has no ``drain_timeout``, in seconds."""

_Collector: TypeAlias = tuple[Callable[[], None], Callable[[], list[BackgroundTask]]]

# How long wait() waits for the timer to submit tasks whose time has come, in seconds.
_SUBMIT_TIMEOUT = 1.0

_PAUSE = 0.01  # seconds between two looks of wait() at tasks that come from a file

# A runner's drain() has given up if it returns tasks so many seconds before its timeout.
_EARLY = 0.05

# By id of the runner: the runners that exit drains. The package's own runners are referenced
# weakly: an unfinished batch holds its runner, and these runners have no work besides batches.
_own_runners: WeakValueDictionary[int, Runner] = WeakValueDictionary()
# A user's runner may have work besides batches, so exit keeps the runner alive.
_users_runners: dict[int, Runner] = {}
# By id of the runner: the process that has drained it. A forked child drains again.
_drained_in: dict[int, int] = {}
# Tasks logged as unfinished: serve() drains before interpreter exit drains, and no task is
# logged twice.
_logged: WeakSet[BackgroundTask] = WeakSet()
# Batches that the main thread waited for at its end, while another thread went on serving.
_had_their_time: WeakSet[Batch] = WeakSet()
# By process id: a function that hands over the responses freed without close(), and a function
# that claims the tasks of all remaining requests.
_collectors: dict[int, _Collector] = {}
# By process id: functions that are called after each drain of all runners.
_after_drain: dict[int, list[Callable[[], object]]] = {}
_NO_REQUESTS: _Collector = (lambda: None), list  # before the first task of a process


def register(runner: Runner) -> None:
    """Let interpreter exit drain ``runner``."""
    runners = _own_runners if _works_by_ledger(runner) else _users_runners
    key = id(runner)
    if runners.get(key) is not runner:  # perhaps at the address of a freed runner
        _drained_in.pop(key, None)
        runners[key] = runner


def _registered() -> list[Runner]:
    """The runners to drain: those of the user first, which may use one of the package."""
    own = [reference() for reference in _own_runners.valuerefs()]
    return list(_users_runners.values()) + [each for each in own if each is not None]


def start_runners() -> None:
    """Let runners that keep tasks take over tasks before the first request of this process.

    :raises RuntimeError: if the files of such a runner cannot be used.
    """
    for runner in _registered():
        if isinstance(runner, LedgerRunner):
            runner.start()


def _works_by_ledger(runner: Runner) -> bool:
    return getattr(runner, "work_is_in_ledgers", False)


def register_drain(
    flush: Callable[[], None], abandon: Callable[[], list[BackgroundTask]]
) -> None:
    """Drain at the exit of this process, after ``flush()``.

    Called with the first task. Functions that the application has registered with
    :mod:`atexit`, such as the closing of a database pool, are called after the tasks that
    need the pool.

    :param flush: hands over the responses that were freed so far.
    :param abandon: claims and returns the tasks of requests that have not ended.
    """
    _collectors[os.getpid()] = flush, abandon
    call_before_exit(_drain_at_exit, _wait_at_exit)
    uwsgi.call_before_exit(partial(_drain_at_exit, True))


def call_after_drain(call: Callable[[], object]) -> None:
    """Call ``call()`` after each drain of all runners of this process; it must not raise."""
    _after_drain.setdefault(os.getpid(), []).append(call)


def _flush() -> None:
    flush, _ = _collectors.get(os.getpid(), _NO_REQUESTS)
    flush()


def wait(timeout: float | None = None) -> list[BackgroundTask]:
    """Block until all tasks that were handed over so far are done.

    ``wait`` includes tasks that these tasks add, and tasks of responses that a server has
    freed without ``close()``, or that a thread is closing now. A task that is sent to another
    process is done when its broker has confirmed the message. ``wait`` includes durable tasks
    of this process that are due in its file, and those for which the pool has no room yet.
    Tasks whose time has not come, and messages that a folder and no memory holds, are neither
    waited for nor returned. Runners accept batches during and after the wait. Call ``wait`` at
    any time, any number of times, from any thread, but not from a background task.

    :param timeout: how long to wait, in seconds; None for no limit.
    :return: the tasks in memory that are not done. They go on.
    :raises RuntimeError: from a running task or the portal's thread, which would be blocked.
    :raises TypeError: if ``timeout`` is not a number.
    :raises ValueError: if ``timeout`` is negative.
    """
    limit = _check("wait", timeout)
    deadline = time.monotonic() + (math.inf if limit is None else limit)
    _flush()
    now = time.monotonic()
    for ledger in ledgers_here():
        # The timer submits these within microseconds, unless the system gives it no thread.
        ledger.wait_for(ledger.due_by(now), min(deadline, now + _SUBMIT_TIMEOUT))
    notice = Notice(first=math.inf)
    while True:
        # First: a task that leaves its file meanwhile is in a batch then.
        was_behind = _is_behind()
        left = wait_for([*batches_under_way(), *tasks_to_send()], deadline, notice)
        # Again: a task of these batches may be in its file now, and be due.
        if not (was_behind or _is_behind()) or time.monotonic() >= deadline:
            break
        greenlets.event().wait(_PAUSE)
    # Tasks that these tasks have added, and that wait to be sent.
    return list(dict.fromkeys(left + wait_for(tasks_to_send(), deadline, notice)))


def _is_behind() -> bool:
    """True if a runner has tasks in a file that are due, or wait for room."""
    return any(each.is_behind for each in _registered() if isinstance(each, LedgerRunner))


def drain(timeout: float | None = None) -> list[BackgroundTask]:
    """Block until all tasks are done, and stop the runners: call this before process exit.

    Tasks that are not done when the time is up are logged at ERROR and do not begin. A batch
    that is submitted later runs in ``close()``. During the wait, a WARNING after one second
    and then every five seconds names the tasks. A second call does not wait for the same
    runner again.

    :param timeout: how long to wait, in seconds; None for each runner's own
        ``drain_timeout``.
    :return: the tasks that were logged as unfinished.
    :raises RuntimeError: from a running task or the portal's thread, which would be blocked.
    :raises TypeError: if ``timeout`` is not a number.
    :raises ValueError: if ``timeout`` is negative.
    :raises KeyboardInterrupt: if Ctrl-C ends the wait; unfinished tasks are logged too.
    """
    limit = _check("drain", timeout)
    _flush()
    return finish(limit=limit)


def _check(name: str, timeout: float | None) -> float | None:
    checks.seconds("timeout", timeout, or_none=True)
    tasks, loop = current.get(None), portal.peek()
    is_in_task = tasks is not None and tasks.is_closed
    if is_in_task or (loop is not None and loop.is_current):
        raise InsideTaskError(name)
    return None if timeout is None else checks.bounded(timeout)


@contextmanager
def _log_if_interrupted() -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        log_all_unfinished(f"before the wait for it was interrupted ({type(exc).__name__})")
        raise


@_log_if_interrupted()
def _drain_at_exit(is_last: bool) -> None:
    _flush()
    left = batches_under_way()
    no_time_left = bool(left) and all(batch in _had_their_time for batch in left)
    finish(began=-math.inf if no_time_left else None, names_requests=is_last)


@_log_if_interrupted()
def _wait_at_exit() -> None:
    """Wait as long as a drain would, while another thread may still serve requests."""
    _flush()
    batches = batches_under_way()
    wait_for(batches, time.monotonic() + longest_limit(of_busy=True), Notice())
    _had_their_time.update(batches)


def finish(
    *,
    limit: float | None = None,
    began: float | None = None,
    notice: Notice | None = None,
    names_requests: bool = True,
) -> list[BackgroundTask]:
    """Drain every runner, log unfinished tasks at ERROR, stop the portal.

    Blocks for the longest ``drain_timeout`` at most, and half a second for the portal. A
    second call does not wait for the same runner again.

    :param limit: how long to wait, in seconds, in place of each runner's own limit.
    :param began: start of that time, by :func:`time.monotonic`; None for now.
    :param notice: logs during the wait; None for a new ``Notice``.
    :param names_requests: True to log the tasks of requests that have not ended, too.
    :return: the tasks that were logged as unfinished.
    :raises KeyboardInterrupt: if Ctrl-C ends the wait; unfinished tasks are logged too.
    """
    began = time.monotonic() if began is None else began
    notice = notice or Notice()
    _prepare_drain()
    waiting = [
        (runner, _limit_of(runner) if limit is None else limit)
        for runner in _registered()
        if _drained_in.get(id(runner)) != os.getpid()
    ]
    batches = batches_under_way()
    limits = [seconds for runner, seconds in waiting if _may_have_work(runner)]
    latest = began + max(limits, default=0.0)
    reasons: dict[int, str] = {}
    all_done = True
    try:
        with _log_if_interrupted():
            for runner, seconds in waiting:
                reason = _drain(runner, seconds, began, notice, latest)
                all_done = all_done and reason is None
                reasons[id(runner)] = reason or _time_is_up(seconds)
            if waiting and all_done:
                # A user's drain() may return no tasks although some batches have not ended, or
                # before the timer has submitted a batch.
                late = {batch: None for batch in batches_under_way() if batch.has_waited}
                wait_for(batches | late, latest, notice)
                # A runner may get a batch after its drain: from a server's thread, or from a
                # request that a task of the next runner makes.
                for runner, seconds in waiting:
                    if isinstance(runner, LedgerRunner):
                        wait_for(list(runner.ledger.batches), began + seconds, notice)
        return _log_left(reasons, "by the end of the process", names_requests=names_requests)
    finally:
        portal.stop(portal.STOP_TIMEOUT if waiting else 0.0)
        for call in _after_drain.get(os.getpid(), ()):
            call()


def _prepare_drain() -> None:
    for runner in _registered():
        if isinstance(runner, LedgerRunner):
            runner.prepare_drain()


def _drain(
    runner: Runner, seconds: float, began: float, notice: Notice, latest: float
) -> str | None:
    """Drain ``runner``; return why its tasks are unfinished, or None if all are done.

    :param latest: the latest deadline of all runners, by :func:`time.monotonic`.
    """
    deadline = began + seconds
    ledger = ledger_of(runner)
    while True:
        until = min(deadline, notice.due)
        # First: a runner that drains takes no more work in.
        if not ledger.wait_for(ledger.not_submitted(deadline, runner), until):
            if time.monotonic() >= deadline:
                return _time_is_up(seconds)
            notice.log_if_due(latest, runner=runner)
            continue
        try:
            left = runner.drain(max(0.0, until - time.monotonic()))
        except BaseException as exc:  # a user's runner: the remaining runners must be drained
            if _is_interruption(exc, runner):
                raise
            log.error("%s could not be drained", runner, exc_info=exc)
            return "since its runner could not be drained"
        if not left:
            # A task that has failed is called again.
            if ledger.not_submitted(deadline, runner):
                continue
            return None
        now = time.monotonic()
        if now >= deadline:
            return _time_is_up(seconds)
        if now < until - _EARLY:
            return "when the drain of its runner had ended"
        notice.log_if_due(latest, runner=runner)


def _time_is_up(seconds: float) -> str:
    return f"within the drain time of {seconds:g} seconds"


def _is_interruption(exc: BaseException, runner: Runner) -> bool:
    """True if ``exc``, raised by a method of ``runner``, must end the wait for all runners.

    The package's own runners raise no exceptions themselves. A user's runner may raise, for
    instance an ``asyncio.CancelledError``.
    """
    if isinstance(exc, Exception):
        return False
    return _works_by_ledger(runner) or stops_worker(exc)


def log_all_unfinished(reason: str) -> None:
    """Let no more tasks begin and log the unfinished tasks at ERROR; does not wait."""
    _log_left({}, reason)


def _log_left(
    reasons: dict[int, str], otherwise: str, *, names_requests: bool = True
) -> list[BackgroundTask]:
    """Log unfinished tasks by runner, with its reason in ``reasons``, else ``otherwise``.

    Tasks submitted during the drain are logged too. A batch that two runners hold is logged
    once.
    """
    named = []
    _prepare_drain()
    for ledger in ledgers_here():
        named += _name(ledger.abandon_waiting(), task_log.WAITING)
        named += _name(ledger.abandon_unsent(), task_log.UNSENT)
    for runner in _registered():
        _drained_in[id(runner)] = os.getpid()
        named += _name(_left_of(runner), reasons.get(id(runner), otherwise))
    # Tasks that a user's runner has accepted and did not return.
    named += _name(
        [task for batch in batches_under_way() for task in batch.abandon()], otherwise
    )
    if names_requests:
        _, abandon = _collectors.get(os.getpid(), _NO_REQUESTS)
        named += _name(abandon(), otherwise)
    return named


def _name(tasks: list[BackgroundTask], reason: str) -> list[BackgroundTask]:
    left = [task for task in tasks if task not in _logged]
    for task in left:
        _logged.add(task)
        task_log.log_unfinished(task, reason)
    return left


def longest_limit(*, of_busy: bool = False) -> float:
    """The longest ``drain_timeout`` of all runners, in seconds.

    :param of_busy: True to count only runners that may have unfinished tasks now.
    """
    runners = [runner for runner in _registered() if not of_busy or _may_have_work(runner)]
    return max(map(_limit_of, runners), default=0.0)


def _may_have_work(runner: Runner) -> bool:
    if not isinstance(runner, LedgerRunner):
        return True
    ledger = runner.ledger
    return bool(ledger.batches or ledger.waiting or ledger.unsent)


def _left_of(runner: Runner) -> list[BackgroundTask]:
    can_abandon = False
    try:
        can_abandon = hasattr(runner, "abandon")
        left = runner.abandon() if can_abandon else runner.drain(0.0)  # type: ignore[attr-defined]
        return [task for task in left or () if isinstance(task, BackgroundTask)]
    except BaseException as exc:  # a user's runner, as in _drain()
        if _is_interruption(exc, runner):
            raise
        if can_abandon:  # else _drain() has logged the failure
            log.error("%s could not say what it left undone", runner, exc_info=exc)
        return []


def _limit_of(runner: Runner) -> float:
    try:
        given = checks.bounded(getattr(runner, "drain_timeout", DRAIN_TIMEOUT))
        if given >= 0:
            return given
        error: Exception = ValueError(f"{given:g} seconds")
    except Exception as exc:  # a user's runner
        error = exc
    log.error("%s has no number of seconds as its drain_timeout", runner, exc_info=error)
    return DRAIN_TIMEOUT
