"""``recorder``: the hooks that record the status of this process."""

from __future__ import annotations

import os
from os import getpid
from typing import TYPE_CHECKING

from wsgi_bg._process import log
from wsgi_bg._process.clock import on_the_wall
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._status.document import KEEP_DONE, KeepDone
from wsgi_bg._status.files import open_folder
from wsgi_bg._status.journal import MAX_ENTRIES, Entry, Journal
from wsgi_bg._status.model import Failure, State
from wsgi_bg._status.numbers import DISCARDED, FAILED, RETRIED, SENT
from wsgi_bg._tasks.task import known_id, plan_of
from wsgi_bg.exceptions import PublishError
from wsgi_bg.hooks.base import OptionHooks, TaskRecord
from wsgi_bg.runners.keeping import KeepingRunner

if TYPE_CHECKING:
    from wsgi_bg._status.process import Process
    from wsgi_bg._store.folder import Folder

_MAX_MESSAGE = 1_000  # characters
_MAX_TRACEBACK = 10_000


class Recorder(OptionHooks):
    """Records the tasks of the processes in which it is used.

    Only the end of a task is recorded. The thread that ends the task appends an entry to the
    journal, and does not wait for any other thread.
    """

    is_direct = True

    def __init__(self) -> None:
        self.is_on: bool = False
        self._folders: dict[str, Folder] = {}
        self._runners: dict[str, KeepingRunner] = {}  # by the folder of tasks or messages
        self._processes = PerProcess(self._make_process)
        self._journal: Journal | None = None  # of the process that has used it last

    def _make_process(self) -> Process:
        from wsgi_bg._status.process import Process  # only if the status is recorded or read

        return Process(self)

    # Options.

    def turn_on(self, path: str | os.PathLike[str] | None = None) -> None:
        """Record from now on.

        :param path: the folder in which processes write their status; None to write nothing.
        :raises TypeError: if ``path`` is not a path.
        :raises ValueError: if the folder cannot be used.
        """
        self.is_on = True
        if path is not None:
            folder = open_folder(path)
            self._folders[folder.path] = folder

    def turn_off(self) -> None:
        """Record nothing from now on, and forget what was recorded: for tests."""
        self.is_on = False
        self._folders = {}
        self._runners = {}
        process = self._processes.peek()
        if process is not None:
            process.stop()
            self._processes.forget(process)
        self._journal = None

    def note_runner(self, runner: object) -> None:
        """Note the folder in which a runner keeps tasks or messages, if the runner has one."""
        if isinstance(runner, KeepingRunner):
            for path in (runner.folder_of_tasks, runner.folder_of_messages):
                if path is not None:
                    self._runners[path] = runner

    @property
    def keep_done(self) -> KeepDone:
        """How many ended tasks are kept by id: those of the durable runner, if there is any."""
        for runner in list(self._runners.values()):
            if runner.folder_of_tasks is not None:
                return KeepDone(*runner.keep_done)
        return KEEP_DONE

    @property
    def durable(self) -> dict[str, list[int]]:
        """The folders of durable tasks, and the numbers of the files of this process."""
        return {
            path: runner.file_numbers()
            for path, runner in list(self._runners.items())
            if path == runner.folder_of_tasks
        }

    @property
    def outboxes(self) -> list[str]:
        """The folders of messages."""
        durable = self.durable
        return [path for path in list(self._runners) if path not in durable]

    @property
    def folders(self) -> list[Folder]:
        """The folders in which processes write their status."""
        return list(self._folders.values())

    def process(self) -> Process:
        """Return what was recorded in this process."""
        process = self._processes.get()
        self._journal = process.journal  # uWSGI forks without forget_parent()
        return process

    def start(self) -> None:
        """Write the status of this process from now on, if it is recorded and has a folder."""
        if self.is_on:
            self.process().start()

    # Hooks.

    def task_finished(self, record: TaskRecord) -> None:
        """Record a task that has succeeded."""
        journal = self._journal or self._begin()
        task = record.task
        successes = journal.successes
        successes.append(
            (
                task.name,
                record.handed_over_at,
                record.started_at,  # type: ignore[arg-type]  # not None, as the next
                record.ended_at,
                known_id(task),
            )
        )
        if len(successes) > MAX_ENTRIES:
            journal.count()

    def task_failed(self, record: TaskRecord) -> None:
        """Record a task that has failed."""
        state: State | None = None if _is_put_aside(record) else "failed"
        self._record(record, FAILED, state, _failure(record))

    def task_retried(self, record: TaskRecord) -> None:
        """Record an attempt that has raised.

        The state is recorded on a worker only: no process has the task until its next attempt.
        """
        plan = plan_of(record.task)
        waits_elsewhere = plan is not None and plan.on_worker
        self._record(record, RETRIED, "retrying" if waits_elsewhere else None)

    def task_discarded(self, record: TaskRecord) -> None:
        """Record a task that was discarded."""
        self._record(record, DISCARDED, "discarded")

    def task_sent(self, record: TaskRecord) -> None:
        """Record a task that was sent to another process."""
        self._record(record, SENT, "sent")
        self.process().write_sent()

    def _record(
        self,
        record: TaskRecord,
        outcome: int,
        state: State | None = None,
        failure: Failure | None = None,
    ) -> None:
        journal = self._journal or self._begin()
        assert record.ended_at is not None
        journal.entries.append(
            Entry(
                record.task.name,
                outcome,
                record.handed_over_at,
                record.started_at,
                record.ended_at,
                known_id(record.task),
                state,
                failure,
            )
        )
        if len(journal.entries) > MAX_ENTRIES:
            journal.count()

    def _begin(self) -> Journal:
        process = self.process()
        process.start()
        return process.journal

    def forget_parent(self) -> None:
        """Forget the journal of the parent process, in a forked child."""
        self._journal = None


def _is_put_aside(record: TaskRecord) -> bool:
    """True if the message could not be sent, and a folder keeps it: the file has the state."""
    runner = record.batch.root.options.runner
    return (
        # isinstance() would read __class__, which may raise.
        issubclass(type(record.error), PublishError)
        and record.started_at is None
        and isinstance(runner, KeepingRunner)
        and runner.folder_of_messages is not None
    )


def _failure(record: TaskRecord) -> Failure:
    error, ended_at = record.error, record.ended_at
    assert error is not None
    assert ended_at is not None
    traceback = "".join(log.format_error(error))
    if len(traceback) > _MAX_TRACEBACK:  # the end names the error
        traceback = f"...{traceback[-_MAX_TRACEBACK:]}"
    return Failure(
        record.task.name,
        record.task.id,  # the log record of the failure has the id, too
        record.request,
        on_the_wall(ended_at),
        record.attempt,
        getpid(),
        type_name(error),
        str(log.shown(error))[:_MAX_MESSAGE],
        traceback,
    )


recorder: Recorder = Recorder()
"""The recorder of all processes, which records nothing until it is turned on."""

os.register_at_fork(after_in_child=recorder.forget_parent)
