"""Warnings about arguments that belong to the request: files, requests, responses, proxies.

When the task runs, such an object is closed, or a proxy refers to another object or to none.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import partial
from inspect import Parameter
from itertools import islice
from types import BuiltinMethodType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import is_from_signal_handler
from wsgi_bg._tasks.callables import signature_of
from wsgi_bg._tasks.current import background_tasks
from wsgi_bg._tasks.task_log import fields

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask

_FILE = (
    "an uploaded file, which is closed when the request ends: pass its bytes, or the path of "
    "a saved copy"
)
_REQUEST = "a request, which ends before the task runs: pass the values that the task needs"
_RESPONSE = "a response, which is closed before the task runs: pass the values of it"
_PROXY = "a proxy, which may stand for another object in the task: pass a value, or an id"

# Keyed by the top-level package and the name of a class, so that no framework is imported.
# Subclasses are found too.
_REFUSED = {
    ("werkzeug", "FileStorage"): _FILE,
    ("werkzeug", "Request"): _REQUEST,
    ("werkzeug", "Response"): _RESPONSE,
    ("werkzeug", "LocalProxy"): _PROXY,
    ("django", "UploadedFile"): _FILE,
    ("django", "HttpRequest"): _REQUEST,
    ("django", "HttpResponseBase"): _RESPONSE,
    ("django", "SimpleLazyObject"): _PROXY,  # request.user
    ("bottle", "FileUpload"): _FILE,
    ("bottle", "BaseRequest"): _REQUEST,
    ("bottle", "BaseResponse"): _RESPONSE,
    ("rest_framework", "Request"): _REQUEST,  # holds Django's request
    ("cherrypy", "_ThreadLocalProxy"): _PROXY,
    ("cherrypy", "Part"): _FILE,
    ("falcon", "BodyPart"): _FILE,
    ("falcon", "Request"): _REQUEST,
    ("falcon", "Response"): _RESPONSE,
    ("cgi", "FieldStorage"): _FILE,  # webob's uploads
    ("webob", "BaseRequest"): _REQUEST,
    ("webob", "Response"): _RESPONSE,
}

# Types that were checked and are harmless. The set is bounded, since it keeps classes alive.
_harmless: set[type] = {bool, bytes, float, int, str, type(None)}
_MOST_HARMLESS = 1000

# Each with a function for its items, also of a subclass; runs no code of the subclass.
_CONTAINERS: dict[type, Callable[[Any], Iterable[object]]] = {
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    dict: dict.values,
    deque: deque.__iter__,
}
_LOOKED_INTO = 10  # items of a container
_DEPTH = 2  # the files of a request are a dict of lists

# Bound methods, of classes and of builtin types.
_METHODS = (MethodType, BuiltinMethodType)

# The names of the functions for which a warning was logged.
_warned: set[str] = set()


def look_at(tasks: Iterable[BackgroundTask]) -> None:
    """Log a WARNING, once for each function, if an argument of a task belongs to the request.

    Arguments inside a :func:`functools.partial` and the object of a bound method count too, and
    so do the first items of lists, tuples, sets, dicts, deques and the fields of dataclasses.
    Costs 0.1 us for ordinary arguments. Reads only the types of the arguments.

    :raises BaseException: what a signal handler raises, or stops the server's worker;
        nothing else.
    """
    for task in tasks:
        try:
            func: Any = task.func
            kind = type(func)
            if kind is not FunctionType and (
                isinstance(func, partial)
                or (kind in _METHODS and type(func.__self__) not in _harmless)
            ):
                _look_closely(task)
            elif task.args or task.kwargs:
                for argument in (*task.args, *task.kwargs.values()):
                    kind = type(argument)
                    if kind not in _harmless and not (
                        kind in _CONTAINERS and _has_harmless_items(argument, kind)
                    ):
                        _look_closely(task)
                        break
        except BaseException as exc:  # raised by a class or a signature
            if is_from_signal_handler(exc):
                raise


def _has_harmless_items(container: object, kind: type) -> bool:
    for item in islice(_CONTAINERS[kind](container), _LOOKED_INTO):  # all() takes twice as long
        if type(item) not in _harmless:
            return False
    return True


def _look_closely(task: BackgroundTask) -> None:
    name = task.name
    if name in _warned:
        return
    func: Any = task.func
    args, kwargs = task.args, task.kwargs
    while isinstance(func, partial):
        func, args, kwargs = func.func, (*func.args, *args), {**func.keywords, **kwargs}
    places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
    found = [
        f"{_name_of(func, place)} {advice}"
        for place, argument in places
        if (advice := _advice_on(argument)) is not None
    ]
    if type(func) in _METHODS and (advice := _advice_on(func.__self__)) is not None:
        found.insert(0, f"the object of the method {advice}")
    if found:
        _warned.add(name)
        log.warning(
            "background task %s has an argument of the request: %s",
            name,
            "; ".join(found),
            extra=fields(task),
        )


def _advice_on(argument: object, depth: int = _DEPTH) -> str | None:
    """Say what ``argument`` is or has that belongs to the request; None if that is nothing."""
    kind = type(argument)  # not __class__, which a proxy passes on
    for base in kind.__mro__:
        advice = _REFUSED.get((base.__module__.partition(".")[0], base.__name__))
        if advice is not None:
            # In a task, background_tasks and current_app refer to the right object too.
            current_app = getattr(sys.modules.get("flask"), "current_app", None)
            if argument is background_tasks or argument is current_app:
                return None
            return f"is {advice}"
    items = _items_of(argument, kind)
    if items is not None:
        first = islice(items, _LOOKED_INTO if depth else 0)
        inside = (_advice_on(item, depth - 1) for item in first)
        found = next((each for each in inside if each is not None), None)
        return None if found is None else f"has {found.partition(' ')[2]}"
    if len(_harmless) < _MOST_HARMLESS:
        _harmless.add(kind)
    return None


def _items_of(argument: object, kind: Any) -> Iterable[object] | None:
    """The items of a container, or the values of a dataclass; None for any other object."""
    for base in kind.__mro__:
        if base in _CONTAINERS:
            return _CONTAINERS[base](argument)
    if is_dataclass(kind):
        return (object.__getattribute__(argument, each.name) for each in dataclass_fields(kind))
    return None


def _name_of(func: Callable[..., object], place: int | str) -> str:
    """Name an argument by its parameter, or by its position if that has no parameter.

    :param place: the index of a positional argument, or the name of a keyword argument.
    """
    if isinstance(place, str):
        return f"argument {place!r}"
    try:
        parameters = list(signature_of(func).parameters.values())
    except (TypeError, ValueError):  # a function in C without a signature
        parameters = []
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    if place < len(parameters) and parameters[place].kind in named:
        return f"argument {parameters[place].name!r}"
    return f"positional argument {place + 1}"
