"""What is said of tasks that failed or did not run. Names only: arguments are data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import log, process
from .interrupts import is_from_signal_handler
from .successors import observe

if TYPE_CHECKING:
    from .task import BackgroundTask

observer: Callable[[BackgroundTask, BaseException], None] | None = None
"""What is told of every error that is logged: the pytest plugin, which lets tests fail."""


def failure(
    task: BackgroundTask, exc: BaseException, said: defaultdict[Any, Any] | None = None
) -> None:
    """Log the task's error with its traceback.

    Called in the task's context, so that log records carry its correlation ids.
    """
    kind = _kind_of(exc)
    log.error("background task %s raised %s", task.name, kind, exc_info=exc, said=said)


def tell_failure(task: BackgroundTask, exc: BaseException) -> None:
    """Tell the hooks of the task and its ``on_error``, in the task's context."""
    generation = process.generation
    of_test = observer  # once: another thread may end the test meanwhile
    if of_test is not None:
        of_test(task, exc)
    calls = task._options.calls
    if calls is not None:
        calls.failed(task, exc)
    on_error = task._options.on_error
    if on_error is None or process.generation != generation:
        return
    try:
        observe(task, on_error, task, exc)
    except BaseException as second:
        if is_from_signal_handler(second) or process.generation != generation:
            raise
        log.error("on_error raised for background task %s", task.name, exc_info=second)


def not_run(task: BackgroundTask, reason: str, said: defaultdict[Any, Any]) -> None:
    """Name a task that will not run."""
    log.warning("background task %s was not run: %s", task.name, reason, said=said)


def stopped(task: BackgroundTask, exc: BaseException, *, began: bool) -> None:
    """Name a task that was left undone when ``exc`` stopped its worker."""
    end = " to its end" if began else ""
    reason = f"{_kind_of(exc)} stopped its worker"
    log.warning("background task %s was not run%s: %s", task.name, end, reason)
    discarded(task, reason)


def unfinished(task: BackgroundTask, reason: str) -> None:
    """Name a task that the process ends without."""
    log.error(
        "background task %s was not finished %s: the process ends without it",
        task.name,
        reason,
    )
    discarded(task, f"it was not finished {reason}")


def discarded(task: BackgroundTask, reason: str) -> None:
    """Tell the hooks of a task that will not run, or not to its end."""
    calls = task._options.calls
    if calls is not None:
        calls.discarded(task, reason)


def _kind_of(exc: BaseException) -> str:
    """The name of the class of ``exc``, without asking the class, whose metaclass may raise."""
    return str(type.__dict__["__name__"].__get__(type(exc)))
