"""Tasks that wait for their time, and the thread that submits each when its time has come.

A wait holds no thread: the tasks are in a heap of the timer, and in ``Ledger.waiting`` of their
runner, by which ``statistics()``, ``wait`` and the exit know them. Each task that waits is a
batch of its own then, :class:`LaterTasks`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from operator import call
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, NamedTuple

from wsgi_bg._loop import portal
from wsgi_bg._process import greenlets, log, per_process
from wsgi_bg._process.exit import is_exiting
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedWarning
from wsgi_bg._process.workers import Workers
from wsgi_bg._tasks.background_tasks import (
    CLOSED,
    OPEN,
    BackgroundTasks,
    TaskQueue,
    Wait,
)
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg._tasks.task_log import WAITING, log_unfinished
from wsgi_bg.exceptions import WaitingLimitError
from wsgi_bg.runners.keeping import KeepingRunner
from wsgi_bg.runners.ledger import Ledger, LedgerRunner, ledger_of
from wsgi_bg.runners.pool import shared_pool

if TYPE_CHECKING:
    from wsgi_bg.runners.base import Runner

SUBMITTERS = 40
"""The number of threads for runners of the user that run a batch in ``submit``."""

_AFTER_ERROR = 1.0  # seconds


class Deferring(TaskQueue):
    """The tasks of a batch that can put tasks off: those of a request, and tasks put off."""

    __slots__ = ()

    # A wsgi_bg._request.observer.RequestObserver, which this room must not import.
    observer: Any = None
    # The wsgi_bg._request.invocation.Invocation that the request belongs to.
    invocation: Any = None

    def awaited(self, batch: Batch) -> Batch:
        """Let the invocation of the request, if any, wait for ``batch``, and return it."""
        if self.invocation is not None:
            self.invocation.hand_over(self, batch)
        return batch

    @property
    def runner(self) -> Runner:
        """The runner that gets the tasks when their time has come."""
        runner: Runner = self.options.runner
        return runner

    def admit_wait(self, task: BackgroundTask) -> None:
        if not self._waits:
            return
        # Now, since Python 3.12 starts no thread once the interpreter exits. And here, on a
        # greenlet of the application, and not on the loop's thread.
        timers.get().start()
        if not task.options.delay:
            return
        ledger = ledger_of(self.runner)
        if not ledger.may_wait():
            raise WaitingLimitError(task.name, ledger.max_waiting)
        if self.phase != OPEN:
            self.begin_delay(task)

    @property
    def _waits(self) -> bool:
        return self.observer is None or bool(self.observer.waits)

    def begin_delay(self, task: BackgroundTask) -> None:
        plan = task.plan
        if not self._waits:
            plan.is_due = True
        elif plan.due is None:
            plan.due = timers.get().now() + task.options.delay

    def put_off(
        self,
        task: BackgroundTask,
        wait: float | None,
        status: int,
        *,
        holds_rest: bool,
        is_over: bool = False,
    ) -> Wait | None:
        if not self._waits:
            return _Next(self, task)
        timer = timers.get()
        runner = self.runner
        ledger = ledger_of(runner)
        keeper = None
        if isinstance(runner, KeepingRunner) and runner.is_stored(task):
            keeper = runner
        if keeper is not None and wait is not None and holds_rest:
            keeper.hold_back(task, wait, self)
        elif keeper is not None and keeper.postpone(task, wait, self, status):
            return _InFile(task, moves_rest=False)
        if is_over or is_exiting():  # no drain will come that could log the task
            return None if keeper is None else self._leave(task, keeper, holds_rest=holds_rest)
        if wait is not None:
            if keeper is None and not ledger.may_wait():
                timer.full.count(ledger.max_waiting)
                return None
            task.plan.due = timer.now() + wait
        timer.start()
        later = LaterTasks(self, task, status, timer, ledger, holds_rest=holds_rest)
        if self.observer is not None:
            self.observer.put_off(later)
        return later

    def _leave(
        self, task: BackgroundTask, keeper: KeepingRunner, *, holds_rest: bool
    ) -> _InFile:
        """Leave a stored task to the next process; log the tasks that would wait with it."""
        keeper.leave(task)
        rest = self.left() if holds_rest else []
        _log_waiting([each for each in rest if not keeper.is_stored(each) and each.claim()])
        return _InFile(task, moves_rest=holds_rest)

    def dropped(self, task: BackgroundTask) -> None:
        if self.observer is not None:
            self.observer.dropped(task)

    def skipped(self, task: BackgroundTask) -> None:
        if self.observer is not None:
            self.observer.skipped(task)

    def notify_failure(self, task: BackgroundTask, exc: BaseException) -> None:
        if self.observer is not None:
            self.observer.task_failed(task, exc)
        super().notify_failure(task, exc)


class _Next:
    """The place of the running task's copy in the list, if waits are zero, as in a test."""

    moves_rest: bool = False

    def __init__(self, tasks: TaskQueue, task: BackgroundTask) -> None:
        copy = task.successor()
        task.options.calls.moved(task, copy, tasks)
        front = tasks.front
        self.begin: Callable[[], object] = (
            partial(front.insert, len(front) - 1, copy)
            if front
            else partial(tasks.open_list().insert, 1, copy)
        )


class _InFile:
    """The wait of a task that its runner has stored, and that no memory holds."""

    def __init__(self, task: BackgroundTask, *, moves_rest: bool) -> None:
        # Else task and record are a cycle, and the task waits here until a garbage collection.
        self.begin: Callable[[], object] = task.record.clear
        self.moves_rest: bool = moves_rest


class LaterTasks(Deferring):
    """A task that waits for its time, and the tasks that wait with it.

    The first task is a copy of the task that was put off. No thread begins the tasks before
    the timer has submitted their batch; until then only the exit may claim them.

    :param tasks: the list that the task came from.
    :param task: the task, which the caller has claimed. Its plan has the time.
    :param status: the status of the request; see :class:`Batch`.
    :param holds_rest: True if the tasks that ``tasks`` has left wait, too.

    :ivar due: the time by the clock of the timer.
    :ivar ledger: the ledger of the runner; counts these tasks as waiting after :attr:`begin`.
    :ivar begin: begins the wait, in a single atomic operation.
    :ivar moves_rest: True if the tasks that were left in ``tasks`` belong to this object.
    """

    __slots__ = (
        "_rest",
        "_right_to_start",
        "_runner",
        "_status",
        "begin",
        "due",
        "invocation",
        "ledger",
        "moves_rest",
        "observer",
        "origin",
    )

    front: list[BackgroundTask] | None
    invocation: Any
    options: Options
    observer: Any
    origin: BackgroundTasks | None
    stored_as: Any
    has_waited: bool = True

    def __init__(
        self,
        tasks: Deferring,
        task: BackgroundTask,
        status: int,
        timer: Timer,
        ledger: Ledger,
        *,
        holds_rest: bool,
    ) -> None:
        copy = task.successor()
        self._list = [] if tasks.observer is None else tasks.observer.new_list()
        self._list.insert(0, copy)
        self.front = self._start_response = None
        self.phase = CLOSED
        # The layer of middleware in which the task was added; see also take_context().
        self.options = copy.options.of_layer(tasks.options)
        self.observer = tasks.observer
        self.origin = tasks.origin or tasks
        self.invocation = tasks.invocation
        self.request = tasks.request
        self.stored_as = getattr(tasks, "stored_as", None)
        self._runner = tasks.runner
        self._status = status
        self._rest: TaskQueue | None = tasks if holds_rest else None
        self._right_to_start = {"right": True}
        assert copy.plan.due is not None
        self.due: float = copy.plan.due
        self.ledger: Ledger = ledger
        self.moves_rest: bool = holds_rest
        self.begin: Callable[[], object] = timer.expecting(self)
        task.options.calls.moved(task, copy, self)

    @property
    def runner(self) -> Runner:
        return self._runner

    @property
    def tasks(self) -> list[BackgroundTask]:
        """See :attr:`BackgroundTasks.tasks`; with the tasks that wait for the first task."""
        if self._rest is None:
            return super().tasks
        return [task for task in self.left() if task.unclaimed]

    def give_up(self) -> list[BackgroundTask]:
        """Wait no longer; claim and return the tasks."""
        self.ledger.waiting.pop(self, None)
        rest = self._rest
        return self.abandon() + ([] if rest is None else rest.abandon())

    def make_batch(self) -> Batch:
        """Make the batch when the time has come; called on the timer's thread."""
        assert self._list is not None
        rest, self._rest = self._rest, None
        for task in [] if rest is None else rest.abandon():
            copy = task.successor()
            task.options.calls.moved(task, copy, self)
            self._list.append(copy)
        if self.has_ended:  # given up by the exit, meanwhile
            _log_waiting(self.abandon())
        self._list[0].plan.is_due = True
        batch = Batch(self, response_complete=True, status=self._status)
        batch.sends = hasattr(self._runner, "send")
        return self.awaited(batch)

    def may_start(self) -> bool:
        return self._right_to_start.pop("right", False)  # atomic, as is each step here

    def allow_start(self) -> None:
        self._right_to_start["right"] = True

    @property
    def has_begun(self) -> bool:
        """True if a batch has begun to run the tasks."""
        return not self._right_to_start

    def length(self) -> int:
        rest = self._rest
        if rest is None:
            return super().length()
        return super().length() + sum(bool(task.unclaimed) for task in rest.left())

    def left(self) -> list[BackgroundTask]:
        rest = self._rest
        return super().left() + ([] if rest is None else rest.left())

    def abandon(self) -> list[BackgroundTask]:
        self.stop()
        return [task for task in super().left() if task.claim()]


def _log_waiting(tasks: list[BackgroundTask]) -> None:
    for task in tasks:
        log_unfinished(task, WAITING)


class _Submission(NamedTuple):
    """A batch whose time has come, and its tasks."""

    batch: Batch
    later: LaterTasks


class Timer:
    """The heap of a process and its daemon thread, which starts with the first task to wait.

    No lock is held: the exception of a signal handler could leave the lock locked. A thread
    that begins a wait appends, then sets an event; the timer's thread clears the event, then
    looks for new waits.

    :param clock: returns the time, in seconds.
    :ivar full: the WARNING about tasks that are not called again because of ``max_waiting``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now: Callable[[], float] = clock
        self.full: RepeatedWarning = RepeatedWarning(
            "%d tasks have failed and are not called again, since the last record of this "
            "kind: %d tasks wait for their time already"
        )
        self._new: deque[LaterTasks] = deque()
        self._heap: list[tuple[float, int, LaterTasks]] = []
        self._numbers = count()
        self._changed = greenlets.event_for_thread()
        # If two threads start the thread, it has a second job, which begins if the first ends.
        self._thread: Workers[None] = Workers(self._work, 1, "wsgi_bg-timer")
        self._is_running = False
        # Not on the timer's thread: a user's submit() may run the batch.
        self._submitters: Workers[_Submission] = Workers(_submit, SUBMITTERS, "wsgi_bg-later")

    def expecting(self, later: LaterTasks) -> Callable[[], object]:
        """Return a function that makes ``later`` wait, for any thread to call once.

        The steps of the function run no bytecode, so that no signal handler comes between.
        """
        steps = (
            partial(later.ledger.waiting.setdefault, later),
            partial(self._new.append, later),
            self._changed.set,
        )
        return partial(deque, map(call, steps), 0)

    def wake(self) -> None:
        """Let the thread look at the clock."""
        self._changed.set()

    def start(self) -> None:
        """Start the thread, unless it runs. Without memory for it the next wait tries again."""
        if self._is_running:
            return
        if greenlets.are_threads():
            loop = portal.peek()
            # No greenlet would run on the loop's thread. (coverage does not see that thread.)
            if loop is not None and loop.is_current:
                return  # pragma: no cover
        self._thread.submit(None)

    def _work(self, job: None) -> None:
        """Submit tasks at their times; returns only in a child that a log handler forks."""
        generation = per_process.generation
        self._is_running = True
        while True:
            self._changed.clear()
            self._changed.wait(self._submit_due())
            if per_process.generation != generation:
                return

    def _submit_due(self) -> float:
        """Submit the tasks whose time has come; return the seconds until the next time."""
        try:
            while self._new:
                later = self._new[0]
                heappush(self._heap, (later.due, next(self._numbers), later))
                self._new.popleft()
            while self._heap:
                due, _, later = self._heap[0]
                seconds = due - self.now()
                if seconds > 0:
                    return min(seconds, TIMEOUT_MAX)
                self._submit(later)
                heappop(self._heap)
        except BaseException as exc:
            log.error("the timer raised", exc_info=exc)
            return _AFTER_ERROR
        return TIMEOUT_MAX

    def _submit(self, later: LaterTasks) -> None:
        ledger = later.ledger
        if later not in ledger.waiting:  # given up
            return
        batch = later.make_batch()
        batch.hand_over(ledger.length)
        ledger.add(batch)  # before the next line: exit finds the tasks in one of both
        ledger.end_wait(later)
        submission = _Submission(batch, later)
        if not self._submitters.submit(submission):
            _submit(submission)


def _submit(submission: _Submission) -> None:
    """Submit the batch to its runner; the shared pool runs a batch that the runner refuses."""
    batch, later = submission
    runner = later.runner
    try:
        if isinstance(runner, LedgerRunner):
            runner.submit_later(batch)
        else:
            runner.submit(batch)
    except BaseException as exc:
        if later.has_begun:
            log.error("%s raised in submit()", runner, exc_info=exc)
            return
        names = ", ".join(task.name for task in batch.tasks)
        message = "%s did not take %s, which run in this process"
        log.error(message, runner, names, exc_info=exc)
        shared_pool.submit_later(batch.again())
    finally:
        later.ledger.end_submit(later)


def delay_left(task: BackgroundTask) -> float:
    """Seconds until the delay of ``task`` is over; the whole delay if it has not begun."""
    due = task.plan.due
    return task.options.delay if due is None else due - timers.get().now()


timers: PerProcess[Timer] = PerProcess(Timer)
"""The timer of this process. A forked child has none of its parent's waits."""
