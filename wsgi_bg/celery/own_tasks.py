"""Celery's own tasks, which a user gives to ``add_task``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from celery import Celery, Task, signature
from celery.canvas import Signature, chord, group

from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg.exceptions import RegistrationError


class Call(NamedTuple):
    """How Celery is to make the call of a task."""

    name: str
    """The name of Celery's task."""
    apply_async: Callable[..., Any]
    """Called with further options, such as ``task_id``."""
    ignores_result: bool
    runs_only_there: bool
    """True if the function needs Celery's task: ``bind=True``, or a chain."""


def find(app: Celery, task: BackgroundTask, options: dict[str, Any]) -> Call | None:
    """Return the call of ``task`` if its function belongs to Celery, else None.

    :param options: for ``apply_async``.
    :raises TypeError: if the function belongs to another application, or Celery would have to
        ask the result backend before it sends the task.
    """
    func: Any = task.func
    if type(func) is FunctionType:
        return None
    if type(func) is MethodType and func.__name__ == "delay":
        func = func.__self__
    if isinstance(func, Signature):
        return _of_signature(app, func, task, options)
    if not isinstance(func, Task):
        return None
    own = _own(app, func.name, task)
    apply_async = partial(own.apply_async, task.args, task.kwargs, **options)
    return Call(own.name, apply_async, bool(own.ignore_result), _is_bound(own))


def _of_signature(
    app: Celery, func: Signature, task: BackgroundTask, options: dict[str, Any]
) -> Call:
    if isinstance(func, (group, chord)):
        raise RegistrationError(
            f"{task.name} is several tasks at once: add each task, or a task that starts them",
            func,
        )
    first = func.tasks[0] if "tasks" in func.kwargs else func
    own = _own(app, first.task, task)
    ignored = bool(func.options.get("ignore_result", own.ignore_result))
    mine = signature(func, app=app)
    apply_async = partial(mine.apply_async, task.args, task.kwargs, **options)
    return Call(own.name, apply_async, ignored, _is_bound(own) or first is not func)


def _own(app: Celery, name: str, task: BackgroundTask) -> Task:
    try:
        return app.tasks[name]
    except KeyError:
        raise RegistrationError(
            f"{task.name} is no task of {app!r}: give the runner the application of the task",
            task.func,
        ) from None


def _is_bound(task: Task) -> bool:
    return not isinstance(vars(type(task)).get("run"), staticmethod)
