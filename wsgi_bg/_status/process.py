"""``Process``: what was recorded in a process, and the thread that writes it into folders."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from os import getpid
from typing import TYPE_CHECKING, Protocol

from wsgi_bg._loop import portal
from wsgi_bg._process import per_process
from wsgi_bg._process.greenlets import event, event_for_thread, start_daemon
from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._status.document import Document, KeepDone
from wsgi_bg._status.files import ProcessFile, open_folder
from wsgi_bg._status.journal import Journal
from wsgi_bg._status.live import Live, command, look
from wsgi_bg._status.model import End, ProcessStatus
from wsgi_bg._store.writer import Turns
from wsgi_bg.exceptions import StoreError
from wsgi_bg.runners.shutdown import call_after_drain

if TYPE_CHECKING:
    from wsgi_bg._loop.portal import PortalThread
    from wsgi_bg._store.folder import Folder

INTERVAL = 1.0
"""Seconds between two looks of the thread that writes."""

_LAG_TIMEOUT = 0.05
"""Seconds for which a callback on the loop is waited for."""


class Places(Protocol):
    """Where to write, and what else has tasks: see :mod:`wsgi_bg._status.recorder`."""

    @property
    def folders(self) -> list[Folder]: ...

    @property
    def durable(self) -> dict[str, list[int]]: ...

    @property
    def outboxes(self) -> list[str]: ...

    @property
    def keep_done(self) -> KeepDone: ...


class Process:
    """The journal of a process, and the thread that writes the status of the process.

    :ivar journal: the tasks that have ended.
    :ivar lag: measures the lag of the loop.
    """

    def __init__(self, places: Places) -> None:
        self.journal = Journal()
        self._places = places
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
        if not self._places.folders or not self._right.pop("to start", False):
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
        self._in_turn(partial(self._write, has_ended=has_ended))

    def write_sent(self) -> None:
        """Append the ids of ended tasks now: other processes know at once what was sent."""
        if self._places.folders:
            self._in_turn(
                self._append if self._written else partial(self._write, has_ended=False)
            )

    def _in_turn(self, write: Callable[[], None]) -> None:
        turn = self._turns.take(INTERVAL)
        if turn is None or self._is_stopped:
            return
        with turn:
            try:
                write()
            except Exception as exc:  # a fault of this package must not end the thread
                self._failed.log(exc, "its folder")

    def _write(self, *, has_ended: bool) -> None:
        places = self._places
        self.journal.count()
        live = look(self.journal.wall)
        work = self.journal.counted, live.running_by_name, live.waiting
        if has_ended:
            self._last_work = work
        has_ended = self._last_work == work  # else the process goes on after a drain
        seen = self.journal.counted, live, places.durable, has_ended, places.folders
        if seen != self._written:
            self._take_ended()
            document = self._document(live, has_ended=has_ended)
            are_written = [self._write_to(each, document) for each in places.folders]
            if all(are_written):
                self._written, self._ended = seen, []
        for folder in places.folders:
            self._try(folder, lambda file: file.add_ended_processes())

    def _append(self) -> None:
        self.journal.count()
        keep = self._take_ended()

        def append(file: ProcessFile) -> None:
            file.append(self._ended, keep)

        are_written = [self._try(folder, append) for folder in self._places.folders]
        if all(are_written):
            self._ended = []

    def _take_ended(self) -> int:
        """Take over the ids of ended tasks; return how many are kept at most."""
        ended, keep = self.journal.new_ended, self._places.keep_done.number
        self._ended += [ended.popleft() for _ in range(len(ended))]
        del self._ended[: -keep or None]
        return keep

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
            if isinstance(exc, StoreError):  # the folder was removed, with the file
                self._files.pop(folder.path, None)
            self._written = ()
            self._failed.log(exc, folder.path)
            return False
        return True

    def number_in(self, folder: Folder) -> int | None:
        """Return the number of the file of this process; None if it has written none."""
        file = self._files.get(folder.path)
        return None if file is None else file.number

    def ends_of(self, id: str) -> list[End]:  # noqa: A002
        """Return the end of a task that has ended in this process."""
        self.journal.keep_done = self._places.keep_done
        self.journal.count()
        end = self.journal.end_of(id)
        return [] if end is None else [end]

    def document(self) -> Document:
        """Return the status of this process as it is now."""
        self.journal.count()
        return self._document(look(self.journal.wall), has_ended=False)

    def _document(self, live: Live, *, has_ended: bool) -> Document:
        journal, places = self.journal, self._places
        journal.keep_done = places.keep_done
        numbers = journal.numbers
        return Document(
            numbers.names.copy(),
            numbers.minutes.copy(),
            numbers.failures.copy(),
            status_of_process(live, journal.started, self.lag.measure()),
            live.running,
            live.running_by_name,
            live.unlisted,
            live.waiting,
            live.ids,
            places.durable,
            places.outboxes,
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
