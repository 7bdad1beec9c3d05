"""The test's side of the gate: which tasks wait, which may go on, and how each run ended."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from tests.support import TIMEOUT


class Run:
    """A run of a task, in any process.

    :ivar ended: ``"passed"``; ``"late"`` if the gate stayed shut for too long; ``""`` if the
        process ended first.
    """

    def __init__(self, token: str, pid: int, connection: socket.socket) -> None:
        self.token = token
        self.pid = pid
        self.ended: Future[str] = Future()
        self._connection = connection

    def go(self) -> None:
        with suppress(OSError):  # the process has ended; the report shows that
            self._connection.sendall(b"go\n")

    @property
    def passed(self) -> bool:
        """True if the task has passed the gate in time; blocks until that is known."""
        return self.ended.result(TIMEOUT) == "passed"


class Control:
    """Listens on loopback for the runs of tasks in all server processes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._changed = threading.Condition()  # guards the next two fields
        self._runs: list[Run] = []
        self._open: set[str] = set()
        self._tests: dict[str, str] = {}  # by token
        self._in_thread(self._accept)

    def token(self) -> str:
        """Make a new token for a task."""
        token = f"task{len(self._tests)}"
        self._tests[token] = os.environ["PYTEST_CURRENT_TEST"]
        return token

    def go(self, token: str) -> None:
        """Open the gate for all runs of the task, future runs included."""
        with self._changed:
            self._open.add(token)
            for run in self._runs:
                if run.token == token:
                    run.go()

    def run(self, token: str) -> Run:
        """The first run of the task; blocks until the run waits at the gate."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.runs(token), TIMEOUT)
        assert came, f"{token} did not run"
        return self.runs(token)[0]

    def runs(self, token: str) -> list[Run]:
        """The runs of the task so far."""
        return [run for run in self._runs if run.token == token]

    def let_through(self, token: str) -> bool:
        """Open the gate for the task; return True if the task passed. Blocks."""
        self.go(token)
        return self.run(token).passed

    def repeated(self) -> list[str]:
        """The tests whose tasks ran more than once."""
        count = Counter(run.token for run in self._runs)
        return [self._tests[token.partition("-")[0]] for token in count if count[token] > 1]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _in_thread(self, func: Callable[..., object], *args: object) -> None:
        threading.Thread(target=func, args=args, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._in_thread(self._serve, self._listener.accept()[0])

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("r") as lines:
            token, pid = lines.readline().split()
            run = Run(token, int(pid), connection)
            with self._changed:
                self._runs.append(run)
                if token in self._open:
                    run.go()
                self._changed.notify_all()
            try:
                run.ended.set_result(lines.readline().strip())
            except OSError:
                run.ended.set_result("")
