"""Runs coroutines in asyncio tasks of their own, or each step in a given context.

For the context alone, an asyncio task for each coroutine would do the same
(``create_task(context=...)``, Python 3.11), but cost ten times as much, including a turn of the
loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager
from contextvars import Context
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any

from wsgi_bg._process import per_process
from wsgi_bg._process.interrupts import is_from_signal_handler

if TYPE_CHECKING:
    import asyncio

# The default given to next(), which returns DONE for a coroutine that has ended. This is
# cheaper than the StopIteration that coroutine.send() raises.
DONE: Any = object()


loop_generation: int = 0
"""``per_process.generation`` when the loop of this process was made."""


def is_awaitable(result: Any) -> bool:
    """True if ``result`` can be awaited; False if its own code raises.

    A proxy has the methods of all objects, and may stand for an object without ``__await__``.
    """
    kind = type(result)  # a generator may be awaitable, and has no such method
    try:
        return inspect.isawaitable(result) and (
            kind is GeneratorType or hasattr(result, "__await__")
        )
    except BaseException as exc:
        if is_from_signal_handler(exc):
            raise
        return False


# Modules whose functions begin the work, and return a generator of the results: Executor.map.
_POOLS = ("concurrent.futures._base", "concurrent.futures.process", "multiprocessing.pool")


def _is_of_a_pool(generator: Any) -> bool:
    return generator.gi_frame.f_globals.get("__name__") in _POOLS


def refuse_unrun(result: Any) -> None:
    """Raise if a call has only made a generator or a coroutine, which no one will run.

    :param result: the result of a call that nobody uses; a coroutine is closed if refused.
    :raises TypeError: if ``result`` is such an object that was not begun, or an async generator
        that has not ended: Python 3.11 does not tell if an async generator was begun.
    """
    # isinstance() would read __class__, which may raise.
    if type(result) is AsyncGeneratorType:
        is_new, kind = result.ag_frame is not None, "an async generator"
    elif type(result) is CoroutineType:
        is_new, kind = inspect.getcoroutinestate(result) == inspect.CORO_CREATED, "a coroutine"
    elif type(result) is GeneratorType:
        is_new, kind = inspect.getgeneratorstate(result) == inspect.GEN_CREATED, "a generator"
        is_new = is_new and not _is_of_a_pool(result)
    else:
        return
    if is_new:
        if kind == "a coroutine":
            result.close()  # or Python warns that the coroutine was never awaited
        raise TypeError(f"it returned {kind} that no one runs: nothing was done")


def is_cancelled(task: Any) -> bool:
    """True if an asyncio task has pending cancellation requests (``Task.cancelling``).

    False for a task class of a library that does not count cancellation requests.
    """
    cancelling = getattr(task, "cancelling", None)
    return cancelling is not None and cancelling() > 0


def current_task() -> Any:
    """The running asyncio task; None if a library has replaced asyncio's tasks."""
    import asyncio  # already loaded: this code runs on a loop

    try:
        return asyncio.current_task()
    except Exception:  # the library's function has raised
        return None


def is_cancellation(exc: BaseException) -> bool:
    """True if ``exc`` is how asyncio cancels a task; called on a loop."""
    import asyncio

    # isinstance() would read __class__, which may raise.
    return issubclass(type(exc), asyncio.CancelledError)


def new_task(work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> asyncio.Task[Any]:
    """Start ``work(*args)`` in a new asyncio task of the running loop."""
    import asyncio

    loop = asyncio.get_running_loop()
    try:
        return loop.create_task(work(*args), name="wsgi_bg")
    except Exception:  # raised by a task factory that a task has set
        return asyncio.Task(work(*args), loop=loop, name="wsgi_bg")


async def separately(
    work: Callable[[], Coroutine[Any, Any, Any]], goes_on: Callable[[], object] = bool
) -> asyncio.Task[Any]:
    """Run ``work()`` in an asyncio task of its own, again in another while ``goes_on()``.

    Work that cancels its asyncio task, or leaves a cancel scope open, ends only this asyncio
    task, and not the asyncio task that awaits ``separately``. If the latter is cancelled, the
    work is cancelled, and ``separately`` waits for its end.

    :return: the last asyncio task, which has ended.
    :raises Exception: the error of the work, which a cancellation is not.
    """
    import asyncio

    while True:
        task = new_task(work)
        # Unlike "await task", gather() does not raise a cancellation that the task has caused.
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            task.result()
        if not goes_on():
            return task


async def in_context(context: Context, awaitable: Awaitable[Any]) -> Any:
    """Await ``awaitable``; each step runs in ``context``."""
    coroutine = as_coroutine(awaitable)
    try:
        waits_for = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    return await RemainingSteps(context, coroutine, waits_for)


def drop(context: Context, awaitable: Awaitable[Any]) -> None:
    """Close ``awaitable``, since Python warns of a coroutine that was never awaited."""
    # A coroutine that has begun, and was left when a signal handler raised, is ended by the
    # loop.
    if inspect.iscoroutine(awaitable):
        has_begun = inspect.getcoroutinestate(awaitable) != inspect.CORO_CREATED
    elif isinstance(awaitable, AwaitableInStack):
        has_begun = awaitable.has_begun
    else:
        return
    if not has_begun:
        context.run(awaitable.close)


def as_coroutine(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    """Return ``awaitable`` if it is a coroutine, else a coroutine that awaits ``awaitable``."""
    return awaitable if inspect.iscoroutine(awaitable) else _awaiting(awaitable)


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class AwaitableInStack(Coroutine[Any, Any, Any]):
    """Awaits ``awaitable`` inside ``stack``, which is entered already, and exits ``stack``.

    A coroutine function that is never awaited would not exit ``stack``; :meth:`close` does.
    """

    __slots__ = ("_awaitable", "_stack", "has_begun")

    def __init__(self, stack: AbstractContextManager[Any], awaitable: Awaitable[Any]) -> None:
        self._stack = stack
        self._awaitable = awaitable
        self.has_begun: bool = False

    def __await__(self) -> Generator[Any, Any, Any]:
        self.has_begun = True
        with self._stack:
            return (yield from as_coroutine(self._awaitable).__await__())

    def send(self, value: Any) -> Any:
        raise NotImplementedError  # this object is only awaited

    def throw(self, *exc: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Exit ``stack`` without awaiting ``awaitable``."""
        with self._stack:
            if inspect.iscoroutine(self._awaitable):
                self._awaitable.close()


class RemainingSteps(Generator[Any, Any, Any]):
    """Awaits the rest of ``coroutine`` after its first step; each step runs in ``context``.

    A generator function would do the same, but take 200 bytes more for each task that waits.

    :param waits_for: the value that the first step has yielded for the event loop.
    """

    __slots__ = ("_context", "_coroutine", "_waits_for")

    def __init__(
        self, context: Context, coroutine: Coroutine[Any, Any, Any], waits_for: Any
    ) -> None:
        self._context = context
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> RemainingSteps:
        return self

    def __next__(self) -> Any:
        waits_for = self._waits_for
        if waits_for is not DONE:
            self._waits_for = DONE
            return waits_for
        # If True, a task of this loop has forked, and this is the child.
        if per_process.generation != loop_generation:
            per_process.end_child(None)
        return self._context.run(self._coroutine.send, None)

    def send(self, value: Any) -> Any:
        raise NotImplementedError  # asyncio sends nothing, and None goes to __next__

    def throw(self, *exc: Any) -> Any:
        """Pass a cancellation on to the coroutine."""
        try:
            return self._context.run(self._coroutine.throw, *exc)
        finally:
            del exc  # or a raised exception may refer to itself, by this frame
