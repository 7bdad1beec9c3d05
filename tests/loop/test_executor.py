"""The executor behind ``asyncio.to_thread`` and host look-ups on the portal's loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from tests.support import (
    TIMEOUT,
    Gate,
    Subject,
    run_python,
    submit,
)
from wsgi_bg import PoolRunner
from wsgi_bg._loop.executor import LoopExecutor


def test_a_task_may_use_a_thread_and_a_host_name_while_the_exit_waits() -> None:
    """The standard library's executor accepts no calls any more by then."""
    done = run_python(
        """
        import asyncio, sys, threading
        from tests.support import submit
        from wsgi_bg import PoolRunner

        leaving, begun = threading.Event(), threading.Event()

        async def task():
            await asyncio.to_thread(begun.set)
            while not leaving.is_set():
                await asyncio.sleep(0.001)
            print(await asyncio.to_thread(lambda: "on a thread"))
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
            print("looked up")

        submit(PoolRunner(), task)
        assert begun.wait(10)
        threading._register_atexit(leaving.set)
        """
    )
    assert done.stdout == "on a thread\nlooked up\n", done.stderr


def test_a_function_stuck_in_asyncios_thread_does_not_keep_the_process() -> None:
    done = run_python(
        """
        import asyncio, threading
        from tests.support import submit
        from wsgi_bg import PoolRunner

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        async def task():
            await asyncio.to_thread(stuck)

        submit(PoolRunner(drain_timeout=0.2), task)
        assert begun.wait(10)
        """,
        timeout=20,
    )
    assert done.returncode == 0
    assert "background task __main__.task was not finished" in done.stderr


def test_a_function_that_is_cancelled_before_a_thread_takes_the_call_is_not_called(
    gate: Gate,
) -> None:
    executor, seen = LoopExecutor(), list[str]()
    for _ in range(int(executor._workers._limit)):
        executor.submit(gate.task)
    cancelled = executor.submit(seen.append, "cancelled")
    last = executor.submit(seen.append, "last")
    assert cancelled.cancel()
    gate.open()
    last.result(TIMEOUT)
    assert seen == ["last"]


def test_a_function_for_which_there_is_no_thread_is_called_right_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulate that no thread can start: using up the real memory would end the tests."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert LoopExecutor().submit(threading.get_ident).result(0) == threading.get_ident()


@pytest.mark.usefixtures("no_collection")
def test_an_error_in_asyncios_thread_keeps_no_argument() -> None:
    runner, subjects = PoolRunner(), [Subject()]
    freed = subjects[0].freed

    async def fail() -> None:
        with suppress(ValueError):
            await asyncio.to_thread(subjects.pop().fail)

    submit(runner, fail)
    assert freed.wait(TIMEOUT)


def test_an_error_in_asyncios_thread_is_the_tasks() -> None:
    async def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    runner = PoolRunner()
    submit(runner, fail)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 1
