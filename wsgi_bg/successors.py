"""Tasks that are added because a task ends: by its hooks, ``on_error`` or a teardown.

Such a task ends too, and adds the next one: a request could run tasks for ever without any
task's own code adding another. Each of these tasks knows in which generation it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .exceptions import EndlessTasksError

if TYPE_CHECKING:
    from .task import BackgroundTask
    from .tasks import BackgroundTasks

MAX_GENERATIONS = 100
"""How many tasks in a row may have been added because the task before has ended."""


class _Thread(threading.local):
    """What the calling thread is about.

    :ivar generation: that of a task that is added now.
    """

    generation = 0


_thread = _Thread()


def observe(task: BackgroundTask, observer: Callable[..., Any], *args: Any) -> None:
    """Call ``observer(*args)``; tasks that it adds are added because ``task`` ends.

    :raises BaseException: what the observer raises. One error says that a row of tasks has no
        end, however many such rows a request has: the others are suppressed.
    """
    before = _thread.generation
    _thread.generation = getattr(task, "_generation", 0) + 1
    try:
        observer(*args)
    except EndlessTasksError as exc:
        if exc.is_first:
            raise
    finally:
        _thread.generation = before


def admit(task: BackgroundTask, batch: BackgroundTasks) -> None:
    """Let a task know its generation.

    :raises RuntimeError: naming the function, if its generation is beyond the limit.
    """
    generation = _thread.generation
    if generation:
        if generation > MAX_GENERATIONS:
            is_first = not getattr(batch, "_is_endless", False)
            batch._is_endless = True
            raise EndlessTasksError(task.name, generation, is_first=is_first)
        task._generation = generation
