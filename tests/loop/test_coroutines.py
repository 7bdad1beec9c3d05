"""Coroutines that nobody will await any more."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

import pytest

from wsgi_bg._loop.coroutines import AwaitableInStack, drop


class Waits:
    """An awaitable that is no coroutine."""

    def __await__(self) -> Generator[str, None, None]:
        yield "waits"


async def waits() -> None:
    await Waits()


async def never() -> None:
    raise AssertionError


def entered(awaitable: Awaitable[Any], left: list[str]) -> AwaitableInStack:
    stack = ExitStack()
    stack.callback(left.append, "left")
    return AwaitableInStack(stack, awaitable)


@pytest.mark.parametrize("make", [waits, Waits, never])
def test_the_contexts_entered_for_a_dropped_awaitable_are_left(make: Any) -> None:
    left: list[str] = []
    drop(copy_context(), entered(make(), left))
    assert left == ["left"]


@pytest.mark.parametrize("make", [waits, Waits])
def test_an_awaitable_that_has_begun_is_not_dropped(make: Any) -> None:
    left: list[str] = []
    awaited = entered(make(), left)
    begun = awaited.__await__()
    assert next(begun) == "waits"
    drop(copy_context(), awaited)
    assert left == []
    assert next(begun, "ended") == "ended"
    assert left == ["left"]


def test_a_coroutine_that_has_begun_is_not_dropped() -> None:
    coroutine = waits()
    assert coroutine.send(None) == "waits"
    drop(copy_context(), coroutine)
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_an_awaitable_without_close_is_left_alone() -> None:
    drop(copy_context(), Waits())
