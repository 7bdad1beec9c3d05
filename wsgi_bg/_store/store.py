"""``Store``: a SQLite file of durable tasks, written by the process that owns the file.

A store knows which rows the caller *holds* in memory: those that ``add`` and ``read`` have
returned. ``read`` leaves these rows out, and rows that run or have ended. The caller holds a
row until ``end``, ``postpone``, ``take_back`` or ``leave``.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count, islice, takewhile
from shutil import copyfile
from typing import Any, NamedTuple

from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._store import notes, sql
from wsgi_bg._store.folder import (
    Folder,
    check_notes,
    check_version,
    is_of_parent,
    note_opened,
    read_epoch,
)
from wsgi_bg._store.owner import Locks, locks_of
from wsgi_bg._store.rows import OF_DONE, OF_ROW, Outcome, Row, Settings, text_of, typed
from wsgi_bg._store.sql import Statement
from wsgi_bg._store.writer import Turn, Turns, Writer, connect, describe
from wsgi_bg.exceptions import StoreError

SIBLINGS = (".sqlite-wal", ".sqlite-shm")

CHUNK = 200
"""The number of ended tasks whose rows go in one transaction."""

WAL_FULL = 4 << 20
"""The size of the WAL, in bytes, at which ``tidy`` lets commits begin at its start again.

The WAL keeps its size: a synced commit that makes the file longer takes twice the time.
"""

WAL_LIMIT = 12 << 20
"""The size of the WAL at which ``tidy`` cuts the WAL to nothing, in bytes."""

WAL_COMMITS = 500
"""The number of transactions after which ``tidy`` looks at the size of the WAL."""

LOOK = 0.9
"""Seconds between two looks of ``tidy`` for orders: less than the second between two calls."""

_FORGED = (TypeError, ValueError, RecursionError)
"""Errors of an order that the command line has not written."""

STATES = {
    "done": notes.DONE,
    "failed": notes.FAILED,
    "aside": notes.ASIDE,
    "gone": notes.GONE,  # taken back
}


class Store:
    """The tasks in a file of which this process is the owner.

    All methods may be called from any thread, and never from a forked child of the owner:
    a child has a store of its own (:meth:`own` looks at the process id).

    :ivar number: the number of the file in the folder.
    """

    def __init__(self, folder: Folder, number: int, settings: Settings, locks: Locks) -> None:
        """Open the file, of which this process has the lock. Call ``own`` or ``adopt``."""
        self.number: int = number
        self.path: str = folder.file(number)
        self._folder = folder
        self.settings: Settings = settings
        self._locks = locks
        self._held: set[int] = set()
        self._discarded: set[int] = set()
        self._cursor = 0  # rows that are due at once were read up to this key
        self._left: list[int] = []  # keys below the cursor, to be read again
        self._ended: deque[Outcome] = deque()  # whose rows are still there
        self._gone: list[int] = []  # keys that are neither held nor noted any more
        self._tidying = Turns(delays_forks=False)
        self._reading = Turns()
        self._next_look = 0.0
        self._next_pruning = 0.0
        self._is_wal_busy = False
        self._wal_size = 0  # when it was emptied
        self._is_lost = False
        if is_of_parent(self.path):
            # A copy is a new file for SQLite, whose record of the old one came by the fork.
            copyfile(self.path, self.path + ".copy")
            os.chmod(self.path + ".copy", 0o600)
            os.replace(self.path + ".copy", self.path)
        self._writer = Writer(
            self.path, settings.timeout, is_full=settings.synchronous == "full"
        )
        note_opened(self.path)
        try:
            self._prepare()
            self._reader = connect(self.path, read_only=True)
            self._reader.text_factory = text_of
            self._files = self._find_files()
        except BaseException:
            self._writer.close()
            raise

    def _prepare(self) -> None:
        execute = self._writer.connection.execute
        is_new = check_version(self._writer.connection, self.path) == 0
        if execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StoreError(self.path, "SQLite cannot keep a WAL on this file system")
        execute("PRAGMA synchronous=NORMAL")
        execute("PRAGMA wal_autocheckpoint=0")
        if is_new:
            self._writer.execute(sql.SCHEMA)
        self._notes = notes.Notes(self._folder.file(self.number, ".notes"))
        self._keys = count((0 if is_new else self._take_over()) << 40 | 1)

    @classmethod
    def own(cls, folder: Folder, settings: Settings) -> Store:
        """Return the store of this process in ``folder``; makes the file on the first call.

        :raises StoreError: if the file cannot be made.
        """
        make = PerProcess(lambda: cls._make(folder, settings))
        identity = folder.identity_now
        try:
            return _own.setdefault(identity, make).get()
        except BaseException:
            _own.pop(identity, None)  # another folder may get the inode of a removed one
            raise

    @classmethod
    def _make(cls, folder: Folder, settings: Settings) -> Store:
        locks = locks_of(folder)
        try:
            while True:
                number = locks.new_number()
                # A removed lock file makes the numbers begin anew.
                if not os.path.exists(folder.file(number)) and locks.take(number):
                    break
            # SQLite would make a file that all may read.
            flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(folder.file(number), flags, 0o600))
            for suffix in SIBLINGS:
                with suppress(FileNotFoundError):
                    os.unlink(folder.file(number, suffix))
        except OSError as exc:
            raise StoreError(folder.path, f"no file can be made: {exc.strerror}") from exc
        return cls._open(folder, number, settings, locks, is_new=True)

    @classmethod
    def adopt(cls, folder: Folder, settings: Settings) -> Store | None:
        """Take over the file of a process that has died; None if there is none.

        Tasks that had begun and not ended get a crash more; tasks that had ended go. Call
        this once a second until None is returned; work the store off by ``read``, ``begin``
        and ``end``; call ``remove`` if that is done. Only children of its tasks are added.

        :raises StoreError: if a file is damaged or the disk is full; the file stays.
        """
        locks = locks_of(folder)
        locks.check()
        error: StoreError | None = None
        for number in folder.numbers():
            if not locks.take(number):
                continue
            if not os.path.exists(folder.file(number)):  # another process has removed it
                _unlink(folder, number)  # and may have died before all was gone
                locks.give(number)
                continue
            try:
                return cls._open(folder, number, settings, locks)
            except StoreError as exc:
                error = exc
        if error is not None:
            raise error
        return None

    @classmethod
    def reopen(cls, folder: Folder, number: int, settings: Settings) -> Store:
        """Open a file that this process has parked.

        :raises StoreError: if that fails. Then this process is no longer the owner.
        """
        return cls._open(folder, number, settings, locks_of(folder))

    @classmethod
    def _open(
        cls,
        folder: Folder,
        number: int,
        settings: Settings,
        locks: Locks,
        *,
        is_new: bool = False,
    ) -> Store:
        try:
            return cls(folder, number, settings, locks)
        except BaseException as exc:
            if is_new:  # each request tries again, and would leave a file on a full disk
                with suppress(OSError):
                    _unlink(folder, number)
            locks.give(number)
            if isinstance(exc, (OSError, sqlite3.Error)):
                raise StoreError(folder.file(number), describe(exc)) from exc
            raise

    def _take_over(self) -> int:
        """Apply the notes of the process that has died, and return the new epoch.

        The epoch shows if a process has died between the two steps: then the notes have been
        applied. It is part of the keys, so that no key is used again.
        """
        check_notes(self._folder.file(self.number, ".notes"))
        of_file = read_epoch(self._writer.connection, self.path)
        epoch = max(of_file, self._notes.epoch) + 1
        states = self._notes.read() if self._notes.epoch >= of_file else {}
        keys: dict[int, list[int]] = defaultdict(list)
        for key, state in states.items():
            keys[state].append(key)
        ended = {name: keys[state] for name, state in STATES.items()}
        self._writer.execute(sql.take_over(keys[notes.BEGUN], ended, epoch))
        self._notes.reset(epoch)
        return epoch

    def add(self, rows: Sequence[Row], into: list[Row] | None = None) -> list[Row]:
        """Store the tasks of a request in one transaction; return them with their keys.

        Blocks until they are stored; greenlets run while another thread writes. Threads that
        wait at the same time share a transaction, and so a sync of the disk. The caller holds
        the rows, those with ``due`` too: ``leave`` lets ``read`` return them in time.

        :param into: gets the rows before they are stored. If a signal handler raises in this
            method, or right after it, the rows may have been stored. Pass the list to
            ``leave`` then: ``read`` returns the rows that have been stored.
        :raises StoreError: if the rows are not stored (disk full), or not within ``timeout``.
        """
        stored = self._number(rows, into)
        try:
            self._write(sql.insert(stored), undo=lambda: sql.delete(row.key for row in stored))
            return stored
        except BaseException:
            self.leave(stored)
            raise

    def _number(self, rows: Sequence[Row], into: list[Row] | None) -> list[Row]:
        now = time.time()
        request = 0
        stored = [] if into is None else into
        # In one step, so that no row of another thread's request comes between.
        for row, key in zip(rows, list(islice(self._keys, len(rows))), strict=True):
            request = row.request or request or key
            id = row.id or f"{self.number:x}-{key:x}"  # noqa: A001
            stored.append(Row(*row[:7], id, row.added or now, key, request))
            self._held.add(key)
            now += 1e-6  # there is a time between two rows, for a row that is added later
        return stored

    def _write(
        self,
        statements: Sequence[Statement],
        *,
        is_synced: bool = True,
        undo: Callable[[], Statement] | None = None,
    ) -> None:
        self._check_lost()
        if statements:
            self._writer.write(statements, is_synced=is_synced, undo=undo)

    def _check_lost(self) -> None:
        if self._is_lost:
            what = "the file or owners.lock was removed or replaced"
            raise StoreError(self.path, f"{what} while this process runs: restart")

    def _find_files(self) -> list[tuple[int, int]]:
        """Return device and inode of the files that keep the tasks, and of the lock file.

        Empty if one is missing.
        """
        suffixes = ".sqlite", ".sqlite-wal", ".notes"
        paths = [self._folder.file(self.number, suffix) for suffix in suffixes]
        try:
            found = [os.stat(path) for path in (*paths, self._locks.path)]
        except OSError:
            return []
        return [(status.st_dev, status.st_ino) for status in found]

    def begin(self, row: Row) -> bool:
        """Note that the task begins, so that SIGKILL cannot take the note back.

        :return: False if the task must not begin, and the caller drops it: it has been
            discarded by hand, or has begun already.
        :raises StoreError: if so many tasks have ended on a full disk that there is no room
            for a note: try again later.
        """
        key = row.key
        if key in self._discarded or key in self._notes:
            self._discarded.discard(key)
            return False
        if not self._notes.set(key, notes.BEGUN):
            raise StoreError(self.path, "the ends of too many tasks wait for room on the disk")
        return True

    def end(self, outcome: Outcome) -> None:
        """Note that the task has ended: from now on it never runs again. Does not block.

        Also for a task that has not begun and is put aside. The row goes at the next ``tidy``.
        """
        self._notes.set(outcome.row.key, STATES[outcome.state])
        self._ended.append(outcome)

    def take_back(self, rows: Iterable[Row]) -> None:
        """Remove rows that have not begun: the request has failed. Like ``end``."""
        for row in rows:
            self.end(Outcome(row, "gone"))

    def end_with(
        self, outcome: Outcome, children: Sequence[Row], into: list[Row] | None = None
    ) -> list[Row]:
        """End a task and store the tasks that it has added, in one transaction.

        :param into: gets the children before they are stored, as in ``add``.
        :raises StoreError: if that cannot be stored; the task counts as running then, and the
            caller tries again or calls ``end``.
        """
        stored = self._number(children, into)
        try:
            self._write(sql.insert(stored) + sql.end([outcome], self.settings))
            self._forget([outcome.row.key])
            return stored
        except BaseException:
            self.leave(stored)
            raise

    def postpone(self, rows: Sequence[Row]) -> None:
        """Store ``due``, ``attempts``, ``crashes`` and ``options`` of rows, running or not.

        For a retry: ``postpone([row._replace(due=time, attempts=row.attempts + 1)])``. The
        caller does not hold the rows any more: ``read`` returns them when they are due.

        :raises StoreError: if that cannot be stored; then nothing has changed.
        """
        self._write(sql.postpone(rows), is_synced=False)
        self._forget([row.key for row in rows])
        self.leave([row for row in rows if row.due <= 0.0])

    def hold_back(self, row: Row, keys: Iterable[int]) -> None:
        """Store that a running task waits for its next attempt, and the rows of ``keys`` too.

        As ``postpone``, but rows that the caller holds are held still.

        :raises StoreError: if that cannot be stored; then nothing has changed.
        """
        self._write(sql.hold_back(row, keys), is_synced=False)
        self.pause(row)

    def pause(self, row: Row) -> None:
        """Note that a task that had begun waits, and that the caller still holds the row."""
        self._notes.clear([row.key])

    def leave(self, rows: Iterable[Row]) -> None:
        """Hold ``rows`` no more, and forget that they have begun: ``read`` returns them again.

        For rows for which memory has no room, or whose task was not called after all.
        """
        self.leave_keys([row.key for row in rows])

    def leave_keys(self, keys: Sequence[int]) -> None:
        """As ``leave``, for rows of which the caller keeps the keys only."""
        if keys:
            self._forget(keys)
            self._left.append(min(keys) - 1)
            if len(self._left) > 100:
                self._left.append(min(_pop_all(self._left)))

    def read(self, now: float, limit: int) -> list[Row]:
        """Return up to ``limit`` rows that may run, which the caller then holds.

        First those with ``due``, by time, then those that are due at once, by key.

        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn():
            found = self._select(sql.READ_DUE, now, limit)
            self._cursor = min([self._cursor, *_pop_all(self._left)])
            return found + self._select(sql.READ_AT_ONCE, self._cursor, limit - len(found))

    def read_late(self, requests: Iterable[int]) -> list[Row]:
        """Return the rows that were added later to ``requests``, as ``read`` does.

        :param requests: keys of the first rows.
        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn():
            keys = json.dumps(list(requests))
            late = map(_row, self._reader.execute(sql.READ_LATE, (keys,)))
            found = [row for row in late if not self._is_known(row.key)]
            self._held.update(row.key for row in found)
            return found

    def read_rest(self, row: Row) -> list[Row]:
        """Return the rows of a request after ``row``, as ``read`` does, also those not due.

        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn():
            first = abs(row.request)
            with closing(self._reader.execute(sql.READ_FROM, (first,))) as cursor:
                # The keys of rows that were added together follow one another.
                added = takewhile(lambda each: each.request == first, map(_row, cursor))
                rows = [*added, *map(_row, self._reader.execute(sql.READ_ADDED, (first,)))]
            rest = [
                each
                for each in rows
                if (each.added, each.key) > (row.added, row.key)
                and not self._is_known(each.key)
            ]
            self._held.update(each.key for each in rest)
            return sorted(rest, key=lambda each: (each.added, each.key))

    def _select(self, query: str, after: float, limit: int) -> list[Row]:
        found: list[Row] = []
        with closing(self._reader.execute(query, (after,))) as cursor:
            while len(found) < limit and (values := cursor.fetchone()) is not None:
                row = _row(values)
                if not self._is_known(row.key):
                    self._held.add(row.key)
                    found.append(row)
                if query is sql.READ_AT_ONCE:
                    self._cursor = row.key
        return found

    def _is_known(self, key: int) -> bool:
        if not 0 < key < notes.END_OF_KEYS:  # a forged row
            return True
        return key in self._held or key in self._notes or key in self._discarded

    def next_due(self) -> float | None:
        """Return the time of the first row with ``due`` that nobody holds, or None.

        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn(), closing(self._reader.execute(sql.NEXT_DUE)) as cursor:
            return next((due for due, key in cursor if not self._is_known(key)), None)

    def count_waiting(self, now: float) -> int:
        """Return the number of rows that nobody holds and whose time has not come.

        Reads an index, a million rows in some 30 ms.

        :raises StoreError: if the file cannot be read.
        """
        return self._count(sql.COUNT_WAITING, now)

    def count_left(self, now: float) -> int:
        """Return the number of rows that nobody holds and that are due.

        A million rows take some 80 ms.

        :raises StoreError: if the file cannot be read.
        """
        return self._count(sql.COUNT_LEFT, now)

    def _count(self, query: str, now: float) -> int:
        with self._reading_turn():
            given = {"now": now, "held": json.dumps(list(self._held.copy()))}
            ((number,),) = self._reader.execute(query, given)
            return int(number)

    def count(self) -> dict[str, int]:
        """Return the number of tasks by state: waiting, running, failed, aside, done.

        Reads the whole table: not for the thread of a request.

        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn():
            select = self._reader.execute
            ((rows,),) = select("SELECT count(*) FROM tasks")
            ((done,),) = select("SELECT count(*) FROM done")
            kept = dict(select("SELECT state, count(*) FROM kept GROUP BY state").fetchall())
            ended = len(self._ended)
            running = max(0, len(self._notes) - ended)
        counts = {"waiting": max(0, rows - running - ended), "running": running}
        return {**counts, "failed": 0, "aside": 0, **kept, "done": done}

    @contextmanager
    def _reading_turn(self) -> Iterator[None]:
        turn = self._reading.take(60.0)
        if turn is None:
            raise StoreError(self.path, "another thread reads for more than a minute")
        with turn:
            self._sweep()
            try:
                if self._reader.in_transaction:  # a signal handler has raised in _empty_wal()
                    self._reader.execute("ROLLBACK")
                yield
            except sqlite3.Error as exc:
                raise StoreError(self.path, describe(exc)) from exc
        self._forget(())

    def _forget(self, keys: Sequence[int]) -> None:
        """Neither hold nor note rows that were changed or deleted.

        While a thread reads, it may see the rows as they were before: then it forgets them
        when it has read all.
        """
        self._gone.extend(keys)
        turn = Turn(self._reading)
        if turn.claim():
            with turn:
                self._sweep()

    def _sweep(self) -> None:
        keys = _pop_all(self._gone)
        self._notes.clear(keys)
        self._held.difference_update(keys)
        self._discarded.difference_update(keys)

    @property
    def untidy(self) -> int:
        """The number of tasks that have ended and whose row is still there."""
        return len(self._ended)

    @property
    def needs_tidy(self) -> bool:
        """True if ``tidy`` should be called now, and not only once a second."""
        return len(self._ended) >= CHUNK or self._writer.commits >= WAL_COMMITS

    def tidy(self) -> None:
        """Write the ends of tasks, in hundreds; prune; obey the command line; empty the WAL.

        Call this on a background thread, once a second and if ``needs_tidy``. Does nothing
        while another thread is in this method.

        :raises StoreError: if the disk is full: nothing is lost, and the next call goes on. If
            the file was removed: then ``add`` raises this error, too.
        """
        turn = Turn(self._tidying)
        if not turn.claim():
            return
        with turn:
            try:
                self._tidy()
            except OSError as exc:  # no file descriptor is left
                raise StoreError(self.path, f"the folder cannot be read: {exc}") from exc

    def _tidy(self) -> None:
        left = len(self._ended)  # later ends wait: a write for each would slow requests
        while left > 0:
            ends = list(islice(self._ended.copy(), CHUNK))
            left -= len(ends)
            self._write(sql.end(ends, self.settings), is_synced=False)
            self._forget([end.row.key for end in ends])
            for _ in ends:
                self._ended.popleft()
        now = time.monotonic()
        is_time = now >= self._next_look
        if is_time:
            self._next_look = now + LOOK
            # No next process would find what is written to files that have lost their name, and
            # without the lock file the next process would take this one for dead.
            self._is_lost = self._find_files() != self._files
            self._check_lost()
            self._obey()
        if is_time and now >= self._next_pruning:
            ages = self.settings.keep_failed[1], self.settings.keep_done[1]
            self._next_pruning = now + min(60.0, *ages)
            self._write(sql.prune(self.settings), is_synced=False)
        if is_time or not self._is_wal_busy:
            self._empty_wal()

    def _obey(self) -> None:
        """Carry out orders of the command line: see ``inspection``."""
        for path in self._folder.orders():
            is_done = False
            # Another process has obeyed, or the order cannot be read, and holds up no other.
            with suppress(OSError):
                is_done = os.stat(path).st_mtime < time.time() - 60.0
                with open(path, encoding="utf-8") as file, suppress(*_FORGED):
                    is_done |= self._carry_out(**json.load(file))
                if is_done:
                    os.unlink(path)

    def _carry_out(self, what: str, number: int, key: int, id: str) -> bool:  # noqa: A002
        """Carry out an order; False if the task is not in this file.

        :raises TypeError: if the order is forged.
        """
        if [type(each) for each in (what, number, key, id)] != [str, int, int, str]:
            raise TypeError
        with self._reading_turn():
            is_kept = self._reader.execute("SELECT 1 FROM kept WHERE id = ?", (id,)).fetchone()
        if is_kept:
            new = next(self._keys)
            is_retry = what == "retry"
            discarded = sql.discard_kept(id, self.settings)
            self._write(sql.retry(id, new) if is_retry else discarded, is_synced=False)
        elif number == self.number and what == "discard":
            is_held = key in self._held
            self._discarded.add(key)  # from now on begin() refuses
            if key in self._notes:  # begin() was quicker
                self._discarded.discard(key)
                return True
            self._write(sql.discard(key, self.settings), is_synced=False)
            if not is_held:
                self._forget([key])
        return bool(is_kept) or number == self.number

    def _empty_wal(self) -> None:
        """Empty a long WAL: copy its pages to the file beside commits, the rest in a turn.

        Before 3.51.3, SQLite can damage the file if a commit restarts the WAL while another
        connection begins to copy. A commit does not restart the WAL before all was copied and
        nobody reads, and meanwhile the reader has a transaction open.
        """
        self._writer.commits = 0
        size = os.stat(self.path + "-wal").st_size
        if size < max(WAL_FULL, self._wal_size + 1):  # commits do not make it longer yet
            return
        if not self._is_wal_busy:
            with self._reading_turn(), closing(connect(self.path)) as copier:
                self._reader.execute("BEGIN")
                try:
                    self._reader.execute("SELECT epoch FROM meta").fetchone()
                    copier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                finally:
                    self._reader.execute("ROLLBACK")
        with self._writer.hold():
            self._is_wal_busy = self._writer.empty_wal(is_cut=size >= WAL_LIMIT)
        if not self._is_wal_busy:
            self._wal_size = 0 if size >= WAL_LIMIT else size

    @property
    def is_empty(self) -> bool:
        """True if no task waits or runs (failed and done ones may be kept).

        :raises StoreError: if the file cannot be read.
        """
        with self._reading_turn():
            return self._reader.execute("SELECT 1 FROM tasks LIMIT 1").fetchone() is None

    def remove(self, heir: Store) -> bool:
        """Remove an empty file; ``heir`` gets its failed, put-aside and done tasks.

        Nothing else may be done with this store meanwhile.

        :return: False if the file is not empty.
        :raises StoreError: if ``heir`` cannot store them.
        """
        self.tidy()
        if not self.is_empty:
            return False
        with self._reading_turn():
            kept = self._reader.execute("SELECT * FROM kept").fetchall()
            done = self._reader.execute(sql.READ_DONE).fetchall()
        for start in range(0, len(kept), 20):
            heir._write(sql.keep(kept[start : start + 20]), is_synced=False)
        for start in range(0, len(done), CHUNK):
            ends = [typed(values, OF_DONE) for values in done[start : start + CHUNK]]
            heir._write([sql.record(ends)], is_synced=False)
        self._end(is_removed=True)
        return True

    def park(self, until: float) -> Parked | None:
        """Close an adopted file, and stay its owner, if nothing is to be done before ``until``.

        The process may own hundreds of such files, whose descriptors it needs for requests.
        Call this if ``read`` has returned no row.

        :return: what to wait for; None if the file stays open.
        :raises StoreError: if the file cannot be read.
        """
        due = self.next_due()
        if due is None or due < until or self._held or self._left or self._ended:
            return None
        parked = Parked(due, self.count_waiting(0.0))
        self._end(is_parked=True)
        return parked

    def close(self) -> None:
        """Tidy, close the file and give up owning it; rows stay for the next process.

        A file without any task, waiting or kept, is removed. Never raises. Call this on the
        last thread that uses the store.
        """
        is_removed = False
        with suppress(StoreError, sqlite3.Error, OSError):
            self.tidy()
            is_removed = not any(self.count().values())
        with suppress(StoreError, sqlite3.Error, OSError):
            self._end(is_removed=is_removed)

    def _end(self, *, is_removed: bool = False, is_parked: bool = False) -> None:
        for own in list(_own.values()):
            own.forget(self)
        turn = self._reading.take(60.0)  # another thread may count the tasks
        self._reading.end()
        self._reader.close()
        del turn  # gives it back
        self._writer.close()
        if is_removed:
            _unlink(self._folder, self.number)
        self._notes.close()
        if not is_parked:
            self._locks.give(self.number)


class Parked(NamedTuple):
    """A closed file that this process owns."""

    due: float
    """The time of the first task, by ``time.time()``."""
    waiting: int
    """The number of tasks."""


_own: dict[tuple[int, int], PerProcess[Store]] = {}


def _unlink(folder: Folder, number: int) -> None:
    # The file goes first: a file without its WAL would have tasks that have ended.
    for suffix in (".sqlite", *SIBLINGS, ".notes"):
        with suppress(FileNotFoundError):
            os.unlink(folder.file(number, suffix))


def _row(values: Iterable[Any]) -> Row:
    return Row(*typed(values, OF_ROW))


def _pop_all(keys: list[int]) -> list[int]:
    """Empty a list to which other threads append."""
    found = []
    with suppress(IndexError):
        while keys:
            found.append(keys.pop())
    return found
