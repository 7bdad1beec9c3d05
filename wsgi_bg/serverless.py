"""For handlers on platforms that freeze the process on return, such as AWS Lambda."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, overload

from wsgi_bg._loop.executor import LoopExecutor
from wsgi_bg._request.invocation import Invocation
from wsgi_bg._tasks.callables import is_async_callable, is_coroutine_callable
from wsgi_bg._tasks.checks import seconds
from wsgi_bg.exceptions import OptionTypeError

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_TIMEOUT = 30.0
"""How long to wait if neither decorator nor runtime sets a limit, in seconds."""

_NOT_GIVEN: Any = object()

MARGIN = 0.5
"""The part of the time limit that the runtime needs to send the response, in seconds."""


@overload
def finish_tasks(handler: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def finish_tasks(
    *, timeout: float | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def finish_tasks(
    handler: Any = _NOT_GIVEN, /, *, timeout: float | None = None
) -> Callable[..., Any]:
    """Decorate a serverless handler to return after the background tasks of its requests.

    The handler waits for the tasks of every runner, on the handler's thread, or without
    blocking the event loop if the handler is ``async def``. Responses that the adapter did
    not close are ended. Tasks that are not finished in time are logged at ERROR, and go on
    only if the process does. The client gets the response when the handler has returned.

    Write ``@finish_tasks`` or ``@finish_tasks(timeout=5)`` above a function, or
    ``handler = finish_tasks(Mangum(app))``.

    :param handler: a plain or ``async def`` function, or an object with such a ``__call__``.
    :param timeout: how long to wait for the tasks at most, in seconds; never longer than
        Lambda's ``context.get_remaining_time_in_millis()`` less half a second. With None
        this is the limit, or 30 seconds if no argument of the handler has such a method.
    :raises TypeError: if ``handler`` is not callable, or is a generator function; if
        ``timeout`` is not a number.
    :raises ValueError: if ``timeout`` is negative.
    """
    seconds("timeout", timeout, or_none=True)
    if handler is _NOT_GIVEN:
        return functools.partial(_decorate, timeout=timeout)
    return _decorate(handler, timeout=timeout)


def _decorate(handler: Callable[..., Any], *, timeout: float | None) -> Callable[..., Any]:
    if not callable(handler):
        raise OptionTypeError("handler", handler, "a function: handler(event, context)")

    try:
        is_async_callable(handler)
    except TypeError as exc:  # a generator's body would run after the invocation
        raise OptionTypeError("handler", handler, "a function that returns a response") from exc

    if is_coroutine_callable(handler):

        @functools.wraps(handler)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            limit = functools.partial(_limit, timeout, *args, *kwargs.values())
            return await _finish_async(handler(*args, **kwargs), limit)

        return call_async

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        limit = functools.partial(_limit, timeout, *args, *kwargs.values())
        failed = True
        with Invocation() as invocation:
            try:
                response = handler(*args, **kwargs)
                failed = False
            finally:
                invocation.finish(limit(), failed=failed)
        if inspect.isawaitable(response):  # the handler wraps an ``async def``
            return _finish_async(response, limit)
        return response

    return call


async def _finish_async(awaitable: Awaitable[Any], limit: Callable[[], float]) -> Any:
    """Return the handler's response after the tasks of its requests."""
    failed = True
    with Invocation() as invocation:
        try:
            response = await awaitable
            failed = False
            return response
        finally:
            finish = functools.partial(invocation.finish, limit(), failed=failed)
            # Not the loop's executor, whose threads the handler may keep busy.
            try:
                await asyncio.get_running_loop().run_in_executor(LoopExecutor(1), finish)
            except asyncio.CancelledError:
                invocation.interrupt()
                raise


def _limit(timeout: float | None, *arguments: Any) -> float:
    """How long tasks may take from now on, in seconds."""
    limits = [] if timeout is None else [timeout]
    for argument in arguments:
        with suppress(Exception):  # not a context, or a mock that returns no number or raises
            left = argument.get_remaining_time_in_millis() / 1000 - MARGIN
            limits.append(max(0.0, left))
    return min(limits, default=DEFAULT_TIMEOUT)
