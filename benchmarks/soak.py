"""100,000 requests, and each of their tasks run once: ``python -m benchmarks.soak``.

Eight clients ask a waitress in a process of its own for all kinds of responses and tasks,
of the inline runner and of the pool. Some leave in the middle of a long stream, some tasks
raise. Half way the server gets SIGTERM, drains and ends, and a second one takes its place.
Before each SIGTERM come two tasks that never end, in a runner with a short drain time.

In the end the journal of the servers is compared with their logs: each task that was added
has begun once and ended, or is named in the log; none was run twice, none is lost. The
memory of each server, read along the way, must not grow. Takes some minutes; ends with 1 if
something is wrong.
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
"""Of a server's memory."""
LONG_RUN = 20_000
"""Requests from which on a growing memory is wrong: it takes some thousand to settle."""
RESPONSES = ["length"] * 10 + ["empty"] * 5 + ["stream"] * 5 + ["long"]


class Soak:
    """The servers, one after the other, and how far the clients are."""

    def __init__(self, requests: int, folder: Path) -> None:
        self.left = self.broken = 0
        self.failures: list[BaseException] = []
        self.memory: list[list[float]] = []
        self.half_done = threading.Event()
        self._folder = folder
        self._half = requests // 2
        self._done = 0
        self._lock = threading.Lock()  # guards the numbers
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
        """How long the server took to end after SIGTERM, and its exit status."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.port)) as connection:
            for tasks in STUCK:
                fetch(connection, f"/{STRICT}/length/{tasks}", LENGTHS["length"])
        self._is_up.clear()
        with (self._folder / "journal").open("a") as journal:
            journal.write("SIGTERM now\n")
        took = self.server.terminate()
        return took, self.server.process.returncode

    def wait_for_server(self) -> int:
        """Wait until a server is up; its port."""
        self._is_up.wait()
        return self.server.port

    def failed(self, port: int, exc: BaseException) -> None:
        """Note a connection that broke; for all but a server that ends that is wrong."""
        with self._lock:
            self.broken += 1
            if self._is_up.is_set() and port == self.server.port:
                self.failures.append(exc)

    def finish(self, *, left: bool) -> None:
        """Note a request that is over."""
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
    """Make a request and read its body, or a part of it, and leave."""
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
