"""Support for the tests of the store: rows, stores in a folder, processes that are killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support import TIMEOUT
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store

PRELUDE = """
import os, signal, sys, threading, time
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # whole, also if killed

folder = check_folder(sys.argv[1])
settings = Settings()
"""


def task(name: str = "shop.mail", *, due: float = 0.0) -> Row:
    return Row(name, '{"args": [1]}', due=due)


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def done(row: Row) -> Outcome:
    return Outcome(row, "done", 1.0, 2.0)


def work_off(store: Store) -> list[Row]:
    """Run all tasks that may run now; return their rows."""
    rows = store.read(0.0, 10_000)
    for row in rows:
        assert store.begin(row)
        store.end(done(row))
    store.tidy()
    return rows


def is_sound(store: Store) -> bool:
    with closing(sqlite3.connect(store.path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


class Child:
    """A Python process that works in a folder; ``PRELUDE`` runs before its code."""

    def __init__(self, folder: Folder, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), folder.path],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """Wait for the next line that the process tells."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def rest(self) -> list[str]:
        """Wait for the end of the process; return the lines that were not read."""
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        self._process.wait(TIMEOUT)
        return lines

    def answer(self, text: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT)


@contextmanager
def child(folder: Folder, code: str) -> Iterator[Child]:
    process = Child(folder, code)
    try:
        yield process
    finally:
        process.end()


def dead_store(folder: Folder, code: str) -> None:
    """Run ``code`` with ``store`` in a process that dies by SIGKILL afterwards."""
    store = "store = Store.own(folder, settings)\n"
    kill = "\nos.kill(os.getpid(), signal.SIGKILL)\n"
    with child(folder, store + textwrap.dedent(code) + kill) as process:
        assert process.rest() == []
        assert process._process.returncode == -signal.SIGKILL


@contextmanager
def open_folder(path: Path, settings: Settings | None = None) -> Iterator[tuple[Folder, Store]]:
    """A folder, and the store of this process."""
    folder = check_folder(os.fspath(path))
    store = Store.own(folder, settings or Settings(keep_done=(10_000, float("inf"))))
    try:
        yield folder, store
    finally:
        store.close()
