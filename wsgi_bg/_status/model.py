"""The data that :func:`wsgi_bg.status.snapshot` returns.

Moments are seconds by :func:`time.time`, lengths are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

State = Literal[
    "waiting",
    "running",
    "retrying",
    "succeeded",
    "failed",
    "discarded",
    "sent",
    "aside",
    "lost",
]
"""The state of a task, as :func:`wsgi_bg.status.of` returns the state."""

End = tuple[State, float]
"""The state of a task whose call has ended in a process, and the moment of the end.

The state is "retrying" if an engine waits for the next attempt, and no process has the task.
"""

OTHER_NAMES = "(other names)"
"""The name under which the tasks of further functions are counted."""


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A task whose call is being made.

    :ivar name: ``module.qualname`` of the function.
    :ivar id: the id of the task; None if the process records no status.
    :ivar request: the request that has added the task, such as ``"GET /orders"``.
    :ivar since: when the call began; None if the process records no status.
    :ivar attempt: the number of the call: 1, or more if a ``Retry`` has called the task again.
    :ivar pid: the process.
    :ivar thread: the name of the thread that makes the call.
    """

    name: str
    id: str | None
    request: str | None
    since: float | None
    attempt: int
    pid: int
    thread: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that has failed.

    :ivar ended: when the task has failed.
    :ivar attempt: the number of the last call.
    :ivar error: the name of the exception's class.
    :ivar message: the text of the exception, cut after 1,000 characters.
    :ivar traceback: the traceback as text, cut to 10,000 characters.
    """

    name: str
    id: str | None
    request: str | None
    ended: float
    attempt: int
    pid: int
    error: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class LostTask:
    """A task that ran or waited in a process that was killed.

    :ivar id: None for a task that waited.
    :ivar request: None for a task that waited.
    :ivar since: when the call had begun; None for a task that waited.
    :ivar pid: the process.
    """

    name: str
    id: str | None
    request: str | None
    since: float | None
    pid: int


@dataclass(frozen=True, slots=True)
class Times:
    """How long tasks took; percentiles are at most a tenth too high.

    :ivar count: the number of tasks.
    :ivar p50: the length that half of the tasks did not exceed; 0 if there was no task.
    :ivar max: the longest.
    """

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


@dataclass(frozen=True, slots=True)
class NameCounts:
    """Numbers of the tasks of a function, since the processes have begun to record.

    :ivar name: ``module.qualname`` of the function; ``"(other names)"`` for the tasks of all
        functions that have no numbers of their own, ``""`` for the sum of all functions.
    :ivar running: tasks that run now.
    :ivar waiting: tasks that have not begun, those that wait for their time or to be sent
        included.
    :ivar retried: attempts that a further attempt has followed.
    :ivar aside: durable tasks that were put aside.
    :ivar lost: tasks that ran or waited in a process that was killed, and were not durable.
    :ivar wait: from the moment in which the request handed the task over to its call.
    :ivar run: the calls.
    """

    name: str
    running: int = 0
    waiting: int = 0
    succeeded: int = 0
    failed: int = 0
    retried: int = 0
    discarded: int = 0
    sent: int = 0
    aside: int = 0
    lost: int = 0
    wait: Times = Times()
    run: Times = Times()


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A process that runs tasks.

    :ivar pid: the number of the process.
    :ivar started: when the process has begun to record.
    :ivar updated: when these numbers were taken.
    :ivar is_alive: False if the process was killed.
    :ivar command: the command line, cut after 200 characters.
    :ivar threads_busy: threads of the pools that run tasks.
    :ivar threads_idle: threads of the pools that wait for work.
    :ivar threads: the most threads that the pools may start.
    :ivar pending: batches that were handed over to pools and have not ended.
    :ivar max_pending: the most of these; None if there is no limit.
    :ivar run_here: tasks that a pool ran on the server's thread for want of room.
    :ivar loop_lag: how late the event loop of the ``async def`` tasks was at the last look;
        None if no loop runs.
    :ivar outbox: tasks that wait to be sent to other processes.
    """

    pid: int
    started: float
    updated: float
    is_alive: bool
    command: str
    threads_busy: int
    threads_idle: int
    threads: int
    pending: int
    max_pending: int | None
    run_here: int
    loop_lag: float | None
    outbox: int


@dataclass(frozen=True, slots=True)
class Minute:
    """Numbers of the tasks that have ended in a minute.

    :ivar time: when the minute began.
    """

    time: float
    succeeded: int = 0
    failed: int = 0
    discarded: int = 0
    sent: int = 0
    wait: Times = Times()
    run: Times = Times()


@dataclass(frozen=True, slots=True)
class DurableTask:
    """A task of a ``DurableRunner``.

    :ivar state: see :func:`wsgi_bg.status.of`.
    :ivar since: when the task was added.
    :ivar due: when the next call is due; None if the task does not wait.
    :ivar attempt: the number of the last call, or of the next if the task waits.
    :ivar error: the name of the last exception's class; empty if there was none.
    :ivar pid: the process whose file has the task; None if that process is not known.
    """

    name: str
    id: str
    state: State
    since: float
    due: float | None
    attempt: int
    error: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tasks of this process, or of all processes that share a folder, at a moment.

    :ivar taken: the moment.
    :ivar processes: sorted by pid.
    :ivar running: the oldest first, at most 1,000.
    :ivar waiting: numbers of the tasks that have not begun, by name.
    :ivar failures: the newest first, at most 100.
    :ivar lost: the newest process first, at most 100; those that ran before those that waited.
    :ivar names: sorted by name, at most 1,000, and one for all other names.
    :ivar minutes: the last hour, the oldest first. A minute in which no task has ended is
        there, too.
    :ivar durable: the newest 200 tasks of the durable folder, the newest first.
    :ivar counts: the sum of all names; its ``name`` is empty.
    """

    taken: float
    processes: tuple[ProcessStatus, ...]
    running: tuple[RunningTask, ...]
    waiting: Mapping[str, int]
    failures: tuple[Failure, ...]
    lost: tuple[LostTask, ...]
    names: tuple[NameCounts, ...]
    minutes: tuple[Minute, ...]
    durable: tuple[DurableTask, ...]
    counts: NameCounts

    def as_dict(self) -> dict[str, Any]:
        """Return the snapshot as dictionaries and lists, which :mod:`json` can encode."""
        return {name: _plain(value) for name, value in _items(self)}


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(value, name)) for name in _NAMES[type(value)]]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    if type(value) in _NAMES:
        return {name: _plain(each) for name, each in _items(value)}
    return value


_NAMES: dict[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (
        RunningTask,
        Failure,
        LostTask,
        Times,
        NameCounts,
        ProcessStatus,
        Minute,
        DurableTask,
        Snapshot,
    )
}
