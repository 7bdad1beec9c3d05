"""Processes that share a folder of durable tasks, and the command that looks at the folder."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support import TIMEOUT, run_python, text_of, wait_until
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.rows import Row

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "wsgi_bg", "tasks")

Result = subprocess.CompletedProcess[str]


class Shop:
    """Processes that share a folder of durable tasks and a log of the calls."""

    def __init__(self, path: Path) -> None:
        self.folder = path / "tasks"
        self._log = path / "calls"

    @property
    def calls(self) -> list[str]:
        """The arguments of the calls of all processes so far."""
        return text_of(self._log).splitlines()

    @property
    def states(self) -> list[str]:
        """The states of all tasks that are not done."""
        found = list_tasks(check_folder(self.folder))
        return [each.outcome.state for each in found if each.outcome.state != "done"]

    @property
    def dues(self) -> list[bool]:
        """For each task that is not done: True if it waits for its time."""
        found = list_tasks(check_folder(self.folder))
        return [each.outcome.row.due > 0 for each in found if each.outcome.state != "done"]

    @contextmanager
    def process(self, code: str, options: str = "") -> Iterator[subprocess.Popen[str]]:
        """Run ``code``, which has a ``runner``, in a process that is killed at the end."""
        runner = f"runner = DurableRunner({str(self.folder)!r}, {options})\n"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.durable_shop",
                runner + textwrap.dedent(code),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "DURABLE_LOG": str(self._log)},
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def run_all(self, count: int, options: str = "") -> None:
        """Run a process until ``count`` calls were made in all."""
        with self.process("runner.start(); input()", options):
            assert wait_until(lambda: len(self.calls) >= count), self.calls


def said(process: subprocess.Popen[Any], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait(TIMEOUT)


def tasks(path: Path, *arguments: str, **environ: str) -> Result:
    """Run the command on the folder ``path``."""
    return subprocess.run(
        [*COMMAND, str(path), *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=3 * TIMEOUT,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environ},
    )


def listed(shop: Shop, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        tasks(shop.folder, "list", "--json", *arguments).stdout
    )
    return found


def id_of(shop: Shop, name: str) -> str:
    (found,) = [task["id"] for task in listed(shop) if task["name"] == name]
    return str(found)


@contextmanager
def at_gate(
    shop: Shop, rest: str = "threading.Event().wait()"
) -> Iterator[subprocess.Popen[str]]:
    """A process with a failed task, a task that waits for a line, and two behind that one."""
    code = f"""
        handle(runner, (fail, 1), (wait_for_line,), (write, 2), (add_two, 3))
        {rest}
        """
    with shop.process(code) as process:
        said(process, "waits")
        assert wait_until(lambda: "failed" in shop.states)  # when its end is written
        yield process


def leave_failed(shop: Shop, *values: int) -> None:
    """Leave failed tasks of a process that was killed."""
    calls = ", ".join(f"(fail, {value})" for value in values)
    with shop.process(f"handle(runner, {calls}); input()") as process:
        assert wait_until(lambda: shop.states == ["failed"] * len(values)), shop.states
        kill(process)


def change(shop: Shop, statement: str, *values: Any) -> None:
    (path,) = shop.folder.glob("*.sqlite")
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(statement, values)


def forge(shop: Shop, table: str, *values: Any) -> None:
    """Insert a row; bytes become a text, which may be no UTF-8."""
    marks = ("CAST(? AS TEXT)" if type(value) is bytes else "?" for value in values)
    change(shop, f"INSERT INTO {table} VALUES ({', '.join(marks)})", *values)


def requests_of_a_dead_process(path: Path, *requests: list[Row]) -> None:
    """Leave the rows of several requests."""
    code = f"""
    import os
    from wsgi_bg._store.folder import check_folder
    from wsgi_bg._store.rows import Row, Settings
    from wsgi_bg._store.store import Store
    store = Store.own(check_folder({str(path)!r}), Settings())
    for rows in {requests!r}:
        store.add(rows)
    os._exit(0)
    """
    assert run_python(code).returncode == 0


def left_by_a_dead_process(path: Path, *rows: Row) -> None:
    """Leave the rows of one request."""
    requests_of_a_dead_process(path, [*rows])


def open_files(path: Path) -> set[str]:
    """The names of the files in ``path`` that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {os.path.basename(each) for each in found if os.path.dirname(each) == str(path)}
