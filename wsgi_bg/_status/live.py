"""The tasks that run and wait in this process now, and its load.

Nothing is recorded when a task begins: the unfinished batches are in the ledgers of the
runners, and each task has its record.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import filterfalse, islice
from typing import TYPE_CHECKING, NamedTuple

from wsgi_bg._status.model import OTHER_NAMES, RunningTask, State
from wsgi_bg._tasks.task import tasks_with_ids
from wsgi_bg.runners.ledger import batches_under_way, calls_on_worker, ledgers_here
from wsgi_bg.runners.pool import pools_here

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.hooks import TaskRecord
    from wsgi_bg.runners.ledger import UnsentTasks

MAX_RUNNING = 1_000
"""How many running tasks a process shows."""

MAX_WAITING = 50_000
"""How many waiting tasks a process counts by name."""

MAX_IDS = 10_000
"""How many waiting and running tasks a process lists by id."""

_MAX_COMMAND = 200


class Load(NamedTuple):
    """The load of this process: see :class:`wsgi_bg._status.model.ProcessStatus`."""

    threads_busy: int
    threads_idle: int
    threads: int
    pending: int
    max_pending: int | None
    run_here: int
    outbox: int


class Live(NamedTuple):
    """The tasks that run and wait in this process.

    :attr:`running` has True for each task that a file keeps. Such tasks are not in
    :attr:`unlisted`, :attr:`waiting` and :attr:`ids`. :attr:`unlisted` counts the running tasks
    for which :attr:`running` has no room.
    """

    running: list[tuple[RunningTask, bool]]
    running_by_name: dict[str, int]
    unlisted: dict[str, int]
    waiting: dict[str, int]
    ids: dict[str, State]
    load: Load


def is_stored(task: BackgroundTask) -> bool:
    """True if a file keeps the task, or its message."""
    return getattr(task.message, "store", None) is not None


def look(wall: Callable[[float], float] | None) -> Live:
    """Look at the tasks of this process.

    :param wall: returns a moment of the monotonic clock by :func:`time.time`; None if no
        status is recorded: then running tasks get no id.
    """
    pid = os.getpid()
    running = [task for task, worker in calls_on_worker.copy().items() if worker == pid]
    waiting: Counter[str] = Counter()
    in_files: set[BackgroundTask] = set()
    room = MAX_WAITING
    for batch in batches_under_way():
        task = batch.running
        if task is not None:
            running.append(task)
        length = batch.length
        if length > room:
            waiting[OTHER_NAMES] += length
            continue
        left = [each for each in batch.tasks if each is not task]
        room -= len(left)
        _count(left, waiting)
    for ledger in ledgers_here():
        for later in islice(ledger.waiting.copy(), MAX_WAITING):
            _count(later.tasks, waiting)
        unsent = ledger.unsent.copy()
        for kept in filter(_is_in_file, unsent):
            in_files.update(kept.tasks)
        for in_memory in islice(filterfalse(_is_in_file, unsent), MAX_WAITING):
            _count(in_memory.tasks, waiting)
    unlisted: Counter[str] = Counter()
    _count(running[MAX_RUNNING:], unlisted)
    return Live(
        [_shown(task, wall) for task in running[:MAX_RUNNING]],
        dict(Counter(task.name for task in running)),
        dict(unlisted),
        dict(waiting),
        _ids(in_files) if wall is not None else {},
        load(),
    )


def _count(tasks: Iterable[BackgroundTask], counter: Counter[str]) -> None:
    for task in tasks:
        if not is_stored(task):
            counter[task.name] += 1


def _is_in_file(unsent: UnsentTasks) -> bool:
    """True if an outbox in a folder has the message, which the task has no more."""
    return getattr(getattr(unsent, "stored", None), "store", None) is not None


def _shown(
    task: BackgroundTask, wall: Callable[[float], float] | None
) -> tuple[RunningTask, bool]:
    record: TaskRecord | None = next(iter(task.record), None)
    id = request = since = thread = None  # noqa: A001
    if record is not None and wall is not None:
        id, request, thread = task.id, record.request, record.thread  # noqa: A001
        since = None if record.started_at is None else wall(record.started_at)
    running = RunningTask(task.name, id, request, since, task.attempt, os.getpid(), thread)
    return running, is_stored(task)


def _ids(in_files: set[BackgroundTask]) -> dict[str, State]:
    """Return the states of tasks whose ids were read, without those that a file keeps.

    :param in_files: tasks whose messages are in a file.
    """
    states = (
        (id, None if task in in_files or is_stored(task) else state_of(task))
        for task, id in tasks_with_ids()  # noqa: A001
    )
    known = ((id, state) for id, state in states if state is not None)  # noqa: A001
    return dict(islice(known, MAX_IDS))


def state_of(task: BackgroundTask) -> State | None:
    """Return the state of a task; None if the task has ended, or another object is its copy."""
    record: TaskRecord | None = next(iter(task.record), None)
    if record is not None and record.started_at is not None and record.ended_at is None:
        return "running"
    if task.unclaimed:
        return "retrying" if task.attempt > 1 else "waiting"
    if record is None:
        return None
    # Claimed in order to be sent, for example.
    return "waiting" if record.started_at is None else "retrying"


def states_of(id: str) -> Iterator[State]:  # noqa: A002
    """Return the states of the tasks of this process that have the id and have not ended."""
    for task, _ in tasks_with_ids(id):
        state = state_of(task)
        if state is not None:
            yield state


def load() -> Load:
    """Return the load of this process."""
    pools = pools_here()
    ledgers = ledgers_here()
    alive = sum(pool.threads_alive for pool in pools)
    idle = sum(pool.threads_idle for pool in pools)
    limits = [pool.max_pending for pool in pools]
    return Load(
        threads_busy=max(0, alive - idle),
        threads_idle=idle,
        threads=sum(pool.threads for pool in pools),
        pending=sum(pool.ledger.length for pool in pools),
        max_pending=None if None in limits else sum(each or 0 for each in limits),
        run_here=sum(pool.ledger.run_here for pool in pools),
        outbox=sum(len(ledger.unsent) for ledger in ledgers),
    )


def command() -> str:
    """The command line of this process, which ``ps`` shows, too."""
    return " ".join(sys.argv)[:_MAX_COMMAND]
