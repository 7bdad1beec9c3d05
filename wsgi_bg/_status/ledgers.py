"""The numbers of a process that records no status: those that its ledgers know."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter

from wsgi_bg._status.model import NameCounts, ProcessStatus, RunningTask, Snapshot
from wsgi_bg.runners.ledger import batches_under_way, ledgers_here

MAX_COMMAND = 200


def snapshot_of_ledgers() -> Snapshot:
    """Return the tasks that run and wait, and numbers without names of those that ended."""
    now = time.time()
    pid = os.getpid()
    running: list[RunningTask] = []
    waiting: Counter[str] = Counter()
    for batch in batches_under_way():
        left = batch.tasks
        if left and batch.is_running:
            running.append(RunningTask(left[0].name, None, None, None, 1, pid, None))
            del left[0]
        waiting.update(task.name for task in left)
    ledgers = ledgers_here()
    statistics = [ledger.statistics() for ledger in ledgers]
    process = ProcessStatus(
        pid=pid,
        started=now,
        updated=now,
        is_alive=True,
        command=command(),
        threads_busy=0,
        threads_idle=0,
        threads=0,
        pending=sum(ledger.length for ledger in ledgers),
        max_pending=None,
        run_here=sum(each.run_here for each in statistics),
        loop_lag=None,
        outbox=sum(len(ledger.unsent) for ledger in ledgers),
    )
    names = {name: NameCounts(name, waiting=number) for name, number in waiting.items()}
    counts = NameCounts(
        "",
        running=len(running),
        waiting=sum(each.pending + each.waiting for each in statistics),
        succeeded=sum(each.succeeded for each in statistics),
        failed=sum(each.failed for each in statistics),
        discarded=sum(each.discarded for each in statistics),
        sent=sum(each.sent for each in statistics),
    )
    return Snapshot(
        taken=now,
        processes=(process,),
        running=tuple(running),
        waiting=dict(waiting),
        failures=(),
        lost=(),
        names=tuple(names[name] for name in sorted(names)),
        minutes=(),
        durable=(),
        counts=counts,
    )


def command() -> str:
    """The command line of this process, which ``ps`` shows, too."""
    return " ".join(sys.argv)[:MAX_COMMAND]
