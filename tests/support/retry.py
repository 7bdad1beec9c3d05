"""Runners, tasks that fail at first, and requests, for the tests of retries and delays."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, Server, app_that, make_server_environ
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, InlineRunner, PoolRunner, Retry
from wsgi_bg.runners import Statistics

SOON = Retry(first=60, jitter=False)


class Own:
    """A user's runner, with the three methods of the protocol and nothing else."""

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self.submitted: list[tuple[bool, bool]] = []
        self._threads: list[threading.Thread] = []

    def submit(self, batch: Any) -> None:
        main = threading.current_thread() is threading.main_thread()
        self.submitted.append((batch.response_complete, main))
        if self._at_once and batch.response_complete:
            batch.run()
        else:
            thread = threading.Thread(target=batch.run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def drain(self, timeout: float) -> list[BackgroundTask]:
        for thread in list(self._threads):
            thread.join(timeout)
        return []

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0)


RUNNERS: dict[str, Callable[[], Any]] = {
    "inline": InlineRunner,
    "pool": PoolRunner,
    "own": lambda: Own(at_once=False),
    "own that runs at once": lambda: Own(at_once=True),
}

each_runner = pytest.mark.parametrize("runner", RUNNERS)
each_kind = pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])


class Calls:
    """A task that raises in its first calls; the test waits for each call."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self._failures = failures
        self._error = error or ValueError("not yet")
        self._done = threading.Semaphore(0)
        self.count = 0
        self.during: Callable[[], object] = lambda: None

    def make(self, is_async: bool) -> Callable[[], Any]:
        async def call_async() -> None:
            await asyncio.sleep(0)
            self.task()

        return call_async if is_async else self.task

    def task(self) -> None:
        self.count += 1
        try:
            self.during()
            if self.count <= self._failures:
                raise self._error
        finally:
            self._done.release()

    def wait(self) -> None:
        assert self._done.acquire(timeout=TIMEOUT), "the task was not called"


def request(
    add: Callable[[], object], runner: Any = None, *, complete: bool = True, **options: Any
) -> None:
    app = app_that(lambda environ: add(), headers=[("Content-Length", "2")] * complete)
    app = BackgroundTasksMiddleware(app, runner=runner or InlineRunner(), **options)
    Server().run(app, make_server_environ())


def logged(log: Log, words: str) -> bool:
    return any(words in message for message in log.warnings + log.errors)


def settle(predicate: Callable[[], object]) -> None:
    """Wait for an effect that sets no event, such as the end of a batch."""
    deadline = time.monotonic() + TIMEOUT
    pause = threading.Event()
    while not predicate():
        assert time.monotonic() < deadline
        pause.wait(0.001)
