"""Threads that start when there is work and end when there has been none for long.

The worker that was idle last is the first to get work, so that under a light load the
others come to their end. ``concurrent.futures`` would cost three times as much for each
job, and joins its threads at interpreter exit: a stuck task would keep the process alive.

No lock is held here, because a signal handler that raises could leave a lock locked for
ever. Each step is one atomic operation of a list, a dict or a deque, and a thread that has
published something looks again at what others published meanwhile.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Generic, TypeVar

from . import log, process
from .threads import start_daemon

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
        self._idle: list[_Worker[Job]] = []
        self._backlog: deque[Job] = deque()
        self._alive: dict[_Worker[Job], None] = {}
        self._numbers = count()

    def submit(self, job: Job) -> bool:
        """Let a thread do ``job``; does not block.

        Jobs begin in the order of the calls. If a signal handler raises in here, the job may
        have been submitted: the caller has to see to it that a job which is done twice does
        no harm.

        :return: False if no thread is there, nor to be had: the job was not submitted.
        """
        if self._give_to_idle(job) or self._start(job):
            return True
        self._backlog.append(job)
        self._serve_backlog()
        if self._alive:
            return True
        try:
            self._backlog.remove(job)
        except ValueError:
            return True
        return False

    def _serve_backlog(self) -> None:
        """Look again: a worker that went idle or ended may have looked before the job came."""
        while self._backlog and (self._idle or len(self._alive) < self._limit):
            try:
                job = self._backlog.popleft()
            except IndexError:
                return
            if not (self._give_to_idle(job) or self._start(job)):
                self._backlog.appendleft(job)
                if not self._idle:
                    return

    def _give_to_idle(self, job: Job) -> bool:
        try:
            worker = self._idle.pop()
        except IndexError:
            return False
        worker.jobs.put(job)
        return True

    def _start(self, job: Job) -> bool:
        if len(self._alive) >= self._limit:
            return False
        worker: _Worker[Job] = _Worker()
        self._alive[worker] = None
        if len(self._alive) > self._limit:  # another thread was as quick
            del self._alive[worker]
            return False
        try:
            start_daemon(self._run, f"{self._name}-{next(self._numbers)}", worker, job)
        except BaseException as exc:
            # A signal handler's exception, after the thread has started perhaps: that thread
            # ends by itself.
            self._alive.pop(worker, None)
            if not isinstance(exc, RuntimeError):
                raise
            return False
        return True

    def _run(self, worker: _Worker[Job], job: Job | None) -> None:
        generation = process.generation
        try:
            while job is not None:
                try:
                    self._work(job)
                except BaseException as exc:
                    if process.generation != generation:
                        raise  # the child that a task has forked: this is its only thread
                    log.error("%s was stopped", self._name, exc_info=exc)
                if process.generation != generation:
                    return
                del job  # an idle thread holds no request
                job = self._next(worker)
        finally:
            self._alive.pop(worker, None)
        self._serve_backlog()

    def _next(self, worker: _Worker[Job]) -> Job | None:
        """Wait for the worker's next job; None if the worker is to end."""
        was_chosen = False
        while worker in self._alive:
            with suppress(IndexError):
                return self._backlog.popleft()
            self._idle.append(worker)
            if self._backlog and worker.withdraw_from(self._idle):
                continue
            try:
                job = worker.jobs.get(timeout=IDLE_TIMEOUT)
            except queue.Empty:
                if worker.withdraw_from(self._idle):
                    return None
                # A submit() has chosen this worker, and has not come with the job: a signal
                # handler may have stopped it. Be idle again, for another submit().
                was_chosen = True
            else:
                if was_chosen:
                    worker.withdraw_from(self._idle)
                return job
        return None


class _Worker(Generic[Job]):
    """A thread's place for its next jobs."""

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def withdraw_from(self, idle: list[_Worker[Job]]) -> bool:
        """Take this worker out of ``idle``; False if another thread has chosen it."""
        try:
            idle.remove(self)
        except ValueError:
            return False
        return True
