"""Find the injected parameters of a function: those annotated ``BackgroundTasks``."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from wsgi_bg._tasks.background_tasks import BackgroundTasks
from wsgi_bg._tasks.callables import name_of
from wsgi_bg._tasks.current import current, current_background_tasks
from wsgi_bg.exceptions import OutsideRequestError

_NAME = re.compile(rf"{BackgroundTasks.__name__}\b")


class InjectedParameter(NamedTuple):
    """An injected parameter."""

    name: str
    place: int | None
    """The index among the positional parameters; None if the parameter is keyword-only."""
    by_name: bool
    """True if the parameter can be passed by keyword."""
    is_optional: bool
    """True if the parameter may be omitted: it has a default and may be None."""


class Unresolved(NamedTuple):
    """A parameter whose annotation could not be resolved."""

    name: str
    error: Exception
    is_ours: bool
    """True if the annotation contains the name ``BackgroundTasks``."""


def find_injected(func: Callable[..., Any]) -> tuple[list[InjectedParameter], list[Unresolved]]:
    """Return the injected parameters, and those whose annotation cannot be resolved.

    Each annotation is resolved separately: an annotation whose type is imported under
    ``TYPE_CHECKING`` only, and so cannot be resolved, does not affect the rest.
    """
    given = func.keywords if isinstance(func, functools.partial) else ()
    injected: list[InjectedParameter] = []
    unresolved: list[Unresolved] = []
    try:
        parameters: Iterable[Parameter] = inspect.signature(func).parameters.values()
        names = _namespace_of(func)
    except (TypeError, ValueError):  # a C function without a signature, or a loop of wrappers
        return [], []
    for place, parameter in enumerate(parameters):
        annotation = parameter.annotation
        if annotation is parameter.empty or parameter.name in given:
            continue
        has_default = parameter.default is not parameter.empty
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        try:
            members = _members(_resolve(parameter.name, annotation, names))
        except Exception as exc:  # evaluating a string may raise any exception
            is_ours = _NAME.search(str(annotation)) is not None
            unresolved.append(Unresolved(parameter.name, exc, is_ours))
            continue
        if is_variadic or not any(member is BackgroundTasks for member in members):
            continue
        may_be_none = type(None) in members or parameter.default is None
        by_name_only = parameter.kind is parameter.KEYWORD_ONLY
        injected.append(
            InjectedParameter(
                parameter.name,
                None if by_name_only else place,
                parameter.kind is not parameter.POSITIONAL_ONLY,
                has_default and may_be_none,
            )
        )
    return injected, unresolved


def injected_value(
    parameter: InjectedParameter, func: Callable[..., Any]
) -> BackgroundTasks | None:
    """Return the request's ``BackgroundTasks`` for a parameter of ``func``, or None.

    :raises RuntimeError: outside of a request, if the parameter cannot be omitted.
    """
    if parameter.is_optional and current.get(None) is None:
        return None
    try:
        return current_background_tasks()
    except OutsideRequestError:
        raise OutsideRequestError(
            f"{name_of(func)} wants the request's BackgroundTasks and was called outside "
            "of a request: give it one as an argument, or make the parameter optional with "
            "None as its default"
        ) from None


def _resolve(name: str, annotation: Any, names: dict[str, Any]) -> Any:
    if isinstance(annotation, type):
        return annotation
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    return typing.get_type_hints(holder, names, names)[name]


def _namespace_of(func: Any) -> dict[str, Any]:
    """The globals of the annotated function, found under all decorators."""
    func = inspect.unwrap(func)
    while isinstance(func, functools.partial):
        func = inspect.unwrap(func.func)
    if not hasattr(func, "__globals__"):
        name = "__init__" if isinstance(func, type) else "__call__"
        func = inspect.unwrap(getattr(func, name))
    return getattr(func, "__globals__", {})


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, without the aliases and unions around them."""
    if hasattr(hint, "__value__"):  # type X = ..., from Python 3.12
        return _members(hint.__value__)
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)
