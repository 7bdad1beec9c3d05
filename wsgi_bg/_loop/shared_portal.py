"""The portal that all users of a process share, so that no user may end it for the others.

Imports anyio: this module is imported on the portal's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from inspect import isawaitable
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import BlockingPortal

from wsgi_bg._process.greenlets import event
from wsgi_bg.exceptions import SharedPortalError


class SharedPortal(BlockingPortal):
    """anyio's portal on asyncio, with four differences.

    - A ``SystemExit`` or ``KeyboardInterrupt`` of a call is raised in the caller only.
      asyncio would end the loop, and with it the portal of all requests.
    - A call cannot be left in a state that ends the portal's task group, such as an asyncio
      task that has cancelled itself: each coroutine runs in an asyncio task of its own.
    - :meth:`stop` and ``async with`` are refused: the portal ends with the process.
    - Only :meth:`call` waits, and lets the greenlets of its thread run meanwhile.
    """

    def __new__(cls) -> Self:
        return object.__new__(cls)  # the base of anyio 4.4 makes an object of the backend

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._is_entered = False
        self._not_begun: dict[Future[Any], None] = {}

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise SharedPortalError
        self._is_entered = True
        return await super().__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        await super().stop()
        return bool(await self._task_group.__aexit__(exc_type, exc_val, exc_tb))

    async def stop(self, cancel_remaining: bool = False) -> None:
        """Refuse to stop the portal.

        :raises RuntimeError: always.
        """
        raise SharedPortalError

    def call(self, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Call ``func`` on the loop and return its result; blocks, but lets greenlets run."""
        self._check_running()
        arrived = event()
        future: Future[Any] = Future()
        # Added before the loop knows the future: the exception of a signal handler could leave
        # the future's lock locked.
        future.add_done_callback(lambda _: arrived.set())
        self._spawn_task_from_thread(func, args, {}, None, future)
        arrived.wait(threading.TIMEOUT_MAX)  # gevent reports an unlimited wait as a deadlock
        return future.result()

    def cancel_not_begun(self) -> None:
        """Cancel the calls that the loop has not begun; called when the loop is closed."""
        for future in list(self._not_begun):
            future.cancel()

    def _spawn_task_from_thread(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: object,
        future: Future[Any],
    ) -> None:
        # anyio's method waits for the loop, which may be busy.
        def begin() -> None:
            try:
                self._task_group.start_soon(
                    self._call_func, func, args, kwargs, future, name=name
                )
            except Exception as exc:  # the loop is ending
                del self._not_begun[future]
                future.set_exception(exc)

        self._not_begun[future] = None
        self._loop.call_soon_threadsafe(begin)

    async def _call_func(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        future: Future[Any],
    ) -> None:
        self._not_begun.pop(future, None)  # not there for call_async()
        # anyio's method settles the future before it raises either of these.
        with suppress(SystemExit, KeyboardInterrupt):
            await super()._call_func(_Separately(func), args, kwargs, future)


class _Separately:
    """A function whose coroutine runs in an asyncio task of its own."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._func(*args, **kwargs)
        return self._await(result) if isawaitable(result) else result

    async def _await(self, awaitable: Awaitable[Any]) -> Any:
        result, error = await asyncio.ensure_future(_outcome(awaitable))
        if error is not None:
            raise error
        return result


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result and the error; asyncio ends the loop for an error of these types."""
    try:
        return await awaitable, None
    except (SystemExit, KeyboardInterrupt) as exc:
        return None, exc
