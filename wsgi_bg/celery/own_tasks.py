"""Celery's own tasks, which a user gives to ``add_task``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from celery import Celery, Task, signature
from celery.canvas import Signature, _chain, chord, chunks, group
from kombu import Producer

from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg.celery.options import TIMES
from wsgi_bg.exceptions import RegistrationError


class Call(NamedTuple):
    """How Celery is to make the call of a task."""

    name: str
    """The name of Celery's task."""
    apply_async: Callable[..., Any]
    """Called with further options, such as ``task_id``."""
    ignores_result: bool
    runs_only_there: bool
    """True if the call needs Celery: ``bind=True``, ``autoretry_for``, a chain, ``delay``."""
    id: str | None = None
    """The id that the user has given to the task."""


def find(app: Celery, task: BackgroundTask, options: dict[str, Any]) -> Call | None:
    """Return the call of ``task`` if its function belongs to Celery, else None.

    :param options: for ``apply_async``.
    :raises TypeError: if the function belongs to another application, or Celery would have to
        ask the result backend before it sends the task.
    """
    func: Any = task.func
    if type(func) is FunctionType:
        return None
    args: tuple[Any, ...] = (task.args, task.kwargs)
    is_sender = type(func) is MethodType and func.__name__ in ("delay", "apply_async")
    if is_sender:
        if func.__name__ == "apply_async":
            args = task.args
            times = TIMES if "countdown" in options or "eta" in options else ()
            given = {name: task.kwargs[name] for name in task.kwargs if name not in times}
            options = {**given, **options}
        func = func.__self__
    if isinstance(func, Signature):
        return _of_signature(app, func, task, args, options, is_sender)
    if not isinstance(func, Task):
        return None
    own = _own(app, func.name, task)
    apply_async = partial(own.apply_async, *args, **options)
    ignored = bool(options.get("ignore_result", own.ignore_result))
    return Call(
        own.name, apply_async, ignored, is_sender or _needs_celery(own), options.get("task_id")
    )


def _of_signature(
    app: Celery,
    func: Signature,
    task: BackgroundTask,
    args: tuple[Any, ...],
    options: dict[str, Any],
    is_sender: bool,
) -> Call:
    first = func
    while isinstance(first, _chain):
        if not first.tasks:
            raise RegistrationError(f"{task.name} is a chain without tasks", func)
        first = first.tasks[0]
    if isinstance(first, (group, chord, chunks)):
        raise RegistrationError(
            f"{task.name} is several tasks at once: add each task, or a task that starts them",
            func,
        )
    own = _own(app, first.task, task)
    given = {**first.options, **func.options, **options}
    ignored = bool(given.get("ignore_result", own.ignore_result))
    mine = signature(func, app=app)
    apply_async = mine.apply_async if first is func else partial(_apply_chain, mine)
    id_ = options.get("task_id") or func.options.get("task_id")
    needs = is_sender or first is not func or _needs_celery(own)
    return Call(own.name, partial(apply_async, *args, **options), ignored, needs, id_)


def _apply_chain(chain: Signature, *args: Any, producer: Producer, **options: Any) -> Any:
    """Call ``apply_async`` of a chain, which does not pass the producer to its first task."""
    first = chain = chain.clone()
    while isinstance(first, _chain):
        first = first.tasks[0]
    first.set(producer=producer)
    return chain.apply_async(*args, **options)


def _own(app: Celery, name: str, task: BackgroundTask) -> Task:
    try:
        return app.tasks[name]
    except KeyError:
        raise RegistrationError(
            f"{task.name} is no task of {app!r}: give the runner the application of the task",
            task.func,
        ) from None


def _needs_celery(task: Task) -> bool:
    is_bound = not isinstance(vars(type(task)).get("run"), staticmethod)
    return is_bound or bool(getattr(task, "autoretry_for", ()))
