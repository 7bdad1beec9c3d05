"""Celery's own tasks, which a user gives to ``add_task``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from celery import Celery, Task, signature
from celery.canvas import Signature, _chain, chord, chunks, group
from celery.result import EagerResult
from kombu import Producer

from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg.celery.options import TIMES
from wsgi_bg.exceptions import RegistrationError

_BUILDERS = ("s", "si", "signature", "map", "starmap", "chunks")
"""The methods of a task that only make a signature."""

_LINKS = ("link", "link_error")
"""The options of a message that name tasks which are sent when its task has ended."""


class Call(NamedTuple):
    """How Celery is to make the call of a task."""

    name: str
    """The name of Celery's task."""
    apply_async: Callable[..., Any]
    """Called with further options, such as ``task_id``."""
    ignores_result: bool
    runs_only_there: bool
    """True if the call needs Celery: ``bind=True``, ``autoretry_for``, links, or a chain."""
    id: str | None = None
    """The id that the user has given to the task."""
    here: Callable[[], Any] | None = None
    """Makes the call in this process; None if the function of the task does."""


def find(app: Celery, task: BackgroundTask, options: dict[str, Any]) -> Call | None:
    """Return the call of ``task`` if its function belongs to Celery, else None.

    :param options: for ``apply_async``.
    :raises TypeError: if the function belongs to another application, Celery would have to
        ask the result backend before it sends the task, or the function only makes a
        signature.
    """
    func: Any = task.func
    if type(func) is FunctionType:
        return None
    # The function of a method may be any callable, without a name.
    how = getattr(func, "__name__", "") if type(func) is MethodType else ""
    if (isinstance(func, type) and issubclass(func, Signature)) or (
        how in _BUILDERS and isinstance(func.__self__, Task)
    ):
        raise RegistrationError(
            f"{task.name} only makes a signature, and sends nothing: write "
            "add_task(celery_task, ...) or add_task(celery_task.s(...))",
            func,
        )
    # A delay() of the user's own is a function as any other.
    is_delay = how == "delay" and func.__func__ in (Task.delay, Signature.delay)
    if is_delay or how == "apply_async":
        func = func.__self__
    if not isinstance(func, (Signature, Task)):
        return None
    given: tuple[Any, ...] = (task.args, task.kwargs)
    named: dict[str, Any] = {}
    if how == "apply_async":
        given, named = task.args, task.kwargs
    # A time replaces those of a call or a signature. Celery prefers a countdown that is not 0.
    unset = {} if options.keys().isdisjoint(TIMES) else {"countdown": 0}
    options = {**named, **unset, **options}
    here = partial(_call, func, *given, **named) if how or isinstance(func, _chain) else None
    first = func
    while isinstance(first, _chain):
        if not first.tasks:
            raise RegistrationError(f"{task.name} is a chain without tasks", func)
        first = first.tasks[0]
    if isinstance(first, chunks) or _has_group(func):
        raise RegistrationError(
            f"{task.name} is several tasks at once, or a chain with them: add each task, or "
            "a task that starts them",
            func,
        )
    is_signature = isinstance(func, Signature)
    own = _own(app, first.task if is_signature else first.name, task)
    mine = signature(func, app=app) if is_signature else own
    apply_async = mine.apply_async if first is func else partial(_apply_chain, mine)
    set_before = {**first.options, **func.options, **options} if is_signature else options
    return Call(
        own.name,
        partial(apply_async, *given, **options),
        bool(set_before.get("ignore_result", own.ignore_result)),
        first is not func or _needs_celery(own) or any(map(set_before.get, _LINKS)),
        options.get("task_id") or (func.options.get("task_id") if is_signature else None),
        here,
    )


def _has_group(func: Any) -> bool:
    """True if Celery would subscribe to results, at its backend, before it sends ``func``."""
    if isinstance(func, _chain):
        return any(map(_has_group, func.tasks))
    return isinstance(func, (group, chord))


def _call(func: Any, args: Any = None, kwargs: Any = None, *_: Any, **__: Any) -> Any:
    """Make the call of ``delay`` or ``apply_async`` in this process, or those of a chain."""
    if isinstance(func, _chain):
        return func.apply(args or (), kwargs or {}).get(disable_sync_subtasks=False)
    return func(*(args or ()), **(kwargs or {}))


def call_eagerly(call: Call, task_id: str) -> Any:
    """Make the call as Celery does with ``task_always_eager``; raise the error of the call."""
    result = call.apply_async(task_id=task_id)
    if isinstance(result, EagerResult):
        return result.get(disable_sync_subtasks=False)
    return None


def _apply_chain(
    chain: Signature, *args: Any, producer: Producer | None = None, **options: Any
) -> Any:
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
            f"{name} is no task of {app!r}: import the module of the task, or give the runner "
            "the application of the task",
            task.func,
        ) from None


def _needs_celery(task: Task) -> bool:
    is_bound = not isinstance(vars(type(task)).get("run"), staticmethod)
    return is_bound or bool(getattr(task, "autoretry_for", ()))
