"""Coroutines of which every step runs in a given context.

An asyncio task of its own would do the same (``create_task(context=...)``, Python 3.11) and
cost ten times as much, a turn of the loop included.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any

# What next(), given it as a default, returns for a coroutine that has ended: cheaper than
# the StopIteration that coroutine.send() raises then.
DONE: Any = object()


async def in_context(context: Context, awaitable: Awaitable[Any]) -> Any:
    """Await ``awaitable`` with every step of it run in ``context``."""
    coroutine = as_coroutine(awaitable)
    try:
        waits_for = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    return await rest_of(context, coroutine, waits_for)


def as_coroutine(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    """``awaitable`` itself, if it is a coroutine, or one that awaits it."""
    return awaitable if inspect.iscoroutine(awaitable) else _awaiting(awaitable)


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@types.coroutine
def rest_of(
    context: Context, coroutine: Coroutine[Any, Any, Any], waits_for: Any
) -> Generator[Any, Any, Any]:
    """The steps of ``coroutine`` after the first, each run in ``context``.

    :param waits_for: what the first step has yielded, for the event loop.
    """
    step: Callable[[Any], Any]
    while True:
        try:
            value = yield waits_for
            step = coroutine.send
        except BaseException as exc:  # a cancellation is for the coroutine to see
            step, value = coroutine.throw, exc
        try:
            waits_for = context.run(step, value)
        except StopIteration as stop:
            return stop.value


def cancellations_of_current_task() -> Callable[[], int]:
    """A function that says how often the running asyncio task was asked to end.

    Without those that were taken back; always 0 on Python 3.10, which does not count.
    """
    return getattr(asyncio.current_task(), "cancelling", int)
