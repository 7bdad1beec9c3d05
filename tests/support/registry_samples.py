"""A module with registered functions, which tests reload."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from wsgi_bg import registered_task


@registered_task
def plain(x: int) -> int:
    return x + 1


@registered_task(name="samples.async")
async def coroutine(x: int) -> int:
    return x + 1


def taken(x: int) -> int:
    return x


def with_more(func: Callable[[int, str], object]) -> Callable[[int], object]:
    """Decorator that passes the function an additional argument."""

    @wraps(func)
    def wrapper(x: int) -> object:
        return func(x, "more")

    return wrapper


@registered_task
@with_more
def decorated(x: int, more: str) -> object:
    return x, more


def generator() -> object:
    yield 1


class Sample:
    """A class with a method."""

    def method(self) -> None:
        pass
