"""The files of a folder in which several processes keep their status.

Each process replaces its own file ``NUMBER.status``, a document of JSON, and appends the ids of
tasks that have ended to ``NUMBER.ended``. The process holds a lock of that number, which the
kernel drops when the process dies: see :mod:`wsgi_bg._store.owner`. A process that finds the
files of an ended process adds their numbers to ``past.status`` and removes the files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, get_args

from wsgi_bg._status.document import VERSION, Document, Past
from wsgi_bg._status.model import End, State
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.owner import locks_of
from wsgi_bg.exceptions import OptionTypeError, OptionValueError, StoreError

T = TypeVar("T")

OUTBOX = "outbox"
"""The folder of messages in the folder that was given to a runner as ``outbox``."""

_TURN = 0  # the number of the lock of the process that adds files to the past
_PAST = "past"
_MARKS = ("owners.lock", os.path.join(OUTBOX, "owners.lock"))

_GONE = (FileNotFoundError, IsADirectoryError, PermissionError)
"""The errors of a file that is not there, or not for this user.

After any other error, such as too many open files, the numbers of the file must not be lost.
"""

Ended = tuple[str, str, float]
"""The id of a task, its state and the time of its end."""


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Return the folder for ``status_path``; make the folder if there is none.

    :raises TypeError: if ``path`` is not a path.
    :raises ValueError: if the folder cannot be used.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionTypeError("status_path", path, "the path of a folder")
    wanted = "the path of a folder on a local disk, which this user can write"
    try:
        return check_folder(path)
    except StoreError as exc:
        raise OptionValueError("status_path", path, wanted) from exc


def find_folder(path: str | os.PathLike[str]) -> Folder:
    """Return the folder that was given as ``status_path``, for reading; make no folder.

    :raises TypeError: if ``path`` is not a path.
    :raises ValueError: if there is no such folder, or no process has ever used the folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionTypeError("path", path, "the path of a folder")
    if not any(os.path.exists(os.path.join(path, name)) for name in _MARKS):
        wanted = "a folder that was given as status_path, or as the path of a DurableRunner"
        raise OptionValueError("path", os.fspath(path), wanted)
    full = os.path.realpath(path)
    status = os.stat(full)
    return Folder(full, (status.st_dev, status.st_ino))


class Found(NamedTuple):
    """The document of a process."""

    number: int
    document: Document
    is_alive: bool


class ProcessFile:
    """The files of this process in a folder.

    :raises StoreError: or ``OSError``, if the folder cannot be written.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder: Folder = folder
        self._locks = locks_of(folder)
        self._locks.check()
        self.number: int = self._locks.new_number()
        self._locks.take(self.number)
        self._ended = EndedFile(folder, str(self.number))

    def write(self, document: Document, ended: Iterable[Ended]) -> None:
        """Write the document, and append ended tasks.

        :raises StoreError: or ``OSError``, if the folder cannot be written.
        """
        self.append(ended, document.keep_done.number)
        _write(self.folder, str(self.number), document.dump())

    def append(self, ended: Iterable[Ended], keep: int) -> None:
        """Append ended tasks: see :meth:`EndedFile.append`.

        :raises StoreError: or ``OSError``, if the folder cannot be written.
        """
        self._locks.check()
        self._ended.append(ended, keep)

    def add_ended_processes(self) -> None:
        """Add the files of processes that have ended to the past, and remove the files."""
        dead = [number for number in _numbers(self.folder) if not self._locks.is_owned(number)]
        if dead and self._locks.take(_TURN):
            try:
                _add_to_past(self.folder, dead)
            finally:
                self._locks.give(_TURN)


class EndedFile:
    """The ids of ended tasks: two files, the older of which goes when the younger is full."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._paths = [
            os.path.join(folder.path, f"{name}{suffix}") for suffix in (".ended", ".ended-old")
        ]
        self._count: int | None = None  # lines in the younger file; None if not known yet

    def append(self, ended: Iterable[Ended], keep: int) -> None:
        """Append tasks.

        :param keep: the number of lines after which a new file begins.
        """
        lines = [json.dumps(each) + "\n" for each in ended]
        if not lines or not keep:
            return
        if self._count is None:
            self._count = sum(text.count(b"\n") for text in self._read()[:1])
        if self._count >= keep:
            os.replace(*self._paths)
            self._count = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with open(os.open(self._paths[0], flags, 0o600), "w", encoding="utf-8") as file:
            file.write("".join(lines))
        self._count += len(lines)  # last: on a full disk the same lines are tried every second

    def _read(self) -> list[bytes]:
        found = []
        for path in self._paths:
            with suppress(*_GONE), open(path, "rb") as file:
                found.append(file.read())
        return found

    def all(self) -> list[Ended]:
        """Return all ended tasks, the oldest first."""
        return [
            ended
            for text in reversed(self._read())
            for line in text.splitlines()
            if (ended := _ended(line)) is not None
        ]

    def find(self, id: str) -> list[Ended]:  # noqa: A002
        """Return all ends of a task.

        The past may have several, of the process that has sent the task and of the worker, in
        the order in which these processes were added.
        """
        start = b"[" + json.dumps(id).encode() + b","
        lines = (
            line
            for text in self._read()
            if start in text  # much faster than to split the text
            for line in text.splitlines()
            if line.startswith(start)
        )
        return [ended for line in lines if (ended := _ended(line)) is not None]

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _ended(line: bytes) -> Ended | None:
    with suppress(ValueError, TypeError):
        id, state, ended = json.loads(line)  # noqa: A001
        return str(id), str(state), float(ended)
    return None


def _numbers(folder: Folder) -> list[int]:
    try:
        names = os.listdir(folder.path)
    except FileNotFoundError:  # removed meanwhile
        return []
    stems = [name.removesuffix(".status") for name in names if name.endswith(".status")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def read_all(folder: Folder, *, is_brief: bool = False) -> tuple[list[Found], Past]:
    """Return the documents of the processes that have not been added to the past; the past.

    :param is_brief: leave out the numbers of the processes.
    """
    found = []
    for number in _numbers(folder):
        is_alive = locks_of(folder).is_owned(number)
        document = _read_document(folder, number, is_brief=is_brief)
        if document is not None:
            found.append(Found(number, document, is_alive))
    past = _read_past(folder)  # last: another process may have added a document meanwhile
    return [each for each in found if each.number not in past.added], past


def states_of(found: Iterable[Found], id: str) -> Iterator[State]:  # noqa: A002
    """Return the states of a task that waits or runs in a process of the folder."""
    for each in found:
        state = each.document.ids.get(id)
        if state is not None and each.is_alive:
            yield from _state(state)


def ends_of(
    folder: Folder,
    found: Iterable[Found],
    past: Past,
    id: str,  # noqa: A002
) -> Iterator[End]:
    """Return the ends of a task in the processes of the folder, in any order."""
    keep = [(str(each.number), each.document.keep_done) for each in found]
    for name, keep_done in [*keep, (_PAST, past.keep_done)]:
        for _, state, ended in EndedFile(folder, name).find(id):
            if time.time() - ended <= keep_done.age:
                yield from ((known, ended) for known in _state(state))
    for each in found:
        document = each.document
        if id in document.ids and not (each.is_alive or document.has_ended):
            assert document.process is not None
            yield "lost", document.process.updated


def _state(text: str) -> tuple[State, ...]:
    """Return a state in a file; an empty tuple for an unknown one."""
    return tuple(state for state in get_args(State) if state == text)


def _add_to_past(folder: Folder, dead: list[int]) -> None:
    past = _read_past(folder)
    past.added = [number for number in past.added if number in dead]
    ended: list[Ended] = []
    # The locks of the dead are not taken: other processes would see these processes alive.
    for number in dead:
        document = _read_document(folder, number)
        if document is None or number in past.added:
            continue
        ended += EndedFile(folder, str(number)).all()
        process = document.process
        assert process is not None
        if not document.has_ended:
            ended += [(id, "lost", process.updated) for id in document.ids]  # noqa: A001
        if document.was_killed:
            past.killed.append(replace(process, is_alive=False))
            past.lost += document.lost()
        past.add(document)
        past.keep_done = document.keep_done
        past.added.append(number)
    EndedFile(folder, _PAST).append(ended, past.keep_done.number)
    past.forget_old(time.time())
    _write(folder, _PAST, past.dump())
    for number in dead:
        EndedFile(folder, str(number)).remove()
        for suffix in (".status", ".status.new"):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder.path, f"{number}{suffix}"))


def _write(folder: Folder, name: str, document: dict[str, Any]) -> None:
    path = os.path.join(folder.path, f"{name}.status")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(path + ".new", flags, 0o600), "w", encoding="utf-8") as file:
        json.dump(document, file)
    os.replace(path + ".new", path)


def _read_document(folder: Folder, number: int, *, is_brief: bool = False) -> Document | None:
    """Return the document of a process; None if there is none that this version can read."""
    return _read(folder, str(number), partial(Document.load, is_brief=is_brief))


def _read_past(folder: Folder) -> Past:
    """Return the status of ended processes, which is empty if none has ended."""
    return _read(folder, _PAST, Past.load) or Past()


_DAMAGES = (
    *_GONE, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
"""The errors of a file that is gone, or does not have what a process writes."""


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # Infinity, for example, which is no JSON


def _read(folder: Folder, name: str, load: Callable[[dict[str, Any]], T]) -> T | None:
    with suppress(*_DAMAGES):
        with open(os.path.join(folder.path, f"{name}.status"), encoding="utf-8") as file:
            dumped = json.load(file, parse_constant=_refuse_constant)
        if dumped["version"] == VERSION:
            return load(dumped)
    return None
