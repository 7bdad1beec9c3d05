"""The answers of :mod:`wsgi_bg.status`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from wsgi_bg._status import files
from wsgi_bg._status.combine import Folders, combine
from wsgi_bg._status.document import Document, Past
from wsgi_bg._status.files import Found, find_folder
from wsgi_bg._status.live import look, states_of
from wsgi_bg._status.model import End, NameCounts, Snapshot, State
from wsgi_bg._status.process import status_of_process
from wsgi_bg._status.recorder import recorder
from wsgi_bg._store.folder import Folder
from wsgi_bg.runners.ledger import ledgers_here
from wsgi_bg.runners.pool import pools_here

_RANK: tuple[State, ...] = (
    "succeeded",
    "failed",
    "running",
    "retrying",
    "discarded",
    "aside",
    "lost",
    "sent",
    "waiting",
)
"""If several processes know a task, the first of these states is the task's: a process that has
sent the task knows less than the worker, and a document may be a second old."""


def take_snapshot(path: str | os.PathLike[str] | None) -> Snapshot:
    """See :func:`wsgi_bg.status.snapshot`."""
    if path is not None:
        folder = _folder(path)
        found, past = _with_this_process(folder)
        documents = [each.document for each in found]
        return combine(found, past, Folders(documents, folder.path))
    if recorder.is_on:
        document = recorder.process().document()
        return combine([Found(0, document, True)], Past(), Folders([document], None))
    document = _document_of_ledgers()
    taken = combine([Found(0, document, True)], Past(), Folders([], None))
    return replace(taken, counts=_counts_of_ledgers(taken.counts), minutes=())


def _folder(path: str | os.PathLike[str]) -> Folder:
    """Return the folder of ``path``, in which this process may not have written yet."""
    with suppress(TypeError, ValueError):  # no path, or with NUL: find_folder() refuses it
        full = os.path.realpath(path)
        for folder in recorder.folders:
            if folder.path == full:
                return folder
    return find_folder(path)


def _with_this_process(folder: Folder) -> tuple[list[Found], Past]:
    found, past = files.read_all(folder)
    process = recorder.process()
    if folder not in recorder.folders:
        return found, past
    number = process.number_in(folder)
    others = [each for each in found if each.number != number]
    return [*others, Found(0, process.document(), True)], past


def _document_of_ledgers() -> Document:
    """The document of a process that records nothing."""
    live = look(None)
    return Document(
        process=status_of_process(live, time.time(), None),
        running=live.running,
        running_by_name=live.running_by_name,
        waiting=live.waiting,
    )


def _counts_of_ledgers(counts: NameCounts) -> NameCounts:
    """Add the sums that the ledgers know.

    A pool also counts the tasks that it runs for other runners, which count them, too.
    """
    pools = [pool.ledger for pool in pools_here()]
    own = [ledger.statistics() for ledger in ledgers_here() if ledger not in pools]
    of_pools = [ledger.statistics() for ledger in pools]

    def most(name: str) -> int:
        sums = (sum(getattr(each, name) for each in several) for several in (own, of_pools))
        return int(max(sums))

    return replace(
        counts,
        succeeded=most("succeeded"),
        failed=most("failed"),
        discarded=most("discarded"),
        sent=most("sent"),
    )


def find_state(id: str, path: str | os.PathLike[str] | None) -> State | None:  # noqa: A002
    """See :func:`wsgi_bg.status.of`."""
    documents = [Document(durable=recorder.durable, outboxes=recorder.outboxes)]
    known = [*states_of(id)]
    ends = recorder.process().ends_of(id) if recorder.is_on else []
    folder = None if path is None else _folder(path)
    if folder is not None:
        found, past = files.read_all(folder, is_brief=True)
        documents += [each.document for each in found]
        known += files.states_of(found, id)
        ends += files.ends_of(folder, found, past, id)
    folders = Folders(documents, None if folder is None else folder.path)
    # A durable task may run again after its end: by an order, for example.
    stored_state = folders.state_of(id)
    if stored_state is not None:
        return stored_state
    known += _without_old_attempts(ends)
    known += folders.states_of_message(id)
    return min(known, key=_RANK.index, default=None)


def _without_old_attempts(ends: list[End]) -> Iterator[State]:
    """Return the states, without "retrying" if a later attempt has ended.

    "sent" ends no attempt: the broker's confirm may come after the worker's first attempt.
    """
    last = max((moment for state, moment in ends if state != "sent"), default=0.0)
    for state, moment in ends:
        if state != "retrying" or moment >= last:
            yield state


def durable_folders(path: str | os.PathLike[str] | None) -> list[Folder]:
    """Return the folders whose tasks :attr:`~wsgi_bg.status.Snapshot.durable` shows.

    :raises ValueError: if no process has ever used the folder ``path``.
    """
    documents = [Document(durable=recorder.durable)]
    folder = None if path is None else _folder(path)
    if folder is not None:
        documents += [each.document for each in files.read_all(folder)[0]]
    return Folders(documents, None if folder is None else folder.path).durable
