"""``wsgi-bg`` in a separate process, for the tests of the command and of the exit.

The served application prints its events to standard output and waits at gates for a byte on
standard input: a gate that works across processes.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import TIMEOUT

ROOT = str(Path(__file__).parents[2])
"""The folder of the package and its tests, from which programs of tests import too."""

MODULE = (sys.executable, "-m", "wsgi_bg")

SHOP = """
import os
from wsgi_bg import background_tasks


def say(*words):
    line = " ".join(map(str, words))
    os.write(1, line.encode() + b"\\n")  # in one piece: threads do not mix their lines


def wait():
    os.read(0, 1)  # not sys.stdin, whose lock a stuck thread would hold at the exit


def task(name="task"):
    say(name, "ran")


def slow():
    say("task begins")
    wait()
    say("task ends")
    background_tasks.add_task(task, "task of the task")


async def slow_async():
    import asyncio
    await asyncio.to_thread(slow)


def app(environ, start_response):
    do = globals()[environ["PATH_INFO"][1:] or "answer"]
    return do(environ, start_response)


def answer(environ, start_response):
    start_response("200 OK", [("Content-Length", "3")])
    return [b"ok\\n"]


def quick(environ, start_response):
    background_tasks.add_task(task)
    return answer(environ, start_response)


def stream(environ, start_response):
    background_tasks.add_task(task)
    start_response("200 OK", [("Content-Type", "text/plain")])

    def chunks():
        yield b"first\\n"
        wait()
        yield b"last\\n"

    return chunks()


def held(environ, start_response):
    background_tasks.add_task(task)
    say("request begins")
    wait()
    return answer(environ, start_response)


def echo(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["wsgi.input"].read()]


def large(environ, start_response):
    background_tasks.add_task(task)
    size = 20_000_000
    start_response("200 OK", [("Content-Length", str(size))])
    return [b"x" * size]


def plain(environ, start_response):
    background_tasks.add_task(slow)
    return answer(environ, start_response)


def coroutine(environ, start_response):
    background_tasks.add_task(slow_async)
    return answer(environ, start_response)
"""


class Command:
    """A process that serves: its output lines, its signals, its exit status."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.connections: list[http.client.HTTPConnection] = []
        self.said_first: list[str] = []
        while not (line := self.line()).startswith("Serving on "):
            assert process.poll() is None, self.end()
            self.said_first.append(line)
        self.address = line.removeprefix("Serving on ")
        self.port = int(self.address.rpartition(":")[2]) if "http:" in self.address else 0

    def line(self) -> str:
        """Return the next line of standard output."""
        stdout = self._process.stdout
        assert stdout is not None
        return stdout.readline().rstrip("\n")

    def open_gate(self) -> None:
        """Let a single task or view pass the gate."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def child(self) -> int:
        """The process id of the command's child."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def stop_accepting(
        self, number: signal.Signals = signal.SIGTERM, pid: int | None = None
    ) -> None:
        """Send the signal; return when connections are refused, or the process has ended."""
        os.kill(self._process.pid if pid is None else pid, number)
        pause = threading.Event()
        while self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), TIMEOUT).close()
            except ConnectionError:  # refused, or reset if the listener is closing just now
                return
            pause.wait(0.01)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the exit; return the exit status and the lines of standard error.

        Without the notices of a wait: on a busy machine each exit may take the second after
        which it is logged. ``next_error`` returns them.
        """
        code = self._process.wait(TIMEOUT * 2)  # communicate() would open the gates
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        assert stdout.read() == "", "more was said than the test has read"
        lines = stderr.read().splitlines()
        ignored = (":waitress", "the process ends, and waits for")
        return code, [line for line in lines if not any(part in line for part in ignored)]

    def next_error(self) -> str:
        """The next line of standard error that waitress did not write."""
        stderr = self._process.stderr
        assert stderr is not None
        while ":waitress" in (line := stderr.readline()):
            pass
        return line.rstrip("\n")

    def ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection that is closed with the process."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.connect()
        self.connections.append(connection)
        return connection

    def request(self, path: str) -> http.client.HTTPConnection:
        """Send a request on a new connection; return the connection."""
        connection = self.connect()
        connection.request("GET", path)
        return connection

    def ask(self, path: str) -> http.client.HTTPResponse:
        """Make a request; return the response as soon as the headers have arrived."""
        return self.request(path).getresponse()


@contextmanager
def running(arguments: list[str], folder: Path) -> Iterator[Command]:
    """Start a program that serves; the process ends with the block."""
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def kill() -> None:
        """Kill the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(4 * TIMEOUT, kill)  # limits each wait for a line
    limit.start()
    command = None
    try:
        command = Command(process)
        yield command
    finally:
        limit.cancel()
        kill()
        process.communicate()
        for connection in command.connections if command else []:
            connection.close()


@contextmanager
def serving(folder: Path, *options: str, app: str = "shop:app") -> Iterator[Command]:
    """``wsgi-bg shop:app --port 0`` with these options, in ``folder``."""
    write(folder, "shop", SHOP)
    port = () if "--" in options and "--listen" in " ".join(options) else ("--port", "0")
    with running([*MODULE, app, *port, *options], folder) as command:
        yield command


def write(folder: Path, module: str, source: str) -> None:
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
