"""Checks that the tasks of 100,000 requests each run once: ``python -m benchmarks.soak``.

Eight clients request all kinds of responses and tasks from a waitress in a separate process,
with the inline runner and with the pool. Some clients leave in the middle of a long stream,
some tasks raise. Half way the server gets SIGTERM, drains and exits, and a second server
takes its place. Before each SIGTERM two tasks that never end are added, to a runner with a
short drain timeout.

At the end the program compares the servers' journal with their logs: each added task has
begun once and ended, or is named in the log; no task has run twice, no task is lost. The
memory of each server, read meanwhile, must not grow. The program takes some minutes; its exit
status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

from benchmarks.serving import ServerProcess
from benchmarks.soak_report import Account, memory_line
from benchmarks.soak_server import DRAIN_TIMEOUT, LENGTHS, RUNNERS, STRICT, STUCK, TASKS

CLIENTS = 8
READINGS = 20
"""The number of readings of a server's memory."""
LONG_RUN = 20_000
"""Number of requests from which memory must not grow: the first thousands let it settle."""
RESPONSES = ["length"] * 10 + ["empty"] * 5 + ["stream"] * 5 + ["long"]


class Soak:
    """The current server, and the progress of the clients."""

    def __init__(self, requests: int, folder: Path) -> None:
        self.left = self.broken = 0
        self.failures: list[BaseException] = []
        self.memory: list[list[float]] = []
        self.half_done = threading.Event()
        self._folder = folder
        self._half = requests // 2
        self._done = 0
        self._lock = threading.Lock()  # guards the counters
        self._is_up = threading.Event()
        self._stack = ExitStack()
        self.server: ServerProcess

    def start_server(self) -> None:
        log = self._stack.enter_context((self._folder / f"{len(self.memory)}.log").open("w"))
        journal = str(self._folder / "journal")
        server = ServerProcess("benchmarks.soak_server", journal, log)
        self.server = self._stack.enter_context(server)
        self.memory.append([])
        self._is_up.set()

    def stop_server(self) -> tuple[float, int]:
        """Send SIGTERM; return the seconds until the exit, and the exit status."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.port)) as connection:
            for tasks in STUCK:
                fetch(connection, f"/{STRICT}/length/{tasks}", LENGTHS["length"])
        self._is_up.clear()
        with (self._folder / "journal").open("a") as journal:
            journal.write("SIGTERM now\n")
        took = self.server.terminate()
        return took, self.server.process.returncode

    def wait_for_server(self) -> int:
        """Wait until a server is up; return its port."""
        self._is_up.wait()
        return self.server.port

    def failed(self, port: int, exc: BaseException) -> None:
        """Count a broken connection; it is a failure unless the server is stopping."""
        with self._lock:
            self.broken += 1
            if self._is_up.is_set() and port == self.server.port:
                self.failures.append(exc)

    def finish(self, *, left: bool) -> None:
        """Count a finished request."""
        with self._lock:
            self._done += 1
            self.left += left
            if self._done % max(1, self._half // READINGS) == 0 and self._is_up.is_set():
                self.memory[-1].append(self.server.memory())
            if self._done == self._half:
                self.half_done.set()

    def close(self) -> None:
        self._stack.close()


def run_client(soak: Soak, requests: int, random: Random) -> None:
    connection: http.client.HTTPConnection | None = None
    for _ in range(requests):
        response = random.choice(RESPONSES)
        path = f"/{random.choice(list(RUNNERS))}/{response}/{random.choice(list(TASKS))}"
        leaves = response == "long" and random.random() < 0.8
        while True:
            port = soak.wait_for_server()
            if connection is None or connection.port != port:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                fetch(connection, path, LENGTHS[response], random if leaves else None)
            except (OSError, http.client.HTTPException) as exc:
                soak.failed(port, exc)
                connection.close()
            else:
                break
        soak.finish(left=leaves)
    if connection is not None:
        connection.close()


def fetch(
    connection: http.client.HTTPConnection,
    path: str,
    length: int,
    leaves: Random | None = None,
) -> None:
    """Make a request, read all or a part of the body, and leave."""
    connection.request("GET", path)
    response = connection.getresponse()
    if leaves is not None:
        response.read(leaves.randrange(length // 2))
        connection.close()
        response.close()
    elif len(response.read()) != length or response.status not in (200, 204):
        raise http.client.HTTPException(f"{path}: {response.status}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.requests, Path(folder))
        soak.start_server()
        share = options.requests // CLIENTS
        clients = [
            threading.Thread(
                target=run_client, args=(soak, share, Random(f"{options.seed} {number}"))
            )
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        soak.half_done.wait()
        stops = [soak.stop_server()]
        soak.start_server()
        for client in clients:
            client.join()
        stops.append(soak.stop_server())
        soak.close()
        account = Account(Path(folder))
    took = time.monotonic() - began
    print(
        f"CPython {sys.version.split()[0]}: {share * CLIENTS} requests from {CLIENTS} clients "
        f"in {took:.0f} s, seed {options.seed}\n"
        f"    {soak.left} clients left in the middle; {soak.broken} connections broke when "
        f"the server ended, {len(soak.failures)} at another time"
    )
    wrong = account.report()
    wrong += [f"a connection broke: {exc!r}" for exc in soak.failures]
    for number, (seconds, status) in enumerate(stops):
        print(f"server {number + 1}: ended {seconds:.1f} s after SIGTERM with status {status}")
        if status or seconds > DRAIN_TIMEOUT + 1:
            wrong.append(f"server {number + 1} ended after {seconds:.1f} s with {status}")
        wrong += memory_line(soak.memory[number], judge=options.requests >= LONG_RUN)
    print("\nWRONG: " + "\n       ".join(wrong) if wrong else "\nall is well")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
