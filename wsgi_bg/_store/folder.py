"""``Folder``: a folder of stores, checked before a process owns a file in it."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from contextlib import suppress
from typing import NamedTuple

from wsgi_bg._store.sql import SELECT_ONE, VERSION
from wsgi_bg._store.writer import connect, describe
from wsgi_bg.exceptions import StoreError

LOCK_FILE = "owners.lock"

REMOTE = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "gpfs",
    "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "smb", "smb2", "smb3", "smbfs",
    "vboxsf", "virtiofs", "vmhgfs",
}  # fmt: skip
"""File systems whose locks or shared memory need not hold for all processes."""

FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE")
"""The errors of SQLite on a full disk."""


class Folder(NamedTuple):
    """A folder that :func:`check_folder` has accepted."""

    path: str
    """The absolute path."""
    identity: tuple[int, int]
    """Device and inode when the folder was checked."""

    @property
    def identity_now(self) -> tuple[int, int]:
        """Device and inode of the folder that has the path now.

        Another folder may have taken the place of the checked one.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return self.identity
        return status.st_dev, status.st_ino

    def file(self, number: int, suffix: str = ".sqlite") -> str:
        """Return the path of file ``number``."""
        return os.path.join(self.path, f"{number:08d}{suffix}")

    def numbers(self) -> list[int]:
        """Return the numbers of the files, oldest first; a file may be half removed."""
        names = [os.path.splitext(name) for name in os.listdir(self.path)]
        return sorted(
            {
                int(number)
                for number, suffix in names
                if suffix in (".sqlite", ".notes") and number.isdecimal()
            }
        )

    def orders(self) -> list[str]:
        """Return the paths of the orders of the command line."""
        names = os.listdir(self.path)
        return sorted(
            os.path.join(self.path, name) for name in names if name.endswith(".order")
        )


def file_of_order(path: str) -> int:
    """Return the number of the file whose task the order is for; 0 if the path tells none."""
    number = os.path.basename(path).partition("-")[0]
    return int(number) if number.isdecimal() else 0


def check_folder(path: str | os.PathLike[str]) -> Folder:
    """Make the folder (mode 0700) if there is none, and check the files in it.

    Nothing stays open, no thread is started, no task is taken over.

    :raises StoreError: for ``:memory:``, a file system of the network or of FUSE, a folder
        that cannot be written, a damaged file or a file of a newer version.
    """
    given = os.fsdecode(path)
    if not given or "\0" in given or given.startswith((":memory:", "file:")):
        instead = "use PoolRunner for tasks that are kept in memory"
        raise StoreError(given, f"durable tasks need the path of a folder; {instead}")
    path = os.path.realpath(given)
    kind = file_system(path)
    if kind.partition(".")[0] in REMOTE or kind == "fuseblk":
        instead = "choose a folder on a local disk"
        raise StoreError(path, f"{kind} does not lock and map files as it should: {instead}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.stat(path)
    except OSError as exc:
        raise StoreError(path, f"the folder cannot be made: {exc.strerror}") from exc
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(path, "the folder cannot be written by this user")
    _check_user(os.path.join(path, LOCK_FILE))
    folder = Folder(path, (status.st_dev, status.st_ino))
    for number in folder.numbers():
        _check_user(folder.file(number))
        if not is_of_parent(folder.file(number)):
            _check_file(folder.file(number))
        check_notes(folder.file(number, ".notes"))
    return folder


def _check_user(path: str) -> None:
    if not os.access(path, os.R_OK | os.W_OK) and os.path.exists(path):
        raise StoreError(path, "the file belongs to another user, who has used the folder")


def _check_file(path: str) -> None:
    try:
        connection = connect(path, read_only=True)
        try:
            if check_version(connection, path):
                read_epoch(connection, path)
                for select in SELECT_ONE:
                    connection.execute(select).fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as exc:
        # A process may remove or recover the file at this moment. And a full disk is no damage:
        # only requests with tasks fail until there is room.
        is_sound = "locked" in str(exc) or getattr(exc, "sqlite_errorname", "") in FULL
        if os.path.exists(path) and not is_sound:
            raise StoreError(
                path, f"{describe(exc)}: move the file away, or restore it"
            ) from exc


def check_version(connection: sqlite3.Connection, path: str) -> int:
    """Return the version of an open file; 0 if a process died while it made the file.

    :raises StoreError: if the version is newer.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        known = f"this wsgi_bg knows version {VERSION}: install a newer wsgi_bg"
        raise StoreError(path, f"the file has version {version}, and {known}")
    return version


END_OF_EPOCHS = 1 << 20
"""Epochs are smaller: they are part of the keys."""


def read_epoch(connection: sqlite3.Connection, path: str) -> int:
    """Return the epoch of an open file: see ``Store``.

    :raises StoreError: if there is none, since the file is damaged.
    """
    found = connection.execute("SELECT epoch FROM meta").fetchall()
    epoch = found[0][0] if len(found) == 1 else None
    if type(epoch) is not int or not 0 <= epoch < END_OF_EPOCHS:
        raise StoreError(path, "the file has no epoch: move the file away, or restore it")
    return epoch


def check_notes(path: str) -> None:
    """Check the notes beside a file: see ``Notes``.

    :raises StoreError: if their epoch is no epoch, since the notes are damaged.
    """
    with suppress(OSError), open(path, "rb") as file:
        if int.from_bytes(file.read(8), sys.byteorder) >= END_OF_EPOCHS:
            instead = "remove them, and tasks of this file that have ended may run again"
            raise StoreError(path, f"the notes are damaged: {instead}")


def file_system(path: str, table: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that holds ``path``; empty if that is not known."""
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as lines:
            mounts = [line.split() for line in lines]
    except OSError:  # no Linux
        return ""
    best, kind = "", ""
    for fields in mounts:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount hides an earlier one
            best, kind = point, fields[fields.index("-") + 1]
    return kind


_opened: dict[tuple[int, int], int] = {}


def note_opened(path: str) -> None:
    """Note that this process has opened the SQLite file ``path``."""
    status = os.stat(path)
    _opened[status.st_dev, status.st_ino] = os.getpid()


def is_of_parent(path: str) -> bool:
    """True if a process had opened the file before it forked this process.

    SQLite's record of a file's locks was copied by the fork: SQLite believes that this process
    has the locks of the parent, and would neither lock nor see a lock.
    """
    try:
        status = os.stat(path)
    except OSError:
        return False
    pid = os.getpid()
    return _opened.get((status.st_dev, status.st_ino), pid) != pid
