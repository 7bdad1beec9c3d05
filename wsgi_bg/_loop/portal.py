"""The event loop of the process: an anyio ``BlockingPortal`` on a thread of its own.

All requests and runners share the portal, so that a client or a database pool opened by an
async task serves the next async task. The portal is made on first use and stopped at
interpreter exit.

A thread that waits for async code makes a call of the portal: :func:`run`, :func:`wait_for`,
or the user's :func:`portal`. A pool waits for nothing and hands work over by :func:`start`.

asyncio and anyio take 20 ms to import, so they are imported on first use too, and on the
portal's thread. On the main thread a signal handler could raise during the import and leave
asyncio half imported, and the next import would fail.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wsgi_bg._loop import coroutines
from wsgi_bg._loop.asgiref_state import move_here, use_for_sync_code
from wsgi_bg._loop.portal_call import PortalCall
from wsgi_bg._process import log, per_process
from wsgi_bg._process.greenlets import are_threads, start_real_thread
from wsgi_bg._process.interrupts import is_from_signal_handler
from wsgi_bg._process.per_process import PerProcess

if TYPE_CHECKING:
    import asyncio

    from anyio.from_thread import BlockingPortal

    from wsgi_bg._loop.shared_portal import SharedPortal


THREAD_NAME = "wsgi_bg-portal"

STOP_TIMEOUT = 0.5
"""Seconds for which the exit of the process waits for the end of the portal's thread."""

FORK_TIMEOUT = 5.0
"""Seconds for which a fork waits until a portal that is being made runs."""


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
        self._thread_has_ended = threading.Event()
        ready: Future[SharedPortal] = Future()
        # A real thread even under gevent: if a loop ran on the thread of the application's
        # greenlets, asyncio.run() would fail in all greenlets.
        start_real_thread(partial(self._run, ready), THREAD_NAME)
        self.portal: SharedPortal = ready.result(threading.TIMEOUT_MAX)  # as in make_call()
        _alive.get().add(self)

    @property
    def has_ended(self) -> bool:
        """True if the loop begins no further work.

        Before asyncio closes a loop, it cancels all tasks of the loop. Cancelling the task of
        ``_serve`` cancels ``end`` immediately, before the loop's next step.
        """
        return self._was_stopped or self.portal.end.done()

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
            _alive.get().discard(self)
            self._thread_has_ended.set()

    async def _serve(self, ready: Future[SharedPortal]) -> None:
        import asyncio

        from wsgi_bg._loop.executor import LoopExecutor
        from wsgi_bg._loop.shared_portal import SharedPortal

        async with SharedPortal() as portal:
            self._loop = asyncio.get_running_loop()
            self._loop.set_default_executor(LoopExecutor())
            if are_threads():
                use_for_sync_code(LoopExecutor(threads=1))
            ready.set_result(portal)
            try:
                await portal.end
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

    def call_soon(self, func: Callable[[], object]) -> None:
        """Call ``func()`` on the loop, unless the loop has ended; does not wait."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(func, context=self._context)

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
        task = coroutines.new_task(job.work, subject)
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

    def stop(self, timeout: float) -> None:
        """Cancel all that runs; wait at most ``timeout`` seconds until the thread has ended."""
        if not self.has_ended:
            self._was_stopped = True
            # Not start_task_soon, which waits for the loop: a task may be blocking the loop.
            self._loop.call_soon_threadsafe(self.portal.end.cancel)
        self._thread_has_ended.wait(timeout)


_threads = PerProcess(PortalThread)

_alive: PerProcess[set[PortalThread]] = PerProcess(set)
"""The threads that run; one whose loop was ended lives on while its tasks clean up."""


def _before_fork() -> None:
    """Wait until no thread makes a portal.

    The portal's thread may be importing asyncio. Python would never release the locks of these
    imports in the child, whose own portal would wait for them for ever.
    """
    _threads.lock().acquire(timeout=FORK_TIMEOUT)


def _after_fork_in_parent() -> None:
    with suppress(RuntimeError):  # not held, since the time was up
        _threads.lock().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)


def portal() -> BlockingPortal:
    """Return the anyio ``BlockingPortal`` of this process, on whose loop the async tasks run.

    ``portal().call(func, *args)`` calls an ``async def`` or plain function on the loop and
    blocks until it is done; ``start_task_soon`` returns a future. Works in views, in plain
    tasks and on any thread, with every runner: a client that async tasks keep open on this
    loop serves synchronous code too. The call runs in a copy of the caller's context
    variables, and its errors, including ``SystemExit``, are raised in the caller. The call is
    cancelled if a signal handler raises in the caller, as for a time limit.

    Ask for the portal at each use: a forked process has a portal of its own, and a new portal
    replaces a portal whose loop was ended. The first call makes the portal and blocks until it
    runs. The portal cannot be stopped: it ends with the process.

    :raises RuntimeError: if the loop's thread cannot start. The methods of the portal raise
        it on the loop's own thread, which would wait for itself, and in a forked child.
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

    Not by a call of the portal. anyio's ``start_task_soon`` waits for the loop. The method of
    ``SharedPortal`` does not wait, but nobody needs its future, and each waiting job would
    take 9 kB in place of 1.2 kB: a future, a cancel scope and a second asyncio task.

    :raises Exception: what keeps a portal from being made, if there is none.
    """
    _thread().start(subject, job)


def run(
    work: Callable[[], Coroutine[Any, Any, object]],
    goes_on: Callable[[], object] = bool,
    call: PortalCall | None = None,
) -> None:
    """Run ``work()`` by a call of the portal; blocks until the work is done.

    Each time ``goes_on()`` is true after that, ``work()`` is called again, in another asyncio
    task of the same call. If the loop is ended, ``run`` returns before the work is done,
    perhaps before the work has begun.

    If no thread can start for the portal (in Python 3.12 while the interpreter exits), the
    work runs on the calling thread.

    :param call: a new object, which the caller must end if a signal handler raises; None to
        cancel the call then.
    :raises Exception: the error of ``work()``, or what keeps a portal from being made.
    :raises RuntimeError: on the portal's own thread, which would block for ever.
    """
    try:
        thread = _thread()
    except RuntimeError as exc:
        if is_from_signal_handler(exc):
            raise
        import anyio

        anyio.run(coroutines.separately, work, goes_on, backend="asyncio")
        return
    make = thread.portal.call if call is None else partial(thread.portal.make_call, call)
    try:
        make(coroutines.separately, work, goes_on)
    except (CancelledError, RuntimeError) as exc:
        if not thread.has_ended or is_from_signal_handler(exc):
            raise


def wait_for(context: Context, awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Await ``awaitable`` on the portal, in ``context``; blocks until the result is there.

    :return: the result and the error of ``awaitable``. The error is not raised, since on the
        main thread the caller could not tell it from a signal handler's exception.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    async def work() -> None:
        move_here(context)
        try:
            outcome.append((await coroutines.in_context(context, awaitable), None))
        except BaseException as exc:  # SystemExit, if raised, would end the loop for all
            outcome.append((None, exc))

    try:
        while not outcome:  # again if the loop was ended before the work began
            run(work)
    except Exception:  # could not start, for example on the portal's own thread
        coroutines.drop(context, awaitable)
        raise
    return outcome.pop()  # or a raised error would refer to itself, by the frame of work()


def stop(timeout: float) -> None:
    """Cancel all that runs on the portal and end its loop.

    :param timeout: the longest wait for the end of the portal's thread, in seconds.
    """
    deadline = time.monotonic() + timeout
    running = list(_alive.get())
    for thread in running:
        thread.stop(0.0)
    for thread in running:
        thread.stop(max(0.0, deadline - time.monotonic()))


# Registered with the import, and so called after the drain. A portal may have no drain, if only
# portal() is used. A daemon thread that the interpreter ends inside of a greenlet's switch
# damages the memory of the process.
atexit.register(stop, STOP_TIMEOUT)
