"""The tasks and messages that files keep: any process reads them at once.

The rows may be forged: a value of a wrong type becomes an empty one.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._status.model import OTHER_NAMES, DurableTask, State
from wsgi_bg._store import notes
from wsgi_bg._store.folder import Folder, check_version, is_of_parent, read_epoch
from wsgi_bg._store.inspection import read_notes
from wsgi_bg._store.owner import locks_of
from wsgi_bg._store.rows import DISCARDED
from wsgi_bg._store.writer import Turns, connect
from wsgi_bg.exceptions import StoreError

T = TypeVar("T")

MAX_SHOWN = 200
"""How many tasks of a folder a snapshot shows."""

MAX_COUNTED = 100_000
"""How many waiting tasks of a file are counted by name."""

_TIMEOUT = 5.0  # seconds to wait while another thread reads

_ENDED: Mapping[str, State] = {"done": "succeeded", "failed": "failed", "aside": "aside"}
_NOTED: Mapping[int | None, State] = {
    notes.DONE: "succeeded",
    notes.FAILED: "failed",
    notes.ASIDE: "aside",
    notes.GONE: "discarded",
}

_TASKS = "SELECT id, name, added, due, attempts, key FROM tasks"
_KEPT = "SELECT id, name, added, attempts, state, error, ended FROM kept"
_DONE = "SELECT id, name, added, begun FROM done"

_turns = PerProcess(Turns)  # for a fork waits until no thread is inside SQLite


class Numbers(NamedTuple):
    """How many tasks of a folder wait and were put aside, by name."""

    waiting: Counter[str]
    aside: Counter[str]


def state_of(
    folder: Folder,
    id: str,  # noqa: A002
    *,
    of_messages: bool = False,
) -> State | None:
    """Return the state of the task with the id; None if no file has the task.

    :param of_messages: True for a folder of messages: one that has begun is about to be sent.
    """

    def find(file: _File) -> list[DurableTask]:
        where = "WHERE id = ? LIMIT 1"
        return file.tasks(where, id) or file.kept(where, id) or file.done(where, id)

    for number in folder.numbers():
        for task in _read(folder, number, find, of_messages=of_messages) or ():
            return task.state
    return None


def newest(folder: Folder, pids: Mapping[int, int]) -> list[DurableTask]:
    """Return the newest tasks, the newest first.

    :param pids: the processes by the numbers of their files.
    """

    def find(file: _File) -> list[DurableTask]:
        return [
            *file.tasks("ORDER BY key DESC LIMIT ?", MAX_SHOWN),
            *file.kept("ORDER BY added DESC LIMIT ?", MAX_SHOWN),
            *file.done("ORDER BY seq DESC LIMIT ?", MAX_SHOWN),
        ]

    found: list[DurableTask] = []
    for number in folder.numbers():
        found += _read(folder, number, find, pids.get(number)) or ()
    return sorted(found, key=lambda task: task.since, reverse=True)[:MAX_SHOWN]


def numbers(folder: Folder, *, of_messages: bool = False) -> Numbers:
    """Count the tasks that wait and that were put aside; see :func:`state_of`."""

    def count(file: _File) -> Numbers:
        return Numbers(file.waiting(), file.aside())

    found = Numbers(Counter(), Counter())
    for number in folder.numbers():
        of_file = _read(folder, number, count, of_messages=of_messages)
        if of_file is not None:
            found.waiting.update(of_file.waiting)
            found.aside.update(of_file.aside)
    return found


class _File:
    """A file of tasks, and the notes of its owner.

    :param runs: True if a task that has begun runs now.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        known: Mapping[int, int],
        pid: int | None,
        *,
        runs: bool,
    ) -> None:
        self.connection = connection
        self._known = known
        self._pid = pid
        self._runs = runs

    def tasks(self, where: str, *values: object) -> list[DurableTask]:
        """Return tasks that have not ended, or whose end is only noted."""
        found = []
        for id, name, added, due, attempts, key in self._select(_TASKS, where, values):  # noqa: A001
            attempt = int(_number(attempts)) + 1
            state = self._state(key, attempt)
            shown = _number(due) if state in ("waiting", "retrying") else 0.0
            found.append(
                DurableTask(
                    _text(name), _text(id), state, _number(added), shown or None, attempt, "",
                    self._pid,
                )
            )  # fmt: skip
        return found

    def _state(self, key: object, attempt: int) -> State:
        note = self._known.get(key) if isinstance(key, int) else None
        if note == notes.BEGUN and self._runs:
            return "running"
        return _NOTED.get(note) or ("retrying" if attempt > 1 else "waiting")

    def kept(self, where: str, *values: object) -> list[DurableTask]:
        """Return tasks that have failed, or were put aside."""
        return [
            DurableTask(
                _text(name),
                _text(id),
                _ENDED.get(_text(state), "failed"),
                _number(added),
                None,
                max(1, int(_number(attempts))),
                _text(error),
                self._pid,
            )
            for id, name, added, attempts, state, error, _ in self._select(_KEPT, where, values)  # noqa: A001
        ]

    def done(self, where: str, *values: object) -> list[DurableTask]:
        """Return tasks that have succeeded, or were discarded by hand."""
        return [
            DurableTask(
                _text(name),
                _text(id),
                "discarded" if begun == DISCARDED else "succeeded",
                _number(added),
                None,
                1,
                "",
                self._pid,
            )
            for id, name, added, begun in self._select(_DONE, where, values)  # noqa: A001
        ]

    def waiting(self) -> Counter[str]:
        """Count the tasks that wait by name."""
        found: Counter[str] = Counter()
        select = "SELECT name, count(*) FROM (SELECT name FROM tasks LIMIT ?) GROUP BY name"
        for name, count in self.connection.execute(select, (MAX_COUNTED,)):
            found[_text(name)] = int(count)
        ((total,),) = self.connection.execute("SELECT count(*) FROM tasks")
        if total > MAX_COUNTED:
            found[OTHER_NAMES] += total - MAX_COUNTED
        for key, note in self._known.items():
            if note != notes.BEGUN or self._runs:
                select = "SELECT name FROM tasks WHERE key = ?"
                for (name,) in self.connection.execute(select, (key,)):
                    found[_text(name)] -= 1
        return +found

    def aside(self) -> Counter[str]:
        """Count the tasks that were put aside by name."""
        select = "SELECT name, count(*) FROM kept WHERE state = 'aside' GROUP BY name"
        return Counter(
            {_text(name): int(count) for name, count in self.connection.execute(select)}
        )

    def _select(
        self, select: str, where: str, values: tuple[object, ...]
    ) -> list[tuple[Any, ...]]:
        return self.connection.execute(f"{select} {where}", values).fetchall()


def _read(
    folder: Folder,
    number: int,
    read: Callable[[_File], T],
    pid: int | None = None,
    *,
    of_messages: bool = False,
) -> T | None:
    """Return ``read(file)``; None if the file cannot be read, for example since it is gone."""
    path = folder.file(number)
    turn = None if is_of_parent(path) else _turns.get().take(_TIMEOUT)
    if turn is None:
        return None
    with turn:
        try:
            with closing(connect(path, read_only=True)) as connection:
                connection.text_factory = _decode
                if not check_version(connection, path):
                    return None
                runs = not of_messages and locks_of(folder).is_owned(number)
                connection.execute("BEGIN")  # no task may move between tables meanwhile
                epoch, known = read_notes(folder.file(number, ".notes"))
                known = known if epoch >= read_epoch(connection, path) else {}
                return read(_File(connection, known, pid, runs=runs))
        except (sqlite3.Error, StoreError, OSError):
            return None


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
