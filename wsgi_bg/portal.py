"""The event loop of the process: one anyio ``BlockingPortal`` on a thread of its own.

All requests and runners share it, so that a client or a database pool that one async
task has opened serves the next. It is made on first use and left at interpreter exit.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Generic, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from . import steps
from .process import PerProcess, is_exiting
from .report import logger

T = TypeVar("T")


class _PortalThread:
    """A portal and its thread.

    anyio's ``start_blocking_portal`` is a generator: left open at interpreter exit, its
    ``finally`` waits for a thread that no longer runs, and the process hangs. This
    thread is a daemon, and :func:`stop` waits for it with a limit.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.loop: asyncio.AbstractEventLoop
        ready: Future[BlockingPortal] = Future()
        self.thread = threading.Thread(
            target=self._run, args=(ready,), name="wsgi_bg-portal", daemon=True
        )
        self.thread.start()
        self.portal = ready.result()

    def _run(self, ready: Future[BlockingPortal]) -> None:
        async def serve() -> None:
            async with BlockingPortal() as portal:
                self.loop = asyncio.get_running_loop()
                ready.set_result(portal)
                try:
                    await portal.sleep_until_stopped()
                finally:
                    self.has_ended = True

        try:
            anyio.run(serve, backend="asyncio")
        except BaseException as exc:
            if not ready.done():
                ready.set_exception(exc)
                return
            # Raised in a task that a coroutine had started on its own: asyncio ends the
            # loop for SystemExit and KeyboardInterrupt, which no one outside can prevent.
            # (coverage does not see what a thread does after that; a test sees the record.)
            message = "the portal's event loop was ended by a task on it"  # pragma: no cover
            logger.error(message, exc_info=exc)  # pragma: no cover


_threads = PerProcess(_PortalThread)


def portal() -> BlockingPortal:
    """The portal of this process; the first call makes it and blocks until it runs.

    One whose loop was ended by a task on it is replaced.
    """
    running = _threads.get()
    if running.has_ended:
        _threads.forget()
        running = _threads.get()
    return running.portal


def run(
    func: Callable[..., Coroutine[Any, Any, T]],
    *args: Any,
    interrupted: Callable[[BaseException], object] = id,
) -> T:
    """Run ``func(*args)`` on the portal; blocks until it is done.

    ``func`` must let no ``SystemExit`` out: that would end the loop for everyone. Where
    the interpreter exits and has no portal, it runs right here.

    :param interrupted: called with what a signal handler raises here meanwhile, before
        the coroutine is cancelled.
    """
    if is_exiting() and _threads.peek() is None:
        return anyio.run(func, *args, backend="asyncio")
    trip = _Trip(func, args)
    try:
        return portal().start_task_soon(trip.run).result()
    except Exception:
        raise
    except BaseException as exc:
        interrupted(exc)
        trip.cancel()
        raise


class _Trip(Generic[T]):
    """A coroutine on the portal that can be cancelled before there is a future for it:
    anyio's ``start_task_soon`` waits for the loop, and a signal may come meanwhile."""

    def __init__(
        self, func: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]
    ) -> None:
        self._func = func
        self._args = args
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    async def run(self) -> T:
        self._task = asyncio.current_task()
        if self._is_cancelled:
            raise asyncio.CancelledError
        return await self._func(*self._args)

    def cancel(self) -> None:
        """From another thread: have the coroutine cancelled, begun or not; does not block."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def wait_for(context: Context, awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Await ``awaitable`` on the portal, in ``context``; blocks until it is done.

    :return: its result, and what it raised: on the main thread an exception that is
        raised here could not be told from a signal handler's.
    """
    try:
        return run(_outcome, context, awaitable)
    except Exception:  # it could not start: this is the portal's own thread, for one
        if inspect.iscoroutine(awaitable) and awaitable.cr_frame is not None:
            awaitable.close()  # or Python warns that it was never awaited
        raise


async def _outcome(
    context: Context, awaitable: Awaitable[Any]
) -> tuple[Any, BaseException | None]:
    try:
        return await steps.in_context(context, awaitable), None
    except BaseException as exc:  # a SystemExit let through would end the loop for all
        return None, exc


def stop(timeout: float) -> None:
    """Cancel what runs on the portal and leave it.

    :param timeout: how long to wait for the portal's thread to end, in seconds.
    """
    running = _threads.peek()
    if running is None or running.has_ended:
        return
    # Not start_task_soon: it waits for the loop, which a task may be blocking.
    stopping = running.portal.stop
    running.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(stopping(True)))
    running.thread.join(timeout)
