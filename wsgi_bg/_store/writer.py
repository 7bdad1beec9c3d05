"""``Turns`` and ``Writer``: threads take turns at a SQLite connection, and share transactions.

No thread waits inside SQLite for another thread of the process, since that would block gevent's
hub. A claim is an atomic operation of a list or a dict, because a signal handler may raise
between any two bytecodes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from wsgi_bg._process import greenlets, per_process
from wsgi_bg._process.interrupts import is_from_signal_handler, is_raised_here
from wsgi_bg._store.sql import Statement, together
from wsgi_bg.exceptions import StoreError

LOOK_AGAIN = 0.05
"""Seconds after which a waiting thread looks again: a signal may have lost its wake."""

FORK_TIMEOUT = 1.0
"""Seconds for which a fork waits for threads that are inside SQLite."""


def connect(path: str, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a connection that only ``close()`` closes, and never a finalizer.

    A forked child inherits the connection and must not close it: SQLite would clear the
    parent's transaction in the shared memory. The function registered here refers to the
    connection, and neither the garbage collector nor the interpreter's exit sees that.
    """
    quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    connection = sqlite3.connect(
        f"file:{quoted}?mode={'ro' if read_only else 'rw'}",
        uri=True,
        timeout=1.0,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.create_function("wsgi_bg_keep", 0, lambda: id(connection))
    return connection


class Turns:
    """The right to use a connection, which one thread has at a time.

    :param delays_forks: True if a fork waits until no thread has the turn. If a thread were
        inside SQLite, the mutexes of SQLite would stay locked in the child.
    """

    def __init__(self, *, delays_forks: bool = True) -> None:
        self.free: list[str] = ["the turn"]
        self.holder = 0  # the thread that has the turn
        self.waiting: dict[_Write, None] = {}
        self.first: dict[Turn, float] = {}  # who comes before all others, until that time
        if delays_forks:
            _all_turns[self] = None

    def take(self, timeout: float) -> Turn | None:
        """Return a claimed turn, or None if there is none within ``timeout`` seconds.

        This thread comes before those that write. (For a second only: a signal handler may
        leave it in the list.)
        """
        turn = Turn(self)
        if turn.claim():
            return turn
        now = time.monotonic()
        turn.event = greenlets.event()
        try:
            self.first[turn] = now + min(timeout, 1.0)
            while not turn.claim():
                if self.is_mine or time.monotonic() >= now + timeout:
                    return None
                turn.event.wait(min(timeout, LOOK_AGAIN))
                turn.event.clear()
            return turn
        finally:
            self.first.pop(turn, None)
            self.wake()

    def may_claim(self, turn: Turn) -> bool:
        """True if no other thread comes first."""
        now = time.monotonic()
        first = [other for other, until in self.first.copy().items() if now < until]
        return not first or first[0] is turn

    def wake(self) -> None:
        """Wake the thread that is to have the next turn, if no thread has the turn."""
        if self.free:
            writes = [write for write in list(self.waiting) if not write.is_settled]
            waiting: list[Turn | _Write] = [*list(self.first), *writes]
            for thread in waiting[:1]:
                thread.event.set()

    @property
    def is_mine(self) -> bool:
        """True if a signal handler has interrupted this thread in its turn."""
        return not self.free and self.holder == threading.get_ident()

    def end(self) -> None:
        """Forget the turns of a connection that is closed."""
        _all_turns.pop(self, None)


class Turn:
    """A turn, which goes back by ``give()``, at the latest when the object is freed."""

    __slots__ = ("_held", "_turns", "event")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._held: list[str] = []
        self.event: Any = None

    def claim(self) -> bool:
        turns = self._turns
        if turns.free and not (turns.first and not turns.may_claim(self)):
            try:
                # Popped and kept in one bytecode, so that no signal handler can lose the turn.
                next(map(self._held.append, iter(turns.free.pop, None)))
            except IndexError as exc:  # another thread was quicker
                if not is_raised_here(exc):
                    raise
        if self._held:
            turns.holder = threading.get_ident()
        return bool(self._held)

    def give(self) -> None:
        turns = self._turns
        if self._held:
            turns.holder = 0  # before another thread claims the turn
            next(map(turns.free.append, iter(self._held.pop, None)))
        if turns.first or turns.waiting:
            turns.wake()  # also a thread without the turn may have been woken, in vain

    def __del__(self) -> None:
        if getattr(self, "_held", None):  # else a signal handler may have raised in __init__()
            self.give()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.give()


_all_turns: dict[Turns, None] = {}
_turns_of_fork: list[Turn] = []


def _before_fork() -> None:
    deadline = time.monotonic() + FORK_TIMEOUT
    for turns in list(_all_turns):
        turn = turns.take(deadline - time.monotonic())
        if turn is not None:
            _turns_of_fork.append(turn)


def _after_fork_in_child() -> None:
    _all_turns.clear()
    _turns_of_fork.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_turns_of_fork.clear,
    after_in_child=_after_fork_in_child,
)


class _Write:
    """The statements of a thread that waits until they are committed."""

    __slots__ = ("_claims", "error", "event", "is_settled", "statements", "undo")

    def __init__(
        self, statements: Sequence[Statement], undo: Callable[[], Statement] | None
    ) -> None:
        self.statements = statements
        self.undo = undo
        self.is_settled = False
        self.error: Exception | None = None
        self.event = greenlets.event()
        self._claims = [None]

    def claim(self) -> bool:
        """Decide the result; False if that is decided already. Any one thread gets True."""
        with suppress(IndexError):
            self._claims.pop()
            return True
        return False

    def settle(self, error: Exception | None) -> bool:
        """Pass the result to the waiting thread; False if that thread has given up."""
        if not self.claim():
            return False
        self.error = error
        self.is_settled = True
        self.event.set()
        return True


class Writer:
    """A connection on which threads that wait at the same time share a transaction.

    :param timeout: seconds after which a thread gives up.
    :param is_full: True if a commit is synced to the disk.
    :ivar commits: the number of transactions; the owner sets it to 0.
    """

    def __init__(self, path: str, timeout: float, *, is_full: bool) -> None:
        self.path = path
        self._timeout = timeout
        self._is_full = is_full
        self._generation = per_process.generation
        self.connection = connect(path)
        self.turns = Turns()
        self.commits = 0

    def write(
        self,
        statements: Sequence[Statement],
        *,
        is_synced: bool = True,
        undo: Callable[[], Statement] | None = None,
    ) -> None:
        """Execute ``statements`` in a transaction; blocks until that is committed.

        :param is_synced: False for a write of the background, lost if the machine dies.
        :param undo: removes the effect if the commit comes after this thread has given up.
            Without ``undo`` the thread does not give up.
        :raises StoreError: if the transaction has failed, or has not begun in time.
        """
        mine = None
        turn = Turn(self.turns)
        try:
            if not is_synced:  # a thread of a request does no work of the background
                with self.hold():
                    self.execute(statements)
            elif not self.turns.waiting and turn.claim():
                self.execute(statements, is_synced=True)
            else:
                mine = _Write(statements, undo)
                self.turns.waiting[mine] = None
                if turn.claim() or self._wait(mine, turn):
                    writes = list(self.turns.waiting)
                    self._commit([write for write in writes if not write.is_settled])
        except (sqlite3.Error, OverflowError, ValueError) as exc:
            if is_from_signal_handler(exc):
                raise
            raise StoreError(self.path, describe(exc)) from exc
        finally:
            if mine is not None:
                self.turns.waiting.pop(mine, None)
            turn.give()
        if mine is not None and mine.error is not None:
            raise StoreError(self.path, describe(mine.error)) from mine.error

    def _wait(self, mine: _Write, turn: Turn) -> bool:
        """Wait for the turn; False if another thread has committed the write meanwhile."""
        if self.turns.is_mine:
            raise StoreError(self.path, "a signal handler has interrupted a thread that writes")
        begun = time.monotonic()
        while not mine.is_settled:
            if turn.claim():
                return not mine.is_settled
            mine.event.wait(LOOK_AGAIN)
            mine.event.clear()
            is_late = time.monotonic() - begun > self._timeout
            if is_late and mine.undo is not None and mine.claim():
                took = f"the disk took more than {self._timeout:g} seconds"
                raise StoreError(self.path, f"{took}, and nothing was stored")
        return False

    def _commit(self, group: list[_Write]) -> None:
        """Commit the writes of a group; if that fails, each in a transaction of its own."""
        error = None
        try:
            statements = [statement for write in group for statement in write.statements]
            self.execute(together(statements), is_synced=True)
        except (sqlite3.Error, OverflowError, ValueError) as exc:
            if is_from_signal_handler(exc):
                raise
            if len(group) > 1:
                for write in group:
                    self._commit([write])
                return
            error = exc
        for write in group:
            if not write.settle(error) and error is None and write.undo is not None:
                self.execute([write.undo()])

    def execute(self, statements: Sequence[Statement], *, is_synced: bool = False) -> None:
        """Execute ``statements`` in a transaction; the caller has the turn.

        A single statement commits itself: each statement releases the GIL, and a thread that
        computes may hold the GIL for 5 ms.
        """
        self.commits += 1
        if self.connection.in_transaction:  # a signal handler has raised before
            self._execute("ROLLBACK")
        if self._is_full:
            self._execute("PRAGMA synchronous=" + ("FULL" if is_synced else "NORMAL"))
        if len(statements) == 1:
            self._execute(*statements[0])
            return
        try:
            self._execute("BEGIN IMMEDIATE")
            for statement in statements:
                self._execute(*statement)
            self._execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._execute("ROLLBACK")
            raise

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        if per_process.generation != self._generation:  # a signal handler has forked
            raise StoreError(self.path, "a forked child must not write to its parent's file")
        self.connection.execute(sql, values)

    def hold(self, timeout: float = 10.0) -> Turn:
        """Take the turn, for a ``with`` statement.

        :raises StoreError: if there is none within ``timeout`` seconds.
        """
        turn = self.turns.take(timeout)
        if turn is None:
            raise StoreError(self.path, f"another thread writes for {timeout:g} seconds")
        return turn

    def empty_wal(self, *, is_cut: bool) -> bool:
        """Copy the WAL to the file and empty it; True if a reader prevents that.

        :param is_cut: False if the WAL is to keep its size, and be written from its start.
        """
        mode = "TRUNCATE" if is_cut else "RESTART"
        try:
            self._execute("PRAGMA busy_timeout=0")
            busy = self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0]
            self._execute("PRAGMA busy_timeout=1000")
        except sqlite3.Error as exc:
            raise StoreError(self.path, describe(exc)) from exc
        return bool(busy)

    def close(self) -> None:
        """Close the connection; the caller has the turn, or is alone."""
        self.turns.end()
        self.connection.close()


def describe(error: Exception) -> str:
    """Return the message of an error of SQLite, with the thing to do."""
    message = str(error) or type(error).__name__
    if "full" in message or "I/O" in message:
        return f"{message}: make room on the disk"
    return message
