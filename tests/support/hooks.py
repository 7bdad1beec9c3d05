"""Hooks that record their calls."""

from __future__ import annotations

from wsgi_bg.hooks import Hooks, TaskRecord


class Diary(Hooks):
    """Records the hook calls of each task."""

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.records: list[TaskRecord] = []

    def note(self, moment: str, record: TaskRecord) -> None:
        self.moments.append(f"{moment} {record.task.name.rpartition('.')[2]}")
        self.records.append(record)

    def task_added(self, record: TaskRecord) -> None:
        self.note("added", record)

    def task_started(self, record: TaskRecord) -> None:
        self.note("started", record)

    def task_finished(self, record: TaskRecord) -> None:
        self.note("finished", record)

    def task_failed(self, record: TaskRecord) -> None:
        self.note("failed", record)

    def task_discarded(self, record: TaskRecord) -> None:
        self.note("discarded", record)
