"""Limits of the exit of a gunicorn worker; tests/servers starts real workers.

The worker is a mock with the attributes of gunicorn's that the hooks use, in a new process.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import run_python
from wsgi_bg import gunicorn

WORKER = """
import math, os, signal, tempfile, threading, time
from types import SimpleNamespace
from tests.support import submit
from wsgi_bg import PoolRunner, gunicorn

never, drains = threading.Event(), threading.Event()

class Pool(PoolRunner):
    def drain(self, timeout):
        drains.set()
        return super().drain(timeout)

pool = Pool(drain_timeout=20)

class Worker:
    handler = signal.SIG_DFL

    def __init__(self, graceful_timeout, **attributes):
        self.cfg = SimpleNamespace(graceful_timeout=graceful_timeout)
        self.tmp = tempfile.TemporaryFile()
        self.heartbeat = os.dup(self.tmp.fileno())
        vars(self).update(attributes)

    def load_wsgi(self):
        pass

    def init_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self.handler)

    def last_beat(self):
        return os.fstat(self.heartbeat).st_mtime

def kill(number, is_done):
    # Again: the main thread misses a signal if it is about to wait, or if there are two
    # and another thread gets the second.
    while not is_done():
        os.kill(os.getpid(), number)
        never.wait(0.05)

def wait_for_ever():
    never.wait()

def begin(worker):
    gunicorn.post_fork(None, worker)
    worker.init_signals()
    worker.load_wsgi()
    return worker

def end(worker):
    worker.tmp.close()
    gunicorn.worker_exit(None, worker)
"""

UNFINISHED = "wait_for_ever was not finished"


def test_the_arbiter_does_not_drain_for_a_worker_that_is_gone() -> None:
    gunicorn.worker_exit(None, SimpleNamespace())


def test_a_worker_that_exits_by_itself_has_the_drain_time_and_a_heartbeat() -> None:
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(30))
beats = []
submit(pool, lambda: never.wait(0), lambda: beats.append(worker.last_beat()))
now = time.monotonic()
end(worker)
print(18 < worker.last_beat() - now < 35, len(beats))
"""
    )
    assert ended.stdout == "True 1\n", ended.stderr
    assert "was not finished" not in ended.stderr


def test_a_drain_without_a_limit_has_a_heartbeat() -> None:
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(30))
now = time.monotonic()
is_alive = lambda: worker.last_beat() - now > 1e9
submit(Pool(drain_timeout=math.inf), lambda: print(drains.wait(10), is_alive()))
end(worker)
"""
    )
    assert ended.stdout == "True True\n", ended.stderr
    assert ended.returncode == 0, ended.stderr


def test_after_a_signal_the_drain_ends_a_second_before_the_graceful_timeout() -> None:
    ended = run_python(
        WORKER
        + """
def stop(number, frame):
    print("handled")

worker = begin(Worker(1.2, handler=stop))
submit(pool, wait_for_ever)
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
try:
    end(worker)
finally:
    print(worker.last_beat() - time.monotonic() < 0.2)
"""
    )
    assert ended.stdout == "handled\nhandled\nTrue\n", ended.stderr
    assert ended.returncode == 0
    assert UNFINISHED in ended.stderr


def test_if_no_time_is_left_the_tasks_are_named_at_once() -> None:
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(0, handler=lambda *_: None))
submit(pool, wait_for_ever)
signal.raise_signal(signal.SIGTERM)
end(worker)
"""
    )
    assert ended.returncode == 0
    assert ended.stderr.count(UNFINISHED) == 1


def test_a_worker_that_a_signal_would_end_at_once_leaves_by_an_exit() -> None:
    """uvicorn's worker: its server raises the signal again after the last request."""
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(1.5, config=SimpleNamespace(timeout_notify=15)))
print(worker.config.timeout_notify)
submit(pool, wait_for_ever)
os.utime(worker.heartbeat, (time.monotonic(),) * 2)
try:
    signal.raise_signal(signal.SIGTERM)
except SystemExit:
    try:
        end(worker)
    finally:
        print(worker.last_beat() - time.monotonic() < 0.5)
"""
    )
    assert ended.stdout == "0\nTrue\n", ended.stderr
    assert UNFINISHED in ended.stderr


def test_after_a_signal_each_runner_has_its_own_drain_time_at_most() -> None:
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(25, handler=lambda *_: None))
short = PoolRunner(drain_timeout=0.1)
submit(short, wait_for_ever)
signal.raise_signal(signal.SIGTERM)
end(worker)
"""
    )
    assert "wait_for_ever was not finished within the drain time of 0.1 seconds" in (
        ended.stderr
    )


def test_a_signal_shortens_a_drain_that_goes_on() -> None:
    ended = run_python(
        WORKER
        + """
def stop():
    drains.wait()
    kill(signal.SIGTERM, lambda: worker.wsgi_bg_exit._ends_at < math.inf)

worker = begin(Worker(0.5, handler=lambda *_: print("handled")))
submit(pool, wait_for_ever)
submit(pool, stop)
end(worker)
print("not reached")
"""
    )
    assert set(ended.stdout.split()) == {"handled"}, ended.stderr
    assert ended.returncode == 0
    assert UNFINISHED in ended.stderr


def test_a_drain_under_uvicorn_goes_on_at_sigterm_and_ends_at_sigint() -> None:
    ended = run_python(
        WORKER
        + """
def stop():
    drains.wait()
    kill(signal.SIGTERM, lambda: worker.wsgi_bg_exit._ends_at < math.inf)
    print("goes on")
    kill(signal.SIGINT, lambda: worker.wsgi_bg_exit._notice is None)

worker = begin(Worker(30))
submit(pool, wait_for_ever)
submit(pool, stop)
end(worker)
print("not reached")
"""
    )
    assert ended.stdout == "goes on\n", ended.stderr
    assert ended.returncode == 0
    assert UNFINISHED in ended.stderr


def test_the_sigquit_by_which_gunicorn_passes_a_ctrl_c_on_ends_no_drain() -> None:
    ended = run_python(
        WORKER
        + """
def leave(number, frame):
    raise SystemExit

def ends(number):
    try:
        signal.raise_signal(number)
    except SystemExit:
        return True
    return False

begin(Worker(30, handler=leave))
order = (signal.SIGINT, signal.SIGQUIT, signal.SIGQUIT, signal.SIGINT, signal.SIGINT)
print(*map(ends, order))
"""
    )
    assert ended.stdout == "True False True False True\n", ended.stderr


def test_uvicorns_worker_stops_at_sigquit_as_at_sigterm() -> None:
    """Its own ``handle_exit`` does not stop its server, and gunicorn kills the worker."""
    ended = run_python(
        WORKER
        + """
worker = begin(Worker(30, config=SimpleNamespace(timeout_notify=30)))
try:
    worker.handle_exit(signal.SIGQUIT, None)
except SystemExit:
    print("stops", worker.wsgi_bg_exit._ends_at < math.inf)
"""
    )
    assert ended.stdout == "stops True\n", ended.stderr


@pytest.mark.parametrize(
    ("begins_with", "leaves", "number"),
    [
        # The worker of uvicorn, and gunicorn's own of the name asgi with uvloop and asyncio.
        ("SIG_DFL", "signal.signal(signal.SIGQUIT, loop.handle)", "SIGQUIT"),
        ("loop.handle", "", "SIGQUIT"),
        ("SIG_DFL", "signal.signal(signal.SIGINT, signal.default_int_handler)", "SIGINT"),
    ],
    ids=["uvicorn", "uvloop", "asyncio"],
)
def test_a_handler_that_a_closed_loop_leaves_behind_keeps_no_drain_going(
    begins_with: str, leaves: str, number: str
) -> None:
    ended = run_python(
        WORKER
        + f"""
import asyncio
from signal import SIG_DFL

class Loop(asyncio.SelectorEventLoop):
    def handle(self, number, frame):
        pass

def stop():
    drains.wait()
    kill(signal.{number}, lambda: worker.wsgi_bg_exit._notice is None)

loop = Loop()
worker = begin(Worker(30, handler={begins_with}))
{leaves}
loop.close()
submit(pool, wait_for_ever)
submit(pool, stop)
end(worker)
print("not reached")
"""
    )
    assert ended.stdout == "", ended.stderr
    assert ended.returncode == 0
    assert UNFINISHED in ended.stderr


def test_the_warning_names_gunicorns_limit_and_the_signal_that_ends_the_wait() -> None:
    ended = run_python(
        WORKER
        + """
import logging

class EndTask(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
        never.set()

logging.getLogger("wsgi_bg").addHandler(EndTask())
worker = begin(Worker(12, handler=lambda *_: None))
submit(pool, wait_for_ever)
signal.raise_signal(signal.SIGTERM)
end(worker)
""",
        with_waits=True,
    )
    assert ended.stdout == (
        "the process ends, and waits for 1 background task (1 __main__.wait_for_ever): "
        "for 10 s more at most; SIGQUIT ends the wait\n"
    ), ended.stderr
