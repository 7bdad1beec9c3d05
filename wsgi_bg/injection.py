"""``@inject``: hands the request's ``BackgroundTasks`` to a function that asks for it."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from .context import current, current_background_tasks
from .exceptions import OptionTypeError, OutsideRequestError
from .tasks import BackgroundTasks

R = TypeVar("R")


class _Wish:
    """A parameter to fill in: its name, place, and whether the call may do without."""

    __slots__ = ("is_optional", "name", "place")

    def __init__(self, name: str, place: int | None, is_optional: bool) -> None:
        self.name = name
        self.place = place
        self.is_optional = is_optional

    def is_given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.name in kwargs or (self.place is not None and self.place < len(args))


def inject(func: Callable[..., R]) -> Callable[..., R]:
    """Fill the parameter of ``func`` that is annotated ``BackgroundTasks``.

    For any function that is called while a request is handled, ``async def`` ones and
    methods too: FastAPI's dependency. All of them get one object. An argument that the
    caller gives wins. The annotation may be a string, ``Annotated`` or optional, and is
    resolved at the first call.

    :raises TypeError: at the first call, if no parameter is annotated ``BackgroundTasks``
        or the annotations cannot be resolved.
    :raises RuntimeError: from a call outside of a request; a parameter with a default that
        may be None keeps its default there.
    """
    if not callable(func):
        raise OptionTypeError("inject", func, "used on a function: @inject above a def")
    wishes: list[_Wish] = []

    def fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not wishes:
            wishes.extend(_wishes_of(func))
        for wish in wishes:
            if wish.is_given(args, kwargs):
                continue
            if wish.is_optional and current.get(None) is None:
                continue
            kwargs[wish.name] = _request_tasks(func)

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def filled_async(*args: Any, **kwargs: Any) -> Any:
            fill(args, kwargs)
            return await func(*args, **kwargs)

        return typing.cast("Callable[..., R]", filled_async)

    @functools.wraps(func)
    def filled(*args: Any, **kwargs: Any) -> R:
        fill(args, kwargs)
        return func(*args, **kwargs)

    return filled


def _request_tasks(func: Callable[..., Any]) -> BackgroundTasks:
    try:
        return current_background_tasks()
    except OutsideRequestError:
        raise OutsideRequestError(
            f"{func.__qualname__} wants the request's BackgroundTasks and was called outside "
            "of a request: give it one as an argument, or make the parameter optional with "
            "None as its default"
        ) from None


def _wishes_of(func: Callable[..., Any]) -> list[_Wish]:
    try:
        hints = typing.get_type_hints(func, include_extras=True)
    except Exception as exc:
        raise OptionTypeError(
            "inject", func, f"used on a function whose annotations can be resolved ({exc})"
        ) from exc
    found = []
    for place, parameter in enumerate(inspect.signature(func).parameters.values()):
        members = _members(hints.get(parameter.name))
        if BackgroundTasks not in members:
            continue
        may_be_none = type(None) in members or parameter.default is None
        has_default = parameter.default is not parameter.empty
        by_name = parameter.kind is parameter.KEYWORD_ONLY
        found.append(
            _Wish(parameter.name, None if by_name else place, has_default and may_be_none)
        )
    if not found:
        raise OptionTypeError(
            "inject", func, "used on a function with a parameter annotated BackgroundTasks"
        )
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, without ``Annotated`` and ``Union`` around them."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)
