"""``Batch``: the run of one request's tasks, which the middleware submits to a runner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import Context, copy_context
from itertools import chain
from sys import getrefcount
from threading import current_thread, main_thread
from time import monotonic
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop import coroutines, portal
from wsgi_bg._loop.asgiref_state import move_here
from wsgi_bg._loop.coroutines import (
    DONE,
    RemainingSteps,
    as_coroutine,
    is_awaitable,
    refuse_unrun,
)
from wsgi_bg._loop.portal_call import PortalCall
from wsgi_bg._process import log, per_process
from wsgi_bg._process.greenlets import start_real_thread
from wsgi_bg._process.interrupts import is_from_signal_handler, is_raised_here, stops_worker
from wsgi_bg._tasks import task_log
from wsgi_bg._tasks.retry import NotSent
from wsgi_bg._tasks.task import (
    DIRECT,
    RESULT,
    SENT,
    BackgroundTask,
    Caller,
    Done,
    Layer,
    Queued,
    WasDiscarded,
    WasQueued,
    plan_of,
)

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import TaskQueue

_SHOWN = 10  # tasks of a batch in its repr, which is logged on a server's thread

GO_ON, STOP, ABANDONED, MOVED = range(4)

_CANCEL_TIMEOUT = 1.0
"""Seconds for which a stopped worker waits for the cancelled async task."""


class Batch:
    """The tasks of one request, made when the outcome of the request is known.

    A task's error is logged and the next task runs. If the task was added under
    ``stop_on_error``, the remaining tasks are discarded instead, and each is logged by name.

    Each task is claimed by a single thread, which runs, discards or logs the task. A signal
    handler may raise between any two bytecodes of the server's thread. Whatever that thread
    was about to do, the claims, ``_running`` and ``_done`` say which tasks are left.

    :param status: the status code of the response; 0 if there was none, CRASHED if the
        application raised.
    :ivar status: the same.
    :ivar response_complete: True if the server needs nothing more from the application
        to finish the response. If False, :meth:`run` must not be called before ``submit``
        has returned.
    :ivar sends: True if the batch's runner may send the tasks to another process.
    :ivar not_before: the earliest start that the runner allows, by :func:`time.monotonic`.
    :ivar is_kept: True if a ledger tracks the batch.
    :ivar has_hooks: True if a task that runs after the request has hooks.
    :ivar succeeded: number of tasks that have returned.
    :ivar failed: number of tasks that have raised.
    :ivar discarded: number of tasks that will not run.
    :ivar run_here: number of tasks that a full pool began to run on the server's thread.
    :ivar sent: number of tasks that the runner's ``send`` has sent to another process.
    """

    __slots__ = (
        "__weakref__",
        "_begun",
        "_call_began",
        "_cause",
        "_done",
        "_generation",
        "_has_started",
        "_let_run",
        "_logs_ends",
        "_on_done",
        "_passed_over",
        "_queue",
        "_running",
        "_stop",
        "_stopped",
        "_watch",
        "discarded",
        "failed",
        "has_hooks",
        "is_kept",
        "not_before",
        "response_complete",
        "run_here",
        "sends",
        "sent",
        "status",
        "succeeded",
    )

    def __init__(
        self,
        tasks: TaskQueue,
        *,
        response_complete: bool,
        status: int = 200,
    ) -> None:
        self.response_complete: bool = response_complete
        self.sends: bool = False
        self.not_before: float = 0.0
        self.is_kept: bool = False
        self.has_hooks: bool = False
        self.succeeded: int = 0
        self.failed: int = 0
        self.discarded: int = 0
        self.run_here: int = 0
        self.sent: int = 0
        self._queue = tasks
        # The number of tasks that are claimed but not yet dropped.
        self._passed_over = 0
        self.status: int = status
        self._let_run: Layer | None = None  # the last options that let a task run
        self._generation = per_process.generation
        self._has_started = self._stopped = False
        # Not GO_ON if no further task begins: STOP if a signal handler raised or another batch
        # runs the tasks, ABANDONED if abandon() has claimed the tasks that were left, MOVED if
        # the tasks that are left wait with a task that will be called again.
        self._stop = GO_ON
        # The running task. Set before the task is claimed, and cleared when its call has
        # returned or its log record is made.
        self._running: BackgroundTask | None = None
        # Progress of the running task, kept only on the main thread, which runs signal
        # handlers. The key RESULT appears in the moment in which the task's call returns, the
        # key SAID with its log record.
        self._done: Done = None
        # A task whose plain function has returned an awaitable, which the portal will await.
        self._begun: tuple[BackgroundTask, Context, Any] | None = None
        # The exception for which the running async task is cancelled.
        self._cause: BaseException | None = None
        self._on_done: tuple[Callable[[Any], None], ...] = ()
        # True if the end of each task is logged, and when the running call began then.
        self._logs_ends = False
        self._call_began: float | None = None
        # Calls the hooks that watch this batch; None if no hook does.
        self._watch: Any = None

    def again(self) -> Batch:
        """Copy this batch for another runner, if the first runner may or may not have it.

        Whichever of the two batches starts first runs the tasks.
        """
        batch = Batch(self._queue, response_complete=False, status=self.status)
        batch._passed_over = self._passed_over
        batch.watch(self._watch)
        batch.on_done((self._end_with,))
        return batch

    def _end_with(self, copy: Batch) -> None:
        """End if ``copy`` has run the tasks; called when ``copy`` has ended, or more often."""
        if copy.has_started and copy.has_ended:
            self._stop = self._stop or STOP
        self.notify_if_ended()

    def unclaim_running(self) -> None:
        """Unclaim the running task if an exception kept it from being logged.

        Another batch can discard the task then.
        """
        task = self._running
        if task is not None and not task.unclaimed and log.SAID not in (self._done or ()):
            task.unclaim()

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that have not finished; the running task is first."""
        if self._stop == MOVED:
            return []
        waiting = [task for task in self._queue.left() if task.unclaimed]
        running = self._running  # read now: a task is marked as running before it is claimed
        if running is None or running in waiting:
            return waiting
        return [running, *waiting]

    @property
    def length(self) -> int:
        """Approximate number of tasks left; further threads add and run tasks meanwhile."""
        return max(0, self._queue.length() - self._passed_over)

    @property
    def is_running(self) -> bool:
        """True if a task is running now."""
        return self._running is not None

    @property
    def running(self) -> BackgroundTask | None:
        """The task that is running now, or is about to begin."""
        return self._running

    @property
    def has_started(self) -> bool:
        """True if this batch, and no other batch of the request, has begun to run the tasks."""
        return self._has_started

    @property
    def has_ended(self) -> bool:
        """True if this batch will begin no further task."""
        return self._stop != GO_ON or self._queue.has_ended

    @property
    def has_waited(self) -> bool:
        """True if the tasks have waited for their time, and the timer submits this batch."""
        return self._queue.has_waited

    @property
    def next_is_async(self) -> bool | None:
        """True if the next task runs on the portal; None if no task is left."""
        task = self.next_task
        return None if task is None else task.is_async

    @property
    def next_task(self) -> BackgroundTask | None:
        """The first task that has not begun; any thread may look."""
        return self._queue.next_unclaimed()

    @property
    def has_messages(self) -> bool:
        """True if the runner's ``check`` returned a message for a task that is left."""
        return any(task.message is not None and task.unclaimed for task in self._queue.left())

    def on_done(self, functions: tuple[Callable[[Any], None], ...]) -> None:
        """Call each of ``functions`` with the batch when its last task is done, or more often.

        Most batches keep only the tuple that their ledger gives to all of them.
        """
        self._on_done += functions

    def watch(self, watch: Any) -> None:
        """Let ``watch.begun()`` and ``watch.ended()`` be called, each at least once."""
        self._watch = watch

    def hand_over(self, in_front: int) -> None:
        """Call the hooks of the tasks: the batch is about to be handed over to its runner.

        :param in_front: number of batches of the runner that have not ended.
        """
        callers = {task.options.calls: None for task in self.tasks if task.options.calls.hooks}
        if callers:
            self._queue.handed_over_at = monotonic()
            first, *others = callers
            hooks = first.hooks
            if others:
                # By id: the hooks are users' objects, which may have no hash.
                every = chain.from_iterable(calls.hooks for calls in callers)
                hooks = tuple({id(each): each for each in every}.values())
            first.watch(self, self._queue, hooks, in_front)

    def notify_if_ended(self) -> None:
        """Call the functions given to :meth:`on_done` if the batch has ended."""
        if self.has_ended:
            self._tell()

    def _tell(self) -> None:
        if self._watch is not None and (self._stop == MOVED or self._queue.has_ended):
            self._watch.ended()
        for tell in self._on_done:
            tell(self)

    def discard_excluded(self, tasks: Iterable[BackgroundTask]) -> bool:
        """Discard those of ``tasks`` that must not run after this outcome of the request.

        :return: False in a child process that a hook has forked meanwhile.
        """
        excluded = []
        for task in tasks:
            if task.options is not self._let_run and not self.lets_run(task):
                excluded.append(task)
        if not excluded:
            return True
        self._done = _done_here()
        for task in excluded:
            self._running = task
            if task.claim():
                self._discard(task)
                self._passed_over += 1
            self._running = None
            if self._is_in_child:
                return False
        self._done = None
        return True

    def run(self) -> None:
        """Run the tasks in order, with the tasks that they add; blocks until all are done.

        Plain functions run on the calling thread. Async functions run on the portal;
        consecutive async tasks share a portal call. On the portal's own thread, as in a
        request that an async task makes, another thread runs the tasks from the first async
        task on, and this method does not wait for them.

        :raises KeyboardInterrupt: or another exception that stops the server's worker (see
            :mod:`wsgi_bg._process.interrupts`), after the unfinished tasks were logged; never a
            task's own error.
        """
        try:
            self._done = _done_here()
            if self._start():
                while self._run_plain_tasks() and self._run_async_tasks():
                    pass
        except BaseException as exc:
            self.stop(exc)
            raise
        finally:
            self.notify_if_ended()

    def skip(self) -> None:
        """Discard all tasks: a task before them has raised under ``stop_on_error``."""
        self._stopped = True
        self.run()

    def run_plain(self) -> bool:
        """Run the next plain tasks on the calling thread; blocks.

        :return: True if :meth:`run_async` must be called next.
        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            return self._start() and self._run_plain_tasks()
        except BaseException as exc:
            self.stop(exc)
            raise
        finally:
            self.notify_if_ended()

    def send(self, *, ends: bool = False) -> bool:
        """Offer all tasks that are left to their runner's ``send``, in order; blocks.

        Used by a runner that sends a task before the tasks ahead of it have run. Tasks that
        ``send`` does not accept stay in the batch.

        :param ends: True to end the batch if no task is left then.
        :return: True if that has ended the batch.
        :raises KeyboardInterrupt: as :meth:`run` does.
        """
        try:
            if not self._start():
                return False
            self._done = _done_here()
            for task in self.tasks:
                if self._stopped or self._stop == ABANDONED:
                    break
                if task.options.delay and not self._may_begin(task):
                    continue
                self._running = task  # before the claim: a signal finds its name
                if task.claim():
                    self._send_or_keep(task)
                self._running = None
            if ends and self._queue.first() is None:
                return True
            self._queue.allow_start()
            self._has_started = False
            return False
        except BaseException as exc:
            self.stop(exc)
            raise
        finally:
            self.notify_if_ended()  # else the remaining tasks are still to run

    def _send_or_keep(self, task: BackgroundTask) -> None:
        calls = task.options.calls
        context = task.context or task.new_context()
        try:
            is_sent = context.run(calls.send, task)
        except BaseException as exc:
            if stops_worker(exc):
                raise
            self._fail(task, context, exc)
        else:
            if is_sent is False:
                task.unclaim()
                return
            if is_sent is True:
                self.sent += 1
            else:
                self._begin(is_sent)  # puts the task into a queue
        self._queue.remove(task)
        task.context = None

    def _start(self) -> bool:
        """Start the run of the request's tasks, which only a single batch may do.

        :return: False if another batch has started, in a forked child, or if the tasks were
            logged because a signal handler interrupted ``submit``, perhaps after a thread had
            got the batch.
        """
        if self._has_started:
            return True
        self._has_started = not self._is_in_child and self._queue.may_start()
        if not self._has_started:
            self._stop = STOP
            self._tell()
            return False
        self._logs_ends = log.is_debug()
        if self._watch is not None:
            self._watch.begun()
        return not self._is_in_child

    def _make_of(self, calls: Caller) -> Callable[[BackgroundTask, Done], Any]:
        """The function that makes the call that is about to begin."""
        if self._logs_ends:
            self._call_began = monotonic()
        return calls.send_or_make if self.sends else calls.make

    def _run_plain_tasks(self) -> bool:
        if self._begun is not None:  # the loop was ended before it has got the awaitable
            return True
        queue, done = self._queue, self._done
        is_simple = not (self.sends or self._logs_ends)
        while (task := self._next(False)) is not None:
            context = task.take_context(queue)
            calls = task.options.calls
            try:
                make = calls.make if is_simple else self._make_of(calls)
                result = context.run(make, task, done)
                if result is not None:
                    if is_awaitable(result):
                        self._begun = task, context, result
                        if done is not None:
                            done.clear()
                        return True
                    refuse_unrun(result)
            except WasDiscarded:
                self.discarded += 1
                self._settle()
                if self._is_in_child:
                    return False
            except BaseException as exc:
                if stops_worker(exc) or self._is_in_child:
                    raise
                if done is not None:
                    if is_from_signal_handler(exc) and done:
                        raise
                    done.clear()
                self._fail(task, context, exc)
                if per_process.generation != self._generation:
                    return False
            else:
                if per_process.generation != self._generation:  # a child, forked by the task
                    return False
                self._running = None
                if done:  # empty if the task was sent
                    del done[RESULT]
                if type(result) is Queued:
                    self.sent += result is SENT
                else:
                    self.succeeded += 1
                    if not is_simple:
                        self._log_end(task, context)
                    if calls is not DIRECT:  # this spares the call of a method without effect
                        if calls.ends_in_context:
                            _run_in(context, calls.finished, task)
                        else:
                            calls.finished(task)
                        if per_process.generation != self._generation:
                            return False
            front = queue.front
            if front:
                front.pop()
            else:
                queue.drop(task)
            result = None  # or the result would live until the next task has returned
        if done is not None:
            done.default_factory = None  # and so the arguments of the last task
        return not (self.has_ended or self._is_in_child)

    @property
    def _is_in_child(self) -> bool:
        """True in a child process that a task, or an observer of a task, has forked."""
        return per_process.generation != self._generation

    def _run_async_tasks(self) -> bool:
        """Run the next async tasks on the portal; blocks until they are done.

        :return: False if another thread runs all tasks that are left.
        """
        call = PortalCall()
        try:
            portal.run(self.run_async, self.goes_on_async, call)
        except BaseException as exc:
            if stops_worker(exc):
                self._stop = self._stop or STOP
                call.end(_CANCEL_TIMEOUT)
                raise
            if not call.is_pending:  # no loop can be made, or this is the loop's thread
                loop = portal.peek()
                if loop is not None and loop.is_current:
                    with suppress(RuntimeError):  # no memory for a stack
                        start_real_thread(self.run, "wsgi_bg-batch")
                        return False
                self._fail_next(exc)
                return True
            # A signal handler or gevent's hub has raised, for example for a time limit. The
            # running task fails with this error.
            self._cause = exc
            has_ended = call.end(_CANCEL_TIMEOUT)
            if not has_ended or self._cause is not None:
                raise
        return True

    def _fail_next(self, exc: BaseException) -> None:
        """Fail the next async task, because there is no loop to run the task on."""
        context = None
        if self._begun is not None:
            _, context, awaitable = self._begun
            self._begun = None
            coroutines.drop(context, awaitable)
        # A drain that timed out has abandoned the batch and logged its tasks already.
        task = None if self._stop == ABANDONED else self._running or self._next(True)
        if task is None:
            return
        if context is None:
            context = task.take_context(self._queue)
            self._call_began = None  # the task has not been called
        self._fail(task, context, exc)
        self._queue.drop(task)

    def goes_on_async(self) -> bool:
        """True if :meth:`run_async` must be called again, in another asyncio task."""
        return not self.has_ended and self.next_is_async is True

    async def run_async(self) -> None:
        """Run the next async tasks; called on the portal's thread.

        May return before the last async task, if a task has left something that could cancel
        the next task: a cancel scope or a timeout that is still entered, or a stored
        ``asyncio.current_task()``. Each of these holds a reference to the asyncio task, and
        references can be counted. See :meth:`goes_on_async`.
        """
        this = coroutines.current_task()
        try:
            if not self._start():
                return
            references = 0  # -1 if the next task gets an asyncio task of its own
            task: BackgroundTask | None
            while True:
                if this is not None:
                    # Counted at one place: since Python 3.14, not each use of a local counts.
                    count = getrefcount(this)
                    if references == 0:
                        references = count
                    elif count > references or coroutines.is_cancelled(this):
                        return
                if per_process.generation != self._generation:  # another task's fork
                    return
                if self._begun is not None:  # the awaitable that a plain function returned
                    task, context, awaitable = self._begun
                    self._begun = None
                    move_here(context)
                else:
                    task = self._next(True)
                    if task is None:
                        return
                    awaitable = None
                    context = task.take_context(self._queue)
                calls = task.options.calls
                try:
                    if awaitable is None:
                        awaitable = context.run(self._make_of(calls), task, None)
                    if type(awaitable) is Queued:
                        raise WasQueued
                    if type(awaitable) is not CoroutineType:
                        awaitable = as_coroutine(awaitable)
                    # The first step; a coroutine that waits for nothing ends in this step.
                    waits_for = context.run(next, awaitable.__await__(), DONE)
                    if waits_for is not DONE:
                        await RemainingSteps(context, awaitable, waits_for)
                except WasQueued as exc:
                    self._running = None
                    self.sent += exc.is_sent
                except WasDiscarded:
                    self.discarded += 1
                    self._settle()
                except BaseException as exc:
                    if self._is_in_child:
                        raise
                    if coroutines.is_cancellation(exc):
                        if self._stop:
                            raise
                        if self._cause is not None:
                            exc, self._cause = self._cause, None
                        references = -1
                    self._fail(task, context, exc)
                else:
                    if per_process.generation != self._generation:
                        return
                    self._running = None
                    self.succeeded += 1
                    self._log_end(task, context)
                    if calls is not DIRECT:
                        _run_in(context, calls.finished, task)
                if per_process.generation != self._generation:
                    return
                self._queue.drop(task)
                del awaitable
        except BaseException as exc:
            if self._is_in_child:
                per_process.end_child(exc)
            raise
        finally:
            if self._is_in_child:
                per_process.end_child(None)
            try:
                self.notify_if_ended()
            finally:
                if self._is_in_child:  # a hook has forked
                    per_process.end_child(None)

    def abandon(self) -> list[BackgroundTask]:
        """Begin no further task; claim and return the tasks left, the running task first."""
        was_abandoned = self._stop == ABANDONED
        self._stop = ABANDONED
        running = None if was_abandoned else self._running
        if running is not None:
            running.claim()  # if the task was only about to begin
            running.keep_root(self._queue)
        left = self._queue.abandon()
        return left if running is None else [running, *left]

    def _next(self, is_async: bool) -> BackgroundTask | None:
        """Claim the next task if its ``is_async`` matches; end the batch if no task is left."""
        queue = self._queue
        while not self._stop:
            front = queue.front
            task = front[-1] if front else queue.first()
            if task is None:
                return None
            runs = not self._stopped and (task.options is self._let_run or self._begins(task))
            if not runs:
                # discard_excluded() may have logged the task: stop() must not log it again.
                self._running = task if task.unclaimed else None
            elif task.is_async is not is_async and task.unclaimed:
                return None
            else:
                self._running = task  # before the claim: a signal finds its name
            try:
                task.unclaimed.pop()  # task.claim(), without the call
            except IndexError as exc:
                if not is_raised_here(exc):
                    raise
            else:
                if runs:
                    if is_async:  # the task may wait for long: free the emptied list
                        task.free_claim()
                    return task
                if not self._puts_off(task):
                    self._discard(task)
                if self._is_in_child:
                    return None
            self._running = None
            self._passed_over = max(0, self._passed_over - 1)  # 0: another thread claimed
            queue.drop(task)
        if self._stop != MOVED:
            queue.stop()  # again: abandon() may have run between two steps of first()
        return None

    def _begins(self, task: BackgroundTask) -> bool:
        """True if the next task runs after this outcome of the request, and its time is up."""
        return self.lets_run(task) and (not task.options.delay or self._may_begin(task))

    def _may_begin(self, task: BackgroundTask) -> bool:
        """True if the delay of ``task`` is over, or another process will wait for its time."""
        return task.plan.is_due or (self.sends and task.options.calls.sends_delayed(task))

    def lets_run(self, task: BackgroundTask) -> bool:
        """True if the task runs after this outcome of the request.

        The batch compares ``_let_run`` first: in most batches all tasks share their options,
        and a call for each task would make an inline task a tenth slower.
        """
        options = task.options
        if options.lets_run(self.status):
            if options.calls.hooks:
                self.has_hooks = True
            if options.delay:  # each of these tasks is looked at
                self._queue.begin_delay(task)
            else:
                self._let_run = options
            return True
        return False

    def _puts_off(self, task: BackgroundTask) -> bool:
        """Let a claimed task wait until its delay is over; False to skip the task."""
        if self._stopped or not task.options.delay or not self.lets_run(task):
            return False
        wait = self._queue.put_off(task, None, self.status, holds_rest=False)
        if wait is not None:
            self._begin(wait.begin)
        else:
            self.discarded += 1
            task_log.log_unfinished(task, task_log.WAITING)
            self._settle()
        return True

    def _repeats(self, task: BackgroundTask, context: Context, exc: BaseException) -> bool:
        """Let a task that raised ``exc`` wait for its next attempt; False if it has failed."""
        plan = plan_of(task)
        is_over = self._stop == ABANDONED
        if plan is None or (self._stop and not is_over):
            return False
        if type(exc) is NotSent:
            return self._puts_off(task)
        retry = plan.retry
        if retry is None or not retry.allows(plan.attempt, exc):
            return False
        seconds = retry.wait_before(plan.attempt + 1)
        holds_rest = task.options.stop_on_error
        wait = self._queue.put_off(
            task, seconds, self.status, holds_rest=holds_rest, is_over=is_over
        )
        if wait is None:
            return False
        for added in self._queue.tasks_of_attempt(task):
            if added.claim():
                self._passed_over += 1
                self.discarded += 1
                self._queue.dropped(added)
                added.options.calls.forget(added)
                _run_in(context, task_log.log_dropped, added, task)
        _run_in(context, task_log.log_attempt, task, exc, seconds, self._call_began)
        _run_in(context, task.options.calls.retried, task, exc, seconds)
        if self._is_in_child:
            return True
        plan.attempt += 1
        if wait.moves_rest:
            self._stop = self._stop or MOVED
        self._begin(wait.begin)
        return True

    def _begin(self, begin: Callable[[], object]) -> None:
        """Begin a wait of the running task, which this batch then forgets.

        :param begin: begins the wait, and runs no bytecode in which a signal could come.
        """
        done = self._done
        if done is None:
            begin()
        else:
            # No bytecode, and so no signal handler, comes between begin() and the key.
            done.default_factory = begin
            done[log.SAID]
        self._settle()

    def _log_end(self, task: BackgroundTask, context: Context) -> None:
        """Log the end of a task that has returned, if DEBUG is logged."""
        if self._call_began is not None:
            _run_in(context, task_log.log_end, task, self._call_began)

    def _fail(self, task: BackgroundTask, context: Context, exc: BaseException) -> None:
        task.options.calls.raised(task)
        if self._repeats(task, context, exc):
            return
        self.failed += 1
        if task.options.stop_on_error:
            self._stopped = True
        _run_in(context, task_log.log_failure, task, exc, self._done, self._call_began)
        self._settle()
        if task.options.stop_on_error:
            _run_in(context, task.options.calls.stopped, task, exc, self._queue)
        _run_in(context, self._queue.notify_failure, task, exc)

    def _discard(self, task: BackgroundTask) -> None:
        self.discarded += 1
        if self._stopped:
            reason = "a task before it failed, with stop_on_error set"
        else:
            reason = task.options.why_not_run(self.status)
        self._queue.skipped(task)
        task.options.calls.forget(task)
        context = task.take_context(self._queue)
        _run_in(context, task_log.log_skipped, task, reason, self._done)
        self._settle()
        _run_in(context, task_log.notify_discarded, task, reason)

    def _settle(self) -> None:
        """Forget the running task: its outcome is logged."""
        self._running = None
        if self._done is not None:
            self._done.clear()

    def stop(self, exc: BaseException) -> None:
        """Begin no further task, since ``exc`` stops the worker, and log the tasks left."""
        if self._is_in_child:
            return
        running = self._running
        has_begun = running is not None and not running.unclaimed
        done: dict[Any, Any] = self._done or {}
        if log.SAID in done:
            self._running = None  # the task is logged already
        elif RESULT in done:
            result = done[RESULT]
            if is_awaitable(result):
                coroutines.drop(copy_context(), result)
            else:
                self._running = None  # the task's call has returned
                self.succeeded += 1
        left = self.abandon()
        for task in left:
            if per_process.generation != self._generation:  # a hook has forked
                return
            self.discarded += 1
            task_log.log_interrupted(task, exc, began=has_begun and task is running)
        self._running = None
        self.notify_if_ended()

    def __repr__(self) -> str:
        tasks = self.tasks
        names = [task.name for task in tasks[:_SHOWN]]
        names += [f"{len(tasks) - _SHOWN} others"] * (len(tasks) > _SHOWN)
        return f"<{type(self).__name__} [{', '.join(names)}]>"


def _done_here() -> Done:
    """A new dictionary for :attr:`Batch._done`, on the thread that signal handlers run on."""
    return defaultdict() if current_thread() is main_thread() else None


def _run_in(context: Context, func: Callable[..., object], *args: Any) -> None:
    """Call ``func(*args)`` in ``context``, or outside if a task still runs in ``context``."""
    try:
        context.run(func, *args)
    except RuntimeError as exc:
        if not is_raised_here(exc):  # func has begun
            raise
        func(*args)
