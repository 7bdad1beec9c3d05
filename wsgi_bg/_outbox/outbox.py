"""``Outbox``: tasks that wait to be sent, and the threads that send them.

No thread of a server speaks to a broker: ``close()`` puts each task into the outbox, and the
package's threads send the tasks in batches. While the broker is away the tasks wait.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from functools import partial
from math import inf
from operator import call
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakSet

from wsgi_bg._process import greenlets, log, per_process
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.repeated import RepeatedWarning
from wsgi_bg._process.workers import IDLE_TIMEOUT, Workers
from wsgi_bg._tasks import task_log
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.task import BackgroundTask, Queue, Queued, current
from wsgi_bg.exceptions import OutboxFullError, PublishError
from wsgi_bg.runners.base import Runner
from wsgi_bg.runners.ledger import Ledger, LedgerRunner
from wsgi_bg.runners.pool import START_DELAY, shared_pool
from wsgi_bg.runners.timer import SUBMITTERS, Deferring

if TYPE_CHECKING:
    from wsgi_bg._outbox.stored import Stored

SENDERS = 2
"""The number of threads that send at the same time, each on a connection of its own."""

CHUNK = 100
"""The number of messages that a thread sends at a time."""

IDLE = 10.0
"""Seconds without a message after which a connection is not used again.

Firewalls and load balancers drop idle connections, and tell neither side.
"""

OF_MESSAGE = (LookupError, TypeError, ValueError, struct.error)
"""Errors of a message that cannot be encoded: they do not say that the broker is away."""

_PAUSES = (0.5, 30.0)  # the first and the longest pause before the next try, in seconds
_LONGEST_ALONE = 2.0  # seconds, if a single message may be at fault, and others wait behind it
_SLACK = 0.001  # seconds: the tasks of a request are sent together, in order
_AFTER_ERROR = 1.0  # seconds
_BUSY = 1.0  # seconds after a task in which the manager's thread expects the next one


class NotKeptError(ConnectionError):
    """Raised by a connection: the broker is there, and cannot keep some messages at present."""


class Connection(Protocol):
    """A connection to a broker, used by one thread at a time.

    A subclass defines :meth:`send`.
    """

    def send(self, messages: Sequence[Any], confirmed: Callable[[int], object]) -> None:
        """Send the messages; blocks until the broker has confirmed all of them.

        :param confirmed: to be called with the index of each message that was confirmed.
        :raises Exception: if a message was not confirmed.
        """
        raise NotImplementedError

    def is_lost(self, exc: Exception) -> bool:
        """True if ``exc`` says that the broker is away; False if a message was refused."""
        # Redis: a key of the queue is of another type, so no message to that queue can be sent.
        return not (isinstance(exc, OF_MESSAGE) or "WRONGTYPE" in str(log.shown(exc)))

    def close(self) -> None:
        """Close the connection; may block for some seconds."""
        return


class Limits(NamedTuple):
    """How many tasks an outbox keeps, and for how long."""

    publish_timeout: float
    """Seconds after which a task that may run here does."""
    hold_for: float
    """Seconds after which a task that waits to be sent is given up."""
    max_unsent: int


class Unsent:
    """A task that waits to be sent. The caller has claimed the task.

    :ivar stored: the message, in a file if the outbox is durable.
    :ivar not_before: when the task is sent at the earliest, by :func:`time.monotonic`: the
        server may still be writing the response.
    :ivar deadline: when the task is given up or runs here.
    :ivar moved_to: the batch in which the task runs in this process.
    :ivar root: the ``BackgroundTasks`` that has the task; None for a message of a file.
    :ivar observer: the observer of the task's request, in a test; None without a test.
    :ivar was_tried: True if the message may have been sent.
    :ivar goes_alone: True if a connection broke when this message alone was sent: perhaps the
        broker does not take the message, and closes the connection instead of saying so.
    """

    __slots__ = (
        "_ledger",
        "_right",
        "context",
        "deadline",
        "goes_alone",
        "moved_to",
        "not_before",
        "observer",
        "root",
        "stored",
        "task",
        "was_tried",
    )

    def __init__(
        self,
        task: BackgroundTask,
        context: Context,
        stored: Stored,
        now: float,
        wait: float,
        ledger: Ledger,
    ) -> None:
        self.task: BackgroundTask = task
        self.context: Context = context
        self.stored: Stored = stored
        self.not_before: float = now + START_DELAY
        self.deadline: float = now + wait
        self.was_tried: bool = False
        self.goes_alone: bool = False
        self.moved_to: Batch | None = None
        inside = context.get(current)
        self.root: Any = None if inside is None else inside.root
        self.observer: Any = getattr(self.root, "observer", None)
        self._ledger = ledger
        self._right = {"to end": True, "to begin": True}

    @property
    def tasks(self) -> list[BackgroundTask]:
        if self.moved_to is not None:
            return self.moved_to.tasks
        return [self.task] if self in self._ledger.unsent else []

    @property
    def has_ended(self) -> bool:
        """True if the task was sent or given up, or has run here."""
        return not self.tasks

    @property
    def has_begun(self) -> bool:
        """True if the task waits no more."""
        return self.is_claimed

    @property
    def is_claimed(self) -> bool:
        """True if a thread has ended the task, or does so now."""
        return "to end" not in self._right

    def begin(self) -> bool:
        """Claim the right to send, or to leave the message to another process.

        True for a single caller only.
        """
        return self._right.pop("to begin", False)  # one atomic step

    def claim(self) -> bool:
        """Claim the right to end the task; True for a single caller only."""
        return self._right.pop("to end", False)  # one atomic step

    def give_up(self) -> list[BackgroundTask]:
        """Claim and return the task, which is not sent any more, unless a file keeps it."""
        if not self.claim():
            return []
        self._ledger.end_unsent(self)
        if self.stored.store is not None:
            self.stored.leave()
            return []
        if self.was_tried:
            message = "background task %s may have been sent"
            log.warning(message, self.task.name, extra=task_log.fields(self.task))
        return [self.task]


class Outbox:
    """The tasks of a runner that wait to be sent in this process, in the order of ``put``.

    No method but :meth:`send_here` blocks, and no lock is held: a signal handler may raise
    anywhere.

    :param connect: makes a connection to the broker; may block.
    :param runner: the runner that the tasks belong to.
    :param ledger: the runner's ledger, whose ``unsent`` has the tasks.
    :param local: the runner for tasks that run here if they cannot be sent.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        runner: Runner,
        ledger: Ledger,
        local: Runner,
        limits: Limits,
    ) -> None:
        self._connect = connect
        self._runner = runner
        self._ledger = ledger
        self._unsent: dict[Any, None] = ledger.unsent
        self._reserved: WeakSet[Stored] = WeakSet()
        self._local = local
        self._limits = limits
        self._queue: deque[Unsent] = deque()
        self._changed = greenlets.event_for_thread()
        # If two threads start the thread, it has a second job, which begins if the first ends.
        self._manager: Workers[None] = Workers(self._manage, 1, "wsgi_bg-outbox")
        self._is_managed = False
        self._is_asleep = False
        self._last_put = 0.0
        self._senders: Workers[_Chunk] = Workers(self._send_chunk, SENDERS, "wsgi_bg-send")
        # Not on the manager's thread: a user's submit() may run the batch.
        later = partial(submit_later, local)
        self._submitters: Workers[Batch] = Workers(later, SUBMITTERS, "wsgi_bg-later")
        self._closer: Workers[Connection] = Workers(_close, 1, "wsgi_bg-send-close")
        self._busy: dict[_Chunk, None] = {}
        self._idle: list[tuple[Connection, float]] = []  # last in, first out
        self._next_deadline = inf
        self._pause = 0.0  # seconds; not 0.0 while the broker is away
        self._next_try = 0.0
        self._away = RepeatedWarning(
            "%d times the broker could not be reached, since the last record of this kind "
            "(%s): %d background tasks of %s wait to be sent"
        )

    def check_room(self, name: str) -> None:
        """Raise if too many tasks wait to be sent, those of unfinished requests included.

        :raises OutboxFullError: if ``max_unsent`` tasks wait.
        """
        if len(self._reserved) >= self._limits.max_unsent:
            raise OutboxFullError(name, self._limits.max_unsent)

    def reserve(self, stored: Stored) -> None:
        """Keep room for a message until its task has ended or the message is freed."""
        self._reserved.add(stored)

    @property
    def room(self) -> int:
        """How many more tasks may wait to be sent."""
        return self._limits.max_unsent - len(self._unsent)

    @property
    def messages(self) -> list[Stored]:
        """The messages that wait to be sent."""
        return [each.stored for each in list(self._unsent)]

    def put(self, task: BackgroundTask, stored: Stored) -> Queue:
        """Return a function that puts a claimed task into the outbox, without a bytecode."""
        limits = self._limits
        is_held = stored.message.when_unsent == "hold"
        wait = limits.hold_for if is_held else limits.publish_timeout
        context = task.context or task.new_context()
        now = time.monotonic()
        unsent = Unsent(task, context, stored, now, wait, self._ledger)
        if unsent.observer is not None:
            unsent.observer.put_off(unsent)
        self._last_put = now  # before the next line: see _is_over() and _sleep()
        self.start()
        steps: Any = (self._unsent.setdefault, self._queue.append)
        return partial(Queued, map(call, steps, (unsent, unsent)), 0)

    def start(self) -> bool:
        """Start or wake the thread that gives tasks to the senders; False if none can start."""
        if self._is_asleep:
            self._changed.set()
        return self._is_managed or self._manager.submit(None)

    def send_here(self, deadline: float) -> None:
        """Send the tasks on this thread, until all are sent or until ``deadline``; blocks.

        For the exit: since Python 3.12 no thread can be started then.
        """
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            self._changed.wait(min(self._step(), left, START_DELAY))

    def _manage(self, job: None) -> None:
        """Give tasks to the senders, until no task has come for long."""
        generation = per_process.generation
        self._is_managed = True
        while per_process.generation == generation and not self._is_over():
            self._changed.clear()
            last = self._last()
            seconds = _AFTER_ERROR
            try:
                seconds = self._step()
            except BaseException as exc:
                log.error("the outbox of %s raised", self._runner, exc_info=exc)
            self._sleep(min(seconds, IDLE), last)

    def _last(self) -> Unsent | None:
        return self._queue[-1] if self._queue else None

    def _sleep(self, seconds: float, last: Unsent | None) -> None:
        """Wait until there is something to do.

        Waking a thread costs the server's thread 30 us. So while tasks come, this thread looks
        for them itself, as often as it would send them: see START_DELAY.

        :param last: the last task that the latest step has seen in the queue.
        """
        if self._expects_tasks:
            self._changed.wait(min(seconds, START_DELAY))
            return
        self._is_asleep = True
        # A thread in put() sees the line above and wakes this thread, or is seen below.
        if self._last() in (None, last) and not self._expects_tasks:
            self._changed.wait(seconds)
        self._is_asleep = False

    @property
    def _expects_tasks(self) -> bool:
        return time.monotonic() - self._last_put < _BUSY

    def _is_over(self) -> bool:
        """True if the thread is to end, so that a runner that is not used can be freed."""
        self._close_idle(time.monotonic() - IDLE)
        if self._is_used():
            return False
        self._is_managed = False
        if self._is_used():  # a thread may have put a task meanwhile
            self._is_managed = True
            return False
        self._close_idle(inf)
        return True

    def _is_used(self) -> bool:
        is_busy = bool(self._unsent or self._busy)  # a busy sender gives its connection back
        return is_busy or time.monotonic() - self._last_put < IDLE_TIMEOUT

    def _close_idle(self, before: float) -> None:
        """Close connections that have not been used since ``before``."""
        with suppress(IndexError):
            while self._idle[0][1] <= before:
                # If a sender has popped the first meanwhile, another one is closed: no harm.
                self._closer.submit(self._idle.pop(0)[0])

    def _step(self) -> float:
        """Expire tasks, give tasks to idle senders; return the seconds until the next step."""
        now = time.monotonic()
        self._expire(now)
        if self._unsent:  # perhaps tasks that no step has seen yet
            soon = now + min(self._limits.publish_timeout, self._limits.hold_for)
            self._next_deadline = min(self._next_deadline, soon)
        until = self._next_deadline
        if self._queue:
            size, limit = CHUNK, SENDERS
            if self._pause:  # a single probe at a time
                size = limit = 1
            if now < self._next_try:
                limit = 0
                until = min(until, self._next_try)
            while self._queue and len(self._busy) < limit:
                chunk = self._next_chunk(size, now)
                if not chunk.unsent:
                    break
                self._busy[chunk] = None
                if not self._senders.submit(chunk):  # since Python 3.12 none starts at exit
                    self._send_chunk(chunk)
            if self._queue and len(self._busy) < limit:  # the first is not to be sent yet
                until = min(until, self._queue[0].not_before - _SLACK)
        return max(0.0, until - now)

    def _next_chunk(self, size: int, now: float) -> _Chunk:
        unsent: list[Unsent] = []
        until = now + _SLACK
        while len(unsent) < size and self._queue and self._queue[0].not_before <= until:
            if self._queue[0].goes_alone:  # the broker would take no message of the chunk
                if unsent:
                    break
                size = 1
            each = self._queue.popleft()
            if not each.is_claimed:
                unsent.append(each)
        return _Chunk(unsent)

    def _expire(self, now: float) -> None:
        """End the tasks that have waited for too long."""
        if now < self._next_deadline:
            return
        self._next_deadline = inf
        for unsent in list(self._unsent):
            if unsent.deadline > now:
                self._next_deadline = min(self._next_deadline, unsent.deadline)
            elif unsent.claim():
                self._end(unsent, "the broker has not answered in time")

    # On a thread that sends.

    def _send_chunk(self, chunk: _Chunk) -> None:
        try:
            self._send(chunk.unsent)
        finally:
            self._busy.pop(chunk, None)
            self._changed.set()

    def _send(self, unsent: list[Unsent]) -> None:
        connection = None
        try:
            connection = self._take_idle() or self._connect()
            unsent = [each for each in unsent if self._begins(each)]
            messages = [each.stored.message for each in unsent]
            connection.send(messages, lambda index: self._confirm(unsent[index]))
            if not all(each.is_claimed for each in unsent):
                raise NotKeptError("send() has returned, and has not confirmed all messages")
        except BaseException as exc:
            left = [each for each in unsent if not each.is_claimed]
            is_away = connection is None or _is_lost(connection, exc)
            if connection is not None:
                self._closer.submit(connection)
            if is_away:
                has_broken = connection is not None and not isinstance(exc, NotKeptError)
                if has_broken and len(unsent) == 1:
                    unsent[0].goes_alone = True
                self._wait_for_broker(left, exc)
            elif len(left) == 1:
                self._refuse(left[0], exc)
            else:  # the broker has refused a single message, and cut the others short
                for each in left:
                    self._send([each])
            if not isinstance(exc, Exception):  # a cancellation, for example
                raise
        else:
            self._idle.append((connection, time.monotonic()))
            if self._pause:
                self._pause = self._next_try = 0.0
                log.info("the broker of %s is reached again", self._runner)

    def _begins(self, unsent: Unsent) -> bool:
        """True if the message is to be sent now; else it was left, ended or discarded."""
        unsent.was_tried = unsent.begin() or unsent.was_tried
        if not unsent.was_tried:
            return False
        if not unsent.is_claimed and unsent.stored.begin():
            return True
        if unsent.claim():
            reason = "it was discarded by hand"
            unsent.context.run(task_log.notify_discarded, unsent.task, reason)
            self._remove(unsent)
        return False

    def leave_stored(self) -> int:
        """Leave messages in their files that are not being sent; return their number."""
        count = 0
        for unsent in list(self._unsent):
            if unsent.stored.store is not None and unsent.begin() and unsent.claim():
                unsent.stored.leave()
                self._remove(unsent)
                count += 1
        return count

    def _take_idle(self) -> Connection | None:
        with suppress(IndexError):
            connection, since = self._idle.pop()
            if time.monotonic() - since < IDLE:
                return connection
            self._closer.submit(connection)
        return None

    def _confirm(self, unsent: Unsent) -> None:
        task = unsent.task
        if not unsent.claim():
            log.warning(
                "background task %s was sent after its time was up: it may run twice",
                task.name,
                extra=task_log.fields(task),
            )
            return
        unsent.stored.end("done")
        unsent.context.run(task.options.calls.sent, task)
        self._remove(unsent, sent=1)

    def _wait_for_broker(self, left: list[Unsent], exc: BaseException) -> None:
        """Send ``left`` again after a pause; each pause is twice as long as the last."""
        is_alone = any(each.goes_alone for each in left)
        first, longest = _PAUSES
        longest = min(longest, _LONGEST_ALONE) if is_alone else longest
        self._pause = min(longest, max(first, 2 * self._pause))
        self._next_try = time.monotonic() + self._pause
        # Neither such a message nor a full queue holds up messages to others.
        if is_alone or isinstance(exc, NotKeptError):
            self._queue.extend(left)
        else:
            self._queue.extendleft(reversed(left))
        if left:  # else given up meanwhile
            both = exc, exc.__cause__  # the first of kombu's two names no reason
            error = ", from ".join(f"{type_name(each)}: {each}" for each in both if each)
            self._away.count(error, len(self._unsent), self._runner)

    def _refuse(self, unsent: Unsent, exc: BaseException) -> None:
        """Give up a message that the broker does not accept."""
        if unsent.claim():
            error = PublishError(unsent.task.name, f"{type_name(exc)}: {exc}")
            error.__cause__ = exc
            self._fail(unsent, error)

    # On any thread of the outbox.

    def _remove(self, unsent: Unsent, *, sent: int = 0, failed: int = 0) -> None:
        """Remove an ended task."""
        self._reserved.discard(unsent.stored)
        self._ledger.end_unsent(unsent, sent=sent, failed=failed)

    def count_aside(self) -> None:
        """Count a stored message that was put aside."""
        self._ledger.count_aside()

    def _end(self, unsent: Unsent, reason: str) -> None:
        """End a claimed task that has waited for too long."""
        if unsent.was_tried:
            reason += ", and it may have been sent"
        message = unsent.stored.message
        is_expired = time.time() >= message.expires
        if is_expired:
            reason += ", and it has expired"
        error = PublishError(unsent.task.name, reason)
        if message.when_unsent == "local" and not is_expired:
            self._run_here(unsent, error)
        else:
            self._fail(unsent, error)

    def _fail(self, unsent: Unsent, error: PublishError) -> None:
        task = unsent.task
        unsent.stored.end("aside", type_name(error.__cause__ or error))
        unsent.context.run(task_log.log_failure, task, error)
        if unsent.observer is not None:
            unsent.observer.task_failed(task, error)
        unsent.context.run(task_log.notify_failure, task, error)
        self._remove(unsent, failed=1)

    def _run_here(self, unsent: Unsent, error: PublishError) -> None:
        task = unsent.task
        extra = unsent.context.run(task_log.fields, task)
        message = "background task %s runs in this process: %s"
        log.warning(message, task.name, error, extra=extra)
        queue = _TaskHere()
        queue.observer = unsent.observer
        copy = task.successor()
        options: Any = task.options
        added: Any = replace(options.of_layer(options), run_on="always")
        copy.options = replace(options, run_on="always", layer=added)
        queue.options = added  # of the tasks that the task adds: nothing of a single task
        copy.context, copy.message = unsent.context, unsent.stored
        unsent.stored.runs_here = True
        queue.request = unsent.context.run(lambda: task.request)
        unsent.context.run(task.options.calls.moved, task, copy, queue)
        queue.open_list().append(copy)
        queue.close()
        batch = unsent.moved_to = Batch(queue, response_complete=True)
        batch.sends = True  # the tasks that the task adds
        batch.hand_over(self._ledger.length)
        self._ledger.add(batch)
        self._remove(unsent)
        if not self._submitters.submit(batch):
            submit_later(self._local, batch)


class _TaskHere(Deferring):
    """A task that could not be sent and runs in this process, in a batch of its own."""

    __slots__ = ("observer",)

    observer: Any


class _Chunk:
    """Tasks that a thread sends together."""

    __slots__ = ("unsent",)

    def __init__(self, unsent: list[Unsent]) -> None:
        self.unsent: list[Unsent] = unsent


def submit_later(runner: Runner, batch: Batch) -> None:
    """Submit a batch outside of any request; the shared pool runs what the runner refuses."""
    try:
        if isinstance(runner, LedgerRunner):
            runner.submit_later(batch)
        else:
            runner.submit(batch)
    except Exception as exc:  # raised by a user's runner
        if not batch.has_started:
            log.error("%s did not take %s, which runs here", runner, batch, exc_info=exc)
            shared_pool.submit_later(batch.again())
            return
        log.error("%s raised in submit()", runner, exc_info=exc)


def _is_lost(connection: Connection, exc: BaseException) -> bool:
    if isinstance(exc, NotKeptError) or not isinstance(exc, Exception):
        return True
    try:
        return connection.is_lost(exc)
    except Exception as error:  # raised by a user's connection
        log.error("is_lost() of %s raised", connection, exc_info=error)
        return True


def _close(connection: Connection) -> None:
    with suppress(Exception):
        connection.close()
