"""The rows of a store: added, read, run, postponed, kept."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import closing
from pathlib import Path

import pytest

from tests.durable.support import done, is_sound, names, open_folder, task, work_off
from wsgi_bg._store import notes
from wsgi_bg._store.folder import Folder
from wsgi_bg._store.rows import Outcome, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._store.writer import connect
from wsgi_bg.exceptions import StoreError


def test_rows_of_a_request_have_keys_in_order_and_the_key_of_the_first(store: Store) -> None:
    rows = store.add([task("first"), task("second")])
    assert rows[0].key < rows[1].key
    assert [row.request for row in rows] == [rows[0].key, rows[0].key]
    assert len({row.id for row in rows}) == 2
    assert store.add([task()._replace(id="mine")])[0].id == "mine"


def test_many_rows_are_stored_in_order(store: Store) -> None:
    rows = store.add([task(f"task {number}") for number in range(120)])
    store.leave(rows)
    assert store.read(0.0, 1000) == rows


def test_rows_in_memory_are_not_read_again(store: Store) -> None:
    held = store.add([task("held")])
    left = store.add([task("left")])
    store.leave(left)
    assert store.read(0.0, 10) == left
    assert store.read(0.0, 10) == []
    store.leave(held)
    assert store.read(0.0, 10) == held


def test_no_more_rows_are_read_than_there_is_room_for(store: Store) -> None:
    rows = store.add([task(f"task {number}") for number in range(5)])
    store.leave(rows)
    assert store.read(0.0, 2) == rows[:2]
    assert store.read(0.0, 0) == []
    assert store.read(0.0, 10) == rows[2:]


def test_a_row_that_has_ended_is_not_read_before_or_after_it_is_deleted(store: Store) -> None:
    rows = store.add([task()])
    assert store.begin(rows[0])
    store.end(done(rows[0]))
    assert store.untidy == 1
    assert store.read(0.0, 10) == []
    store.tidy()
    assert store.untidy == 0
    assert store.read(0.0, 10) == []
    assert store.count() == {"waiting": 0, "running": 0, "failed": 0, "aside": 0, "done": 1}


def test_a_task_does_not_begin_twice(store: Store) -> None:
    (row,) = store.add([task()])
    assert store.begin(row)
    assert not store.begin(row)
    assert store.count()["running"] == 1


def test_rows_with_a_time_are_read_when_the_time_has_come(store: Store) -> None:
    store.leave(store.add([task("late", due=200.0), task("early", due=100.0)]))
    store.leave(store.add([task("now")]))
    assert store.next_due() == 100.0
    assert names(store.read(50.0, 10)) == ["now"]
    assert names(store.read(200.0, 10)) == ["early", "late"]
    assert store.next_due() is None


def test_a_postponed_row_is_read_again_with_its_attempts(store: Store) -> None:
    (row,) = store.add([task()])
    assert store.begin(row)
    again = row._replace(due=100.0, attempts=1, options="{}")
    store.postpone([again])
    assert store.count()["running"] == 0
    assert store.next_due() == 100.0
    assert store.read(100.0, 10) == [again]
    assert store.begin(again)


def test_a_row_postponed_to_at_once_is_read_again(store: Store) -> None:
    (row,) = store.add([task()])
    store.leave(store.add([task()]))
    store.read(0.0, 10)
    store.postpone([row._replace(attempts=1)])
    assert store.read(0.0, 10) == [row._replace(attempts=1)]


def test_rows_given_back_a_hundred_times_are_all_read(store: Store) -> None:
    rows = [store.add([task(f"task {number}")])[0] for number in range(250)]
    store.leave([rows[0]])
    assert store.read(0.0, 10) == [rows[0]]
    for row in rows:
        store.leave([row])
    assert store.read(0.0, 1000) == rows


def test_rows_taken_back_are_gone(store: Store) -> None:
    rows = store.add([task(), task()])
    store.take_back(rows)
    assert not store.begin(rows[0])
    store.tidy()
    assert store.is_empty
    assert store.count()["done"] == 0


def test_children_are_stored_with_the_end_of_their_task(store: Store) -> None:
    (row,) = store.add([task("parent")])
    assert store.begin(row)
    children = store.end_with(done(row), [task("child")])
    assert store.untidy == 0
    assert store.count()["waiting"] == 1
    store.leave(children)
    assert store.read(0.0, 10) == children


def test_a_failed_task_is_kept_with_its_traceback_whatever_its_text(store: Store) -> None:
    (row,) = store.add([task()])
    assert store.begin(row)
    store.end(Outcome(row, "failed", 1.0, 9e9, "ValueError", "ValueError: \udc80"))
    store.tidy()
    assert store.count()["failed"] == 1


def test_kept_tasks_are_limited_by_number_and_age(tmp_path: Path) -> None:
    settings = Settings(keep_failed=(2, 100.0), keep_done=(3, 100.0))
    with open_folder(tmp_path, settings) as (_, store):
        old = store.add([task(), task()])
        store.end(Outcome(old[0], "failed", 1.0, 2.0))
        store.end(Outcome(old[1], "done", 1.0, 2.0))
        for row in store.add([task() for _ in range(5)]):
            store.end(Outcome(row, "failed", 1.0, 9e9))
        for row in store.add([task() for _ in range(5)]):
            store.end(Outcome(row, "done", 1.0, 9e9))
        store.tidy()
        counts = store.count()
    assert (counts["failed"], counts["done"]) == (2, 3)


def test_tasks_that_are_kept_for_a_short_time_go_at_the_next_look(tmp_path: Path) -> None:
    settings = Settings(keep_failed=(9, 0.0), keep_done=(9, 0.0))
    with open_folder(tmp_path, settings) as (_, store):
        store.tidy()
        (row,) = store.add([task()])
        store.end(Outcome(row, "done", 1.0, 2.0))
        store.tidy()
        assert store.count()["done"] == 1
        store._next_look = 0.0
        store.tidy()
        assert store.count()["done"] == 0


def test_a_request_without_tasks_is_not_written(store: Store) -> None:
    assert store.add([]) == []


def test_a_text_that_cannot_be_stored_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match="surrogates"):
        store.add([task("\udc80")])
    assert store.count()["waiting"] == 0


def test_without_room_for_notes_no_task_begins(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "SLOTS", 3)
    rows = store.add([task(), task(), task()])
    assert store.begin(rows[0])
    assert store.begin(rows[1])
    with pytest.raises(StoreError, match="room on the disk"):
        store.begin(rows[2])
    store.end(done(rows[0]))
    store.tidy()
    assert store.begin(rows[2])


def fill_wal(store: Store, size: int) -> int:
    """Add rows until the WAL has ``size`` bytes; return its size."""
    while os.path.getsize(store.path + "-wal") < size:
        store.leave(store.add([task()]))
    return os.path.getsize(store.path + "-wal")


@pytest.fixture
def short_wal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_bg._store.store.WAL_FULL", 100_000)
    monkeypatch.setattr("wsgi_bg._store.store.WAL_LIMIT", 200_000)


def test_a_store_needs_to_be_tidied_after_many_ends_and_many_commits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._store.store.CHUNK", 2)
    needs = []
    for _ in range(2):
        store.take_back(store.add([task()]))
        needs.append(store.needs_tidy)
    store.tidy()
    needs.append(store.needs_tidy)
    monkeypatch.setattr("wsgi_bg._store.store.WAL_COMMITS", 1)
    store.add([task()])
    needs.append(store.needs_tidy)
    store.tidy()
    needs.append(store.needs_tidy)
    assert needs == [False, True, False, True, False]


@pytest.mark.usefixtures("short_wal")
def test_a_full_wal_is_written_from_its_start(store: Store) -> None:
    size = fill_wal(store, 100_000)
    store.tidy()
    store.leave(store.add([task() for _ in range(100)]))
    store.tidy()
    assert os.path.getsize(store.path + "-wal") == size
    assert is_sound(store)
    assert fill_wal(store, size + 1) > size
    store.tidy()
    assert work_off(store)
    assert store.is_empty


@pytest.mark.usefixtures("short_wal")
def test_a_long_wal_is_cut(store: Store) -> None:
    fill_wal(store, 200_000)
    store.tidy()
    assert os.path.getsize(store.path + "-wal") == 0
    assert work_off(store)
    assert store.is_empty


@pytest.mark.usefixtures("short_wal")
def test_a_reader_delays_the_emptying_of_the_wal_and_nothing_else(store: Store) -> None:
    with closing(connect(store.path, read_only=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM tasks").fetchall()
        fill_wal(store, 200_000)
        for _ in range(2):
            store.tidy()
            assert os.path.getsize(store.path + "-wal") >= 200_000
        assert work_off(store)
    store._next_look = 0.0
    store.tidy()
    assert os.path.getsize(store.path + "-wal") == 0


def test_the_folder_and_its_files_are_private(store: Store, folder: Folder) -> None:
    store.add([task()])
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
    modes = {
        name: stat.S_IMODE(os.stat(os.path.join(folder.path, name)).st_mode)
        for name in os.listdir(folder.path)
    }
    assert len(modes) == 5
    assert set(modes.values()) == {0o600}, modes


def test_an_own_file_with_nothing_in_it_goes_when_it_is_closed(folder: Folder) -> None:
    store = Store.own(folder, Settings())
    assert Store.own(folder, Settings()) is store
    store.close()
    assert os.listdir(folder.path) == ["owners.lock"]
    store.close()
    again = Store.own(folder, Settings())
    assert again is not store
    again.close()


@pytest.mark.parametrize("suffix", [".sqlite", ".sqlite-wal", ".notes", "owners.lock"])
def test_a_file_that_was_removed_while_the_process_runs_is_an_error(
    store: Store, suffix: str
) -> None:
    stem, folder = os.path.splitext(store.path)[0], os.path.dirname(store.path)
    os.unlink(stem + suffix if suffix[0] == "." else os.path.join(folder, suffix))
    with pytest.raises(StoreError, match="removed or replaced while this process runs"):
        store.tidy()
    with pytest.raises(StoreError, match="removed or replaced while this process runs"):
        store.add([task()])


def test_a_copy_in_place_of_the_folder_is_an_error_while_the_process_runs(
    store: Store, folder: Folder
) -> None:
    shutil.copytree(folder.path, folder.path + ".copy")
    os.rename(folder.path, folder.path + ".old")
    os.rename(folder.path + ".copy", folder.path)
    with pytest.raises(StoreError, match="removed or replaced while this process runs"):
        store.tidy()
    with pytest.raises(StoreError, match="removed or replaced while this process runs"):
        store.add([task()])


def test_a_closed_store_stores_nothing(folder: Folder) -> None:
    store = Store.own(folder, Settings())
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.add([task()])
    with pytest.raises(StoreError, match="closed"):
        store.read(0.0, 1)


def test_rows_given_back_while_a_thread_reads_are_held_until_it_has_read(store: Store) -> None:
    (row,) = store.add([task()])
    turn = store._reading.take(0.0)
    assert turn is not None
    with turn:
        store.leave([row])
        assert row.key in store._held
        with pytest.raises(StoreError, match="another thread reads"):
            store.read(0.0, 10)
    assert store.read(0.0, 10) == [row]


def test_a_second_thread_does_not_tidy(store: Store) -> None:
    store.take_back(store.add([task()]))
    turn = store._tidying.take(0.0)
    assert turn is not None
    with turn:
        store.tidy()
        assert store.untidy == 1
    store.tidy()
    assert store.untidy == 0


def test_a_wal_that_cannot_be_emptied_is_an_error(store: Store) -> None:
    store._writer.connection.close()
    with pytest.raises(StoreError, match="closed"):
        store._writer.empty_wal(is_cut=True)


def test_a_folder_that_cannot_be_read_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: os.stat("/missing"))
    with pytest.raises(StoreError, match=r"folder cannot be read: .*No such file"):
        store.tidy()
