"""``State``: the durable tasks of a runner in one process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from wsgi_bg._durable.kept import Kept, Place, is_delayed, row_of
from wsgi_bg._durable.reruns import Reruns
from wsgi_bg._messages import headers
from wsgi_bg._process import log
from wsgi_bg._process.greenlets import event, start_daemon
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._store.folder import Folder
from wsgi_bg._store.owned_files import OwnedFiles
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._tasks.background_tasks import context_of
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg._tasks.task_log import fields
from wsgi_bg.exceptions import BatchEndedError, StoreError
from wsgi_bg.runners.base import Statistics
from wsgi_bg.runners.ledger import Ledger
from wsgi_bg.runners.pool import PoolRunner
from wsgi_bg.runners.timer import Deferring, delay_left

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import TaskQueue

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


class _AddedHere(NamedTuple):
    """A task that this process has added, and that only the file holds now."""

    options: Any
    request: str | None
    """The label of the request."""
    status: int
    """The status of the request, for the tasks that the task adds; see ``Batch``."""


class DurableLedger(Ledger):
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


class State:
    """The tasks of a runner in one process."""

    def __init__(
        self, folder: Folder, settings: Settings, pool: PoolRunner, reruns: Reruns
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._pool = pool
        self._reruns = reruns
        self._files = OwnedFiles(folder, settings, partial(self._read, rest=_REST), self._try)
        self.ledger = DurableLedger(pool.max_waiting, self._files)
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

    def keep(self, tasks: list[BackgroundTask], place: Place | None = None) -> None:
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
        self, claimed: list[BackgroundTask], tasks: list[BackgroundTask], place: Place | None
    ) -> list[Row]:
        if place is None and len(claimed) < len(tasks):
            place = self._place_in(tasks)
        if place is None:
            return [row_of(task) for task in claimed]
        now, new, before = time.time(), dict.fromkeys(claimed), inf
        rows = []
        for task in reversed(tasks):
            if task in new:
                rows.append(place.row_of(task, now, before))
            else:
                before = task.message.row.added or before  # 0.0 if it was not stored
        return rows[::-1]

    def _place_in(self, tasks: Iterable[BackgroundTask]) -> Place | None:
        """The place after the stored tasks of a request; None if none is in the own file."""
        messages = [task.message for task in tasks if isinstance(task.message, Kept)]
        rows = [kept.row for kept in messages if kept.store is self.store]
        return Place(abs(rows[0].request), 0.0, rows[-1].added) if rows else None

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
        tasks.stored_as = place or Place(row.request, 0.0, row.added)

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
            place = Place(abs(outcome.row.request), 0.0, outcome.row.added)
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
        if store is not None and not is_delayed(kept.row):
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
            tasks.stored_as = Place(abs(row.request), row.due, row.added)

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
            delay = _AT_ITS_TURN if row is not rows[0] and is_delayed(row) else 0.0
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


def _batches(rows: list[Row]) -> list[list[Row]]:
    """The rows of a request as batches: as in memory, each delayed row is one of its own.

    But not before its turn: a delayed row after others is put off by their batch.
    """
    ordered = sorted(rows, key=lambda row: (row.added, row.key))
    alone = [[row] for row in takewhile(is_delayed, ordered)]
    rest = ordered[len(alone) :]
    return [*alone, rest] if rest else alone
