"""Threads that write at the same time: shared transactions, time limits, signals, gevent."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.durable.support import open_folder, task
from tests.support import TIMEOUT, run_python
from wsgi_bg._store import sql
from wsgi_bg._store.rows import Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._store.writer import Turn, Turns, _Write, connect
from wsgi_bg.exceptions import StoreError


class Waiting(dict[_Write, None]):
    """The writes of a writer; tells when ``count`` of them are there."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self.are_there = threading.Event()

    def __setitem__(self, write: _Write, nothing: None) -> None:
        super().__setitem__(write, nothing)
        if len(self) == self._count:
            self.are_there.set()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def add_together(
    store: Store, executor: ThreadPoolExecutor, rows: list[Row]
) -> list[Future[list[Row]]]:
    """Add each row on a thread of its own, while another thread has the turn."""
    waiting = store._writer.turns.waiting = Waiting(len(rows))
    with store._writer.hold():
        futures = [executor.submit(store.add, [row]) for row in rows]
        assert waiting.are_there.wait(TIMEOUT)
    return futures


def statements(store: Store) -> list[str]:
    """Return a list that gets each statement of the writer from now on."""
    found: list[str] = []
    store._writer.connection.set_trace_callback(found.append)
    return found


@pytest.mark.parametrize("synchronous", ["normal", "full"])
def test_threads_that_wait_together_share_a_commit(
    tmp_path: Path, executor: ThreadPoolExecutor, synchronous: str
) -> None:
    with open_folder(tmp_path, Settings(synchronous)) as (_, store):
        executed = statements(store)
        futures = add_together(store, executor, [task() for _ in range(8)])
        assert len({future.result(TIMEOUT)[0].key for future in futures}) == 8
        *before, insert = executed  # a single statement commits itself
        assert insert.startswith("INSERT")
        assert before == ["PRAGMA synchronous=FULL"] * (synchronous == "full")
        assert store.count()["waiting"] == 8


def test_threads_that_store_many_tasks_share_a_commit(
    store: Store, executor: ThreadPoolExecutor
) -> None:
    waiting = store._writer.turns.waiting = Waiting(3)
    sizes = (60, 1, 1)
    with store._writer.hold():
        executed = statements(store)
        futures = [executor.submit(store.add, [task()] * size) for size in sizes]
        assert waiting.are_there.wait(TIMEOUT)
    assert tuple(len(future.result(TIMEOUT)) for future in futures) == sizes
    assert [each.partition(" ")[0] for each in executed] == ["BEGIN", *["INSERT"] * 3, "COMMIT"]
    assert store.count()["waiting"] == 62


def test_deletes_are_not_synced(tmp_path: Path) -> None:
    with open_folder(tmp_path, Settings("full")) as (_, store):
        (row,) = store.add([task()])
        executed = statements(store)
        store.take_back([row])
        store.tidy()
        assert executed[0] == "PRAGMA synchronous=NORMAL"
        assert "PRAGMA synchronous=FULL" not in executed


def test_a_bad_row_fails_no_other_thread(store: Store, executor: ThreadPoolExecutor) -> None:
    good, bad, second = add_together(store, executor, [task(), task("\udc80"), task()])
    assert good.result(TIMEOUT)
    assert second.result(TIMEOUT)
    with pytest.raises(StoreError, match="surrogates"):
        bad.result(TIMEOUT)
    assert store.count()["waiting"] == 2


def test_a_thread_that_waits_too_long_stores_nothing(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    with open_folder(tmp_path, Settings(timeout=0.01)) as (_, store):
        with store._writer.hold():
            late = executor.submit(store.add, [task()])
            with pytest.raises(StoreError, match=r"more than 0.01 seconds, and nothing"):
                late.result(TIMEOUT)
        store.add([task("next")])
        assert store.count()["waiting"] == 1


def test_a_member_of_a_group_that_gives_up_is_removed_by_the_leader(
    tmp_path: Path, executor: ThreadPoolExecutor
) -> None:
    gate, committing = threading.Event(), threading.Event()

    def slow_disk(statement: str) -> None:
        if statement.startswith("INSERT") and not committing.is_set():
            committing.set()
            assert gate.wait(TIMEOUT)

    with open_folder(tmp_path) as (_, store):
        store._writer.connection.set_trace_callback(slow_disk)
        futures = add_together(store, executor, [task("first"), task("second")])
        assert committing.wait(TIMEOUT)
        store._writer._timeout = 0.0
        (late,), (leader,) = wait(futures, TIMEOUT, FIRST_COMPLETED)
        with pytest.raises(StoreError, match="nothing was stored"):
            late.result()
        gate.set()
        assert leader.result(TIMEOUT)
        assert store.count()["waiting"] == 1


@contextmanager
def interrupted_after(store: Store, statement: str) -> Iterator[None]:
    """A signal comes after the writer has executed ``statement``."""
    execute: Any = store._writer._execute

    def interrupt(sql: str, *values: object) -> None:
        execute(sql, *values)
        if sql.startswith(statement):
            signal.raise_signal(signal.SIGUSR1)

    store._writer.__dict__["_execute"] = interrupt
    try:
        yield
    finally:
        del store._writer.__dict__["_execute"]


def test_a_signal_in_a_transaction_leaves_the_store_as_it_was(
    store: Store, error: type[BaseException]
) -> None:
    with interrupted_after(store, "BEGIN"), pytest.raises(error):
        store.add([task() for _ in range(60)])
    assert store.count()["waiting"] == 0
    assert store.add([task()])


def test_rows_stored_before_a_signal_are_read(store: Store, error: type[BaseException]) -> None:
    with interrupted_after(store, "INSERT"), pytest.raises(error):
        store.add([task()])
    assert len(store.read(0.0, 10)) == 1


def waiting_write(store: Store) -> _Write:
    """The write of a thread that waits for the next leader to store its row."""
    (row,) = store.add([task("follower")])
    store.take_back([row])
    store.tidy()
    write = _Write(sql.insert([row]), None)
    store._writer.turns.waiting[write] = None
    return write


def test_a_thread_whose_leader_is_interrupted_waits_for_the_next_leader(
    store: Store, error: type[BaseException]
) -> None:
    follower = waiting_write(store)
    with interrupted_after(store, "BEGIN"), pytest.raises(error):
        store.add([task("leader") for _ in range(60)])
    was_settled = follower.is_settled
    store.add([task("next")])
    assert (was_settled, follower.is_settled) == (False, True)
    assert store.count()["waiting"] == 2


def test_a_thread_whose_leader_is_interrupted_after_the_commit_is_stored_once(
    store: Store, error: type[BaseException]
) -> None:
    follower = waiting_write(store)
    with interrupted_after(store, "INSERT"), pytest.raises(error):
        store.add([task("leader")])
    was_settled = follower.is_settled
    store.add([task("next")])
    assert (was_settled, follower.is_settled) == (False, True)
    assert store.count()["waiting"] == 3


def test_a_transaction_left_open_by_a_signal_is_rolled_back(store: Store) -> None:
    store._writer.connection.execute("BEGIN IMMEDIATE")
    store._writer.connection.execute("DELETE FROM meta")
    store._reader.execute("BEGIN")
    store._reader.execute("SELECT * FROM tasks").fetchall()  # would not see later rows
    store.add([task()])
    assert store.count()["waiting"] == 1
    assert store._reader.execute("SELECT count(*) FROM meta").fetchone() == (1,)


def test_a_handler_that_interrupts_a_write_cannot_write(store: Store) -> None:
    with store._writer.hold(), pytest.raises(StoreError, match="signal handler"):
        store.add([task()])
    assert store.add([task()])


def test_a_turn_that_another_thread_has_just_claimed_is_not_mine(store: Store) -> None:
    turns = store._writer.turns
    store.add([task()])
    turn = turns.free.pop()
    assert not turns.is_mine
    turns.free.append(turn)


def test_a_turn_that_is_not_given_back_returns_when_it_is_freed(store: Store) -> None:
    turn = store._writer.hold()
    assert store._writer.turns.take(0.0) is None
    del turn
    assert store.add([task()])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_a_thread_that_is_inside_sqlite(
    store: Store, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, committing = threading.Event(), threading.Event()
    take = Turns.take

    def slow_disk(statement: str) -> None:
        if statement == "COMMIT":
            committing.set()
            assert gate.wait(TIMEOUT)

    def take_later(self: Turns, timeout: float) -> Turn | None:
        gate.set()
        return take(self, timeout)

    store._writer.connection.set_trace_callback(slow_disk)
    monkeypatch.setattr(Turns, "take", take_later)
    future = executor.submit(store.add, [task() for _ in range(60)])
    assert committing.wait(TIMEOUT)
    pid = os.fork()
    if not pid:
        os._exit(store._writer.connection.in_transaction)
    assert os.waitpid(pid, 0)[1] == 0
    assert future.result(TIMEOUT)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_in_a_turn_of_the_same_thread_does_not_wait(store: Store) -> None:
    with store._writer.hold():
        pid = os.fork()
        if not pid:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert store.add([task()])


def test_a_thread_that_waits_lets_greenlets_run(tmp_path: Path) -> None:
    done = run_python(
        f"""
        import threading
        import gevent
        from wsgi_bg._store.folder import check_folder
        from wsgi_bg._store.rows import Row, Settings
        from wsgi_bg._store.store import Store

        store = Store.own(check_folder({os.fspath(tmp_path / "tasks")!r}), Settings())
        taken, gate, ended = threading.Event(), threading.Event(), threading.Event()

        def write():
            with store._writer.hold():
                taken.set()
                gate.wait(10)
                print("free", gate.is_set())

        thread = threading.Thread(target=write)
        thread.start()
        taken.wait(10)
        add = gevent.spawn(store.add, [Row("shop.mail", "")])
        gevent.spawn(gate.set)
        print(len(add.get()))
        thread.join()
        """
    )
    assert done.stdout == "free True\n1\n", done.stderr


def test_a_turn_that_another_thread_claims_meanwhile_is_not_claimed(store: Store) -> None:
    class Popped(list[str]):
        def __bool__(self) -> bool:
            return True

    free = store._writer.turns.free
    store._writer.turns.free = Popped()
    assert store._writer.turns.take(0.0) is None
    store._writer.turns.free = free


def test_an_error_that_a_signal_handler_raises_in_a_claim_is_raised(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(list[str]):
        def pop(self, *index: object) -> str:
            raise IndexError

    free = store._writer.turns.free
    store._writer.turns.free = Interrupting(free)
    with pytest.raises(IndexError):
        store._writer.turns.take(0.0)
    store._writer.turns.free = free


def test_a_turn_that_does_not_come_in_time_is_an_error(
    store: Store, executor: ThreadPoolExecutor
) -> None:
    with store._writer.hold():
        late = executor.submit(store._writer.hold, 0.01)
        with pytest.raises(StoreError, match=r"another thread writes for 0\.01 seconds"):
            late.result(TIMEOUT)


class First(dict[Turn, float]):
    """The threads that come first; tells when there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.is_there = threading.Event()

    def __setitem__(self, turn: Turn, until: float) -> None:
        super().__setitem__(turn, until)
        self.is_there.set()


def test_a_thread_that_takes_the_turn_comes_before_threads_that_write(
    store: Store, executor: ThreadPoolExecutor
) -> None:
    order: list[str] = []

    def take() -> None:
        with store._writer.hold():
            order.append("take")

    first = store._writer.turns.first = First()
    with store._writer.hold():
        taken = executor.submit(take)
        assert first.is_there.wait(TIMEOUT)
    store.add([task()])  # the turn is free, but for another thread
    order.append("write")
    taken.result(TIMEOUT)
    assert order == ["take", "write"]


def test_a_connection_that_nobody_refers_to_is_not_closed(tmp_path: Path) -> None:
    def open_files() -> list[str]:
        return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]

    path = os.fspath(tmp_path / "tasks.sqlite")
    sqlite3.connect(path).close()
    connect(path).execute("PRAGMA journal_mode=WAL")
    gc.collect()
    assert path in open_files()
