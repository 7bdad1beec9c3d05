"""The example with Celery: started as a reader would start the example, with its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import text_of, wait_until
from tests.support.celery import redis_server
from tests.support.examples import FOLDER, TIMEOUT, Example, ask, serving

EXAMPLE = Example(
    "celery_app.py",
    "POST",
    "/reports/ada@example.com",
    "",
    '{"message":"Report ordered"}\n',
    "To ada@example.com: Your report is on its way\n",
)
REPORT = "Report for ada@example.com\n"


@contextmanager
def worker(folder: Path) -> Iterator[None]:
    """The docstring's command, run in ``folder`` instead of the repository."""
    with (folder / "worker").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "examples.celery_app:queue", "worker"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(FOLDER.parent), "DELAY": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and the child processes
        process.wait(TIMEOUT)


@pytest.mark.parametrize("broker", ["filesystem", "redis"])
def test_the_light_task_runs_here_and_the_heavy_task_on_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, broker: str
) -> None:
    if broker == "redis":
        with redis_server(tmp_path) as server:
            monkeypatch.setenv("BROKER", server.url)
            order_and_wait(tmp_path)
    else:
        order_and_wait(tmp_path)


def order_and_wait(folder: Path) -> None:
    log = folder / "log.txt"
    with serving(EXAMPLE, folder, delay=0) as port:
        assert ask(EXAMPLE, port) == EXAMPLE.answer
        assert wait_until(lambda: text_of(log) == EXAMPLE.line), text_of(folder / "stderr")
    with worker(folder):  # after the application has ended
        assert wait_until(lambda: text_of(log) == EXAMPLE.line + REPORT), text_of(
            folder / "worker"
        )


def test_the_docstring_has_the_commands_to_run_and_ask_the_example() -> None:
    docstring = EXAMPLE.source.split('"""')[1]
    assert f"    python examples/{EXAMPLE.name} [PORT]\n" in docstring
    assert "    celery -A examples.celery_app:queue worker\n" in docstring
    assert f"http://127.0.0.1:8080{EXAMPLE.path}\n" in docstring


def test_the_example_is_shorter_than_50_lines() -> None:
    assert len(EXAMPLE.source.splitlines()) < 50
