"""``OutboxRunner``: base class of runners that send tasks to an engine's workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypedDict
from weakref import WeakValueDictionary

from wsgi_bg._messages import headers
from wsgi_bg._outbox.encoded import EngineOptions, encode_call, load_call
from wsgi_bg._outbox.outbox import Connection, Limits, Outbox
from wsgi_bg._outbox.stored import Message, Stored, StoredMessages
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedError, RepeatedWarning
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.rows import NO_LIMIT, Row, Settings
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.checks import (
    WhenUnsent,
    bounded,
    check_when_unsent,
    seconds,
    whole_number,
)
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.task import BackgroundTask, Queue, Queued, fill, plan_of
from wsgi_bg.exceptions import MessageError, OptionTypeError, OptionValueError
from wsgi_bg.runners import Runner, Statistics, resolve
from wsgi_bg.runners.attached import Attached
from wsgi_bg.runners.keeping import KeepingRunner, is_kept_at_once, is_recorded
from wsgi_bg.runners.ledger import Ledger
from wsgi_bg.runners.timer import Deferring

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.batch import Batch

_LONG = 900.0
"""Seconds of delay from which a message waits in the file, if there is a file."""

_NO_ROW = Row("", "")

_SETTINGS = Settings(keep_failed=(NO_LIMIT, 7 * 86400.0))
"""Messages that were put aside are kept for a week, however many they are."""

_of_folder: WeakValueDictionary[tuple[int, int], OutboxRunner] = WeakValueDictionary()
"""A runner of this process by the identity of its folder."""


class OutboxOptions(TypedDict, total=False):
    """The options of :class:`OutboxRunner`, for the signatures of its subclasses."""

    local: Runner | Literal["inline", "pool"]
    outbox: str | os.PathLike[str] | None
    when_unsent: WhenUnsent
    publish_timeout: float
    hold_for: float
    max_unsent: int
    drain_timeout: float


class OutboxRunner(KeepingRunner):
    """Puts the messages of tasks into an outbox; tasks without a message run on ``local``.

    ``add_task`` makes the message, by :meth:`message`. ``close()`` puts the message into the
    outbox and returns; threads of the package send messages in batches, over connections that
    :meth:`connect` makes. So no thread of the server waits for a broker. While the broker is
    away the messages wait in the outbox.

    A subclass defines :meth:`connect`, and :attr:`engine_options` if its engine has any. The
    data of each message is an :class:`~wsgi_bg.outbox.EncodedCall` then. A subclass with other
    data defines :meth:`message`, and for an outbox in a folder :meth:`dump`, :meth:`load` and
    :meth:`find`.

    :param local: the runner for tasks that are not sent, or its name.
    :param outbox: the path of a folder that keeps the messages until the broker has confirmed
        them, as :class:`~wsgi_bg.DurableRunner` keeps tasks: a response that says success means
        that its messages are stored. None keeps the messages in memory.
    :param when_unsent: for a task that cannot be sent: ``"hold"`` keeps the task for
        ``hold_for`` seconds; ``"local"`` runs the task on ``local`` after ``publish_timeout``,
        so the task may run twice (a task with a delay or a ``Retry`` is held all the same);
        ``"discard"`` gives the task up after ``publish_timeout``. A task that is given up is
        logged at ERROR and passed to ``on_error`` with a ``PublishError``.
    :param publish_timeout: seconds for which a thread of the package waits for an answer of
        the broker.
    :param hold_for: seconds for which a task waits for the broker.
    :param max_unsent: how many tasks may wait in the memory of a process. Beyond that
        ``add_task`` raises ``OutboxFullError``, a ``RuntimeError``; with a folder, further
        tasks wait in the file.
    :param drain_timeout: seconds for which interpreter exit waits until all tasks are sent
        and the local tasks are done. Tasks that are not sent by then are logged at ERROR.
    :raises ValueError: if an option is out of range.
    :raises TypeError: if an option has the wrong type.
    :raises StoreError: a ``RuntimeError``, if the folder cannot be used.

    :ivar engine_options: the options of the engine for a function or a task, see
        :data:`~wsgi_bg.outbox.EngineOptions`.
    :ivar destination: where the messages are sent to; equal for runners that may share a
        folder. A subclass sets it.
    :ivar holds_delays: True if the engine keeps a message with a long delay as safely as any
        message: then no WARNING names the task, and the message does not wait in the folder.
    """

    sends_delayed = True
    engine_options: ClassVar[EngineOptions] = {}
    holds_delays: bool = False
    queues = True

    def __init__(
        self,
        *,
        local: Runner | Literal["inline", "pool"] = "pool",
        outbox: str | os.PathLike[str] | None = None,
        when_unsent: WhenUnsent = "hold",
        publish_timeout: float = 5.0,
        hold_for: float = 3600.0,
        max_unsent: int = 100_000,
        drain_timeout: float = 30.0,
    ) -> None:
        seconds("publish_timeout", publish_timeout, above_zero=True, most=TIMEOUT_MAX)
        seconds("hold_for", hold_for, above_zero=True)
        whole_number("max_unsent", max_unsent, least=1)
        seconds("drain_timeout", drain_timeout)
        check_when_unsent(when_unsent)
        self.local: Runner = resolve(local, "local")
        self.publish_timeout: float = publish_timeout
        self.drain_timeout = drain_timeout
        self._when_unsent = when_unsent
        self._limits = Limits(publish_timeout, bounded(hold_for), max_unsent)
        self._long_delays = RepeatedWarning(
            "%d tasks are sent with a delay of more than 15 minutes, since the last record of "
            "this kind; the last is %s. Brokers may deliver such a message again: Redis after "
            "its visibility_timeout (an hour by default), RabbitMQ after its consumer_timeout "
            "(30 minutes)"
        )
        self._not_started = RepeatedError("%s cannot send the messages of other processes")
        self._folder: Folder | None = None
        if outbox is not None:
            if not isinstance(outbox, (str, os.PathLike)):
                raise OptionTypeError("outbox", outbox, "the path of a folder")
            # A folder in the folder: no DurableRunner reads messages, or the other way round.
            parent = check_folder(outbox)
            self._folder = check_folder(os.path.join(parent.path, "outbox"))
        self.keeps: bool = self._folder is not None
        self.destination: object = type(self)
        self._attached = Attached(Options(runner=self))
        self._states = PerProcess(self._make_state)

    def _make_state(self) -> _State:
        ledger = Ledger()
        outbox = Outbox(self.connect, self, ledger, self.local, self._limits)
        files = None
        if self._folder is not None:
            files = StoredMessages(self._folder, _SETTINGS, outbox, self.find, self._from_row)
        return _State(ledger, outbox, files)

    # What a subclass defines.

    def message(self, task: BackgroundTask) -> Message | None:
        """Return the message of an added task; None if the task runs on ``local``.

        Called in ``add_task``, on its thread, in the context of the request. Must not block.
        This method encodes the call of a registered function.

        :raises TypeError: to refuse the task.
        :raises ValueError: if an option for the engine is unknown or out of range.
        """
        call = encode_call(task, self.engine_options)
        return None if call is None else Message(call.name, call, call.due)

    def connect(self) -> Connection:
        """Connect to the broker; called on a thread of the outbox; may block.

        :raises Exception: if the broker cannot be reached.
        """
        raise NotImplementedError

    def dump(self, message: Message) -> str:
        """Return the data of a message as text for a file.

        :raises TypeError: if the data is no JSON.
        """
        return json.dumps(message.data)

    def load(self, name: str, text: str) -> Any:
        """Return the data of a message in a file, which may be forged.

        :raises ValueError: or another error, if ``text`` is no message for the task ``name``.
        """
        return load_call(name, text, self.engine_options)

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the function of a message in a file; None if it is not known (yet)."""
        registration = registry.get(name)
        return None if registration is None else registration.func

    # For the middleware.

    def attach(self, options: Options) -> None:
        """Send messages that this process has not added under ``options``.

        Calls on workers are made under these options, too. The first call holds, or the first
        call with the context of an application.

        :raises ValueError: if a runner with another :attr:`destination` has the folder.
        """
        if self._folder is not None:
            other = _of_folder.setdefault(self._folder.identity, self)
            if other.destination != self.destination:
                wanted = f"another folder than that of {other!r}, which would send the messages"
                raise OptionValueError("outbox", self._folder.path, wanted)
        self._attached.attach(options)

    @property
    def options(self) -> Options:
        """The options that :meth:`attach` has set."""
        return self._attached.options

    def start(self) -> None:
        """Send the messages of processes that have died; does not block.

        Called by the middleware with each request.

        :raises StoreError: if this process cannot make its file in the folder.
        """
        files = self._states.get().files
        if files is not None:
            files.start()

    def start_on_worker(self) -> None:
        """Send the messages with a long delay that other processes have left.

        A process of a worker may end before the delay is over, and no web process may be there.
        Nothing is made in a folder without a file: a worker may have a process for each call.
        """
        files = self._states.get().files
        if files is None or self.holds_delays:
            return
        try:
            files.start_if_any()
        except (OSError, RuntimeError) as exc:  # raised again if a message has to be stored
            self._not_started.log(exc, self)

    def check(self, task: BackgroundTask) -> Stored | None:
        """Make the message of an added task if another process is to run the task.

        :return: the message for :meth:`send`; None if the task runs in this process.
        :raises TypeError: if the task is refused, or ``when_unsent="local"`` was given for a
            task that cannot run in this process.
        :raises OutboxFullError: a ``RuntimeError``, if ``max_unsent`` tasks wait to be sent.
        """
        message = self.message(task)
        if message is None:
            return None
        files, outbox = self._states.get().files, self._states.get().outbox
        if files is None:
            outbox.check_room(task.name)
        when_unsent = self._find_when_unsent(task, message)
        due = message.due
        if self.holds_delays or due <= time.time() + _LONG:
            due = 0.0
        elif files is None:
            self._long_delays.count(task.name)
        message = message._replace(when_unsent=when_unsent, due=due)
        if files is None:
            stored = Stored(message, _NO_ROW)
            outbox.reserve(stored)
            return stored
        context = json.dumps(headers.of_request())
        row = Row(message.name, self.dump(message), "", context, due=due, id=task.id)
        return Stored(message, row)

    def _find_when_unsent(self, task: BackgroundTask, message: Message) -> WhenUnsent:
        registration = registry.find(task.func)
        own = task.options.when_unsent
        if own is None and registration is not None:
            own = registration.when_unsent
        found = own or self._when_unsent
        if found != "local" or (message.can_run_here and not message.due and not plan_of(task)):
            return found
        if own is not None:
            raise OptionTypeError(
                "when_unsent",
                own,
                f"'hold' or 'discard' for {task.name}: a task with a time, a Retry, "
                "a link, autoretry_for or bind=True cannot run in this process",
            )
        return "hold"

    def keep(self, tasks: Iterable[BackgroundTask]) -> None:
        """Store the messages of ``tasks`` that are not stored; blocks.

        :raises StoreError: if they are not stored, after 5 seconds at the latest.
        """
        files = self._states.get().files
        new = [task.message for task in tasks if isinstance(task.message, Stored)]
        if files is not None and new:
            files.keep(new)

    def keep_unsent(self) -> None:
        """Store the messages that wait in memory alone to be sent; blocks.

        :raises StoreError: as :meth:`keep` does.
        """
        state = self._states.get()
        assert state.files is not None
        state.files.keep(state.outbox.messages)

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Store the message of a task that is added after the answer has begun.

        :raises StoreError: as :meth:`keep` does.
        """
        if is_kept_at_once(task, batch) and not is_recorded(batch):
            self.keep([task])

    def joined(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Store the message of a task if the answer has begun since :meth:`added`.

        :raises StoreError: as :meth:`keep` does.
        """
        self.added(task, batch)

    def begin(self, task: BackgroundTask) -> bool:
        """True: a task that runs here is to run."""
        return True

    def finished(self, task: BackgroundTask) -> None:
        """Note that a task has run here, which could not be sent."""
        self._end(task, "done")

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """Note that a task has raised here, which could not be sent."""
        self._end(task, "failed", type_name(exc))

    def forget(self, task: BackgroundTask) -> None:
        """Remove the message of a task that its request takes back."""
        self._end(task, "gone")

    def _end(self, task: BackgroundTask, state: str, error: str = "") -> None:
        if isinstance(task.message, Stored):
            task.message.end(state, error)

    def moved(self, task: BackgroundTask, copy: BackgroundTask) -> None:
        """Nothing is to be done: ``copy`` has the message of ``task``."""

    @property
    def folder_of_messages(self) -> str | None:
        """See :class:`KeepingRunner`."""
        return None if self._folder is None else self._folder.path

    # A runner's methods.

    def may_send(self, task: BackgroundTask) -> bool:
        """False: a task without a message runs in this process."""
        return False

    def send(self, task: BackgroundTask, message: Stored | None = None) -> bool | Queue:
        """Return a function that puts a task into the outbox.

        Does not block, but on a worker, where a message with a long delay is stored now.

        :param message: the message that :meth:`check` returned for the task.
        :return: False if the task is to run in this process.
        :raises StoreError: if the message cannot be stored.
        """
        if message is None:
            return False
        if message.runs_here:
            task.message = message  # until the task has ended: see finished()
            return False
        state = self._states.get()
        if message.store is None and message.message.due and state.files is not None:
            state.files.keep([message])  # a task on a worker has added it
            state.files.start()
        is_stored = message.store is not None
        if is_stored and (message.message.due or state.outbox.room <= 0):
            assert state.files is not None
            return partial(Queued, map(state.files.leave, [message]), 0)
        return state.outbox.put(task, message)

    def submit(self, batch: Batch) -> None:
        """Put the tasks with a message into the outbox; submit the rest to ``local``.

        :raises KeyboardInterrupt: or another exception that stops the server's worker.
        """
        state = self._states.get()
        state.ledger.add(batch)
        if batch.has_messages:
            has_ended = batch.send(ends=True)
            state.outbox.start()  # the thread may have ended after put() had looked for it
            if has_ended:
                return
        self.local.submit(batch)

    def prepare_drain(self) -> None:
        """Send no stored message from now on: they wait for the next process."""
        state = self._states.get()
        if state.files is not None:
            state.files.stop(state.outbox.leave_stored)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until all tasks are sent, and the local tasks have ended; blocks.

        Stored messages that are not being sent stay in the file for the next process.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished in time. They go on.
        """
        deadline = time.monotonic() + timeout
        self.prepare_drain()
        left = super().drain(timeout)
        ledger, outbox = self.ledger, self._states.get().outbox
        if ledger.unsent and not outbox.start():
            outbox.send_here(deadline)
        waiting = list(ledger.unsent)
        ledger.wait_for(waiting, deadline)
        return left + [task for unsent in waiting for task in unsent.tasks]

    def statistics(self) -> Statistics:
        """Return the numbers of this process, with the messages that wait in its files."""
        found, files = super().statistics(), self._states.get().files
        waiting = 0 if files is None else files.count_waiting()
        return replace(found, waiting=found.waiting + waiting)

    @property
    def ledger(self) -> Ledger:
        return self._states.get().ledger

    def _from_row(self, row: Row) -> tuple[BackgroundTask, Message]:
        """Return a task, which is only sent, and the message in ``row``."""
        func = self.find(row.name)
        assert func is not None, "asked before, and no task is forgotten"
        try:
            message = Message(row.name, self.load(row.name, row.arguments))
            label = json.loads(row.context or "{}").get(headers.REQUEST)
        except Exception as exc:  # a forged row
            raise MessageError(f"the message cannot be read: {type_name(exc)}") from None
        task = BackgroundTask.__new__(BackgroundTask)
        fill(task, func, (), {}, copy_context(), self.options)
        task.keep_id(row.id)
        if registry.find(func) is None:
            task.keep_name(row.name)
        queue = Deferring()
        queue.options = self.options
        queue.restore_request(label)
        queue.close()
        self.options.calls.received(task, queue)
        return task, message


class _State(NamedTuple):
    """A runner's ledger, outbox and files in one process."""

    ledger: Ledger
    outbox: Outbox
    files: StoredMessages | None
