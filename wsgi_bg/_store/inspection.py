"""Functions for the command line: safe while processes run, since they write no store.

An order (retry, discard) is a file, which the owner of the task obeys in ``Store.tidy``. If no
process lives, the next process that takes the tasks over obeys.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import NamedTuple

from wsgi_bg._store import notes
from wsgi_bg._store.folder import (
    LOCK_FILE,
    Folder,
    check_version,
    is_of_parent,
    read_epoch,
)
from wsgi_bg._store.owner import Locks, locks_of
from wsgi_bg._store.rows import DISCARDED, OF_ROW, Outcome, Row, text_of, typed
from wsgi_bg._store.writer import connect, describe
from wsgi_bg.exceptions import StoreError

ORDERS = {"retry": ("failed", "aside"), "discard": ("failed", "aside", "waiting")}
"""The states of the tasks that an order is for."""

ORDER_LIFE = 7 * 86400.0
"""Seconds for which an order waits for the owner, which may be stopped or not yet started."""

_TASKS = "SELECT * FROM tasks"
_KEPT = "SELECT * FROM kept"
_TASKS_IN_BRIEF = """
    SELECT name, '', '', '', due, attempts, crashes, id, added, key, request FROM tasks
"""
_KEPT_IN_BRIEF = """
    SELECT name, '', '', '', due, attempts, crashes, id, added, key, request,
    state, begun, ended, error, '' FROM kept
"""
_DONE = """
    SELECT name, '', '', '', 0.0, 0, 0, id, added, 0, 0, 'done', begun, ended, '', ''
    FROM done WHERE begun IS NOT ? ORDER BY seq
"""
_KINDS = (*OF_ROW, str, float, float, str, str)

_OWNED = {None: "waiting", notes.BEGUN: "running"}
# After the death of the owner; the next owner notes the same in the file.
_LEFT = {**_OWNED, notes.BEGUN: "waiting", notes.FAILED: "failed", notes.ASIDE: "aside"}


class Found(NamedTuple):
    """A task in a file."""

    number: int
    """The number of the file."""
    is_owned: bool
    """True if a process that lives owns the file, and will run the task."""
    outcome: Outcome
    """The state may be ``"waiting"`` or ``"running"``, too. Done tasks have no arguments.

    A task that ran when its process died waits, with one crash more."""


def _all(outcome: Outcome) -> bool:
    return True


def list_tasks(
    folder: Folder, wanted: Callable[[Outcome], bool] = _all, *, is_brief: bool = False
) -> list[Found]:
    """Return the tasks in the order added.

    Rows are data that may be forged: a value of a wrong type becomes ``""`` or 0, bytes that
    are no text become replacement characters. Files that a parent had opened before it forked
    this process are left out.

    :param wanted: chooses tasks while the files are read: a folder may have a million.
    :param is_brief: leave out arguments, options, context and traceback.
    :raises StoreError: if a file is damaged, or a newer version has made it.
    """
    found: list[Found] = []
    kept: set[str] = set()

    def is_copy(outcome: Outcome) -> bool:
        """True if a process was killed while it moved kept tasks into its own file."""
        if outcome.state not in ORDERS["retry"]:
            return False
        is_known = outcome.row.id in kept
        kept.add(outcome.row.id)
        return is_known

    for number in folder.numbers():
        if is_of_parent(folder.file(number)):
            continue
        is_owned = _locks(folder).is_owned(number)
        try:
            outcomes = _read(folder, number, is_owned=is_owned, is_brief=is_brief)
            found += [
                Found(number, is_owned, outcome)
                for outcome in outcomes
                if wanted(outcome) and not is_copy(outcome)
            ]
        except sqlite3.Error as exc:
            if os.path.exists(folder.file(number)):  # else its tasks are done
                raise StoreError(folder.file(number), describe(exc)) from exc
    return sorted(found, key=lambda task: (task.outcome.row.added, task.outcome.row.key))


def is_used(folder: Folder) -> bool:
    """Return True if a process that lives runs tasks of the folder."""
    return any(_locks(folder).is_owned(number) for number in folder.numbers())


def _locks(folder: Folder) -> Locks:
    """Return the locks; never make the lock file, which would belong to the wrong user."""
    if not os.path.exists(os.path.join(folder.path, LOCK_FILE)):
        raise StoreError(folder.path, "the lock file owners.lock is missing")
    return locks_of(folder)


def _read(folder: Folder, number: int, *, is_owned: bool, is_brief: bool) -> Iterator[Outcome]:
    path = folder.file(number)
    epoch, states = read_notes(folder.file(number, ".notes"))
    known = _OWNED if is_owned else _LEFT
    with closing(connect(path, read_only=True)) as connection:
        connection.text_factory = text_of
        if not check_version(connection, path):
            return
        connection.execute("BEGIN")  # no task may move from a table to another meanwhile
        if epoch < read_epoch(connection, path):
            states = {}  # a process has died right after it had applied the notes
        for stored in connection.execute(_TASKS_IN_BRIEF if is_brief else _TASKS):
            values = typed(stored, _KINDS)
            row = Row(*values)
            note = states.get(row.key)
            if note in known:
                crashes = row.crashes + (note == notes.BEGUN and not is_owned)
                attempts = row.attempts + (note == notes.FAILED)
                yield Outcome(row._replace(crashes=crashes, attempts=attempts), known[note])
        for stored in connection.execute(_KEPT_IN_BRIEF if is_brief else _KEPT):
            values = typed(stored, _KINDS)
            yield Outcome(Row(*values[:11]), *values[11:])
        for stored in connection.execute(_DONE, (DISCARDED,)):
            values = typed(stored, _KINDS)
            yield Outcome(Row(*values[:11]), *values[11:])


def read_notes(path: str) -> tuple[int, dict[int, int]]:
    """Return the epoch of the notes, and the state of each task by its key."""
    try:
        with open(path, "rb") as file:
            used = file.read().rstrip(b"\0")  # most of the 65,536 slots were never used
            slots = array("Q", used + bytes(-len(used) % 8))
        return slots[0], notes.states(slots[1:])
    except (OSError, ValueError, IndexError):
        return 0, {}


def order(folder: Folder, found: Found, what: str) -> str:
    """Order the owner to ``"retry"`` or to ``"discard"`` a task; returns at once.

    The order takes the place of an earlier order for the task that was not yet obeyed.

    :return: the path of the order, which the owner removes when the owner has obeyed.
    :raises StoreError: if the state of the task does not allow that, or the order cannot be
        written.
    """
    row, state = found.outcome.row, found.outcome.state
    if state not in ORDERS[what]:
        wanted = ", ".join(ORDERS[what])
        raise StoreError(folder.path, f"task {row.id} is {state}; {what} is for: {wanted}")
    text = json.dumps({"what": what, "number": found.number, "key": row.key, "id": row.id})
    task = hashlib.sha256(json.dumps([found.number, row.key, row.id]).encode()).hexdigest()
    path = os.path.join(folder.path, f"{found.number:08d}-{task[:32]}.order")
    temporary = os.path.join(folder.path, secrets.token_hex(8))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
            # The owner may be another user than root, and has to read the order.
            file_of_task = folder.file(found.number)
            status = os.stat(file_of_task if os.path.exists(file_of_task) else folder.path)
            with suppress(PermissionError):
                os.chown(temporary, status.st_uid, status.st_gid)
            file.write(text)
        # A store that finds an order of another file removes the order a minute after this.
        until = time.time() + ORDER_LIFE
        os.utime(temporary, (until, until))
        os.replace(temporary, path)
    except OSError as exc:
        raise StoreError(folder.path, f"the order cannot be written: {exc.strerror}") from exc
    return path
