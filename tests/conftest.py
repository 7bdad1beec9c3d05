"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import table
from tests.support import TIMEOUT, Clock, Gate
from tests.support.brokers import RabbitServer, RedisServer, rabbit_server, redis_server
from wsgi_bg._loop import executor, portal, shared_portal
from wsgi_bg._loop.portal import PortalThread
from wsgi_bg._outbox.stored import StoredMessages
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._request.layer import everywhere
from wsgi_bg._request.unclosed import Collector, collectors
from wsgi_bg._status.recorder import recorder
from wsgi_bg._store import store as stores
from wsgi_bg._tasks.task import current
from wsgi_bg.runners import shutdown, timer
from wsgi_bg.runners.ledger import ledgers_here

pytest_plugins = ["pytester", "tests.support.django_fixtures"]

# pytest parses each module that is imported. In Python 3.11 that fails while another thread
# formats a traceback, so the loop's thread must not be the first that imports these.
LOADED_EARLY = (executor, shared_portal)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Not in tests/servers/conftest.py, which only the workers of pytest -n load.
    table.write(terminalreporter)


@pytest.fixture(autouse=True)
def recorder_is_off() -> Iterator[None]:
    """Let each test begin with a recorder that records nothing."""
    recorder.turn_off()
    yield
    recorder.turn_off()
    everywhere.clear()


class Log:
    """The log records of the package."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def at(self, level: int) -> list[str]:
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name == "wsgi_bg" and record.levelno == level
        ]

    @property
    def warnings(self) -> list[str]:
        return self.at(logging.WARNING)

    @property
    def errors(self) -> list[str]:
        return self.at(logging.ERROR)

    @property
    def tracebacks(self) -> list[BaseException]:
        return [
            record.exc_info[1]
            for record in self._caplog.records
            if record.name == "wsgi_bg" and record.exc_info and record.exc_info[1]
        ]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.DEBUG, logger="wsgi_bg")
    return Log(caplog)


@pytest.fixture
def no_request_left() -> Iterator[None]:
    """End the request that an interrupted middleware may have left on this thread."""
    nothing: Any = None
    token = current.set(nothing)
    yield
    current.reset(token)


@pytest.fixture(autouse=True)
def no_message_left() -> Iterator[None]:
    """Give up the messages and waits that a test has left: the next test would see them."""
    yield
    for ledger in ledgers_here():
        ledger.abandon_unsent()
        ledger.abandon_waiting()
    close_stores()


def close_stores() -> None:
    """Close the files of durable tasks that a test has left, unless a task still runs.

    Hundreds of tests open several each, and waitress waits by ``select()``, which knows no file
    descriptor above 1,023.
    """
    of_runners = ("wsgi_bg-durable", "wsgi_bg-outbox-files")
    threads: list[Any] = [each for each in threading.enumerate() if each.name in of_runners]
    for thread in threads:
        state = thread._target.__self__
        if isinstance(state, StoredMessages):
            state.stop(lambda: 0)
        elif state.ledger.batches:
            return
        else:
            state.stop_reading()
            state.end()
    for thread in threads:
        thread.join(TIMEOUT)
    for own in list(stores._own.values()):
        store = own.peek()
        if store is not None:
            store.close()


@pytest.fixture
def one_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a single thread of each new outbox send, so that messages arrive in their order."""
    monkeypatch.setattr("wsgi_bg._outbox.outbox.SENDERS", 1)


@pytest.fixture
def own_collector(monkeypatch: pytest.MonkeyPatch) -> Collector:
    """Replace the collector for the test; ``wait()`` flushes the process's own afterwards."""
    collectors.get()
    monkeypatch.setitem(shutdown._collectors, os.getpid(), shutdown._collectors[os.getpid()])
    return Collector()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that opens at the end of the test, also if the test fails."""
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ for all tests of the process, each with a ``fresh()`` virtual host."""
    with rabbit_server(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for all tests of the process, each with a ``fresh()`` database."""
    with redis_server(tmp_path_factory.mktemp("redis"), keeps=True) as server:
        yield server


@pytest.fixture(scope="session")
def clock_of_process() -> Clock:
    return Clock()


@pytest.fixture
def clock(clock_of_process: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Let tasks wait by a clock that only the test moves; drop tasks that wait at the end."""
    timers = PerProcess(lambda: clock_of_process.timer)
    monkeypatch.setattr(timer, "timers", timers)
    yield clock_of_process
    for ledger in ledgers_here():
        ledger.abandon_waiting()


@pytest.fixture
def loop() -> None:
    """Start the portal with a first async batch."""
    portal.portal()


@pytest.fixture
def no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the portal start anew in the test."""
    monkeypatch.setattr(portal, "_threads", PerProcess(PortalThread))


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
