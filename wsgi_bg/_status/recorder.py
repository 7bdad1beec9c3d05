"""``recorder``: the hooks that record the status of this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from os import getpid
from types import FunctionType
from typing import TYPE_CHECKING

from wsgi_bg._durable.writer import Turns
from wsgi_bg._loop import portal
from wsgi_bg._process import log, per_process
from wsgi_bg._process.clock import on_the_wall
from wsgi_bg._process.greenlets import event, event_for_thread
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._process.threads import start_daemon
from wsgi_bg._status.document import KEEP_DONE, Document, KeepDone
from wsgi_bg._status.files import ProcessFile, open_folder
from wsgi_bg._status.journal import MAX_ENTRIES, Entry, Journal
from wsgi_bg._status.live import Live, command, look
from wsgi_bg._status.model import Failure, ProcessStatus, State
from wsgi_bg._status.numbers import DISCARDED, FAILED, RETRIED, SENT
from wsgi_bg._tasks.task import known_id
from wsgi_bg.hooks import OptionHooks, TaskRecord
from wsgi_bg.runners.keeping import KeepingRunner
from wsgi_bg.runners.shutdown import call_after_drain

if TYPE_CHECKING:
    from wsgi_bg._durable.folder import Folder
    from wsgi_bg._loop.portal import PortalThread

INTERVAL = 1.0
"""Seconds between two looks of the thread that writes."""

_LAG_TIMEOUT = 0.05
"""Seconds for which a callback on the loop is waited for."""

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
        """Write the status of this process from now on, if there is a folder."""
        self.process().start()

    # Hooks.

    def task_finished(self, record: TaskRecord) -> None:
        """Record a task that has succeeded."""
        journal = self._journal or self._begin()
        task = record.task
        func = task.func
        if type(func) is FunctionType and func.__module__:
            name = f"{func.__module__}.{func.__qualname__}"  # task.name, in a fifth of the time
        else:
            name = task.name
        successes = journal.successes
        successes.append(
            (
                name,
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
        self._record(record, FAILED, "failed", _failure(record))

    def task_retried(self, record: TaskRecord) -> None:
        """Record an attempt that has raised."""
        self._record(record, RETRIED)

    def task_discarded(self, record: TaskRecord) -> None:
        """Record a task that was discarded."""
        self._record(record, DISCARDED, "discarded")

    def task_sent(self, record: TaskRecord) -> None:
        """Record a task that was sent to another process."""
        self._record(record, SENT, "sent")

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


class Process:
    """The journal of a process, and the thread that writes the status of the process.

    :ivar journal: the tasks that have ended.
    :ivar lag: measures the lag of the loop.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.journal = Journal()
        self._recorder = recorder
        self.lag: LoopLag = LoopLag()
        self._files: dict[str, ProcessFile] = {}
        self._written: tuple[object, ...] = ()
        self._last_work: tuple[object, ...] = ()  # at the last drain
        self._ended: list[tuple[str, str, float]] = []
        self._right = {"to start": True}
        self._turns = Turns(delays_forks=False)
        self._pause = event_for_thread()
        self._is_stopped = False
        self._failed = RepeatedError("the status of this process could not be written to %s")

    def start(self) -> None:
        """Start the thread that writes, unless it runs; does nothing without a folder."""
        if not self._recorder.folders or not self._right.pop("to start", False):
            return
        self.journal.keeps_ended = True
        try:
            start_daemon(self._work, "wsgi_bg-status")
        except RuntimeError:  # no memory for a stack, or the interpreter exits
            self._right["to start"] = True
        else:
            call_after_drain(self.end)

    def _work(self) -> None:
        generation = per_process.generation
        # A log handler may fork a child, whose only thread this is then.
        while not self._is_stopped and per_process.generation == generation:
            self.write()
            self._pause.wait(INTERVAL)

    def stop(self) -> None:
        """End the thread, and write no more."""
        self._is_stopped = True
        self._pause.set()

    def end(self) -> None:
        """Write once more: the runners were drained, and what is left was named."""
        self.write(has_ended=True)

    def write(self, *, has_ended: bool = False) -> None:
        """Write the status if it has changed; an error is logged."""
        turn = self._turns.take(INTERVAL)
        if turn is None or self._is_stopped:
            return
        with turn:
            try:
                self._write(has_ended=has_ended)
            except Exception as exc:  # a fault of this package must not end the thread
                self._failed.log(exc, "its folder")

    def _write(self, *, has_ended: bool) -> None:
        recorder = self._recorder
        self.journal.count()
        live = look(self.journal.wall)
        work = self.journal.counted, live.running_by_name, live.waiting
        if has_ended:
            self._last_work = work
        has_ended = self._last_work == work  # else the process goes on after a drain
        seen = self.journal.counted, live, recorder.durable, has_ended, recorder.folders
        if seen != self._written:
            ended = self.journal.new_ended
            self._ended += [ended.popleft() for _ in range(len(ended))]
            document = self._document(live, has_ended=has_ended)
            are_written = [self._write_to(each, document) for each in recorder.folders]
            if all(are_written):
                self._written, self._ended = seen, []
            del self._ended[: -document.keep_done.number or None]
        for folder in recorder.folders:
            self._try(folder, lambda file: file.add_ended_processes())

    def _write_to(self, folder: Folder, document: Document) -> bool:
        return self._try(folder, lambda file: file.write(document, self._ended))

    def _try(self, folder: Folder, act: Callable[[ProcessFile], object]) -> bool:
        """Call ``act`` with the file of this process; log an error, and return False then."""
        try:
            file = self._files.get(folder.path)
            if file is None:
                # The folder may have been removed.
                file = ProcessFile(open_folder(folder.path))
                self._files[folder.path] = file
            act(file)
        except Exception as exc:
            self._files.pop(folder.path, None)
            self._failed.log(exc, folder.path)
            return False
        return True

    def number_in(self, folder: Folder) -> int | None:
        """Return the number of the file of this process; None if it has written none."""
        file = self._files.get(folder.path)
        return None if file is None else file.number

    def states_of(self, id: str) -> list[State]:  # noqa: A002
        """Return the state of a task that has ended in this process."""
        self.journal.count()
        state = self.journal.state_of(id)
        return [] if state is None else [state]

    def document(self) -> Document:
        """Return the status of this process as it is now."""
        self.journal.count()
        return self._document(look(self.journal.wall), has_ended=False)

    def _document(self, live: Live, *, has_ended: bool) -> Document:
        journal, recorder = self.journal, self._recorder
        journal.look_at_clock()
        journal.keep_done = recorder.keep_done
        numbers = journal.numbers
        return Document(
            numbers.names.copy(),
            numbers.minutes.copy(),
            numbers.failures.copy(),
            status_of_process(live, journal.started, self.lag.measure()),
            live.running,
            live.running_by_name,
            live.waiting,
            live.ids,
            recorder.durable,
            recorder.outboxes,
            journal.keep_done,
            has_ended,
        )


def status_of_process(live: Live, started: float, loop_lag: float | None) -> ProcessStatus:
    """Return the load of this process."""
    load = live.load
    return ProcessStatus(
        pid=getpid(),
        started=started,
        updated=time.time(),
        is_alive=True,
        command=command(),
        loop_lag=loop_lag,
        **load._asdict(),
    )


class LoopLag:
    """Measures how late the loop of the ``async def`` tasks is; starts no loop."""

    def __init__(self) -> None:
        self._probe: _Probe | None = None  # the last

    def measure(self) -> float | None:
        """Return the seconds that a callback waits for the loop; None if no loop runs.

        Waits for the callback for :data:`_LAG_TIMEOUT` seconds at most, and not on the loop
        itself. If the last callback has not run yet, returns the time that it waits already.
        """
        thread = portal.peek()
        if thread is None:
            return None
        probe = self._probe
        if probe is None or probe.thread is not thread or probe.lag is not None:
            self._probe = probe = _Probe(thread)
            if not thread.is_current:
                probe.has_run.wait(_LAG_TIMEOUT)
        return time.monotonic() - probe.asked_at if probe.lag is None else probe.lag


class _Probe:
    """A callback that waits for the loop."""

    def __init__(self, thread: PortalThread) -> None:
        self.thread = thread
        self.has_run = event()
        self.lag: float | None = None
        self.asked_at = time.monotonic()
        thread.call_soon(self._run)

    def _run(self) -> None:
        self.lag = time.monotonic() - self.asked_at
        self.has_run.set()


recorder: Recorder = Recorder()
"""The recorder of all processes, which records nothing until it is turned on."""

os.register_at_fork(after_in_child=recorder.forget_parent)
