"""``Locks``: which process owns which file of a folder.

The owner of file number N holds a POSIX lock on byte N of the lock file. The kernel drops the
lock at the moment in which the process dies, and never because a forked child dies or lives.
But the lock also goes if the process closes *any* descriptor of the lock file, and the process
itself could take a lock twice. So a process opens the lock file once, never closes it, and
keeps a list of its own locks.
"""

from __future__ import annotations

import fcntl
import os
import threading

from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._store.folder import LOCK_FILE, Folder
from wsgi_bg.exceptions import StoreError


class Locks:
    """The locks of this process in a folder. Get the object by :func:`locks_of`.

    :ivar path: the path of the lock file.
    """

    def __init__(self, path: str) -> None:
        self.path: str = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._held: dict[int, object] = {}
        # Reentrant: a signal handler may look, too. Each process has an object of its own.
        self._looks = threading.RLock()

    def new_number(self) -> int:
        """Return a number that no other process has got or will get.

        The number is the size of the lock file, which grows by a byte: also at the same time
        in two processes, and without a wait for a process that is stopped.
        """
        os.write(self._file, b".")
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def take(self, number: int) -> bool:
        """Become the owner of file ``number``; False if this or another process owns it."""
        return self._lock(number, fcntl.LOCK_EX)

    def _lock(self, number: int, kind: int) -> bool:
        me = object()
        if self._held.setdefault(number, me) is not me:
            return False
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            del self._held[number]
            return False
        return True

    def give(self, number: int) -> None:
        """Give up owning file ``number``, at the next step of any process."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
        self._held.pop(number, None)

    def is_owned(self, number: int) -> bool:
        """True if a process that lives owns file ``number``."""
        # Many may look at once: processes by a shared lock, and the threads of this process one
        # after another. None of them takes another that looks for an owner.
        with self._looks:
            if not self._lock(number, fcntl.LOCK_SH):
                return True
            self.give(number)
            return False

    def check(self) -> None:
        """Raise a ``StoreError`` if the lock file was removed: locks would mean nothing."""
        try:
            is_same = os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            is_same = False
        if not is_same:
            raise StoreError(
                self.path, "the lock file was removed while processes run: restart all of them"
            )


_locks: dict[tuple[int, int], PerProcess[Locks]] = {}


def locks_of(folder: Folder) -> Locks:
    """Return the locks of this process in ``folder``.

    :raises StoreError: if the lock file cannot be opened.
    """
    path = os.path.join(folder.path, LOCK_FILE)
    identity = folder.identity_now
    per_process = _locks.setdefault(identity, PerProcess(lambda: Locks(path)))
    try:
        return per_process.get()
    except OSError as exc:
        _locks.pop(identity, None)  # another folder may get the inode of a removed one
        raise StoreError(path, f"the lock file cannot be opened: {exc}") from exc
