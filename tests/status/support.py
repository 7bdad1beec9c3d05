"""Requests whose tasks are recorded, in this process and in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import TIMEOUT, Server, app_that, make_server_environ
from tests.support.command import ROOT
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, background_tasks


def handle(
    *functions: Callable[[], Any], path: str = "/", **options: Any
) -> list[BackgroundTask]:
    """Handle a request that adds tasks; return the tasks."""
    added: list[BackgroundTask] = []

    def add() -> None:
        added.extend(background_tasks.add_task(function) for function in functions)
        assert all(task.id for task in added)  # reads the ids

    visit(add, path=path, **options)
    return added


def visit(view: Callable[[], object], path: str = "/", **options: Any) -> None:
    """Handle a request that calls ``view()``."""
    app = app_that(lambda environ: view())
    environ = make_server_environ(PATH_INFO=path)
    Server().run(BackgroundTasksMiddleware(app, **{"status": True, **options}), environ)


class Process:
    """Another process, which says lines and waits for lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid: int = process.pid

    def line(self) -> str:
        """The next line that the process says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def tell(self) -> None:
        """Let the process go on behind ``input()``."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(TIMEOUT)

    def end(self) -> int:
        """Wait until the process has ended by itself."""
        self.tell()
        return self._process.wait(2 * TIMEOUT)


@contextmanager
def process(code: str, folder: Path) -> Iterator[Process]:
    """Run ``code`` in a process that is killed at the end; ``PATH`` is ``folder`` there."""
    head = f"""
import os
from tests.status.support import fail, handle, hang, nothing, say, visit
from tests.support import app_that, respond
from wsgi_bg import BackgroundTasksMiddleware, DurableRunner, PoolRunner, background_tasks
from wsgi_bg import status, wait
PATH = {str(folder)!r}
"""
    with subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as started:
        try:
            yield Process(started)
        finally:
            started.kill()


def say(text: str) -> None:
    """Say a line in one piece, so that threads do not mix their lines."""
    os.write(1, f"{text}\n".encode())


def nothing() -> None:
    """A task that does nothing."""


def fail() -> None:
    """A task that fails."""
    raise ValueError("not today")


def hang() -> None:
    """A task that says so, and never returns."""
    say("hangs")
    threading.Event().wait()
