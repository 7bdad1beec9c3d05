"""The thread of the portal: an event loop to which any thread can submit without waiting.

asyncio and anyio are imported on this thread. On the main thread a signal handler could raise
during the import and leave asyncio half imported, and the next import would fail.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from wsgi_bg._loop import coroutines
from wsgi_bg._loop.asgiref_state import use_for_sync_code
from wsgi_bg._process import log
from wsgi_bg._process import per_process as process
from wsgi_bg._process.greenlets import are_threads, start_real_thread
from wsgi_bg._process.interrupts import is_from_signal_handler

if TYPE_CHECKING:
    import asyncio

    from wsgi_bg._loop.shared_portal import SharedPortal


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
        coroutines.loop_generation = process.generation
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
