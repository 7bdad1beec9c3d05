"""Coroutines of which every step runs in a given context.

An asyncio task of its own would do the same (``create_task(context=...)``, Python 3.11) and
cost ten times as much, a turn of the loop included.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Coroutine, Generator
from contextlib import ExitStack
from contextvars import Context
from typing import Any

# What next(), given it as a default, returns for a coroutine that has ended: cheaper than
# the StopIteration that coroutine.send() raises then.
DONE: Any = object()


def is_cancelled(task: Any) -> bool:
    """Whether an asyncio task has cancellation requests that were not taken back.

    False for a task of a library's own class that does not count them.
    """
    cancelling = getattr(task, "cancelling", None)
    return cancelling is not None and cancelling() > 0


async def in_context(context: Context, awaitable: Awaitable[Any]) -> Any:
    """Await ``awaitable`` with every step of it run in ``context``."""
    coroutine = as_coroutine(awaitable)
    try:
        waits_for = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    return await RestOf(context, coroutine, waits_for)


def drop(context: Context, awaitable: Awaitable[Any]) -> None:
    """Close what no one will await: Python warns of a coroutine that no one has awaited."""
    # One that has begun, and was left by a signal handler's exception, is the loop's to end.
    if inspect.iscoroutine(awaitable):
        has_begun = inspect.getcoroutinestate(awaitable) != inspect.CORO_CREATED
    elif isinstance(awaitable, AwaitedIn):
        has_begun = awaitable.has_begun
    else:
        return
    if not has_begun:
        context.run(awaitable.close)


def as_coroutine(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    """``awaitable`` itself, if it is a coroutine, or one that awaits it."""
    return awaitable if inspect.iscoroutine(awaitable) else _awaiting(awaitable)


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class AwaitedIn(Coroutine[Any, Any, Any]):
    """Awaits ``awaitable`` in what ``stack`` has entered already, and leaves that.

    A coroutine function would not leave it if it was never awaited.
    """

    __slots__ = ("_awaitable", "_stack", "has_begun")

    def __init__(self, stack: ExitStack, awaitable: Awaitable[Any]) -> None:
        self._stack = stack
        self._awaitable = awaitable
        self.has_begun: bool = False

    def __await__(self) -> Generator[Any, Any, Any]:
        self.has_begun = True
        with self._stack:
            return (yield from as_coroutine(self._awaitable).__await__())

    def send(self, value: Any) -> Any:
        raise NotImplementedError  # it is awaited only

    def throw(self, *exc: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Leave without awaiting."""
        with self._stack:
            if inspect.iscoroutine(self._awaitable):
                self._awaitable.close()


class RestOf(Generator[Any, Any, Any]):
    """Awaits what ``coroutine`` does after its first step, each step in ``context``.

    In place of a generator that does the same, which takes 200 bytes more for each task
    that waits.

    :param waits_for: what the first step has yielded, for the event loop.
    """

    __slots__ = ("_context", "_coroutine", "_waits_for")

    def __init__(
        self, context: Context, coroutine: Coroutine[Any, Any, Any], waits_for: Any
    ) -> None:
        self._context = context
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> RestOf:
        return self

    def __next__(self) -> Any:
        waits_for = self._waits_for
        if waits_for is not DONE:
            self._waits_for = DONE
            return waits_for
        return self._context.run(self._coroutine.send, None)

    def send(self, value: Any) -> Any:
        raise NotImplementedError  # asyncio sends nothing, and None goes to __next__

    def throw(self, *exc: Any) -> Any:
        """A cancellation, which is for the coroutine to see."""
        try:
            return self._context.run(self._coroutine.throw, *exc)
        finally:
            del exc  # or what is raised on may hold itself, by this frame
