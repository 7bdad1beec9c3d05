"""Tasks that hooks, ``on_error`` or a teardown add because a task has ended.

When such a task ends, the same code adds the next task: a request could run tasks for ever
although no task's own code adds a task. So each of these tasks counts its generation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop.coroutines import refuse_unrun
from wsgi_bg.exceptions import EndlessTasksError

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask

MAX_GENERATIONS = 100
"""Most tasks in a row that are added because the task before has ended.

Also the most such tasks, for each task of the first generation: a teardown that adds two tasks
each time would have added 2**100 tasks before one of them is the last of such a row. A task of
the first generation may add its successor for days, and hooks a task for each."""

_generation: ContextVar[int] = ContextVar("wsgi_bg.generation", default=0)
"""While something observes a task: the generation of a task that is added now. In the context
of a task that was added so: its generation, negative. What the task itself adds is of the same
generation. A context variable, since an observer may await, and add tasks on another thread."""

watched: list[None] = []
"""If not empty, a task without hooks is admitted, too: while a thread logs a task, and once a
function was registered with a ``Retry``."""


def observe(task: BackgroundTask, observer: Callable[..., Any], *args: Any) -> None:
    """Call ``observer(*args)``; a task that the observer adds is a successor of ``task``.

    :raises TypeError: if the observer returned a coroutine or a generator that no one runs.
    :raises BaseException: the error of the observer. If a request has several endless rows
        of tasks, only the first ``EndlessTasksError`` is raised; later errors are suppressed.
    """
    before = _generation.get()
    try:
        _generation.set(_next(task, before) if before else task.generation + 1)
        result = observer(*args)
        if result is not None:
            refuse_unrun(result)
    except EndlessTasksError as exc:
        if exc.is_first:
            raise
    finally:
        _generation.set(before)


async def observe_async(
    task: BackgroundTask, observer: Callable[..., Awaitable[Any]], *args: Any
) -> None:
    """Await ``observer(*args)``: see :func:`observe`. Each step must run in the same context.

    :raises BaseException: as :func:`observe` does.
    """
    before = _generation.get()
    try:
        _generation.set(_next(task, before))
        await observer(*args)
    except EndlessTasksError as exc:
        if exc.is_first:
            raise
    finally:
        _generation.set(before)


def _next(task: BackgroundTask, inside: int) -> int:
    """The generation of what is added now; ``inside`` is negative in a task's own context."""
    return max(task.generation, -inside) + 1


def begin_request() -> None:
    """Count from zero: the calling thread adds the first task of a request.

    The exception of a signal handler may have ended :func:`observe` before its last step.
    """
    if _generation.get():
        _generation.set(0)


def observe_log(task: BackgroundTask, log: Callable[[], Any]) -> None:
    """Call ``log()``, whose handler may add a task to send the record by mail, for example."""
    watched.append(None)
    try:
        observe(task, log)
    finally:
        watched.pop()


def admit(task: BackgroundTask, batch: Any) -> None:
    """Set the generation of a task that is about to join ``batch``, a ``BackgroundTasks``.

    :raises RuntimeError: if the generation, or the number of such tasks, is beyond the limit;
        names the function.
    """
    generation = _generation.get()
    if generation:
        request = batch.origin or batch
        first, later, added = getattr(request, "successors", (0, 0, 0))
        if generation in (1, -1):  # also a successor that a task of the first generation adds
            first += 1
        later += generation > 1
        added += generation > 0
        request.successors = first, later, added
        if generation > MAX_GENERATIONS or (
            generation > 0 and later > MAX_GENERATIONS * max(first, 1)
        ):
            is_first = not getattr(request, "is_endless", False)
            request.is_endless = True
            raise EndlessTasksError(task.name, added - 1, is_first=is_first)
        task.generation = abs(generation)
        assert task.context is not None
        task.context.run(_generation.set, -task.generation)
