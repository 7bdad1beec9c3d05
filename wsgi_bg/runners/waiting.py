"""Wait for the unfinished batches of this process, and log their tasks during the wait."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection
from itertools import chain, islice
from typing import TYPE_CHECKING

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import safe_repr
from wsgi_bg.runners.ledger import batches_under_way, ledgers_here, tasks_to_send

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners.ledger import UnsentTasks

FIRST, EVERY = 1.0, 5.0
"""Seconds until the first WARNING of a wait, and between the following WARNINGs."""

_NAMES = 5  # the most different names in a WARNING
_COUNTED = 1000  # read the names of so many tasks: those of a million take seconds


def wait_for(
    batches: Collection[Batch | UnsentTasks], deadline: float, notice: Notice
) -> list[BackgroundTask]:
    """Block until ``batches`` have ended, including tasks that their tasks add.

    :param deadline: when to stop waiting, by :func:`time.monotonic`.
    :param notice: logs during the wait.
    :return: the tasks that are not done.
    """
    for ledger in ledgers_here():
        while not ledger.wait_for(batches, min(deadline, notice.due)):
            if time.monotonic() >= deadline:
                break
            notice.log_if_due(deadline)
    return [task for batch in batches for task in batch.tasks]


class Notice:
    """Logs a WARNING a second after its creation, then every five seconds of a wait.

    :param ended_by: the signal that ends the wait, for the message; None to detect Ctrl-C.
    :param first: seconds before the first WARNING.
    :ivar latest: an earlier end of the wait than the deadline, by :func:`time.monotonic`.
    """

    def __init__(self, ended_by: str | None = None, first: float = FIRST) -> None:
        self.due: float = time.monotonic() + first
        self.latest: float = math.inf
        self._ended_by = _interrupting_signal() if ended_by is None else ended_by

    def log_if_due(self, deadline: float, requests: int = 0, runner: object = None) -> None:
        """Log the requests and tasks that the process waits for, if a WARNING is due.

        :param deadline: the end of the wait, by :func:`time.monotonic`.
        :param requests: how many requests the process also waits for.
        :param runner: is logged if no task and no request is known.
        """
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + EVERY
        names = Counter[str]()
        count = 0
        waiting: list[UnsentTasks] = [*tasks_to_send()]
        for ledger in ledgers_here():
            waiting += ledger.due_by(deadline)
        for tasks in chain(
            (batch.tasks for batch in batches_under_way()), (later.tasks for later in waiting)
        ):
            names.update(task.name for task in islice(tasks, max(0, _COUNTED - count)))
            count += len(tasks)
        waits_for = []
        if requests:
            waits_for.append(f"{requests} request{'s' * (requests > 1)}")
        if count:
            waits_for.append(
                f"{count} background task{'s' * (count > 1)} ({_list(names, count)})"
            )
        if not waits_for:
            waits_for.append("the runners" if runner is None else safe_repr(runner))
        limit = min(deadline, self.latest) - now
        how_long = "without a limit" if limit == math.inf else f"for {limit:.0f} s more at most"
        log.warning(
            "the process ends, and waits for %s: %s%s",
            " and ".join(waits_for),
            how_long,
            f"; {self._ended_by} ends the wait" if self._ended_by else "",
        )


def _list(names: Counter[str], count: int) -> str:
    """Format ``names``: ``"2 shop.send_mail, 1 shop.resize, 7 others"``."""
    shown = names.most_common(_NAMES)
    others = count - sum(number for _, number in shown)
    parts = [f"{number} {name}" for name, number in shown]
    return ", ".join(parts + [f"{others} others"] * bool(others))


def _interrupting_signal() -> str:
    """``"Ctrl-C"`` if SIGINT ends a wait on this thread by an exception, else ``""``."""
    is_main = threading.current_thread() is threading.main_thread()
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # uWSGI handles SIGINT itself, and Python does not know of that.
    return "Ctrl-C" if is_main and raises and "uwsgi" not in sys.modules else ""
