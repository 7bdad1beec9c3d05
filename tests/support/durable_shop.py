"""Registered tasks for the tests of durable tasks, which later processes find by name."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from tests.support import Server, app_that, make_server_environ
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    Retry,
    background_tasks,
    registered_task,
)
from wsgi_bg import PoolRunner as PoolRunner  # for the command line below
from wsgi_bg._messages.headers import correlation_id

calls: list[Any] = []
"""Arguments of the calls in this process, in order."""

changed = threading.Condition()


def note(value: Any) -> None:
    with changed:
        calls.append(value)
        changed.notify_all()


def wait_for(count: int) -> list[Any]:
    """Block until ``count`` calls were made, and return them."""
    with changed:
        assert changed.wait_for(lambda: len(calls) >= count, 10), calls
        return list(calls)


gates: dict[str, threading.Event] = {}
begun: dict[str, threading.Event] = {}


def gate(name: str) -> threading.Event:
    begun.setdefault(name, threading.Event())
    return gates.setdefault(name, threading.Event())


class UnformattableError(Exception):
    @property
    def __suppress_context__(self) -> bool:  # type: ignore[override]
        raise OSError


@registered_task(name="durable.write")
def write(value: Any) -> None:
    """Note the call; in a process that has a log, append a line to the log."""
    note(value)
    if "DURABLE_LOG" in os.environ:
        with open(os.environ["DURABLE_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{value}\n")


@registered_task(name="durable.write_async")
async def write_async(value: Any) -> None:
    note(value)


@registered_task(name="durable.wait_at")
def wait_at(name: str) -> None:
    opened = gate(name)
    begun[name].set()
    assert opened.wait(10)
    note(name)


@registered_task(name="durable.add_at")
def add_at(name: str) -> None:
    opened = gate(name)
    begun[name].set()
    assert opened.wait(10)
    background_tasks.add_task(write, name)


@registered_task(name="durable.wait_for_line")
def wait_for_line() -> None:
    """Wait for a line on standard input: a gate that works across processes."""
    print("waits", flush=True)
    sys.stdin.readline()


@registered_task(name="durable.fail")
def fail(value: Any) -> None:
    note(value)
    raise ValueError(f"secret {value}")


@registered_task(name="durable.fail_unformattably")
def fail_unformattably() -> None:
    raise UnformattableError


@registered_task(name="durable.fail_twice", retry=Retry(3, first=0.01, jitter=False))
def fail_twice(value: Any) -> None:
    """Fail in the first two calls of this process, and add a task in each call."""
    background_tasks.add_task(note, "child")
    note(value)
    if calls.count(value) < 3:
        raise ValueError(value)


@registered_task(name="durable.fail_for_long", retry=Retry(2, first=3600))
def fail_for_long(value: Any) -> None:
    write(value)
    raise ValueError(value)


@registered_task(name="durable.flaky", retry=Retry(5, first=3600))
def flaky(value: Any) -> None:
    """Fail while the environment says so."""
    note(value)
    if "FLAKY" in os.environ:
        raise ValueError(value)


@registered_task(name="durable.wait_and_fail", retry=Retry(3, first=3600))
def wait_and_fail(name: str) -> None:
    gate(name)
    begun[name].set()
    assert gates[name].wait(10)
    raise ValueError(name)


@registered_task(name="durable.wait_and_fail_at_once")
def wait_and_fail_at_once(name: str) -> None:
    gate(name)
    begun[name].set()
    assert gates[name].wait(10)
    raise ValueError(name)


@registered_task(name="durable.add_with_delay")
def add_with_delay(name: str) -> None:
    """Add a task with a delay of an hour, and go on until the gate is open."""
    background_tasks.using(delay=3600).add_task(write, name)
    wait_at(name)


@registered_task(name="durable.add_two")
def add_two(value: Any) -> None:
    note(value)
    background_tasks.add_task(write, f"{value}.1")
    background_tasks.add_task(write, f"{value}.2")


@registered_task(name="durable.note_correlation_id")
def note_correlation_id() -> None:
    note(correlation_id.get())


@registered_task(name="durable.note_application")
def note_application() -> None:
    from flask import current_app  # here: see tests.support

    note(current_app.name if current_app else None)


@registered_task(name="durable.add_and_run_by_hand")
def add_and_run_by_hand(value: Any) -> None:
    background_tasks.add_task(write, value)
    background_tasks()


@registered_task(name="durable.add_on_a_thread")
def add_on_a_thread(value: Any) -> None:
    """Start a thread that adds a task after this task has ended."""
    tasks, context, opened = background_tasks.root, copy_context(), gate("thread")

    def add() -> None:
        assert opened.wait(10)
        tasks.add_task(write, value)
        gate("added").set()

    threading.Thread(target=context.run, args=[add]).start()


@registered_task(name="durable.add_on_a_thread_and_fail", retry=Retry(2, first=3600))
def add_on_a_thread_and_fail(value: Any) -> None:
    add_on_a_thread(value)
    raise ValueError(value)


def new_function() -> Any:
    """Return a function that is not registered yet."""
    names: dict[str, Any] = {"note": note, "__name__": __name__}
    exec("def late(value): note(value)", names)
    return names["late"]


@registered_task(name="durable.die")
def die() -> None:
    os.kill(os.getpid(), 9)


@registered_task(name="durable.hang")
def hang(value: Any) -> None:
    write(value)
    print("hangs", flush=True)
    time.sleep(60)


@registered_task(name="durable.hang_once")
def hang_once(value: Any) -> None:
    """Hang in the first call of all processes."""
    with open(os.environ["DURABLE_LOG"], "a+", encoding="utf-8") as log:
        log.seek(0)
        is_first = f"{value}\n" not in log.readlines()
    (hang if is_first else write)(value)


def handle(runner: DurableRunner, *calls: tuple[Any, ...], **options: Any) -> bytes:
    """Handle a request that adds ``calls``, each a function and its arguments."""

    def add(environ: object) -> None:
        for func, *args in calls:
            background_tasks.add_task(func, *args)

    return run_view(runner, add, **options)


def run_view(runner: DurableRunner, view: Callable[[Any], object], **options: Any) -> bytes:
    """Handle a request for which the application calls ``view(environ)``."""
    app = BackgroundTasksMiddleware(app_that(view, **options), runner=runner)
    return Server().run(app, make_server_environ())


if __name__ == "__main__":
    # A process that executes the rest of its command line with the names above.
    exec(sys.argv[1])
