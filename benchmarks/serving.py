"""Servers in separate processes, for benchmarks that need a socket.

A benchmark starts itself again with ``--serve SUBJECT``. The new process writes its port as
the first line of its output, and answers each line of its input with a line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, final

from benchmarks.measure import App

TIMEOUT = 120.0
THREADS = 4
"""The number of waitress's threads, which is its default."""

Answers = Mapping[str, Callable[[], object]]


@final
class ServerProcess:
    """A server process, controlled by the benchmark.

    :param module: the module to start with ``-m``.
    :param subject: the module's application to serve.
    :param log: the file for the server's standard error.
    """

    def __init__(self, module: str, subject: str, log: IO[str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", subject],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
        )
        self.port = int(self._read_line())

    def ask(self, question: str) -> Any:
        """Return the server process's answer to ``question``."""
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        return json.loads(self._read_line())

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server has ended: {self.process.wait(TIMEOUT)}")
        return line

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def terminate(self) -> float:
        """Send SIGTERM; return the seconds until the process has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(TIMEOUT)
        return time.monotonic() - began

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()


def connect(port: int, timeout: float = TIMEOUT) -> socket.socket:
    """Open a connection that sends without delay (``TCP_NODELAY``)."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve_waitress(app: App, answers: Answers) -> None:
    """Serve a WSGI application until the process is ended."""
    from waitress.server import create_server

    # This logger warns of each request that waits for a thread.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = create_server(app, host="127.0.0.1", port=0, threads=THREADS)
    _announce(int(server.effective_port), answers)
    server.run()


def serve_cheroot(app: App, answers: Answers) -> None:
    from cheroot.wsgi import Server

    server = Server(("127.0.0.1", 0), app)
    server.prepare()
    _announce(server.bind_addr[1], answers)
    server.serve()


def serve_uvicorn(app: Any, answers: Answers) -> None:
    """Serve an ASGI application."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    _announce(listening.getsockname()[1], answers)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


def _announce(port: int, answers: Answers) -> None:
    """Write the port, and start a thread that writes the answers.

    The thread uses the descriptors directly: a thread that waits in ``sys.stdin`` holds a
    lock that interpreter exit needs.
    """

    def answer() -> None:
        while question := os.read(0, 1024):
            reply = answers[question.decode().strip()]()
            os.write(1, json.dumps(reply).encode() + b"\n")
        os._exit(1)  # the benchmark is gone

    os.write(1, b"%d\n" % port)
    threading.Thread(target=answer, daemon=True).start()


class Counters:
    """Counts the added and the finished tasks of a server process."""

    def __init__(self) -> None:
        self.added = self.completed = 0
        self._changed = threading.Condition()

    def add(self) -> None:
        with self._changed:
            self.added += 1

    def complete(self) -> None:
        with self._changed:
            self.completed += 1
            if self.completed == self.added:
                self._changed.notify_all()

    def report(self) -> dict[str, int]:
        with self._changed:
            return {"added": self.added, "completed": self.completed}

    def drained(self) -> dict[str, int]:
        """Wait until all tasks are finished; return :meth:`report`."""
        with self._changed:
            self._changed.wait_for(lambda: self.completed == self.added, TIMEOUT)
            return self.report()

    @property
    def answers(self) -> Answers:
        return {"report": self.report, "drained": self.drained}
