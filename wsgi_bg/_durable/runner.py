"""``DurableRunner``: keeps registered tasks in a file until they have run."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from math import inf, nextafter
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from wsgi_bg._messages import headers, retries
from wsgi_bg._messages.codec import decode, encode
from wsgi_bg._process import log
from wsgi_bg._process.greenlets import event, start_daemon
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.owned_files import OwnedFiles
from wsgi_bg._store.rows import NO_LIMIT, Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.background_tasks import context_of
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.checks import seconds, whole_number
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.retry import Plan, Retry
from wsgi_bg._tasks.task import DIRECT, BackgroundTask, fill
from wsgi_bg._tasks.task_log import fields, fields_of, notify_discarded
from wsgi_bg.exceptions import (
    BatchEndedError,
    OptionTypeError,
    OptionValueError,
    StoreError,
)
from wsgi_bg.runners import Runner, Statistics, resolve
from wsgi_bg.runners.attached import Attached
from wsgi_bg.runners.keeping import (
    KeepingCaller,
    KeepingRunner,
    is_kept_at_once,
    is_recorded,
)
from wsgi_bg.runners.ledger import Ledger
from wsgi_bg.runners.pool import PoolRunner, shared_pool
from wsgi_bg.runners.timer import Deferring, delay_left

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks, TaskQueue

Synchronous = Literal["normal", "full"]

_LOOK = 1.0  # seconds between two looks at the folder
_READ = 500  # rows read from a file at a time
_BURST, _REST = 10, 0.001  # requests of a dead process, and the seconds between two bursts
_IN_MEMORY = "%s waits in memory for its next attempt"
_PAUSE = 0.001  # seconds between two looks at a task that another thread stores
_SHORTER = 0.01  # seconds that a delay may be too short, counted from the storing of its row
_LAST_LOOK = 1.0  # seconds for which the exit waits for the last look
_ROOM = 0.05  # seconds between two looks if there was no room for a task
_COUNT_REST = 30  # times the duration of a count, before the next: a million rows take 30 ms
_AT_ITS_TURN = 1e-9  # seconds of a delay that is over
_SHARE = 0.5  # of the pool's max_pending that tasks from files may take


class DurableRunner(KeepingRunner):
    """Keeps each task whose function is registered in a file until the task has run.

    A response that says success means that its registered tasks are stored. A stored task is
    run, whatever process dies: at least once, and twice only if the process died while the
    task ran, or before the end of the task was noted. With ``synchronous="full"`` that also
    holds if the machine dies. Functions that are not registered run on ``local``.

    ``add_task`` encodes the arguments. An argument that a later process would not get back
    unchanged raises ``TypeError`` there. The tasks are stored in one transaction, when the
    application returns; a task that is added later is stored by ``add_task``. If the tasks
    cannot be stored, the request fails with ``StoreError``.

    A process runs tasks, and takes over the tasks of processes that have died, from its
    first request on, or from :meth:`start` on. Any number of processes of a machine may use
    the folder. Durable tasks run on the threads and the loop of the pool.

    :param path: the folder; made with mode 0700 if there is none.
    :param local: the runner for functions that are not registered, or its name. A
        ``PoolRunner`` also runs the durable tasks; else the shared pool runs these. Beyond
        ``max_pending`` of that pool durable tasks stay in the file until there is room. Beyond
        ``max_waiting``, which counts the tasks of this process that wait for their time in
        memory or in the file, ``add_task`` with a delay raises ``WaitingLimitError``; a durable
        task that raised waits for its next attempt all the same.
    :param synchronous: ``"normal"``: tasks survive the death of the process; ``"full"``: of
        the machine too, for a sync of the disk before each response with tasks.
    :param store_timeout: seconds after which a request fails whose tasks are not stored.
    :param max_crashes: a task that was running when its process died is put aside after so
        many deaths. The end of a process that drains is no death.
    :param keep_failed: how many failed and put-aside tasks are kept, and for how many seconds.
    :param keep_done: how many ended tasks are kept by id, name and times, and for how many
        seconds.
    :param drain_timeout: seconds for which interpreter exit waits for the running tasks. If
        ``drain_timeout`` of the pool that runs the tasks is longer, that time counts.
    :raises StoreError: a ``RuntimeError``, if the folder cannot be used.
    :raises TypeError: if an option has the wrong type.
    :raises ValueError: if an option is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        local: Runner | Literal["inline", "pool"] = "pool",
        synchronous: Synchronous = "normal",
        store_timeout: float = 5.0,
        max_crashes: int = 3,
        keep_failed: tuple[int, float] = (1000, 7 * 86400.0),
        keep_done: tuple[int, float] = (10_000, 3600.0),
        drain_timeout: float = 30.0,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise OptionTypeError("path", path, "the path of a folder")
        if synchronous not in get_args(Synchronous):
            raise OptionValueError("synchronous", synchronous, "'normal' or 'full'")
        seconds("store_timeout", store_timeout, above_zero=True)
        whole_number("max_crashes", max_crashes, least=1)
        seconds("drain_timeout", drain_timeout)
        self._local = resolve(local, "local")
        self._pool = self._local if isinstance(self._local, PoolRunner) else shared_pool
        self._settings = Settings(
            synchronous,
            min(store_timeout, TIMEOUT_MAX),
            _number_and_age("keep_failed", keep_failed),
            _number_and_age("keep_done", keep_done),
        )
        self.drain_timeout = drain_timeout
        self._folder = check_folder(path)
        calls = KeepingCaller(self, DIRECT)
        without_middleware = Options(runner=self, calls=calls, run_on="always")
        self._reruns = Reruns(self._folder.path, max_crashes, without_middleware)
        self._states = PerProcess(self._make_state)

    def _make_state(self) -> _State:
        return _State(self._folder, self._settings, self._pool, self._reruns)

    @property
    def path(self) -> str:
        """The absolute path of the folder."""
        return self._folder.path

    @property
    def folder_of_tasks(self) -> str:
        """See :class:`KeepingRunner`."""
        return self._folder.path

    @property
    def keep_done(self) -> tuple[int, float]:
        """See :class:`KeepingRunner`."""
        return self._settings.keep_done

    def file_numbers(self) -> list[int]:
        """See :class:`KeepingRunner`."""
        return self._states.get().ledger.files.numbers

    @property
    def ledger(self) -> _Ledger:
        return self._states.get().ledger

    # For the middleware.

    def attach(self, options: Options) -> None:
        """Run tasks that this process has not added under ``options``.

        The first call holds, or the first call with the context of an application.
        """
        self._reruns.attach(options)

    def start(self) -> None:
        """Run the tasks of this process, and those of processes that have died.

        Called by the middleware with each request; call it in a process without requests.
        Starts a thread with the first call, and does not block.

        :raises StoreError: if this process cannot make its file in the folder.
        """
        self._states.get().start()

    def check(self, task: BackgroundTask) -> Kept | None:
        """Encode the arguments of an added task if the task's function is registered.

        :raises TypeError: if a later process would not get an argument back.
        """
        registration = registry.find(task.func)
        if registration is None:
            return None
        text = encode(registration, task.args, task.kwargs)
        options = ""
        given = task.options
        if given.stop_on_error or given.retry is not None or given.delay:
            options = _options_of(task)
        context = headers.current()
        carried = json.dumps(context) if context else ""
        return Kept(Row(registration.name, text, options, carried, id=task.id))

    def keep(self, tasks: Iterable[BackgroundTask]) -> None:
        """Store those of ``tasks`` that are registered and not stored; blocks.

        :raises StoreError: if they are not stored, after ``store_timeout`` at the latest.
        """
        durable, has_new = _durable(tasks)
        if has_new:
            self._states.get().keep(durable)

    def added(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Store a task that is added after the answer has begun, or while a task runs.

        :raises StoreError: as :meth:`keep` does.
        """
        kept = task.message
        if not isinstance(kept, Kept):
            return
        if is_recorded(batch):
            kept.settle()  # a test that records tasks touches no file
            return
        parent = _running.get()
        children = None if parent is None else parent.children
        if parent is not None and children is not None:
            children.append(task)  # stored with the end of the task that adds it
            kept.has_parent = parent.children is children
            if kept.has_parent:
                return
            # On another thread of that task, which has ended meanwhile.
        if is_kept_at_once(task, batch):
            self._states.get().keep_late(task, batch)

    def joined(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Store a task if the answer has begun since :meth:`added` has looked.

        :raises StoreError: as :meth:`keep` does. The task is not added then.
        """
        kept = task.message
        if not isinstance(kept, Kept) or kept.has_parent or not kept.is_new:
            return
        if is_kept_at_once(task, batch):
            try:
                self._states.get().keep_late(task, batch)
            except StoreError:
                if task.claim():  # else it runs already, from memory
                    batch.remove(task)
                    notify_discarded(task, "it could not be stored")
                    raise

    def begin(self, task: BackgroundTask) -> bool:
        """Note the beginning of a task, where SIGKILL cannot take the note back.

        :return: False if the task was discarded by hand.
        """
        kept = task.message
        if not isinstance(kept, Kept):
            return True
        if kept.is_new:  # joined() is about to store it, on another thread
            with suppress(StoreError):
                self._states.get().keep([task])
        if kept.store is None:
            return True
        try:
            may_begin = kept.store.begin(kept.row)
        except StoreError:  # no room for a note: only a crash would not be counted
            may_begin = True
        if may_begin:
            kept.began = time.time()
            kept.children = []
            _running.set(kept)
        else:
            self._states.get().drop(kept)
        return may_begin

    def finished(self, task: BackgroundTask) -> None:
        """Note the end of a task."""
        self._states.get().note_end(task, "done", None)

    def raised(self, task: BackgroundTask) -> None:
        """Note when the call of a task has ended."""
        if isinstance(task.message, Kept):
            task.message.ended = time.time()

    def stopped(self, task: BackgroundTask, exc: BaseException, tasks: TaskQueue) -> None:
        """Note the error of a task, and let no process run the tasks after it."""
        self._states.get().stopped(task, exc, tasks)

    def failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """Note the error of a task, whose row is kept."""
        self._states.get().note_end(task, "failed", exc)

    def is_stored(self, task: BackgroundTask) -> bool:
        """True if the file keeps the task."""
        return isinstance(task.message, Kept) and task.message.store is not None

    def postpone(
        self, task: BackgroundTask, wait: float | None, tasks: TaskQueue, status: int
    ) -> bool:
        """Let a stored task wait in the file, for its next attempt or until its delay is over.

        :return: False if the task has to wait in memory, since the disk is full or a test has
            to know how the task ends.
        """
        return self._states.get().postpone(task, wait, tasks, status)

    def hold_back(self, task: BackgroundTask, wait: float, tasks: TaskQueue) -> None:
        """Note in the file that a task and the rest of its request wait for a retry."""
        self._states.get().hold_back(task, wait, tasks)

    def leave(self, task: BackgroundTask) -> None:
        """Let the next process run a stored task."""
        self._states.get().leave(task.message)

    def moved(self, task: BackgroundTask, copy: BackgroundTask) -> None:
        """Note that ``copy`` will run in place of ``task``."""
        if isinstance(copy.message, Kept) and copy.message.store is not None:
            self._states.get().hold(copy)

    def forget(self, task: BackgroundTask) -> None:
        """Remove a stored task that its request takes back."""
        kept = task.message
        store = self._states.get().drop(kept) if isinstance(kept, Kept) else None
        if store is not None:
            store.take_back([kept.row])

    # A runner's methods.

    def statistics(self) -> Statistics:
        """Return numbers of tasks, also of those that wait in the file for room."""
        found = super().statistics()
        return replace(found, pending=found.pending + self._states.get().count_left())

    @property
    def is_behind(self) -> bool:
        """See :class:`LedgerRunner`."""
        return self._states.get().is_behind

    def prepare_drain(self) -> None:
        """Begin no stored task from now on: stored tasks wait for the next process."""
        self._states.get().stop_reading()

    def submit(self, batch: Batch) -> None:
        """Hand the batch over to the pool; a batch without durable tasks goes to ``local``."""
        state = self._states.get()
        state.ledger.add(batch)
        durable, has_new = _durable(batch.tasks)
        if not durable:
            self._local.submit(batch)
            return
        if has_new:
            try:
                state.keep(durable)
            except StoreError as exc:
                log.error("%s is not stored, and runs from memory", batch, exc_info=exc)
                for task in durable:
                    task.message.settle()
        if self._pool.offer(batch):
            return
        state.leave_in_file(durable, batch.status)
        # The pool is full, or the process exits: run here what only memory holds.
        if batch.next_is_async is None:
            batch.run()
        else:
            self._local.submit(batch)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Begin no stored task, and wait until the running tasks have ended; blocks.

        Stored tasks stay in the file for the next process.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished in time. They go on.
        """
        self.prepare_drain()
        return super().drain(timeout)

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin more tasks; return the unfinished tasks. Does not block."""
        state = self._states.get()
        state.stop_reading()
        left = super().abandon()
        state.end()
        return left

    def __repr__(self) -> str:
        survives = "the machine" if self._settings.synchronous == "full" else "the process"
        return (
            f"<{type(self).__name__} {self._folder.path!r}: tasks survive the death of "
            f"{survives}, local={self._local!r}>"
        )


class Kept:
    """A durable task in this process.

    :ivar row: the task as stored, or as it will be stored.
    :ivar store: the file that holds the row; None if the row is not stored.
    :ivar children: the durable tasks that the running task has added; None unless it runs.
    :ivar began: when the call began, by :func:`time.time`.
    :ivar ended: when the last call ended that has raised.
    :ivar has_parent: True if the row will be stored with the end of the task that has added it.
    :ivar is_new: True if the row may be stored, or a thread stores the row now.
    """

    __slots__ = (
        "_right",
        "began",
        "children",
        "ended",
        "has_parent",
        "is_new",
        "row",
        "store",
    )

    def __init__(self, row: Row, store: Store | None = None) -> None:
        self.row: Row = row
        self.store: Store | None = store
        self.children: list[BackgroundTask] | None = None
        self.began: float = 0.0
        self.ended: float = 0.0
        self.has_parent: bool = False
        self.is_new: bool = store is None
        self._right = {"to store": True}

    @property
    def is_claimed(self) -> bool:
        """True if a thread stores the row now."""
        return self.is_new and not self._right

    def claim(self) -> bool:
        """Claim the right to store the row; True for a single caller only."""
        return self.is_new and self._right.pop("to store", False)  # one atomic step

    def unclaim(self) -> None:
        """Give the claim back: the row was not stored."""
        self._right["to store"] = True

    def settle(self) -> None:
        """Note that the row is stored, or is not to be stored any more."""
        self.is_new = False


class _Place(NamedTuple):
    """The place of a row that is added to a stored request later."""

    request: int
    """The key of the first row of the request."""
    due: float
    """The time until which the request waits for a task that will be called again."""
    added: float
    """The row comes after rows with this time."""

    def row_of(self, task: BackgroundTask, now: float, before: float = inf) -> Row:
        """The row of a task that is added now.

        :param before: when the task after it was added, if that task is stored.
        """
        row = _row_of(task)
        return row._replace(
            request=-self.request,
            due=max(row.due, self.due),
            added=min(max(now, self.added), nextafter(before, 0.0)),
        )


class _AddedHere(NamedTuple):
    """A task that this process has added, and that only the file holds now."""

    options: Any
    request: str | None
    """The label of the request."""
    status: int
    """The status of the request, for the tasks that the task adds; see ``Batch``."""


_running: ContextVar[Kept | None] = ContextVar("wsgi_bg._durable", default=None)
"""The durable task that runs in this context."""


class Reruns(Attached):
    """Makes tasks of stored rows."""

    def __init__(self, path: str, max_crashes: int, options: Options) -> None:
        super().__init__(options)
        self._path = path
        self._max_crashes = max_crashes
        # Keys of rows, by the name of a function that is not registered yet, or no more.
        self._unknown: dict[str, dict[Store, list[int]]] = {}

    def attach(self, options: Options) -> None:
        """See :class:`Attached`; the outcome of the request of a stored task was known then."""
        super().attach(replace(options, run_on="always"))

    def task(
        self,
        store: Store,
        row: Row,
        added_under: Options | None,
        ledger: Ledger,
        delay: float,
    ) -> BackgroundTask | None:
        """Return the task of a row; None if the row has to wait, or was put aside.

        :param added_under: the options of the layer that has added the task in this process.
        :param ledger: counts a task that was put aside.
        :param delay: above 0.0 to put the task off at its turn.
        """
        registration = registry.get(row.name)
        if registration is None:
            if row.name not in self._unknown:
                log.error(
                    "durable tasks of %s wait in %s: no function is registered by that name",
                    row.name,
                    self._path,
                )
            self._unknown.setdefault(row.name, {}).setdefault(store, []).append(row.key)
            return None
        if row.crashes >= self._max_crashes:
            log.error(
                "durable task %s was put aside: the process has died %d times while it ran",
                row.name,
                row.crashes,
                extra=fields_of(row.name, row.id, "aside"),
            )
            store.end(Outcome(row, "aside", ended=time.time()))
            ledger.count_aside()
            return None
        try:
            args, kwargs = decode(row.arguments)
            given: dict[str, Any] = json.loads(row.options or "{}")
            stops = given.get("stop_on_error") is True
            retry = retries.find(given.get("retry"), registration.retry)
            if retry is None and row.attempts:  # the function has lost its Retry meanwhile
                retry = Retry(row.attempts + 1)
            options = added_under or self.options
            layer = options.of_layer(options)  # of the tasks that the task adds
            options = replace(
                options, run_on="always", stop_on_error=stops, delay=delay, layer=layer
            )
            context = copy_context()
            headers.restore(context, json.loads(row.context or "{}"))
        except Exception as exc:  # a forged row
            extra = fields_of(row.name, row.id, "aside", "it cannot be read")
            message = "durable task %s was put aside: it cannot be read"
            log.error(message, row.name, extra=extra)
            store.end(Outcome(row, "aside", ended=time.time(), error=type_name(exc)))
            ledger.count_aside()
            return None
        task = BackgroundTask.__new__(BackgroundTask)
        fill(task, registration.func, tuple(args), kwargs, context, options)
        task.message = Kept(row, store)
        task.keep_id(row.id)
        if retry is not None or delay:
            task.plan = Plan(retry, row.attempts + 1)
        if retry is not None:
            task.keep_context()
        return task

    def leave_known(self) -> None:
        """Let rows be read again whose functions were registered meanwhile."""
        for name in [name for name in self._unknown if registry.get(name) is not None]:
            for store, keys in self._unknown.pop(name).items():
                store.leave_keys(keys)


class _Ledger(Ledger):
    """Also counts the tasks that wait for their time in the files of this process."""

    def __init__(self, max_waiting: float, files: OwnedFiles) -> None:
        super().__init__(max_waiting)
        self.files = files
        self._asked = count()  # how often a task asked if it may wait
        self._room = 0.0  # until which number it may
        self._next_count = 0.0  # by time.monotonic()

    def may_wait(self) -> bool:
        """See :class:`Ledger`. Counts the rows only when all room found before is taken."""
        number = next(self._asked)
        if number >= self._room and time.monotonic() >= self._next_count:
            began = time.monotonic()
            waiting = len(self.waiting) + self.files.count_waiting()
            self._room = number + self.max_waiting - waiting
            now = time.monotonic()
            # Last: else a thread finds no room.
            self._next_count = now + _COUNT_REST * (now - began)
        return number < self._room

    def statistics(self) -> Statistics:
        found = super().statistics()
        return replace(found, waiting=found.waiting + self.files.count_waiting())


class _State:
    """The tasks of a runner in one process."""

    def __init__(
        self, folder: Folder, settings: Settings, pool: PoolRunner, reruns: Reruns
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._pool = pool
        self._reruns = reruns
        self._files = OwnedFiles(folder, settings, partial(self._read, rest=_REST), self._try)
        self.ledger = _Ledger(pool.max_waiting, self._files)
        self._store: Store | None = None
        # The durable tasks in memory, by their file's number and their key.
        self._in_memory: dict[tuple[int, int], BackgroundTask] = {}
        # The options of tasks that ran or were added here, and that only the file holds now,
        # and the labels of their requests.
        self._added_here: dict[tuple[int, int], _AddedHere] = {}
        self._lacks_room = False  # True if tasks were left in a file for want of room
        self._has_left_some = False  # True if stored tasks of the own file are in no memory
        self._is_reading = False  # True while tasks of the own file come into memory
        # Tasks that ran when a process died: they run one at a time, other tasks meanwhile.
        self._suspect: tuple[int, int] | None = None  # its key in _in_memory
        self._more_suspects: deque[tuple[Store, list[Row]]] = deque()
        self._right = {"to start": True}
        self._wake = event()
        self._has_looked = event()  # set when the thread has ended
        self._next_look = self._next_full_look = 0.0  # by time.time()
        self._look_failed = RepeatedError("%s could not be looked at")
        self._is_stopping = False

    @property
    def store(self) -> Store:
        if self._store is None:
            store = self._files.own
            if store.settings != self._settings:
                raise StoreError(
                    self._folder.path, "a runner of this process has it under other options"
                )
            self._store = store
        return self._store

    def start(self) -> None:
        if not self._right.pop("to start", False):  # one atomic step
            return
        try:
            _ = self.store
            start_daemon(self._work, "wsgi_bg-durable")
        except BaseException:
            self._right["to start"] = True
            raise

    def keep(self, tasks: list[BackgroundTask], place: _Place | None = None) -> None:
        """Store those durable tasks of a request that are not stored; blocks.

        :param tasks: in their order.
        :param place: given for a task that is added later.
        """
        store = self.store
        claimed = [task for task in tasks if task.message.claim()]
        rows: list[Row] = []
        try:
            if claimed:
                store.add(self._rows_of(claimed, tasks, place), rows)
                self._hold_all(claimed, rows, store)
        except BaseException:
            store.take_back(rows)
            for task in claimed:
                self.drop(task.message)
                task.message.unclaim()
            raise
        for task in tasks if len(claimed) < len(tasks) else ():
            self._await(task.message)

    def _rows_of(
        self, claimed: list[BackgroundTask], tasks: list[BackgroundTask], place: _Place | None
    ) -> list[Row]:
        if place is None and len(claimed) < len(tasks):
            place = self._place_in(tasks)
        if place is None:
            return [_row_of(task) for task in claimed]
        now, new, before = time.time(), dict.fromkeys(claimed), inf
        rows = []
        for task in reversed(tasks):
            if task in new:
                rows.append(place.row_of(task, now, before))
            else:
                before = task.message.row.added or before  # 0.0 if it was not stored
        return rows[::-1]

    def _place_in(self, tasks: Iterable[BackgroundTask]) -> _Place | None:
        """The place after the stored tasks of a request; None if none is in the own file."""
        messages = [task.message for task in tasks if isinstance(task.message, Kept)]
        rows = [kept.row for kept in messages if kept.store is self.store]
        return _Place(abs(rows[0].request), 0.0, rows[-1].added) if rows else None

    def _await(self, kept: Kept) -> None:
        """Wait until another thread has stored a task, or has failed to."""
        deadline = time.monotonic() + self._settings.timeout
        pause = event()
        while kept.is_claimed and time.monotonic() < deadline:
            pause.wait(_PAUSE)

    def keep_late(self, task: BackgroundTask, tasks: Any) -> None:
        """Store a task that is added to ``tasks`` after the answer has begun; blocks."""
        place = getattr(tasks, "stored_as", None)
        if place is None:
            place = self._place_in(tasks.tasks)
        self.keep([task], place)
        row = task.message.row
        tasks.stored_as = place or _Place(row.request, 0.0, row.added)

    def _hold_all(self, tasks: list[BackgroundTask], rows: list[Row], store: Store) -> None:
        for task, row in zip(tasks, rows, strict=True):
            kept = task.message
            kept.row = row
            kept.store = store
            self.hold(task)
            kept.settle()

    def hold(self, task: BackgroundTask) -> None:
        """Hold a stored task in memory, unless no stored task begins any more."""
        kept = task.message
        self._in_memory[kept.store.number, kept.row.key] = task
        if self._is_stopping:  # the task has escaped stop_reading()
            self.leave_in_file([task])

    def note_end(self, task: BackgroundTask, state: str, exc: BaseException | None) -> None:
        """Note the end of ``task``, and store the tasks that it has added."""
        kept = task.message
        if not isinstance(kept, Kept) or kept.store is None or self._was_cut(exc):
            return
        store, children = kept.store, kept.children
        kept.store = kept.children = None  # first: a thread that adds a child looks again
        self._in_memory.pop((store.number, kept.row.key), None)
        error = "" if exc is None else type_name(exc)
        text = "" if exc is None else "".join(log.format_error(exc))
        row = kept.row
        if state == "failed":
            row = row._replace(attempts=task.attempt)
        ended = (exc is not None and kept.ended) or time.time()
        outcome = Outcome(row, state, kept.began, ended, error, text)
        new: list[BackgroundTask] = []
        if children:
            new = [each for each in children if each.unclaimed and each.message.claim()]
        if not (new and self._end_with(task, store, outcome, new)):
            store.end(outcome)
            for child in new:
                child.message.settle()  # runs from memory
        if exc is not None or kept.row.crashes or store.needs_tidy:
            self._wake.set()

    def _was_cut(self, exc: BaseException | None) -> bool:
        """True if a task could add no task any more, since the exit has ended its batch.

        The exit has named the task, and the next process runs it.
        """
        return self._is_stopping and isinstance(exc, BatchEndedError)

    def _end_with(
        self, task: BackgroundTask, store: Store, outcome: Outcome, new: list[BackgroundTask]
    ) -> bool:
        """Note the end of ``task`` and store ``new`` in a transaction; False if it fails."""
        try:
            place = _Place(abs(outcome.row.request), 0.0, outcome.row.added)
            children = [place.row_of(child, outcome.ended) for child in new]
            rows = store.end_with(outcome, children)
        except StoreError as exc:
            log.error(
                "tasks that %s has added are not stored, and run from memory",
                task.name,
                exc_info=exc,
                extra=fields(task),
            )
            return False
        self._hold_all(new, rows, store)
        return True

    def stopped(self, task: BackgroundTask, exc: BaseException, tasks: TaskQueue) -> None:
        if self._was_cut(exc):
            return
        kept = task.message
        store = kept.store if isinstance(kept, Kept) else None
        self.note_end(task, "failed", exc)
        # Now: the process may die while a hook or on_error runs, before the batch skips them.
        left = [each.message for each in tasks.left() if isinstance(each.message, Kept)]
        for each in left:
            held_by = self.drop(each)
            if held_by is not None:
                held_by.take_back([each.row])
        # A task after a delay is a batch of its own, and holds up no other.
        if store is not None and not _is_delayed(kept.row):
            try:
                rows = store.read_rest(kept.row)
            except StoreError as error:
                message = "the tasks after %s in the file could not be skipped"
                log.error(message, task.name, exc_info=error, extra=fields(task))
                return
            batch = self._make_batch(store, rows, {})
            if batch is not None:
                self.ledger.add(batch)
                batch.skip()

    def postpone(
        self, task: BackgroundTask, wait: float | None, tasks: TaskQueue, status: int
    ) -> bool:
        kept = task.message
        store, row = kept.store, kept.row
        assert store is not None
        kept.children = None  # a thread that adds a task from now on lets it be stored
        if tasks.observer is not None:  # of a test, which waits for the task and gets its error
            if wait is not None:
                self._store_wait(task, wait, ())
            return False
        place = store.number, row.key
        self._in_memory.pop(place, None)  # first: the row may be read at once
        self._added_here[place] = _AddedHere(task.options, tasks.request, status)
        changed = None
        if wait is not None:
            changed = row._replace(due=time.time() + wait, attempts=row.attempts + 1)
        elif (due := time.time() + delay_left(task)) > row.due + _SHORTER:
            changed = row._replace(due=due)  # the response has streamed meanwhile
        if changed is None:
            store.leave([row])
        else:
            row = changed
            try:
                store.postpone([row])
            except StoreError as exc:
                log.error(_IN_MEMORY, task.name, exc_info=exc, extra=fields(task))
                self._in_memory[place] = task
                kept.row = row
                store.pause(row)
                return False
        kept.store = None
        if row.crashes or row.due < self._next_look:  # the next suspect may run meanwhile
            self._wake.set()
        return True

    def hold_back(self, task: BackgroundTask, wait: float, tasks: TaskQueue) -> None:
        kept = task.message
        store = kept.store
        kept.children = None
        left = [each.message for each in tasks.left() if isinstance(each.message, Kept)]
        # A drain may have left some in the file: then no memory holds them.
        rest = [
            each.row.key for each in left if each.store in (store, None) and each is not kept
        ]
        if self._store_wait(task, wait, rest) and store is self._store:
            row = kept.row
            tasks.stored_as = _Place(abs(row.request), row.due, row.added)

    def _store_wait(self, task: BackgroundTask, wait: float, rest: Iterable[int]) -> bool:
        """Note in the file that a task in memory waits, and the rows of ``rest`` as long."""
        kept = task.message
        store = kept.store
        row = kept.row._replace(due=time.time() + wait, attempts=kept.row.attempts + 1)
        kept.row = row
        try:
            store.hold_back(row, rest)
        except StoreError as exc:
            log.error(_IN_MEMORY, task.name, exc_info=exc, extra=fields(task))
            store.pause(row)
            return False
        if row.crashes:  # the next suspect may run meanwhile
            self._wake.set()
        return True

    def leave(self, kept: Kept) -> None:
        """Forget a stored task: the row may be read again."""
        store = self.drop(kept)
        assert store is not None
        store.leave([kept.row])

    def drop(self, kept: Kept) -> Store | None:
        """Drop a task from memory; return the store that holds its row, if any."""
        store, kept.store = kept.store, None
        if store is not None:
            self._in_memory.pop((store.number, kept.row.key), None)
        return store

    def leave_in_file(self, tasks: Iterable[BackgroundTask], status: int = 0) -> None:
        """Forget stored tasks that have not begun.

        This process reads them again as room comes, or the next process does.

        :param status: the status of their request, if this process may read them again.
        """
        has_left_some = False
        for task in tasks:
            kept = task.message
            if kept.store is not None and task.claim():
                store = self.drop(kept)
                assert store is not None
                place = store.number, kept.row.key
                self._added_here[place] = _AddedHere(task.options, task.request, status)
                store.leave([kept.row])
                has_left_some = True
        if has_left_some:
            self._has_left_some = True
            if not self._lacks_room:
                self._lacks_room = True
                self._wake.set()

    def count_left(self) -> int:
        """Return the number of rows that are due, and that no memory holds for want of room."""
        left = 0
        if self._has_left_some or self._is_reading or self._files.are_behind:
            for store in self._files.open:
                with suppress(StoreError):  # removed meanwhile, for example
                    left += store.count_left(time.time())
        return left

    def stop_reading(self) -> None:
        """Begin no stored task from now on; say once how many stay in the file."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self.leave_in_file(list(self._in_memory.values()))
        left = self._files.count_parked()
        for store in self._files.open:
            with suppress(StoreError):  # removed meanwhile, for example
                left += store.count()["waiting"]
        if left:
            log.info(
                "%d durable tasks stay in %s for the next process",
                left,
                self._folder.path,
            )

    def end(self) -> None:
        """Prepare the end of the process, which closes the files and drops their locks.

        Tasks that run still are not counted as having crashed.
        """
        self._wake.set()
        if not self._right:
            self._has_looked.wait(_LAST_LOOK)
        messages = [task.message for task in list(self._in_memory.values())]
        stored = [(kept.store, kept.row) for kept in messages]
        for store, row in [each for each in stored if each[0] is not None]:
            store.leave([row])

    @property
    def is_behind(self) -> bool:
        """True if tasks of this process are due in the file, or wait there for room."""
        if self._is_stopping or self._pool.ledger.is_draining:
            return False
        # First: a task that leaves the file meanwhile is being read, or in a batch.
        return self._is_due or self._has_left_some or self._is_reading

    @property
    def _is_due(self) -> bool:
        due = None
        if self._store is not None and not self._right:  # else no thread reads the file
            with suppress(StoreError):
                due = self._store.next_due()
        return due is not None and due <= time.time()

    def _work(self) -> None:
        while not self._is_stopping:
            self._try(self._look)
            # Not longer than between two looks: the clock may be set back meanwhile.
            self._wake.wait(min(max(0.0, self._next_look - time.time()), _LOOK))
            self._wake.clear()
        self._try(self.store.tidy)
        self._has_looked.set()

    def _try(self, func: Callable[[], object]) -> None:
        """Call ``func()``, and log its error, the same error at most once a minute."""
        try:
            func()
        except Exception as exc:
            self._look_failed.log(exc, self._folder.path)

    def _look(self) -> None:
        """Look around once a second; between, only at the files with work left."""
        now = time.time()
        self._lacks_room = False
        is_time = not now < self._next_full_look <= now + _LOOK  # the clock may be set back
        if is_time:
            self._next_full_look = now + _LOOK
            self._reruns.leave_known()
        self._next_look = self._next_full_look
        self._try(self._read_own)
        if is_time or self.store.needs_tidy:  # a commit here keeps requests waiting
            self._try(self.store.tidy)
        if is_time:
            self._try(self._files.adopt)
            self._try(self._files.reopen)
        self._files.work_off(is_time=is_time)
        if self._lacks_room:  # also for a task that is due
            self._next_look = now + _ROOM

    def _has_ended(self, batch: Batch) -> None:
        """Read further tasks as soon as a batch from a file leaves enough room."""
        if self._lacks_room and self._pool.has_room(_SHARE / 2):
            self._wake.set()

    def _read_own(self) -> None:
        while self._more_suspects and not self._has_suspect:
            self._submit(*self._more_suspects.popleft())
        due = self.store.next_due()
        if self._has_left_some or (due is not None and due <= time.time()):
            self._is_reading = has_more = True  # has_more: also if the file cannot be read
            self._has_left_some = False  # first: a request may set it meanwhile
            try:
                has_more = self._read(self.store)
            finally:
                if has_more:
                    self._has_left_some = True
                self._is_reading = False
            due = self.store.next_due()
        if due is not None:
            self._next_look = min(self._next_look, due)

    @property
    def _has_suspect(self) -> bool:
        """True if a task runs that ran when a process died, and that does not wait now."""
        task = None if self._suspect is None else self._in_memory.get(self._suspect)
        return task is not None and task.message.row.due <= time.time()

    def _read(self, store: Store, rest: float = 0.0) -> bool:
        """Submit tasks of ``store`` that no memory holds; True if there may be more.

        :param rest: seconds to wait after some tasks. Thousands at once would let all threads
            of the pool compete with the requests for the GIL, 5 ms at a time.
        """
        if not self._pool.has_room(_SHARE):
            self._lacks_room = True
            return True
        rows = store.read(time.time(), _READ)
        more = len(rows) == _READ
        while more and abs(rows[0].request) == abs(rows[-1].request):  # with many tasks
            further = store.read(time.time(), _READ)
            more = len(further) == _READ
            rows += further
        requests: dict[int, list[Row]] = {}
        for row in rows:
            requests.setdefault(abs(row.request), []).append(row)
        if more and len(requests) > 1 and rows[-1].request > 0:
            store.leave(requests.pop(rows[-1].request))  # there may be more rows of it
        for row in store.read_late(requests):
            requests[-row.request].append(row)
        groups = deque(batch for each in requests.values() for batch in _batches(each))
        has_room = True
        while groups and has_room:
            if rest and len(groups) % _BURST == 0:
                time.sleep(rest)
            has_room = self._submit(store, groups.popleft())
        store.leave([row for group in groups for row in group])
        if not has_room:
            self._lacks_room = True
        elif more:
            self._wake.set()
        return more or not has_room

    def _submit(self, store: Store, rows: list[Row]) -> bool:
        """Run rows of a request as a batch; False, and leave the rows, without room."""
        suspect = next((row.key for row in rows if row.crashes), None)
        if suspect is not None and self._has_suspect:
            self._more_suspects.append((store, rows))
            return True
        added_here: dict[tuple[int, int], _AddedHere] = {}
        batch = self._make_batch(store, rows, added_here)
        if batch is None:
            return True
        has_room = not self._is_stopping and self._pool.has_room(_SHARE)
        if has_room:  # else the rows are offered again, and the hooks told then
            batch.hand_over(self.ledger.length)
        if suspect is not None:
            self._suspect = store.number, suspect
        self.ledger.add(batch)
        if has_room and self._pool.offer(batch, share=_SHARE):
            batch.on_done((self._has_ended,))  # after the pool, which forgets the batch first
            batch.notify_if_ended()
            return True
        self._added_here.update(added_here)
        for kept in [task.message for task in batch.tasks if task.claim()]:
            self.leave(kept)
        batch.run()  # no task is left: only end the batch
        return False

    def _make_batch(
        self, store: Store, rows: list[Row], added_here: dict[tuple[int, int], _AddedHere]
    ) -> Batch | None:
        """Make a batch of the rows of a request; None if no row can run.

        :param added_here: gets what is known of the tasks that this process has added.
        """
        queue = Deferring()
        queue.options = self._reruns.options
        tasks = queue.open_list()
        status = 200
        for row in rows:
            place = store.number, row.key
            options = None
            if place in self._added_here:
                added_here[place] = self._added_here.pop(place)
                options, queue.request, status = added_here[place]
            delay = _AT_ITS_TURN if row is not rows[0] and _is_delayed(row) else 0.0
            task = self._reruns.task(store, row, options, self.ledger, delay)
            if task is not None:
                tasks.append(task)
                self._in_memory[place] = task
        if not tasks:
            return None
        if queue.request is None:
            context = context_of(tasks[0])
            assert context is not None
            queue.restore_request((context[headers.carried] or {}).get(headers.REQUEST))
        queue.close()
        for task in tasks:
            task.options.calls.received(task, queue)
        return Batch(queue, response_complete=True, status=status)


def _durable(tasks: Iterable[BackgroundTask]) -> tuple[list[BackgroundTask], bool]:
    """Return the durable ones of ``tasks``, and True if one of them is not stored."""
    durable = []
    has_new = False
    for task in tasks:
        kept = task.message
        if isinstance(kept, Kept):
            durable.append(task)
            has_new = has_new or kept.is_new
    return durable, has_new


def _options_of(task: BackgroundTask) -> str:
    retry = task.options.retry
    given = {
        "stop_on_error": task.options.stop_on_error,
        "retry": None if retry is None else retries.to_text(retry),
        "is_delayed": bool(task.options.delay),
    }
    return json.dumps(given)


def _is_delayed(row: Row) -> bool:
    """True for a row with a delay."""
    return '"is_delayed": true' in row.options  # as _options_of() has written it


def _batches(rows: list[Row]) -> list[list[Row]]:
    """The rows of a request as batches: as in memory, each delayed row is one of its own.

    But not before its turn: a delayed row after others is put off by their batch.
    """
    ordered = sorted(rows, key=lambda row: (row.added, row.key))
    alone = [[row] for row in takewhile(_is_delayed, ordered)]
    rest = ordered[len(alone) :]
    return [*alone, rest] if rest else alone


def _row_of(task: BackgroundTask) -> Row:
    """The row to store: the delay of the task begins now, unless it has begun."""
    row: Row = task.message.row
    if headers.REQUEST not in row.context and (label := task.request) is not None:
        # Of a request_label, which was not called yet in add_task.
        context = {**json.loads(row.context or "{}"), headers.REQUEST: label}
        row = row._replace(context=json.dumps(context))
    return row._replace(due=time.time() + delay_left(task)) if task.options.delay else row


def _number_and_age(option: str, given: Any) -> tuple[int, float]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise OptionTypeError(option, given, "a tuple of a number and an age in seconds")
    number, age = given
    whole_number(f"{option}[0]", number, least=0)
    seconds(f"{option}[1]", age)
    return min(number, NO_LIMIT), min(age, TIMEOUT_MAX)
