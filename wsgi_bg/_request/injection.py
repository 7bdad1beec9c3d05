"""``@inject``: passes the request's ``BackgroundTasks`` to an annotated parameter."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from wsgi_bg._request.injected import InjectedParameter, find_injected, injected_value
from wsgi_bg.exceptions import OptionTypeError

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
        has a default keeps its default there.
    """
    if isinstance(func, (staticmethod, classmethod)):  # inject into the wrapped function
        return typing.cast("Callable[..., R]", type(func)(inject(func.__func__)))
    if not callable(func):
        raise OptionTypeError("inject", func, "used on a function: @inject above a def")
    injected: list[InjectedParameter] = []

    def find_once() -> list[InjectedParameter]:
        if not injected:
            injected.extend(_find_injected(func))
        return injected

    return fill_injected(func, find_once)


def fill_injected(
    func: Callable[..., R], injected: Callable[[], list[InjectedParameter]]
) -> Callable[..., R]:
    """Wrap ``func``: each call gets the injected parameters, unless the caller passed them."""

    def fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        for parameter in injected():
            is_given = parameter.place is not None and parameter.place < len(args)
            if is_given or (parameter.by_name and parameter.name in kwargs):
                continue
            tasks = injected_value(parameter, func)
            if tasks is None:
                continue
            if parameter.by_name:
                kwargs[parameter.name] = tasks
            elif parameter.place == len(args):
                args = (*args, tasks)
        return args

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def filled_async(*args: Any, **kwargs: Any) -> Any:
            return await func(*fill(args, kwargs), **kwargs)

        return typing.cast("Callable[..., R]", filled_async)

    @functools.wraps(func)
    def filled(*args: Any, **kwargs: Any) -> R:
        return func(*fill(args, kwargs), **kwargs)

    return filled


def _find_injected(func: Callable[..., Any]) -> list[InjectedParameter]:
    injected, unresolved = find_injected(func)
    if unresolved and not injected:
        name, error, _ = unresolved[0]
        raise OptionTypeError(
            "inject",
            func,
            f"used on a function whose annotations can be resolved ({name}: {error})",
        ) from error
    if not injected:
        raise OptionTypeError(
            "inject", func, "used on a function with a parameter annotated BackgroundTasks"
        )
    return injected
