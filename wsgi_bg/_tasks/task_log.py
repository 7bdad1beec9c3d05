"""Log messages for tasks that failed or were not run.

Messages name tasks without their arguments, since arguments may be private data.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop.coroutines import refuse_unrun
from wsgi_bg._process import log, per_process
from wsgi_bg._process.clock import on_the_wall
from wsgi_bg._process.interrupts import is_from_signal_handler, type_name
from wsgi_bg._tasks.successors import observe, observe_log

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask


WAITING = "since it was waiting for its time"
"""Why a task is unfinished that no thread could begin before the process ends."""

UNSENT = "since it was not sent"
"""Why a task is unfinished that another process should run."""


def fields(
    task: BackgroundTask,
    outcome: str | None = None,
    *,
    error: BaseException | None = None,
    reason: str | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """The attributes of a log record about ``task``; each has a value, which may be None.

    :param started: when the call began (:func:`time.monotonic`), if the caller knows.
    """
    record = task.record[0] if task.record else None
    root = task.root if record is None else record.batch.root
    found = fields_of(task.name, task.id, outcome, reason)
    found["wsgi_bg_attempt"] = task.attempt
    found["wsgi_bg_error"] = None if error is None else _kind_of(error)
    if root is not None:
        found["wsgi_bg_request"] = root.request
        found["wsgi_bg_runner"] = type_name(root.options.runner)
    if record is not None:
        found["wsgi_bg_added"] = record.added_time
        found["wsgi_bg_wait"] = record.wait
        started = started or record.started_at
    if started is not None:
        found["wsgi_bg_started"] = on_the_wall(started)
        found["wsgi_bg_duration"] = time.monotonic() - started
    return found


def fields_of(
    name: str,
    id: str,  # noqa: A002
    outcome: str | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """The attributes of a log record about a task that is known by its name and id only."""
    return {
        "wsgi_bg_task": name,
        "wsgi_bg_id": id,
        "wsgi_bg_request": None,
        "wsgi_bg_runner": None,
        "wsgi_bg_thread": threading.current_thread().name,
        "wsgi_bg_attempt": None,
        "wsgi_bg_outcome": outcome,
        "wsgi_bg_error": None,
        "wsgi_bg_reason": reason,
        "wsgi_bg_added": None,
        "wsgi_bg_started": None,
        "wsgi_bg_ended": None if outcome in (None, "running") else time.time(),
        "wsgi_bg_wait": None,
        "wsgi_bg_duration": None,
    }


def log_failure(
    task: BackgroundTask,
    exc: BaseException,
    said: defaultdict[Any, Any] | None = None,
    started: float | None = None,
) -> None:
    """Log the task's error with its traceback.

    Called in the task's context, so that log records carry its correlation ids.

    :param started: when the call began (:func:`time.monotonic`), if DEBUG is logged.
    """
    message, args = _raised(task, exc)
    extra = fields(task, "failed", error=exc, started=started)
    observe_log(task, partial(log.error, message, *args, exc_info=exc, said=said, extra=extra))
    if started is not None:
        _log_end(task, extra)


def log_end(task: BackgroundTask, started: float, error: BaseException | None = None) -> None:
    """Log at DEBUG that the call of a task has ended, and how long the call has taken.

    :param started: when the call began (:func:`time.monotonic`).
    """
    outcome = "succeeded" if error is None else "failed"
    _log_end(task, fields(task, outcome, error=error, started=started))


def _log_end(task: BackgroundTask, extra: dict[str, Any]) -> None:
    message = "background task %s has %s after %.3g seconds"
    args = task.name, extra["wsgi_bg_outcome"], extra["wsgi_bg_duration"]
    observe_log(task, partial(log.debug, message, *args, extra=extra))


def log_slow(task: BackgroundTask, seconds: float, stack: str, thread: str | None) -> None:
    """Log that a call has taken ``seconds`` and goes on, with its stack at this moment.

    :param thread: the name of the thread of the call; the caller is on another thread.
    """
    message = "background task %s still runs after %.3g seconds:\n%s"
    extra = fields(task, "running")
    extra["wsgi_bg_thread"] = thread
    observe_log(task, partial(log.warning, message, task.name, seconds, stack, extra=extra))


def log_attempt(
    task: BackgroundTask, exc: BaseException, seconds: float, started: float | None
) -> None:
    """Log the error of an attempt after which the task will be called again.

    :param seconds: the wait before the next attempt.
    :param started: when the call began (:func:`time.monotonic`), if DEBUG is logged.
    """
    message, args = _raised(task, exc)
    message += ", and is called again in %.3g seconds"
    extra = fields(task, "retried", error=exc, started=started)
    observe_log(task, partial(log.warning, message, *args, seconds, exc_info=exc, extra=extra))


def log_dropped(task: BackgroundTask, added_by: BackgroundTask) -> None:
    """Log and discard a task whose adder will be called again, and will add the task again."""
    message = "background task %s was dropped: %s, which has added it, is called again"
    reason = f"{added_by.name}, which has added it, is called again"
    extra = fields(task, "discarded", reason=reason)
    log.debug(message, task.name, added_by.name, extra=extra)
    notify_discarded(task, reason)


def _raised(task: BackgroundTask, exc: BaseException) -> tuple[str, tuple[Any, ...]]:
    plan = getattr(task, "plan", None)
    args = task.name, _kind_of(exc)
    if plan is None or plan.retry is None:
        return "background task %s raised %s", args
    message = "background task %s raised %s in attempt %d of %d"
    return message, (*args, plan.attempt, plan.retry.attempts)


def notify_failure(task: BackgroundTask, exc: BaseException) -> None:
    """Call the hooks and the ``on_error`` of a failed task, in the task's context."""
    generation = per_process.generation
    task.options.calls.failed(task, exc)
    on_error = task.options.on_error
    if on_error is None or per_process.generation != generation:
        return
    try:
        observe(task, on_error, task, exc)
    except BaseException as second:
        if is_from_signal_handler(second) or per_process.generation != generation:
            raise
        message = "on_error raised for background task %s"
        log.error(message, task.name, exc_info=second, extra=fields(task))


def call_hook(moment: str, method: Callable[..., object], record: Any) -> None:
    """Call a method of a hook with a record; log an error of the method.

    :param moment: the name of the method.
    :param record: of a task, or of a batch.
    :raises BaseException: if the error stops the worker, or was raised in a forked child.
    """
    task: BackgroundTask | None = getattr(record, "task", None)
    generation = per_process.generation
    try:
        if task is None:
            refuse_unrun(method(record))
        else:
            observe(task, method, record)
    except BaseException as exc:
        if is_from_signal_handler(exc) or per_process.generation != generation:
            raise
        subject = "a batch" if task is None else f"background task {task.name}"
        hooks = type_name(getattr(method, "__self__", method))
        extra = None if task is None else fields(task)
        log.error("%s.%s raised for %s", hooks, moment, subject, exc_info=exc, extra=extra)


def log_skipped(task: BackgroundTask, reason: str, said: defaultdict[Any, Any]) -> None:
    """Log a task that will not run."""
    message = "background task %s was not run: %s"
    extra = fields(task, "discarded", reason=reason)
    observe_log(task, partial(log.warning, message, task.name, reason, said=said, extra=extra))


def log_interrupted(task: BackgroundTask, exc: BaseException, *, began: bool) -> None:
    """Log a task that was interrupted or never began because ``exc`` stopped its worker."""
    end = " to its end" if began else ""
    reason = f"{_kind_of(exc)} stopped its worker"
    extra = fields(task, "discarded", reason=reason)
    log.warning("background task %s was not run%s: %s", task.name, end, reason, extra=extra)
    notify_discarded(task, reason)


def log_unfinished(task: BackgroundTask, reason: str) -> None:
    """Log a task that is unfinished when the process exits."""
    log.error(
        "background task %s was not finished %s: the process ends without it",
        task.name,
        reason,
        extra=fields(task, "discarded", reason=f"it was not finished {reason}"),
    )
    notify_discarded(task, f"it was not finished {reason}")


def notify_discarded(task: BackgroundTask, reason: str) -> None:
    """Call the hooks for a task that will not run, or that was interrupted."""
    task.options.calls.discarded(task, reason)


def _kind_of(exc: BaseException) -> str:
    """The name of the class of ``exc``, read without code of the metaclass, which may raise."""
    return str(type.__dict__["__name__"].__get__(type(exc)))
