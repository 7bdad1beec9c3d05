"""The event loop of the process: an anyio ``BlockingPortal`` on a thread of its own.

All requests and runners share the portal, so that a client or a database pool opened by an
async task serves the next async task. The portal is made on first use and stopped at
interpreter exit. Any thread can submit work to the loop without waiting for the loop.

asyncio and anyio take 20 ms to import, so they are imported on first use too, and on the
portal's thread. On the main thread a signal handler could raise during the import and leave
asyncio half imported, and the next import would fail.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from wsgi_bg._loop import coroutines
from wsgi_bg._loop.asgiref_state import move_here, use_for_sync_code
from wsgi_bg._process import log, per_process
from wsgi_bg._process.greenlets import are_threads, event, start_real_thread
from wsgi_bg._process.interrupts import is_from_signal_handler
from wsgi_bg._process.per_process import PerProcess

if TYPE_CHECKING:
    import asyncio

    from anyio.from_thread import BlockingPortal

    from wsgi_bg._loop.shared_portal import SharedPortal

T = TypeVar("T")

AGAIN: Any = object()
"""Returned by a portal call's function to be called again: see :class:`PortalCall`."""


class LoopJob(NamedTuple):
    """A kind of work for the loop; one object serves all subjects of that kind."""

    work: Callable[[Any], Coroutine[Any, Any, None]]
    """Runs on the loop with the subject; lets nothing out but a cancellation."""
    goes_on: Callable[[Any], object]
    """If true for the subject after that, ``work`` is called again, in another asyncio task."""
    on_done: Callable[[Any], object]
    """Called with the subject when the work is done, on the portal's thread, or on any thread
    if the loop was ended before the work could begin."""


class PortalThread:
    """A portal and its thread; the constructor blocks until the loop runs.

    anyio's ``start_blocking_portal`` is a generator. If the generator is open at interpreter
    exit, its ``finally`` waits for a thread that no longer runs, and the process hangs. The
    thread of this class is a daemon, and :meth:`stop` waits for the thread with a limit.
    """

    def __init__(self) -> None:
        self._was_stopped = False
        # Arguments of start() for work that the loop has not begun; _is_woken is True if the
        # loop will look at the inbox.
        self._inbox: deque[tuple[Any, LoopJob]] = deque()
        self._is_woken = False
        self._under_way: dict[asyncio.Task[None], tuple[Any, LoopJob]] = {}
        self._context = Context()  # of all callbacks: empty, and not copied for each
        self._on_finish = self._finish  # one object for all asyncio tasks
        self._loop: asyncio.AbstractEventLoop
        # asyncio.Task at the time the loop was made, since libraries replace the class.
        self._task_class: type[asyncio.Task[None]]
        self._end: asyncio.Future[None]
        self._thread_has_ended = threading.Event()
        ready: Future[SharedPortal] = Future()
        # A real thread even under gevent: if a loop ran on the thread of the application's
        # greenlets, asyncio.run() would fail in all greenlets.
        start_real_thread(partial(self._run, ready), "wsgi_bg-portal")
        self.portal: SharedPortal = ready.result(threading.TIMEOUT_MAX)  # as in PortalCall

    @property
    def has_ended(self) -> bool:
        """True if the loop begins no further work.

        Before asyncio closes a loop, it cancels all tasks of the loop. Cancelling the task of
        ``_serve`` cancels ``_end`` immediately, before the loop's next step.
        """
        return self._was_stopped or self._end.done()

    @property
    def is_current(self) -> bool:
        """True if the calling code runs on the loop."""
        import asyncio

        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _run(self, ready: Future[SharedPortal]) -> None:
        coroutines.loop_generation = per_process.generation
        try:
            import anyio

            anyio.run(self._serve, ready, backend="asyncio")
        except BaseException as exc:
            if not ready.done():
                ready.set_exception(exc)
            elif not self._was_stopped:
                # Raised in an asyncio task that a coroutine had started: asyncio ends the loop
                # for SystemExit and KeyboardInterrupt, which cannot be prevented. (coverage
                # loses the thread's trace here; a test checks the record.)
                log.error(  # pragma: no cover
                    "the portal's event loop was ended by a task on it", exc_info=exc
                )
        finally:
            if ready.done() and not ready.exception():
                ready.result().cancel_not_begun()
            self._thread_has_ended.set()

    async def _serve(self, ready: Future[SharedPortal]) -> None:
        import asyncio

        from wsgi_bg._loop.executor import LoopExecutor
        from wsgi_bg._loop.shared_portal import SharedPortal

        async with SharedPortal() as portal:
            self._task_class = asyncio.Task
            self._loop = asyncio.get_running_loop()
            self._loop.set_default_executor(LoopExecutor())
            if are_threads():
                use_for_sync_code(LoopExecutor(threads=1))
            self._end = self._loop.create_future()
            ready.set_result(portal)
            try:
                await self._end  # never set, only cancelled
            finally:
                self._return_inbox()

    def start(self, subject: Any, job: LoopJob) -> None:
        """See :func:`wsgi_bg._loop.portal.start`."""
        # This side appends, then reads _is_woken; _begin() clears _is_woken, then reads the
        # inbox. So a single wake is enough for all work appended before the loop looks.
        self._inbox.append((subject, job))
        if not self._is_woken:
            try:
                self._is_woken = True
                self._wake()
            except BaseException:  # a signal handler's; more threads count on this wake
                self._wake()
                raise
        if self.has_ended:
            self._return_inbox()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._begin, context=self._context)
        except RuntimeError as exc:  # closed
            if is_from_signal_handler(exc):
                raise

    def _begin(self) -> None:
        self._is_woken = False
        while self._inbox and not self.has_ended:
            self._create_task(*self._inbox.popleft())

    def _create_task(self, subject: Any, job: LoopJob) -> None:
        try:
            task = self._loop.create_task(job.work(subject), name="wsgi_bg")
        except Exception:  # raised by a task factory that a task has set
            task = self._task_class(job.work(subject), loop=self._loop, name="wsgi_bg")
        self._under_way[task] = subject, job  # the loop has weak references
        task.add_done_callback(self._on_finish, context=self._context)

    def _finish(self, task: asyncio.Task[None]) -> None:
        subject, job = self._under_way.pop(task)
        if job.goes_on(subject) and not self.has_ended:
            self._create_task(subject, job)
        else:
            job.on_done(subject)

    def _return_inbox(self) -> None:
        with suppress(IndexError):
            while True:
                subject, job = self._inbox.popleft()
                job.on_done(subject)

    def cancel(self, subject: Any) -> None:
        """Cancel the asyncio task of ``subject``, begun or not; from any thread."""
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._cancel, subject, context=self._context)

    def _cancel(self, subject: Any) -> None:
        for task, (each, _) in list(self._under_way.items()):
            if each is subject:
                task.cancel()

    def stop(self, timeout: float) -> None:
        """Cancel all that runs; wait at most ``timeout`` seconds until the thread has ended."""
        if self.has_ended:
            return
        self._was_stopped = True
        # Not start_task_soon, which waits for the loop: a task may be blocking the loop.
        self._loop.call_soon_threadsafe(self._end.cancel)
        self._thread_has_ended.wait(timeout)


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

    # The three steps of the job that runs on the loop.

    async def run(self) -> None:
        """Call the function, and keep its result or error."""
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

    def has_to_go_on(self) -> bool:
        """True if the function has returned AGAIN."""
        return self._goes_on

    def arrive(self) -> None:
        """Wake the thread that waits in :meth:`make`."""
        self._arrived.set()

    async def _run_here(self) -> T:
        import asyncio

        while (result := await asyncio.ensure_future(self._func(*self._args))) is AGAIN:
            pass
        return result

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


_CALL = LoopJob(PortalCall.run, PortalCall.has_to_go_on, PortalCall.arrive)


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
