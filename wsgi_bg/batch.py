"""The run of one request's tasks, as a runner gets it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from inspect import GEN_CREATED, getgeneratorstate, isawaitable, isgenerator
from sys import getrefcount
from threading import current_thread, main_thread
from types import CoroutineType
from typing import Any

from . import log, portal, process, report, steps
from .asgiref_state import move_here
from .calls import RESULT, Calls
from .interrupts import goes_through, is_from_signal_handler, is_raised_here
from .options import Options
from .steps import DONE, RestOf, as_coroutine
from .task import CLAIMED, BackgroundTask
from .tasks import ENDED, BackgroundTasks

_NOT_RUN = "it returned a generator that no one runs: nothing was done"

_SHOWN = 10  # tasks of a batch in its repr, which is logged on a server's thread

_CANCEL_TIMEOUT = 1.0
"""How long a stopped worker waits for the cancelled async task, in seconds."""


class Batch:
    """The tasks of one request, once it is known how the request ended.

    A task's error is logged and the next task runs, unless the task was added under
    ``stop_on_error``: then the rest is discarded, each task by name.

    Each task is claimed by one thread, which runs, discards or names it. The exception of a
    signal handler may come between any two bytecodes of the server's thread: whatever that
    thread was about to do, the claims, ``_running`` and ``_done`` say which tasks are left.

    :param raised: whether the application raised.
    :param status: the status code of the response; 0 if there was none.
    :ivar response_complete: whether the server needs nothing more from the application
        to finish the response. If not, :meth:`run` must not be called before ``submit``
        has returned.
    :ivar sends: whether the runner that has it may send its tasks to another process.
    :ivar not_before: when its runner will have it begin, by :func:`time.monotonic`.
    :ivar is_kept: whether a ledger knows of it.
    :ivar succeeded: how many tasks have returned.
    :ivar failed: how many have raised.
    :ivar discarded: how many will not run.
    :ivar run_here: how many a pool without room began to run on the server's thread.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_begun",
        "_cause",
        "_done",
        "_generation",
        "_has_started",
        "_is_stopping",
        "_let_run",
        "_of",
        "_passed_over",
        "_raised",
        "_running",
        "_status",
        "_stopped",
        "_when_done",
        "discarded",
        "failed",
        "is_kept",
        "not_before",
        "response_complete",
        "run_here",
        "sends",
        "succeeded",
    )

    def __init__(
        self,
        tasks: BackgroundTasks,
        *,
        response_complete: bool,
        raised: bool = False,
        status: int = 200,
    ) -> None:
        self.response_complete: bool = response_complete
        self.sends: bool = False
        self.not_before: float = 0.0
        self.is_kept: bool = False
        self.succeeded: int = 0
        self.failed: int = 0
        self.discarded: int = 0
        self.run_here: int = 0
        self._of = tasks
        # How many tasks are claimed, and not yet dropped.
        self._passed_over = 0
        self._raised = raised
        self._status = status
        self._let_run: Options | None = None  # the last options that were asked and did
        self._generation = process.generation
        self._has_started = self._stopped = False
        # No further task begins, since the exception of a signal handler came, or since the
        # tasks that are left were claimed to name them.
        self._is_stopping = self._abandoned = False
        # The task that runs, from before it is claimed until its call or its log record is
        # through.
        self._running: BackgroundTask | None = None
        # On the main thread, which runs signal handlers, the progress of the running task. The
        # dictionary gets the key RESULT with the end of the task's call, and the key SAID with
        # a record in the log: no bytecode comes between.
        self._done: defaultdict[Any, Any] | None = None
        # The task whose plain function has returned an awaitable, for the portal.
        self._begun: tuple[BackgroundTask, Context, Any] | None = None
        # Why the async task that runs is cancelled.
        self._cause: Exception | None = None
        self._when_done: tuple[Callable[[Any], None], ...] = ()

    def again(self) -> Batch:
        """This batch for another runner, since the first one may have it or may not.

        Whichever of the two starts first runs the tasks.
        """
        batch = Batch(
            self._of, response_complete=False, raised=self._raised, status=self._status
        )
        batch._passed_over = self._passed_over
        batch.when_done(lambda batch: self._tell())
        return batch

    def give_back(self) -> None:
        """Let another batch discard the task that an exception kept from being named."""
        task = self._running
        if task is not None and not task._unclaimed and log.SAID not in (self._done or ()):
            task._unclaimed = [None]

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are to run and have not finished, the running one first."""
        waiting = [task for task in self._of._left() if task._unclaimed]
        running = self._running  # now: a task that begins is running before it is claimed
        if running is None or running in waiting:
            return waiting
        return [running, *waiting]

    @property
    def length(self) -> int:
        """How many tasks are left, more or less: other threads add and run some."""
        return max(0, self._of._length() - self._passed_over)

    @property
    def is_running(self) -> bool:
        """Whether a task is running now."""
        return self._running is not None

    @property
    def has_ended(self) -> bool:
        """Whether no further task will begin."""
        return self._of._phase == ENDED

    @property
    def next_is_async(self) -> bool | None:
        """Whether the next task is for the portal; None if there is none."""
        task = self._of._next_unclaimed()
        return None if task is None else task.is_async

    def when_done(self, tell: Callable[[Any], None]) -> None:
        """Call ``tell(batch)``, perhaps more than once, when the last task is done."""
        self._when_done += (tell,)

    def _tell_if_ended(self) -> None:
        if self.has_ended:
            self._tell()

    def _tell(self) -> None:
        for tell in self._when_done:
            tell(self)

    def discard_excluded(self) -> bool:
        """Discard the tasks that the outcome of the request keeps from running.

        :return: False in a child that a hook has forked meanwhile.
        """
        excluded = [
            task
            for task in list(self._of._list or ())
            if not (task._options is self._let_run or self._lets_run(task))
        ]
        if not excluded:
            return True
        self._done = _done_here()
        for task in excluded:
            self._running = task
            if task._claim():
                self._discard(task)
                self._passed_over += 1
            self._running = None
            if self._is_in_child:
                return False
        self._done = None
        return True

    def run(self) -> None:
        """Run the tasks in order, what they add included; blocks until all are done.

        Plain functions run on the calling thread, async ones on the portal, consecutive
        ones in one portal call.

        :raises KeyboardInterrupt: or what else stops the server's worker (see
            :mod:`wsgi_bg.interrupts`), after the tasks left undone were named; never a
            task's own error.
        """
        try:
            self._done = _done_here()
            if self._start():
                while self._run_plain_tasks():
                    self._run_async_tasks()
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            self._tell_if_ended()

    def run_plain(self) -> bool:
        """Run the plain tasks that come next, on the calling thread; blocks.

        :return: whether :meth:`run_async` is to go on.
        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            return self._start() and self._run_plain_tasks()
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            self._tell_if_ended()

    def send(self) -> None:
        """Offer all tasks that are left to their runner's ``send``, in order; blocks.

        For a runner that does not wait for their turn. Those that it does not take stay.

        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            if not self._start():
                return
            self._done = _done_here()
            for task in self.tasks:
                if self._stopped or self._abandoned:
                    break
                self._running = task  # first, so that a signal finds its name
                if task._claim():
                    self._send_or_keep(task)
                self._running = None
            self._of._allow_start()
            self._has_started = False
        except BaseException as exc:
            self.stop_for(exc)
            raise
        finally:
            self._tell_if_ended()  # a stop; else the batch goes on to who runs the others

    def _send_or_keep(self, task: BackgroundTask) -> None:
        calls = task._options.calls
        context = task._context or copy_context()
        try:
            if calls is None or not context.run(calls.send, task):
                task._unclaimed = [None]  # by the thread that has claimed it
                return
        except BaseException as exc:
            if goes_through(exc):
                raise
            self._fail(task, context, exc)
        else:
            self.succeeded += 1
        self._passed_over += 1
        task._context = None

    def _start(self) -> bool:
        """Whether this is the one run of the request's tasks.

        It is not if the tasks were named since a signal handler stopped their hand-over,
        perhaps after it had come to another thread.
        """
        if self._has_started:
            return True
        self._has_started = self._of._may_start()
        if not self._has_started:
            self._tell()
        return self._has_started

    def _run_plain_tasks(self) -> bool:
        of, done = self._of, self._done
        while (task := self._next(False)) is not None:
            context = of._context_of(task)
            calls = task._options.calls
            try:
                if calls is not None:
                    result = context.run(self._make_of(calls), task, done)
                elif done is None:
                    result = context.run(task.func, *task.args, **task.kwargs)
                else:  # as calls.call() does; an empty ** costs 0.1 us
                    done.default_factory = (
                        partial(context.run, task.func, *task.args, **task.kwargs)
                        if task.kwargs
                        else partial(context.run, task.func, *task.args)
                    )
                    result = done[RESULT]
                if result is not None:
                    if isawaitable(result):
                        self._begun = task, context, result
                        if done is not None:
                            done.clear()
                        return True
                    if isgenerator(result) and getgeneratorstate(result) == GEN_CREATED:
                        raise TypeError(_NOT_RUN)
            except BaseException as exc:
                if goes_through(exc) or self._is_in_child:
                    raise
                if done is not None:
                    if is_from_signal_handler(exc) and done:
                        raise
                    done.clear()
                self._fail(task, context, exc)
                if process.generation != self._generation:
                    return False
            else:
                if process.generation != self._generation:  # a child, forked by the task
                    return False
                self._running = None
                if done is not None:
                    done.clear()
                self.succeeded += 1
                if calls is not None:
                    _run_in(context, calls.finished, task)
                    if process.generation != self._generation:
                        return False
            front = of._front
            if front:
                front.pop()
            else:
                of._drop(task)
        if done is not None:
            done.default_factory = None  # and so the arguments of the last task
        return not (self.has_ended or self._is_in_child)

    @property
    def _is_in_child(self) -> bool:
        """Whether a task, or what watches it, has forked this child of the tasks' process."""
        return process.generation != self._generation

    def _make_of(self, calls: Calls) -> Callable[..., Any]:
        return calls.send_or_make if self.sends else calls.make

    def _run_async_tasks(self) -> None:
        """Run the async tasks that come next on the portal; wait for them."""
        call = portal.PortalCall(self._run_async_and_say)
        try:
            call.make()
        except Exception as exc:
            if not call.is_pending:  # no loop to be had, or it was ended
                self._fail_next(exc)
                return
            # A signal handler's, such as a time limit. It is the error of the task that runs.
            self._cause = exc
            has_ended = call.cancel(_CANCEL_TIMEOUT)
            if not has_ended or self._cause is not None:
                raise
        except BaseException:
            self._is_stopping = True
            call.cancel(_CANCEL_TIMEOUT)
            raise

    def _fail_next(self, exc: Exception) -> None:
        """Without a loop: the task that should have run on it has failed."""
        # Abandoned by a drain whose time was up, and which named the tasks?
        task = None if self._abandoned else self._running or self._next(True)
        if task is None:
            return
        context = self._of._context_of(task)
        if self._begun is not None:
            _, context, awaitable = self._begun
            self._begun = None
            steps.drop(context, awaitable)
        self._fail(task, context, exc)
        self._of._drop(task)

    async def _run_async_and_say(self) -> Any:
        await self.run_async()
        return portal.AGAIN if self.goes_on_async() else None

    def goes_on_async(self) -> bool:
        """Whether :meth:`run_async` is to be called once more, in another asyncio task."""
        return not (self.has_ended or self._is_stopping) and self.next_is_async is True

    async def run_async(self) -> None:
        """Run the async tasks that come next; on the portal's thread.

        It may return before the last of them, because a task has left behind what may cancel
        the next one: a cancel scope or a time-out that was not left, a reference to
        ``asyncio.current_task()``. All these hold a reference to the asyncio task, which can
        be counted. See :meth:`goes_on_async`.
        """
        import asyncio  # the loop that this runs on has loaded it

        this = asyncio.current_task()  # perhaps None, if a library has replaced asyncio's
        references = getrefcount(this)
        try:
            if not self._start():
                return
            task: BackgroundTask | None
            while True:
                if self._begun is not None:  # the awaitable that a plain function returned
                    task, context, awaitable = self._begun
                    self._begun = None
                    move_here(context)
                else:
                    task = self._next(True)
                    if task is None:
                        return
                    awaitable = None
                    context = self._of._context_of(task)
                calls = task._options.calls
                cancelled = False
                try:
                    if awaitable is None:
                        if calls is None:
                            awaitable = context.run(task.func, *task.args, **task.kwargs)
                        else:
                            awaitable = context.run(self._make_of(calls), task, None)
                    if type(awaitable) is not CoroutineType:
                        awaitable = as_coroutine(awaitable)
                    # The first step, and for a coroutine that waits for nothing the last.
                    waits_for = context.run(next, awaitable.__await__(), DONE)
                    if waits_for is not DONE:
                        await RestOf(context, awaitable, waits_for)
                except BaseException as exc:
                    if self._is_in_child:
                        raise
                    cancelled = isinstance(exc, asyncio.CancelledError)
                    if cancelled and self._is_stopping:
                        raise
                    if cancelled and self._cause is not None:
                        exc, self._cause = self._cause, None
                    self._fail(task, context, exc)
                else:
                    if process.generation != self._generation:
                        return
                    self._running = None
                    self.succeeded += 1
                    if calls is not None:
                        _run_in(context, calls.finished, task)
                if process.generation != self._generation:
                    return
                self._of._drop(task)
                del awaitable
                if this is not None and (
                    cancelled or getrefcount(this) > references or steps.is_cancelled(this)
                ):
                    return
        except BaseException as exc:
            if self._is_in_child:
                process.end_child(exc)
            raise
        finally:
            if self._is_in_child:
                process.end_child(None)
            self._tell_if_ended()

    def abandon(self) -> list[BackgroundTask]:
        """Begin no further task; claim and return those left undone, the running one first."""
        was_abandoned = self._abandoned
        self._abandoned = self._is_stopping = True
        self._of._end()
        running = None if was_abandoned else self._running
        if running is not None:
            running._claim()  # if it was only about to begin
        left = [task for task in self._of._left() if task._claim()]
        return left if running is None else [running, *left]

    def _next(self, is_async: bool) -> BackgroundTask | None:
        """Claim the next task, if it is of this kind; if there is none, end the batch."""
        of = self._of
        while not self._is_stopping:
            front = of._front
            task = front[-1] if front else of._first()
            if task is None:
                return None
            runs = not self._stopped and (
                task._options is self._let_run or self._lets_run(task)
            )
            if runs and task.is_async is not is_async and task._unclaimed:
                return None
            self._running = task  # first, so that a signal finds its name
            try:
                task._unclaimed.pop()  # task._claim(), without the call
            except IndexError as exc:
                if not is_raised_here(exc):
                    raise
            else:
                if runs:
                    if is_async:  # it may wait for long
                        task._unclaimed = CLAIMED
                    return task
                self._discard(task)
                if self._is_in_child:
                    return None
            self._running = None
            self._passed_over = max(0, self._passed_over - 1)  # or it was claimed elsewhere
            of._drop(task)
        if self._abandoned:
            of._end()  # again: abandon() may have come between a look and a mark of _first()
        return None

    def _lets_run(self, task: BackgroundTask) -> bool:
        """Whether the request's outcome lets a task run.

        Callers compare ``_let_run`` first: most batches have one set of options, and a call
        for each task would make an inline task a tenth slower.
        """
        options = task._options
        if options.lets_run(self._raised, self._status):
            self._let_run = options
            return True
        return False

    def _fail(self, task: BackgroundTask, context: Context, exc: BaseException) -> None:
        self.failed += 1
        if task._options.stop_on_error:
            self._stopped = True
        _run_in(context, report.failure, task, exc, self._done)
        self._settle()
        _run_in(context, report.tell_failure, task, exc)

    def _discard(self, task: BackgroundTask) -> None:
        self.discarded += 1
        if self._stopped:
            reason = "a task before it failed, with stop_on_error set"
        else:
            reason = task._options.why_not_run(self._raised, self._status)
        context = self._of._context_of(task)
        _run_in(context, report.not_run, task, reason, self._done)
        self._settle()
        _run_in(context, report.discarded, task, reason)

    def _settle(self) -> None:
        """Note that the log has named the task that ran, or was to run."""
        self._running = None
        if self._done is not None:
            self._done.clear()

    def stop_for(self, exc: BaseException) -> None:
        """Begin no further task, since ``exc`` stops the worker, and name those left."""
        if self._is_in_child:
            return
        running = self._running
        has_begun = running is not None and not running._unclaimed
        done: dict[Any, Any] = self._done or {}
        if log.SAID in done:
            self._running = None  # the log has named it
        elif RESULT in done:
            result = done[RESULT]
            if isawaitable(result):
                steps.drop(copy_context(), result)
            else:
                self._running = None  # its call has returned
                self.succeeded += 1
        left = self.abandon()
        for task in left:
            if process.generation != self._generation:  # a hook has forked
                return
            self.discarded += 1
            report.stopped(task, exc, began=has_begun and task is running)
        self._running = None
        self._tell_if_ended()

    def __repr__(self) -> str:
        tasks = self.tasks
        names = [task.name for task in tasks[:_SHOWN]]
        names += [f"{len(tasks) - _SHOWN} others"] * (len(tasks) > _SHOWN)
        return f"<{type(self).__name__} [{', '.join(names)}]>"


def _done_here() -> defaultdict[Any, Any] | None:
    """A new dictionary for :attr:`Batch._done`, on the thread that signal handlers run on."""
    return defaultdict() if current_thread() is main_thread() else None


def _run_in(context: Context, func: Callable[..., object], *args: Any) -> None:
    """Call ``func(*args)`` in ``context``, or outside if a task runs in that context."""
    try:
        context.run(func, *args)
    except RuntimeError as exc:
        if not is_raised_here(exc):  # func has begun
            raise
        func(*args)
