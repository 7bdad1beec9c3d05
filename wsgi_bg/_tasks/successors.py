"""Tasks that hooks, ``on_error`` or a teardown add because a task has ended.

When such a task ends, the same code adds the next task: a request could run tasks for ever
although no task's own code adds a task. So each of these tasks counts its generation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wsgi_bg.exceptions import EndlessTasksError

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask

MAX_GENERATIONS = 100
"""Most tasks in a row that are added because the task before has ended."""


class _Thread(threading.local):
    """State of the calling thread.

    :ivar generation: the generation of a task that the thread adds now.
    """

    generation = 0


_thread = _Thread()

watched: list[None] = []
"""If not empty, a task without hooks is admitted, too: while a thread logs a task, and once a
function was registered with a ``Retry``."""


def observe(task: BackgroundTask, observer: Callable[..., Any], *args: Any) -> None:
    """Call ``observer(*args)``; a task that the observer adds is a successor of ``task``.

    :raises BaseException: the error of the observer. If a request has several endless rows
        of tasks, only the first ``EndlessTasksError`` is raised; later errors are suppressed.
    """
    before = _thread.generation
    try:
        _thread.generation = task.generation + 1
        observer(*args)
    except EndlessTasksError as exc:
        if exc.is_first:
            raise
    finally:
        _thread.generation = before


def begin_request() -> None:
    """Count from zero: the calling thread adds the first task of a request.

    The exception of a signal handler may have ended :func:`observe` before its last step.
    """
    _thread.generation = 0


def observe_log(task: BackgroundTask, log: Callable[[], Any]) -> None:
    """Call ``log()``, whose handler may add a task to send the record by mail, for example."""
    watched.append(None)
    try:
        observe(task, log)
    finally:
        watched.pop()


def admit(task: BackgroundTask, batch: Any) -> None:
    """Set the generation of a task that is about to join ``batch``, a ``BackgroundTasks``.

    :raises RuntimeError: if the generation is beyond the limit; names the function.
    """
    generation = _thread.generation
    if generation:
        if generation > MAX_GENERATIONS:
            is_first = not getattr(batch, "is_endless", False)
            batch.is_endless = True
            raise EndlessTasksError(task.name, generation, is_first=is_first)
        task.generation = generation
