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
from operator import call
from typing import Generic, TypeVar

from . import log, process
from .interrupts import is_raised_here
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
        self._backlog: deque[Job] = deque()
        self._alive: dict[_Worker, None] = {}
        self._idle: list[Callable[[None], object]] = []  # what wakes each of these workers
        self._numbers = count()

    def submit(self, job: Job) -> bool:
        """Let a thread do ``job``; does not block.

        Jobs begin in the order of the calls. If a signal handler raises in here, the job may
        have been submitted: the caller has to see to it that it is not done twice.

        :return: False if no thread is there, nor to be had: the job was not submitted.
        """
        self._backlog.append(job)
        if self._wake() or self._start() or self._alive:
            return True
        try:
            self._backlog.remove(job)
        except ValueError:  # a thread that has ended since has done it
            return True
        return False

    def _wake(self) -> bool:
        """Let the worker that was idle last look at the backlog; False if none is idle."""
        if not self._idle:
            return False
        try:
            # In one step: a worker that is idle for nobody would never be woken.
            next(map(call, iter(self._idle.pop, None), (None,)))
        except IndexError as exc:
            if not is_raised_here(exc):  # there may be a worker to wake
                raise
            return False
        return True

    def _start(self) -> bool:
        if len(self._alive) >= self._limit:
            return False
        worker = _Worker()
        try:
            self._alive[worker] = None
            if len(self._alive) > self._limit:  # another thread was as quick
                del self._alive[worker]
                return False
            start_daemon(self._run, f"{self._name}-{next(self._numbers)}", worker)
        except BaseException as exc:
            # RuntimeError: no memory for a stack, or the interpreter exits. A signal
            # handler's exception may come after the thread has started: that thread ends.
            self._alive.pop(worker, None)
            if not isinstance(exc, RuntimeError):
                raise
            return False
        return True

    def _run(self, worker: _Worker) -> None:
        generation = process.generation
        try:
            while self._wait(worker):
                try:
                    job = self._backlog.popleft()
                except IndexError:
                    continue
                try:
                    self._work(job)
                except BaseException as exc:
                    if process.generation != generation:
                        raise  # in the child that a task has forked: this is its only thread
                    log.error("%s was stopped", self._name, exc_info=exc)
                if process.generation != generation:
                    return
                del job  # an idle thread holds no request
        finally:
            self._alive.pop(worker, None)
        if self._backlog:  # a submit() has counted on this worker
            self._wake() or self._start()

    def _wait(self, worker: _Worker) -> bool:
        """Wait until there is a backlog; False if the worker is to end."""
        while worker in self._alive:
            if self._backlog:
                return True
            self._idle.append(worker.wake)
            if self._backlog and self._withdraw(worker):  # look again: see submit()
                return True
            try:
                worker.wakes.get(timeout=IDLE_TIMEOUT)
            except queue.Empty:
                if self._withdraw(worker):
                    return False
        return False

    def _withdraw(self, worker: _Worker) -> bool:
        with suppress(ValueError):
            self._idle.remove(worker.wake)
            return True
        return False  # it was chosen meanwhile, and is woken


class _Worker:
    """A thread's place to wait."""

    __slots__ = ("wake", "wakes")

    def __init__(self) -> None:
        self.wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.wake = self.wakes.put
