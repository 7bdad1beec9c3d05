"""Log messages for tasks that failed or were not run.

Messages name tasks without their arguments, since arguments may be private data.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

from wsgi_bg._process import log, per_process
from wsgi_bg._process.interrupts import is_from_signal_handler
from wsgi_bg._tasks.successors import observe, observe_log

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask


WAITING = "since it was waiting for its time"
"""Why a task is unfinished that no thread could begin before the process ends."""

UNSENT = "since it was not sent"
"""Why a task is unfinished that another process should run."""


def log_failure(
    task: BackgroundTask, exc: BaseException, said: defaultdict[Any, Any] | None = None
) -> None:
    """Log the task's error with its traceback.

    Called in the task's context, so that log records carry its correlation ids.
    """
    message, args = _raised(task, exc)
    observe_log(task, partial(log.error, message, *args, exc_info=exc, said=said))


def log_attempt(task: BackgroundTask, exc: BaseException, seconds: float) -> None:
    """Log the error of an attempt after which the task will be called again.

    :param seconds: the wait before the next attempt.
    """
    message, args = _raised(task, exc)
    message += ", and is called again in %.3g seconds"
    observe_log(task, partial(log.warning, message, *args, seconds, exc_info=exc))


def log_dropped(task: BackgroundTask, added_by: BackgroundTask) -> None:
    """Log and discard a task whose adder will be called again, and will add the task again."""
    message = "background task %s was dropped: %s, which has added it, is called again"
    log.debug(message, task.name, added_by.name)
    notify_discarded(task, f"{added_by.name}, which has added it, is called again")


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
        log.error("on_error raised for background task %s", task.name, exc_info=second)


def log_skipped(task: BackgroundTask, reason: str, said: defaultdict[Any, Any]) -> None:
    """Log a task that will not run."""
    message = "background task %s was not run: %s"
    observe_log(task, partial(log.warning, message, task.name, reason, said=said))


def log_interrupted(task: BackgroundTask, exc: BaseException, *, began: bool) -> None:
    """Log a task that was interrupted or never began because ``exc`` stopped its worker."""
    end = " to its end" if began else ""
    reason = f"{_kind_of(exc)} stopped its worker"
    log.warning("background task %s was not run%s: %s", task.name, end, reason)
    notify_discarded(task, reason)


def log_unfinished(task: BackgroundTask, reason: str) -> None:
    """Log a task that is unfinished when the process exits."""
    log.error(
        "background task %s was not finished %s: the process ends without it",
        task.name,
        reason,
    )
    notify_discarded(task, f"it was not finished {reason}")


def notify_discarded(task: BackgroundTask, reason: str) -> None:
    """Call the hooks for a task that will not run, or that was interrupted."""
    task.options.calls.discarded(task, reason)


def _kind_of(exc: BaseException) -> str:
    """The name of the class of ``exc``, read without code of the metaclass, which may raise."""
    return str(type.__dict__["__name__"].__get__(type(exc)))
