"""The check of a folder: each thing that is wrong is one clear error."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.durable.support import dead_store, open_folder, task
from wsgi_bg._store.folder import Folder, check_folder, file_system, is_of_parent
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.rows import Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError

MOUNTS = r"""
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:40 / /mnt/shared\040files rw,relatime shared:1 - nfs4 server:/x rw
23 21 0:41 / /mnt/fuse rw - fuse.sshfs x rw
24 21 0:42 / /srv rw - tmpfs x rw
25 21 0:43 / /srv rw - cifs x rw
26 21 0:44 / /mnt/sharedroom rw - xfs x rw
"""


@pytest.fixture
def killed(folder: Folder) -> str:
    """The path of the file of a process that was killed, without a WAL."""
    dead_store(folder, "store.add([Row('shop.mail', '{}')])")
    without_wal(folder.file(1))
    return folder.file(1)


def without_wal(path: str) -> None:
    with closing(sqlite3.connect(path)) as connection:  # copies the WAL when it closes
        connection.execute("SELECT * FROM tasks").fetchall()
    assert not os.path.exists(path + "-wal")


def test_a_path_may_be_an_object_whose_path_is_bytes(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "tasks")
    entry: Any
    (entry,) = os.scandir(os.fsencode(tmp_path))
    assert check_folder(entry).path == os.path.realpath(tmp_path / "tasks")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/tasks", "ext4"),
        ("/mnt/shared files/tasks", "nfs4"),
        ("/mnt/fuse", "fuse.sshfs"),
        ("/srv/tasks", "cifs"),
        ("/mnt/sharedroom", "xfs"),
    ],
)
def test_the_file_system_is_that_of_the_last_mount(
    tmp_path: Path, path: str, kind: str
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.lstrip())
    assert file_system(path, os.fspath(table)) == kind


def test_an_unknown_file_system_is_accepted(tmp_path: Path) -> None:
    assert file_system("/", os.fspath(tmp_path / "missing")) == ""


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "cifs", "9p", "fuseblk"])
def test_a_remote_file_system_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("wsgi_bg._store.folder.file_system", lambda path: kind)
    with pytest.raises(StoreError, match=f"{kind} .*choose a folder on a local disk"):
        check_folder(tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize("path", ["", ":memory:", "file:tasks", "tasks\0"])
def test_a_path_that_is_no_folder_is_refused(path: str) -> None:
    with pytest.raises(StoreError, match="need the path of a folder"):
        check_folder(path)


def test_a_path_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be made: (Not a directory|File exists)"):
        check_folder(tmp_path / "file" / "tasks")
    with pytest.raises(StoreError, match="cannot be made: File exists"):
        check_folder(tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir(mode=0o500)
    if os.access(tmp_path / "tasks", os.W_OK):  # root may write there, except to a mount
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", os.fspath(tmp_path / "tasks")]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this user may write everywhere, and may not mount")
    try:
        with pytest.raises(StoreError, match="cannot be written by this user"):
            check_folder(tmp_path / "tasks")
    finally:
        subprocess.run(["umount", tmp_path / "tasks"], capture_output=True, check=False)


@pytest.mark.parametrize("name", ["owners.lock", "00000001.sqlite"])
def test_a_file_of_another_user_is_refused(
    folder: Folder, killed: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = os.path.join(folder.path, name)
    # root may write it.
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != path)
    with pytest.raises(StoreError, match=re.escape(name) + ".*belongs to another user"):
        check_folder(folder.path)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    folder = check_folder(tmp_path / "var" / "tasks %?#")
    with open_folder(Path(folder.path)) as (_, store):
        store.leave(store.add([task()]))
        assert check_folder(folder.path) == folder
        assert len(store.read(0.0, 10)) == 1


def test_a_damaged_file_is_refused_by_name(folder: Folder, killed: str) -> None:
    Path(killed).write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=re.escape(killed) + ".*not a database.*move the file"):
        check_folder(folder.path)
    with pytest.raises(StoreError, match="not a database"):
        Store.adopt(folder, Settings())


@pytest.mark.parametrize("epoch", [b"\xff" * 8, (1 << 30).to_bytes(8, sys.byteorder)])
def test_damaged_notes_are_refused_by_name_and_keep_no_other_file(
    folder: Folder, killed: str, epoch: bytes
) -> None:
    notes = folder.file(1, ".notes")
    dead_store(folder, "store.add([Row('shop.other', '{}')])")
    Path(notes).write_bytes(epoch)
    with pytest.raises(StoreError, match=re.escape(notes) + ".*damaged: remove them"):
        check_folder(folder.path)
    other = Store.adopt(folder, Settings())
    assert other is not None
    assert other.number == 2
    with pytest.raises(StoreError, match="the notes are damaged"):
        Store.adopt(folder, Settings())
    os.unlink(notes)
    again = Store.adopt(check_folder(folder.path), Settings())
    assert again is not None
    assert len(again.read(0.0, 10)) == 1
    again.close()
    other.close()


def test_a_cut_file_is_refused(folder: Folder, killed: str) -> None:
    os.truncate(killed, 4096)
    with pytest.raises(StoreError, match="malformed"):
        check_folder(folder.path)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE meta SET epoch = 'x'",
        "UPDATE meta SET epoch = -1",
        "DELETE FROM meta",
        "DROP TABLE done",
        "DROP TABLE kept",
    ],
)
def test_a_file_without_its_tables_or_epoch_is_refused(
    folder: Folder, killed: str, damage: str
) -> None:
    with closing(sqlite3.connect(killed)) as connection, connection:
        connection.execute(damage)
    with pytest.raises(StoreError, match=re.escape(killed) + ".*move the file away"):
        check_folder(folder.path)
    if "DROP" not in damage:
        with pytest.raises(StoreError, match="no epoch"):
            list_tasks(folder)
        with pytest.raises(StoreError, match="no epoch"):
            Store.adopt(folder, Settings())


def test_a_file_of_a_newer_version_is_refused(folder: Folder, killed: str) -> None:
    with closing(sqlite3.connect(killed)) as connection:
        connection.execute("PRAGMA user_version=2")
    newer = "has version 2, and this wsgi_bg knows version 1: install a newer wsgi_bg"
    with pytest.raises(StoreError, match=newer):
        check_folder(folder.path)
    with pytest.raises(StoreError, match=newer):
        Store.adopt(folder, Settings())


def test_a_damaged_file_does_not_keep_other_files_from_being_adopted(folder: Folder) -> None:
    dead_store(folder, "store.add([Row('first', '{}')])")
    dead_store(folder, "store.add([Row('second', '{}')])")
    without_wal(folder.file(1))
    Path(folder.file(1)).write_bytes(b"no database" * 1000)
    store = Store.adopt(folder, Settings())
    assert store is not None
    assert store.number == 2
    store.close()


def test_a_file_whose_process_died_while_it_made_the_file_is_accepted(folder: Folder) -> None:
    Path(folder.file(7)).write_bytes(b"")
    check_folder(folder.path)
    with open_folder(Path(folder.path)) as (_, heir):
        store = Store.adopt(folder, Settings())
        assert store is not None
        assert store.remove(heir)


def test_the_check_changes_nothing(folder: Folder) -> None:
    dead_store(folder, "store.add([Row('shop.mail', '{}')])")
    wal = Path(folder.file(1) + "-wal").read_bytes()
    check_folder(folder.path)
    assert wal
    assert Path(folder.file(1) + "-wal").read_bytes() == wal


def test_files_of_others_are_passed_over(folder: Folder) -> None:
    Path(folder.path, "my.sqlite").write_text("no database")
    Path(folder.path, "1.txt").write_text("no database")
    assert check_folder(folder.path).numbers() == []


def test_a_file_that_another_process_removes_meanwhile_is_passed_over(folder: Folder) -> None:
    os.symlink("removed", folder.file(1))
    Path(folder.path, "owners.lock").touch()  # made before any file
    check_folder(folder.path)
    assert list_tasks(folder) == []
    assert Store.adopt(folder, Settings()) is None
    assert not is_of_parent(folder.file(1))


def test_a_file_that_sqlite_has_locked_is_accepted(folder: Folder, killed: str) -> None:
    with closing(sqlite3.connect(killed)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("DELETE FROM done")
        check_folder(folder.path)


def test_a_file_that_cannot_be_opened_leaves_nothing_open(folder: Folder, killed: str) -> None:
    os.unlink(folder.file(1, ".notes"))
    os.mkdir(folder.file(1, ".notes"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StoreError, match="Is a directory"):
            Store.adopt(folder, Settings())
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the lock file


def test_a_file_system_without_shared_memory_is_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in memory has no WAL either.
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        monkeypatch.setattr("wsgi_bg._store.writer.connect", lambda path: connection)
        with pytest.raises(StoreError, match="cannot keep a WAL on this file system"):
            Store.own(folder, Settings())
