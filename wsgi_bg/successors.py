"""Tasks that are added because a task ends: by its hooks, ``on_error`` or a teardown.

Such a task ends too, and adds the next one: a request could run tasks for ever without any
task's own code adding another. Each of these tasks knows in which generation it is.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from .exceptions import EndlessTasksError

if TYPE_CHECKING:
    from contextvars import Token

    from .task import BackgroundTask
    from .tasks import BackgroundTasks

MAX_GENERATIONS = 100
"""How many tasks in a row may have been added because the task before has ended."""

_generation: ContextVar[int] = ContextVar("wsgi_bg.generation", default=0)


class observing:  # noqa: N801  # used as a function
    """While entered, tasks that this context adds are added because ``task`` ends.

    A class, and not a generator function, which takes three times as long.
    """

    __slots__ = ("_generation", "_token")

    _token: Token[int]

    def __init__(self, task: BackgroundTask) -> None:
        self._generation = getattr(task, "_generation", 0) + 1

    def __enter__(self) -> None:
        self._token = _generation.set(self._generation)

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> bool:
        _generation.reset(self._token)
        # One error says all: the view may have added many tasks, each with such a row.
        return isinstance(exc, EndlessTasksError) and not exc.is_first


def admit(task: BackgroundTask, batch: BackgroundTasks) -> None:
    """Let a task know its generation.

    :raises RuntimeError: naming the function, if its generation is beyond the limit.
    """
    generation = _generation.get()
    if generation > MAX_GENERATIONS:
        is_first = not getattr(batch, "_is_endless", False)
        batch._is_endless = True
        raise EndlessTasksError(task.name, generation, is_first=is_first)
    if generation:
        task._generation = generation
        assert task._context is not None
        task._context.run(_generation.set, 0)  # its own code is free to add what it wants
