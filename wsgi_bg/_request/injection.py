"""``@inject``: passes the request's ``BackgroundTasks`` to annotated parameters."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from wsgi_bg._process.interrupts import type_name
from wsgi_bg._tasks.background_tasks import BackgroundTasks
from wsgi_bg._tasks.callables import name_of, signature_of
from wsgi_bg._tasks.task import current
from wsgi_bg.exceptions import OptionTypeError, OutsideRequestError

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
        parameters: Iterable[Parameter] = signature_of(func).parameters.values()
        names = _namespace_of(func)
    except (TypeError, ValueError):  # a C function without a signature, or a loop of wrappers
        return [], []
    for place, parameter in enumerate(parameters):
        annotation = parameter.annotation
        if (
            annotation is parameter.empty
            or parameter.name in given
            or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ):
            continue
        try:
            members = _members(_resolve(parameter.name, annotation, names))
        except Exception as exc:  # evaluating a string may raise any exception
            text = getattr(annotation, "__forward_arg__", annotation)  # of a ForwardRef
            is_ours = _NAME.search(str(text)) is not None
            unresolved.append(Unresolved(parameter.name, exc, is_ours))
            continue
        if not any(member is BackgroundTasks for member in members):
            continue
        has_default = parameter.default is not parameter.empty
        may_be_none = type(None) in members or parameter.default is None
        injected.append(
            InjectedParameter(
                name=parameter.name,
                place=None if parameter.kind is parameter.KEYWORD_ONLY else place,
                by_name=parameter.kind is not parameter.POSITIONAL_ONLY,
                is_optional=has_default and may_be_none,
            )
        )
    return injected, unresolved


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


R = TypeVar("R")


def inject(func: Callable[..., R]) -> Callable[..., R]:
    """Fill the parameter of ``func`` that is annotated ``BackgroundTasks``.

    Works for any function that is called while a request is handled, including ``async def``
    functions and methods, like FastAPI's dependency. All functions called in a request get
    the same object. An argument that the caller passes takes precedence. The annotation may
    be a string, ``Annotated`` or optional, and is resolved at the first call.

    :raises TypeError: at the first call, if no parameter is annotated ``BackgroundTasks``,
        or the annotation of a parameter that may be meant cannot be resolved; at a call with
        too few arguments before a positional-only injected parameter.
    :raises RuntimeError: from a call outside of a request. A parameter that may be None and
        has a default keeps its default there, and after the last task of a request.
    """
    if isinstance(func, (staticmethod, classmethod)):  # inject into the wrapped function
        return typing.cast("Callable[..., R]", type(func)(inject(func.__func__)))
    if not callable(func):
        raise OptionTypeError("inject", func, "used on a function: @inject above a def")
    return fill_injected(func, functools.cache(functools.partial(_find_injected, func)))


def fill_injected(
    func: Callable[..., R], injected: Callable[[], list[InjectedParameter]]
) -> Callable[..., R]:
    """Wrap ``func``: each call gets the injected parameters, unless the caller passed them.

    :raises RuntimeError: from a call outside of a request, if a parameter is not optional.
    """

    def fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        for parameter in injected():
            is_given = parameter.place is not None and parameter.place < len(args)
            if is_given or (parameter.by_name and parameter.name in kwargs):
                continue
            tasks = current.get(None)
            if parameter.is_optional and (tasks is None or tasks.has_ended):
                continue
            if tasks is None:
                raise OutsideRequestError(
                    f"{name_of(func)} wants the request's BackgroundTasks and was called "
                    "outside of a request: give it one as an argument, or make the parameter "
                    "optional with None as its default"
                )
            if parameter.by_name:
                kwargs[parameter.name] = tasks
            elif parameter.place == len(args):
                args = (*args, tasks)
        return args

    def explain(exc: AttributeError, args: tuple[Any, ...]) -> None:
        for name, place, *_ in injected():
            if place is None or place >= len(args):
                continue
            if args[place] is exc.obj is not None:
                exc.add_note(
                    f"The caller of {name_of(func)} has passed this {type_name(exc.obj)} as "
                    f"argument {place + 1}, which is the parameter {name!r} that @inject "
                    "fills. Put all parameters that the caller passes before it."
                )

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def filled_async(*args: Any, **kwargs: Any) -> Any:
            try:
                return await func(*fill(args, kwargs), **kwargs)
            except AttributeError as exc:
                explain(exc, args)
                raise

        return typing.cast("Callable[..., R]", filled_async)

    @functools.wraps(func)
    def filled(*args: Any, **kwargs: Any) -> R:
        try:
            return func(*fill(args, kwargs), **kwargs)
        except AttributeError as exc:
            explain(exc, args)
            raise

    return filled


def _find_injected(func: Callable[..., Any]) -> list[InjectedParameter]:
    injected, unresolved = find_injected(func)
    if injected:
        return injected
    if not unresolved:
        raise OptionTypeError(
            "inject", func, "used on a function with a parameter annotated BackgroundTasks"
        )
    name, error, _ = unresolved[0]
    wanted = f"used on a function whose annotations can be resolved ({name}: {error})"
    raise OptionTypeError("inject", func, wanted) from error
