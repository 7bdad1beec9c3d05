"""The portal that all users of a process share, so that no user may end it for the others.

Imports anyio: this module is imported on the portal's thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import BlockingPortal

from wsgi_bg._loop.coroutines import current_task, is_awaitable, is_cancelled, separately
from wsgi_bg._loop.portal_call import PortalCall
from wsgi_bg._process import per_process
from wsgi_bg.exceptions import ForkedPortalError, SharedPortalError

# anyio asks sniffio for the library if sniffio is installed. In a callback of the loop sniffio
# sees no task, and so needs the name in the context, which anyio's own portal sets, too.
_sniffio = sys.modules.get("sniffio")
_name_library: Callable[[str], object] = (
    str if _sniffio is None else _sniffio.current_async_library_cvar.set
)


class SharedPortal(BlockingPortal):
    """anyio's portal on asyncio, with five differences.

    - An error of a call that is no ``Exception``, such as ``SystemExit``, is raised in the
      caller only. anyio would end the portal of all requests for it.
    - A call cannot be left in a state that ends the portal's task group, such as an asyncio
      task that has cancelled itself: each coroutine runs in an asyncio task of its own.
    - :meth:`stop` and ``async with`` are refused: the portal ends with the process.
    - Only :meth:`call` waits, and lets the greenlets of its thread run meanwhile. If a signal
      handler raises in this thread, the call is cancelled.
    - In a forked child a call raises: the loop does not run there.
    """

    def __new__(cls) -> Self:
        return object.__new__(cls)  # the base of anyio 4.4 makes an object of the backend

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._pid = per_process.pid()
        # As it is now: a library may replace it by a class that anyio's scopes do not know.
        self._task_class = asyncio.Task
        self._is_entered = False
        # Never set, only cancelled: by PortalThread.stop(), or as asyncio cancels all tasks.
        self.end: asyncio.Future[None] = self._loop.create_future()
        # The calls that have not ended, each with its asyncio task, or None before the begin.
        self._calls: dict[Future[Any], asyncio.Task[Any] | None] = {}
        self._not_begun: dict[Future[Any], Coroutine[Any, Any, None]] = {}

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
        for call, task in self._calls.copy().items():
            if not is_cancelled(task):  # else asyncio has cancelled all tasks of the loop
                (task or call).cancel()
        # Without the error, or the scope would cancel each step of the calls' clean-up too.
        return bool(await self._task_group.__aexit__(None, None, None))

    async def stop(self, cancel_remaining: bool = False) -> None:
        """Refuse to stop the portal.

        :raises RuntimeError: always.
        """
        raise SharedPortalError

    def _check_running(self) -> None:  # anyio calls this at the begin of each call
        if per_process.pid() != self._pid:
            raise ForkedPortalError
        super()._check_running()

    def call(self, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Call ``func`` on the loop and return its result; blocks, but lets greenlets run."""
        call = PortalCall()
        try:
            return self.make_call(call, func, *args)
        except BaseException:
            call.end(0.0)
            raise

    def make_call(self, call: PortalCall, func: Callable[..., Any], *args: Any) -> Any:
        """Make a :meth:`call` whose future is ``call``, a new object; does not cancel it."""
        self._check_running()
        call.portal = self
        self._spawn_task_from_thread(func, args, {}, None, call)
        call.ended.wait(threading.TIMEOUT_MAX)  # gevent reports an unlimited wait as a deadlock
        return call.result()

    def cancel_call(self, call: Future[Any]) -> None:
        """Cancel ``call``, begun or not; its future is done when the call has ended."""
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(lambda: (self._calls.get(call) or call).cancel())

    def cancel_not_begun(self) -> None:
        """Cancel the calls that the loop has not begun; called when the loop is closed."""
        for call in list(self._calls):
            call.cancel()
        for coroutine in self._not_begun.values():
            coroutine.close()  # or Python warns that the coroutine was never awaited

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
            if self.end.done():  # the loop is ending
                del self._calls[future]
                future.cancel()
                future.set_running_or_notify_cancel()
                return
            _name_library("asyncio")
            factory = self._loop.get_task_factory()
            self._loop.set_task_factory(self._make_task)  # that of a task may raise
            coroutine = self._call_func(func, args, kwargs, future)
            self._not_begun[future] = coroutine
            try:
                self._task_group.start_soon(
                    lambda: coroutine, name="wsgi_bg" if name is None else name
                )
            finally:
                self._loop.set_task_factory(factory)

        self._calls[future] = None
        self._loop.call_soon_threadsafe(begin)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        return self._task_class(coro, loop=loop, **options)

    async def _call_func(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        future: Future[Any],
    ) -> None:
        try:
            self._not_begun.pop(future, None)  # call_async() of anyio 4.16 begins by itself
            if future.cancelled():
                future.set_running_or_notify_cancel()
                return
            self._calls[future] = task = current_task()
            if func is not separately:
                func = partial(_separate, task, func)
            # anyio's method settles the future, and then raises an error that is no Exception.
            with suppress(BaseException):
                await super()._call_func(func, args, kwargs, future)
        finally:
            self._calls.pop(future, None)


def _separate(caller: Any, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``func``, whose coroutine then runs in an asyncio task of its own.

    :param caller: the asyncio task of the call, which the other task has its name from.
    """
    result = func(*args, **kwargs)
    return _await(result, caller) if is_awaitable(result) else result


async def _await(awaitable: Awaitable[Any], caller: Any) -> Any:
    task = await separately(partial(_outcome, awaitable, caller))
    result, error = task.result()
    if error is not None:
        raise error
    return result


async def _outcome(awaitable: Awaitable[Any], caller: Any) -> tuple[Any, BaseException | None]:
    """Return the result and the error; asyncio ends the loop for an error of these types."""
    with suppress(Exception):  # a library's class of tasks may have no names
        current_task().set_name(caller.get_name())
    try:
        return await awaitable, None
    except (SystemExit, KeyboardInterrupt) as exc:
        return None, exc
