"""The event loop of the process: an anyio ``BlockingPortal`` on a thread of its own.

All requests and runners share the portal, so that a client or a database pool opened by an
async task serves the next async task. The portal is made on first use and stopped at
interpreter exit.

asyncio and anyio take 20 ms to import, so they are imported on first use too.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from wsgi_bg._loop import coroutines
from wsgi_bg._loop.asgiref_state import move_here
from wsgi_bg._loop.portal_thread import LoopJob, PortalThread
from wsgi_bg._process.greenlets import event
from wsgi_bg._process.interrupts import is_from_signal_handler
from wsgi_bg._process.per_process import PerProcess

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

T = TypeVar("T")

AGAIN: Any = object()
"""Returned by a portal call's function to be called again: see :class:`PortalCall`."""

_threads = PerProcess(PortalThread)


def portal() -> BlockingPortal:
    """Return the anyio ``BlockingPortal`` of this process, on whose loop the async tasks run.

    ``portal().call(func, *args)`` calls an ``async def`` or plain function on the loop and
    blocks until it is done; ``start_task_soon`` returns a future. Works in views, in plain
    tasks and on any thread, with every runner: a client that async tasks keep open on this
    loop serves synchronous code too. The call runs in a copy of the caller's context
    variables, and its errors, including ``SystemExit``, are raised in the caller.

    Ask for the portal at each use: a forked process has a portal of its own, and a new portal
    replaces a portal whose loop was ended. The first call makes the portal and blocks until it
    runs. The portal cannot be stopped: it ends with the process.

    :raises RuntimeError: if the loop's thread cannot start. The methods of the portal raise
        it on the loop's own thread, which would wait for itself.
    """
    return _thread().portal


def _thread() -> PortalThread:
    running = _threads.get()
    if running.has_ended:
        _threads.forget(running)
        running = _threads.get()
    return running


def peek() -> PortalThread | None:
    """Return the portal's thread if its loop runs, else None; never makes a portal."""
    running = _threads.peek()
    return None if running is None or running.has_ended else running


def start(subject: Any, job: LoopJob) -> None:
    """Run ``job`` for ``subject`` on the loop; does not wait for the loop, however busy.

    :raises Exception: what keeps a portal from being made, if there is none.
    """
    _thread().start(subject, job)


def run(func: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Run ``func(*args)`` on the portal; blocks until the call is done.

    ``func`` must not raise ``SystemExit``, which would end the loop for all requests.
    """
    call = PortalCall(func, args)
    try:
        return call.make()
    except BaseException:
        # If the coroutine still runs, a signal handler has raised, such as for a time limit.
        call.cancel(0.0)
        raise


class PortalCall(Generic[T]):
    """A call on the portal that can be cancelled, even before the call has begun.

    ``func`` is called again, in another asyncio task, as long as it returns AGAIN.

    The call is not in the portal's task group: a task that cancels itself and returns would
    end the group, and thereby the loop for all requests. Also, anyio's ``start_task_soon``
    waits for the loop.
    """

    def __init__(
        self, func: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...] = ()
    ) -> None:
        self._func = func
        self._args = args
        self._thread: PortalThread | None = None
        self._is_cancelled = self._goes_on = False
        self._outcome: Future[T] = Future()
        self._arrived: Any = None

    @property
    def is_pending(self) -> bool:
        """True if the call was made and has neither returned nor raised."""
        return self._thread is not None and not self._outcome.done()

    def make(self) -> T:
        """Make the call; blocks, but lets the greenlets of this thread run.

        If no thread can start for the portal (in Python 3.12 while the interpreter exits),
        the coroutine runs on the calling thread.

        :raises RuntimeError: on the portal's own thread, which would block for ever.
        """
        while not self._outcome.done():  # again if the loop was ended before the call began
            try:
                thread = _thread()
            except RuntimeError as exc:
                if is_from_signal_handler(exc):
                    raise
                import anyio

                return anyio.run(self._run_here, backend="asyncio")
            if thread.is_current:
                raise RuntimeError("this cannot be called from the event loop thread")
            self._arrived = event()
            self._thread = thread
            thread.start(self, _CALL)
            # With a timeout: gevent reports an unlimited wait as a deadlock if all is idle.
            self._arrived.wait(threading.TIMEOUT_MAX)
        return self._outcome.result()

    def _has_to_go_on(self) -> bool:
        return self._goes_on

    def _arrive(self) -> None:
        self._arrived.set()

    async def _run_here(self) -> T:
        import asyncio

        while (result := await asyncio.ensure_future(self._func(*self._args))) is AGAIN:
            pass
        return result

    async def _run(self) -> None:
        self._goes_on = False
        if self._is_cancelled:
            self._outcome.set_exception(RuntimeError("the portal call was cancelled"))
            return
        try:
            result = await self._func(*self._args)
            if result is AGAIN:
                self._goes_on = True
            else:
                self._outcome.set_result(result)
        except BaseException as exc:  # close() must not raise a cancellation, made at exit
            ended = RuntimeError("the portal has ended")
            self._outcome.set_exception(exc if isinstance(exc, Exception) else ended)

    def cancel(self, timeout: float) -> bool:
        """Cancel the call, begun or not, and wait for its end; not on the portal's thread.

        :param timeout: the longest wait, in seconds.
        :return: True if the call has ended.
        """
        if self.is_pending:
            assert self._thread is not None
            self._is_cancelled = True
            self._thread.cancel(self)
            self._arrived.wait(timeout)
        return not self.is_pending


_CALL = LoopJob(PortalCall._run, PortalCall._has_to_go_on, PortalCall._arrive)


def wait_for(context: Context, awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Await ``awaitable`` on the portal, in ``context``; blocks until the result is there.

    :return: the result and the error of ``awaitable``. The error is not raised, since on the
        main thread the caller could not tell it from a signal handler's exception.
    """
    try:
        return run(_outcome, context, awaitable)
    except Exception:  # could not start, for example on the portal's own thread
        coroutines.drop(context, awaitable)
        raise


async def _outcome(
    context: Context, awaitable: Awaitable[Any]
) -> tuple[Any, BaseException | None]:
    move_here(context)
    try:
        return await coroutines.in_context(context, awaitable), None
    except BaseException as exc:  # SystemExit, if raised, would end the loop for all
        return None, exc


def stop(timeout: float) -> None:
    """Cancel all that runs on the portal and end its loop.

    :param timeout: the longest wait for the end of the portal's thread, in seconds.
    """
    running = _threads.peek()
    if running is not None:
        running.stop(timeout)
