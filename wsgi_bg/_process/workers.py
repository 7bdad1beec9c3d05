"""``Workers``: threads that start when there is work, and end after a long time without work.

The worker that became idle last gets the next job, so that under a light load the remaining
workers end. ``concurrent.futures`` would cost three times as much for each job, and joins
its threads at interpreter exit: a stuck task would keep the process alive.

This module holds no lock, because a signal handler that raises could leave a lock locked for
ever. Each step is an atomic operation of a list, a dict or a deque. A thread that has
published a change looks again for changes that further threads published meanwhile.
"""

from __future__ import annotations

import _queue
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from operator import call
from typing import Generic, TypeVar

from wsgi_bg._process import greenlets, log, per_process
from wsgi_bg._process.greenlets import start_daemon
from wsgi_bg._process.interrupts import is_raised_here

Job = TypeVar("Job")

IDLE_TIMEOUT = 60.0
"""Seconds after which a worker without work ends."""

LINGER = 0.0001
"""Seconds for which a worker without work sleeps before it waits for a wake.

Under load the next job comes in this time. A wake makes the two threads compete for the GIL:
without the sleep a flood of durable tasks takes a quarter more processor time.
"""

FLOOD_LINGER = 0.001
"""The same for a worker that has found more than one job, so that it finds several again."""


class Workers(Generic[Job]):
    """Up to ``limit`` daemon threads of a process.

    :param work: called with each job on a thread; must not raise.
    :param limit: the maximum number of threads; ``math.inf`` for no limit.
    :param name: prefix of the threads' names.
    :param are_real: True for real threads under gevent, too, where a ``threading.Thread`` is a
        greenlet of the thread that starts it.
    """

    def __init__(
        self,
        work: Callable[[Job], object],
        limit: float,
        name: str,
        *,
        are_real: bool = False,
    ) -> None:
        self._are_real = are_real
        self._work = work
        self._limit = limit
        self._name = name
        self._backlog: deque[Job] = deque()
        self._alive: dict[_Worker, None] = {}
        self._idle: list[Callable[[None], object]] = []  # the idle workers' wake()
        self._lingering: dict[_Worker, None] = {}  # workers that sleep, then look for a job
        self._numbers = count()

    @property
    def _is_beside_greenlets(self) -> bool:
        """True for real threads under gevent; each has a hub, whose files nobody closes.

        So these threads live on without work, and the number of hubs is limited.
        """
        return self._are_real and greenlets.are_threads()

    @property
    def alive(self) -> int:
        """Number of threads that run, or are about to start."""
        return len(self._alive)

    @property
    def idle(self) -> int:
        """Number of threads that wait for work."""
        return len(self._idle) + len(self._lingering)

    def submit(self, job: Job) -> bool:
        """Submit ``job`` to a thread; does not block.

        Jobs begin in the order of the calls. If a signal handler raises in this method, the
        job may or may not have been submitted: the caller must prevent a second run.

        :return: False if the job was not submitted, because no thread runs or can start.
        """
        self._backlog.append(job)
        if self._lingering or self._wake() or self._start() or self._alive:
            return True
        try:
            self._backlog.remove(job)
        except ValueError:  # a thread has done the job, and has ended since
            return True
        return False

    def _wake(self) -> bool:
        """Wake the worker that became idle last; False if no worker is idle."""
        if not self._idle:
            return False
        try:
            # Pop and call in one step: a worker that was popped but not called would never
            # wake.
            next(map(call, iter(self._idle.pop, None), (None,)))
        except IndexError as exc:
            if not is_raised_here(exc):  # there may be a worker to wake
                raise
            return False
        return True

    def _start(self) -> bool:
        if len(self._alive) >= self._limit:
            return False
        # gevent's queue, which replaces queue.SimpleQueue, serves a single thread.
        worker = _Worker(_queue.SimpleQueue if self._are_real else queue.SimpleQueue)
        try:
            self._alive[worker] = None
            if len(self._alive) > self._limit:  # another thread was as quick
                del self._alive[worker]
                return False
            name = f"{self._name}-{next(self._numbers)}"
            if self._is_beside_greenlets:
                greenlets.start_real_thread(partial(self._run, worker), name)
            else:
                start_daemon(self._run, name, worker)
        except BaseException as exc:
            # RuntimeError: no memory for a stack, or the interpreter exits. A signal handler
            # may raise after the thread has started: then that thread ends.
            self._alive.pop(worker, None)
            if not isinstance(exc, RuntimeError):
                raise
            return False
        return True

    def _run(self, worker: _Worker) -> None:
        generation = per_process.generation
        try:
            while self._wait(worker):
                has_more = len(self._backlog) > 1
                worker.linger = FLOOD_LINGER if has_more else LINGER
                if has_more and not self._lingering:  # submit() has woken this thread alone
                    self._wake() or self._start()
                self._do_jobs(generation)
                if per_process.generation != generation:
                    return
        finally:
            self._lingering.pop(worker, None)
            self._alive.pop(worker, None)
            # A submit() may have counted on this worker.
            if self._backlog and per_process.generation == generation:
                self._wake() or self._start()

    def _do_jobs(self, generation: int) -> None:
        """Do jobs until there is no backlog; wakes no further thread."""
        while True:
            try:
                job = self._backlog.popleft()
            except IndexError:
                return
            try:
                self._work(job)
            except BaseException as exc:
                if per_process.generation != generation:
                    raise  # in a child that a task has forked, whose only thread this is
                log.error("%s was stopped", self._name, exc_info=exc)
            if per_process.generation != generation:
                return
            del job  # an idle thread holds no request, and neither does an error's traceback

    def _wait(self, worker: _Worker) -> bool:
        """Wait until there is a backlog; False if the worker is to end."""
        while worker in self._alive:
            if self._backlog or self._linger(worker):
                return True
            self._idle.append(worker.wake)
            if self._backlog and self._withdraw(worker):  # submit() may have missed this worker
                return True
            try:
                worker.wakes.get(timeout=None if self._is_beside_greenlets else IDLE_TIMEOUT)
            except queue.Empty:
                if self._withdraw(worker):
                    return False
        return False

    def _linger(self, worker: _Worker) -> bool:
        """Sleep a moment, so that the next job needs no wake; True if there is a backlog."""
        if not greenlets.are_threads():  # greenlets share a thread
            self._lingering[worker] = None
            time.sleep(worker.linger)
            del self._lingering[worker]
        return bool(self._backlog)

    def _withdraw(self, worker: _Worker) -> bool:
        with suppress(ValueError):
            self._idle.remove(worker.wake)
            return True
        return False  # another thread has popped the wake, and calls it


class _Worker:
    """The queue on which an idle thread waits, and how long the thread sleeps before."""

    __slots__ = ("linger", "wake", "wakes")

    def __init__(self, simple_queue: type[queue.SimpleQueue[None]]) -> None:
        self.wakes: queue.SimpleQueue[None] = simple_queue()
        self.wake = self.wakes.put
        self.linger: float = LINGER
