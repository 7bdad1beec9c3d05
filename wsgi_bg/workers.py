"""Threads that start when there is work and end when there has been none for long.

The worker that was idle last is the first to get work, so that under a light load the
others come to their end. ``concurrent.futures`` would cost three times as much for each
job, and joins its threads at interpreter exit: a stuck task would keep the process alive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

from . import log

Job = TypeVar("Job")

IDLE_TIMEOUT = 60.0
"""How long a worker without work stays, in seconds."""


class Workers(Generic[Job]):
    """Up to ``limit`` daemon threads of one process.

    :param work: called with each job on a thread; lets nothing out.
    :param limit: how many threads at most; ``math.inf`` for no limit.
    :param name: how the threads' names begin.
    """

    def __init__(self, work: Callable[[Job], object], limit: float, name: str) -> None:
        self._work = work
        self._limit = limit
        self._name = name
        # Guards all below. Its lock can be taken again: a signal handler may have
        # interrupted its holder.
        self._lock = threading.RLock()
        self._idle: list[_Worker[Job]] = []
        self._backlog: deque[Job] = deque()
        self._alive = 0
        self._numbers = count()

    def take(self, job: Job) -> bool:
        """Have a thread do ``job``, in the order of the calls; does not block.

        :return: False if no thread is there, nor to be had: the job was not taken.
        """
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
            elif self._alive < self._limit and self._start(job):
                return True
            elif self._alive:
                self._backlog.append(job)
                return True
            else:
                return False
        worker.wake(job)
        return True

    def _start(self, job: Job) -> bool:
        thread = threading.Thread(
            target=self._run,
            args=(_Worker(job),),
            name=f"{self._name}-{next(self._numbers)}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # no memory for a stack, or the interpreter is exiting
            return False
        self._alive += 1
        return True

    def _run(self, worker: _Worker[Job]) -> None:
        job = worker.take_job()
        while job is not None:
            try:
                self._work(job)
            except BaseException as exc:  # a greenlet's kill
                log.error("%s was stopped", self._name, exc_info=exc)
            del job  # an idle thread holds no request
            job = self._next(worker)

    def _next(self, worker: _Worker[Job]) -> Job | None:
        """Wait for the worker's next job; None if the worker is to end."""
        with self._lock:
            if self._backlog:
                return self._backlog.popleft()
            self._idle.append(worker)
        if not worker.woken.acquire(timeout=IDLE_TIMEOUT):
            with self._lock:
                if worker in self._idle:
                    self._idle.remove(worker)
                    self._alive -= 1
                    return None
            worker.woken.acquire()  # it was chosen as its time was up
        return worker.take_job()


class _Worker(Generic[Job]):
    """A thread's place for its next job."""

    __slots__ = ("_job", "woken")

    def __init__(self, job: Job) -> None:
        self._job: Job | None = job
        self.woken = threading.Lock()  # held by no one: released by wake()
        self.woken.acquire()

    def wake(self, job: Job) -> None:
        self._job = job
        self.woken.release()

    def take_job(self) -> Job | None:
        job, self._job = self._job, None
        return job
