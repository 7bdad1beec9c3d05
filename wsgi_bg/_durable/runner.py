"""``DurableRunner``: keeps registered tasks in a file until they have run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, Literal, get_args

from wsgi_bg._durable.kept import Kept, durable_among, options_of, running
from wsgi_bg._durable.reruns import Reruns
from wsgi_bg._durable.state import DurableLedger, State
from wsgi_bg._messages import headers
from wsgi_bg._messages.codec import encode
from wsgi_bg._process import log
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.rows import NO_LIMIT, Row, Settings
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.checks import seconds, whole_number
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.task import DIRECT, BackgroundTask
from wsgi_bg._tasks.task_log import notify_discarded
from wsgi_bg.exceptions import OptionTypeError, OptionValueError, StoreError
from wsgi_bg.runners import Runner, Statistics, resolve
from wsgi_bg.runners.keeping import (
    KeepingCaller,
    KeepingRunner,
    is_kept_at_once,
    is_recorded,
)
from wsgi_bg.runners.pool import PoolRunner, shared_pool

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks, TaskQueue

Synchronous = Literal["normal", "full"]


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

    def _make_state(self) -> State:
        return State(self._folder, self._settings, self._pool, self._reruns)

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
    def ledger(self) -> DurableLedger:
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
            options = options_of(task)
        context = headers.current()
        carried = json.dumps(context) if context else ""
        return Kept(Row(registration.name, text, options, carried, id=task.id))

    def keep(self, tasks: Iterable[BackgroundTask]) -> None:
        """Store those of ``tasks`` that are registered and not stored; blocks.

        :raises StoreError: if they are not stored, after ``store_timeout`` at the latest.
        """
        durable, has_new = durable_among(tasks)
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
        parent = running.get()
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
            running.set(kept)
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
        durable, has_new = durable_among(batch.tasks)
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


def _number_and_age(option: str, given: Any) -> tuple[int, float]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise OptionTypeError(option, given, "a tuple of a number and an age in seconds")
    number, age = given
    whole_number(f"{option}[0]", number, least=0)
    seconds(f"{option}[1]", age)
    return min(number, NO_LIMIT), min(age, TIMEOUT_MAX)
