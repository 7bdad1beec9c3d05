"""Snapshots, made of the documents of processes and of the files of tasks."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from wsgi_bg._status import stored
from wsgi_bg._status.document import (
    MAX_FAILURES,
    MAX_LOST,
    MINUTES,
    Document,
    Numbers,
    Past,
)
from wsgi_bg._status.files import OUTBOX, Found, find_folder
from wsgi_bg._status.live import MAX_RUNNING
from wsgi_bg._status.model import DurableTask, Minute, RunningTask, Snapshot, State
from wsgi_bg._status.numbers import Tally, merged
from wsgi_bg._store.folder import Folder

_NO_TALLY = Tally()


class Folders:
    """The folders of tasks and of messages that processes use."""

    def __init__(self, documents: Iterable[Document], path: str | None) -> None:
        self._pids: dict[str, dict[int, int]] = {}
        outboxes: dict[str, None] = {}
        if path is not None:
            self._pids[path] = {}
            outboxes[os.path.join(path, OUTBOX)] = None
        for document in documents:
            for folder, numbers in document.durable.items():
                pids = self._pids.setdefault(folder, {})
                if document.process is not None:
                    pids.update(dict.fromkeys(numbers, document.process.pid))
            outboxes.update(dict.fromkeys(document.outboxes))
        self.durable = [folder for path in self._pids for folder in _existing(path)]
        self.outboxes = [folder for path in outboxes for folder in _existing(path)]

    def state_of(self, id: str) -> State | None:  # noqa: A002
        """Return the state of a durable task."""
        states = (stored.state_of(folder, id) for folder in self.durable)
        return next((state for state in states if state is not None), None)

    def states_of_message(self, id: str) -> Iterator[State]:  # noqa: A002
        """Return the state of a message."""
        for folder in self.outboxes:
            state = stored.state_of(folder, id, of_messages=True)
            if state is not None:
                yield "sent" if state == "succeeded" else state

    def newest(self) -> list[DurableTask]:
        """Return the newest durable tasks, the newest first."""
        tasks = [
            task
            for folder in self.durable
            for task in stored.newest(folder, self._pids.get(folder.path, {}))
        ]
        return sorted(tasks, key=lambda task: task.since, reverse=True)[: stored.MAX_SHOWN]

    def numbers(self) -> stored.Numbers:
        """Count the tasks and messages that wait, or were put aside, by name."""
        total = stored.Numbers(Counter(), Counter())
        for folder in [*self.durable, *self.outboxes]:
            numbers = stored.numbers(folder, of_messages=folder in self.outboxes)
            total.waiting.update(numbers.waiting)
            total.aside.update(numbers.aside)
        return total


def _existing(path: str) -> list[Folder]:
    try:
        folder = find_folder(path)
        return [folder] if folder.numbers() else []
    except (OSError, ValueError):
        return []


def combine(found: Sequence[Found], past: Past, folders: Folders) -> Snapshot:
    """Return the status of processes.

    :param found: the documents of the processes that were not added to ``past``.
    """
    now = time.time()
    numbers = Past()
    numbers.add(past)
    lost, processes = [*past.lost], [*past.killed]
    running: list[RunningTask] = []
    running_by_name: Counter[str] = Counter()
    in_files = folders.numbers()
    waiting = Counter(in_files.waiting)
    for _, document, is_alive in found:
        process = document.process
        assert process is not None
        if is_alive:
            running += [task for task, _ in document.running]
            running_by_name.update(document.running_by_name)
            waiting.update(document.waiting)
            processes.append(process)
        elif document.was_killed:
            lost += document.lost()
            processes.append(replace(process, is_alive=False))
        numbers.add(document)
    waiting, running_by_name, aside = (
        _bounded(numbers, counter) for counter in (waiting, running_by_name, in_files.aside)
    )
    names = [
        numbers.names[name].of_name(
            name, running=running_by_name[name], waiting=waiting[name], aside=aside[name]
        )
        for name in sorted(numbers.names)
    ]
    counts = merged(numbers.names.values()).of_name(
        "", running=running_by_name.total(), waiting=waiting.total(), aside=aside.total()
    )
    return Snapshot(
        taken=now,
        processes=tuple(sorted(processes, key=lambda each: (each.pid, each.started))),
        running=tuple(sorted(running, key=lambda task: task.since or now)[:MAX_RUNNING]),
        waiting={name: waiting[name] for name in sorted(waiting)},
        failures=tuple(
            sorted(numbers.failures, key=lambda each: each.ended, reverse=True)[:MAX_FAILURES]
        ),
        lost=tuple(lost[::-1][:MAX_LOST]),
        names=tuple(names),
        minutes=_minutes(numbers.minutes, now),
        durable=tuple(folders.newest()),
        counts=counts,
    )


def _bounded(numbers: Numbers, counter: Counter[str]) -> Counter[str]:
    """Let ``numbers`` have all names of ``counter``; count names beyond the limit together."""
    found: Counter[str] = Counter()
    for name, count in counter.items():
        found[numbers.place_of(name)] += count
    return found


def _minutes(tallies: dict[int, Tally], now: float) -> tuple[Minute, ...]:
    last = int(now // 60)
    return tuple(
        tallies.get(minute, _NO_TALLY).of_minute(minute)
        for minute in range(last - MINUTES + 1, last + 1)
    )
