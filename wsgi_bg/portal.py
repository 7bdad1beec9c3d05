"""The event loop of the process: one anyio ``BlockingPortal`` on a thread of its own.

All requests and runners share it, so that a client or a database pool that one async
task has opened serves the next. It is made on first use and left at interpreter exit.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Generic, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from . import steps
from .asgiref_state import move_here
from .greenlets import event
from .portal_thread import PortalThread
from .process import PerProcess

T = TypeVar("T")

_threads = PerProcess(PortalThread)


def portal() -> BlockingPortal:
    """The portal of this process; the first call makes it and blocks until it runs.

    One whose loop was ended by a task on it is replaced.
    """
    return _thread().portal


def _thread() -> PortalThread:
    running = _threads.get()
    if running.has_ended:
        _threads.forget(running)
        running = _threads.get()
    return running


def peek() -> PortalThread | None:
    """The portal's thread, if there is one that runs; does not block to make it."""
    running = _threads.peek()
    return None if running is None or running.has_ended else running


def start(
    subject: T,
    work: Callable[[T], Coroutine[Any, Any, None]],
    then: Callable[[T], object],
) -> None:
    """Have ``work(subject)`` run on the loop; does not wait for the loop, however busy.

    :param work: lets nothing out but a cancellation.
    :param then: ``then(subject)`` is called on the portal's thread when that is done, or on
        any thread if the loop was ended before it could begin.
    :raises Exception: what keeps a portal from being made, if there is none.
    """
    _thread().start(subject, work, then)


def run(
    func: Callable[..., Coroutine[Any, Any, T]],
    *args: Any,
    interrupted: Callable[[BaseException], object] = id,
) -> T:
    """Run ``func(*args)`` on the portal; blocks until it is done.

    ``func`` must let no ``SystemExit`` out: that would end the loop for everyone. Where no
    thread can start for the portal (in Python 3.12 while the interpreter exits), it runs
    right here.

    :param interrupted: called with what a signal handler raises here meanwhile, before
        the coroutine is cancelled.
    """
    try:
        _thread()
    except RuntimeError:
        return anyio.run(func, *args, backend="asyncio")
    trip = _Trip(func, args)
    try:
        return trip.make()
    except Exception:
        # Not the coroutine's own if that goes on: a signal handler's, such as a time limit.
        if not trip.is_done:
            trip.cancel()
        raise
    except BaseException as exc:
        interrupted(exc)
        trip.cancel()
        raise


class _Trip(Generic[T]):
    """A coroutine on the portal that can be cancelled before it has begun.

    Not in the portal's task group: a task that cancels itself and returns would end that,
    and with it the loop of all others. And anyio's ``start_task_soon`` waits for the loop.
    """

    def __init__(
        self, func: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]
    ) -> None:
        self._func = func
        self._args = args
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False
        self._outcome: Future[T] = Future()
        self._arrived: Any = None

    @property
    def is_done(self) -> bool:
        """Whether the coroutine has returned or raised."""
        return self._outcome.done()

    async def run(self) -> T:
        self._task = asyncio.current_task()
        if self._is_cancelled:
            raise asyncio.CancelledError
        return await self._func(*self._args)

    def make(self) -> T:
        """Run it on the portal; blocks, but lets the greenlets of this thread run.

        :raises RuntimeError: on the portal's own thread, which it would block for ever.
        """
        while self._task is None:  # its loop may be ended before it has begun
            thread = _thread()
            if thread.is_current:
                raise RuntimeError("this cannot be called from the event loop thread")
            self._arrived = event()
            thread.start(self, _Trip._run_and_keep, _Trip._arrive)
            # With a limit: without one gevent takes it for a dead lock if all else is idle.
            self._arrived.wait(threading.TIMEOUT_MAX)
        return self._outcome.result()

    def _arrive(self) -> None:
        self._arrived.set()

    async def _run_and_keep(self) -> None:
        try:
            self._outcome.set_result(await self.run())
        except BaseException as exc:  # a cancellation, at the exit, must not leave close()
            ended = RuntimeError("the portal has ended")
            self._outcome.set_exception(exc if isinstance(exc, Exception) else ended)

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
        steps.drop(context, awaitable)
        raise


async def _outcome(
    context: Context, awaitable: Awaitable[Any]
) -> tuple[Any, BaseException | None]:
    move_here(context)
    try:
        return await steps.in_context(context, awaitable), None
    except BaseException as exc:  # a SystemExit let through would end the loop for all
        return None, exc


def stop(timeout: float) -> None:
    """Cancel what runs on the portal and leave it.

    :param timeout: how long to wait for the portal's thread to end, in seconds.
    """
    running = _threads.peek()
    if running is not None:
        running.stop(timeout)
