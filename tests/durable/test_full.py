"""A full disk: an error for what cannot be stored, and nothing that has ended runs again."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.durable.support import child, dead_store, done, is_sound, open_folder, task
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.rows import Outcome, Row
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", os.fspath(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path) -> Path:
    """Use up the room of a disk; the file that has it is removed by the test."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def add_until_full(store: Store) -> list[Row]:
    rows: list[Row] = []

    def add() -> None:
        while True:
            rows.extend(store.add([task() for _ in range(20)]))

    with pytest.raises(StoreError, match="full: make room on the disk"):
        add()
    return rows


def test_a_full_disk_fails_new_tasks_and_runs_none_twice(small_disk: Path) -> None:
    with open_folder(small_disk / "tasks") as (_, store):
        rows = store.add([task() for _ in range(20)])
        filler = fill(small_disk)
        rows += add_until_full(store)
        for row in rows:
            assert store.begin(row)
            store.end(done(row))
        with pytest.raises(StoreError, match="full"):
            store.tidy()
        assert store.untidy == len(rows)
        assert store.read(0.0, 10_000) == []
        filler.unlink()
        assert store.add([task("after")])
        store.tidy()
        assert store.count()["waiting"] == 1
        assert store.count()["done"] == len(rows)
        assert is_sound(store)


def test_tasks_ended_on_a_full_disk_do_not_run_in_the_next_process(small_disk: Path) -> None:
    folder = Folder(os.fspath(small_disk / "tasks"), (0, 0))
    os.mkdir(folder.path, 0o700)
    code = """
    store = Store.own(folder, settings)
    (first, second) = store.add([Row("first", ""), Row("second", "")])
    store.begin(first)
    tell("stored")
    input()
    store.end(Outcome(first))
    try:
        while True:
            store.tidy()
            store.add([Row("more", "-" * 4000)])
    except StoreError as error:
        tell(error)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with child(folder, code) as process:
        assert process.line() == "stored"
        filler = fill(small_disk)
        process.answer()
        (error,) = process.rest()
    assert "full" in error
    filler.unlink()
    with open_folder(small_disk / "tasks") as (folder, heir):
        left = Store.adopt(folder, heir.settings)
        assert left is not None
        rows = left.read(0.0, 10_000)
        assert rows[0].name == "second"
        assert rows[0].crashes == 0
        left.close()


def test_a_full_disk_is_no_damage_of_a_file_that_was_closed(small_disk: Path) -> None:
    folder = check_folder(small_disk / "tasks")
    dead_store(folder, "store.add([Row('left', '')])")
    with closing(sqlite3.connect(folder.file(1))) as connection:
        connection.execute("SELECT * FROM tasks").fetchall()
    assert not os.path.exists(folder.file(1, ".sqlite-shm"))
    filler = fill(small_disk)
    assert check_folder(folder.path) == folder  # only requests with tasks fail
    with pytest.raises(StoreError, match=r"make room on the disk$"):
        list_tasks(folder)
    filler.unlink()
    assert [each.outcome.row.name for each in list_tasks(folder)] == ["left"]


def test_no_file_is_made_on_a_full_disk(small_disk: Path) -> None:
    filler = fill(small_disk)
    with (
        pytest.raises(StoreError, match=r"no file can be made|full|No space left"),
        open_folder(small_disk / "tasks"),
    ):
        pass
    filler.unlink()
    with open_folder(small_disk / "tasks") as (folder, store):
        assert store.add([task()])
        while (left := Store.adopt(folder, store.settings)) is not None:
            assert left.remove(store)


def test_a_process_that_finds_no_room_for_its_file_leaves_none(small_disk: Path) -> None:
    tasks = small_disk / "tasks"
    check_folder(tasks)
    (tasks / "owners.lock").write_bytes(b"...")  # has a block, with room for further numbers
    filler = fill(small_disk)
    for _ in range(3):  # each request tries again
        with pytest.raises(StoreError, match="make room on the disk"), open_folder(tasks):
            pass
    assert os.listdir(tasks) == ["owners.lock"]
    filler.unlink()
    with open_folder(tasks) as (_, store):
        assert store.add([task()])


def test_children_and_retries_that_cannot_be_stored_are_errors(small_disk: Path) -> None:
    with open_folder(small_disk / "tasks") as (_, store):
        rows = store.add([task(), task()])
        filler = fill(small_disk)
        add_until_full(store)
        big = task()._replace(arguments="-" * 100_000)
        assert store.begin(rows[0])
        with pytest.raises(StoreError, match="full"):
            store.end_with(done(rows[0]), [big])
        assert store.count()["running"] == 1
        with pytest.raises(StoreError, match="full"):
            store.postpone([rows[1]._replace(due=1.0, options="-" * 100_000)])
        filler.unlink()
        assert store.end_with(done(rows[0]), [big])
        store.postpone([rows[1]._replace(due=1.0)])
        assert store.next_due() == 1.0


def test_a_limit_of_the_size_of_files_is_an_error_and_no_signal(folder: Folder) -> None:
    code = """
    import resource
    store = Store.own(folder, settings)
    rows = store.add([Row("first", "")])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        while True:
            rows += store.add([Row("more", "")])
    except StoreError as error:
        tell(error)
    for row in rows:
        store.begin(row)
        store.end(Outcome(row))
    try:
        store.tidy()
    except StoreError:
        tell("untidy", store.untidy == len(rows))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    store.tidy()
    tell("tidy", store.untidy, store.is_empty)
    """
    with child(folder, code) as process:
        error, untidy, tidy = process.rest()
    assert "make room on the disk" in error
    assert (untidy, tidy) == ("untidy True", "tidy 0 True")


def test_a_failed_task_is_kept_when_there_is_room(small_disk: Path) -> None:
    with open_folder(small_disk / "tasks") as (_, store):
        (row,) = store.add([task()])
        filler = fill(small_disk)
        add_until_full(store)
        store.end(Outcome(row, "failed", 1.0, 9e9, "ValueError", "-" * 100_000))
        with pytest.raises(StoreError, match="full"):
            store.tidy()
        filler.unlink()
        store.tidy()
        assert store.count()["failed"] == 1
