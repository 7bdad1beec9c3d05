"""Kills servers at random moments and counts durable tasks: ``python -m benchmarks.kill``.

Eight clients make requests that add one to five durable tasks, first to ``gunicorn`` with three
workers, then to ``wsgi-bg``; both use one folder. Meanwhile the program sends SIGKILL, SIGTERM,
or SIGSTOP and later SIGCONT, to a worker and now and then to the master, starts a server that
has ended again, and checks each SQLite file. At last a new process works the folder off.

A journal on disk has a line for each task that begins or ends. A client
keeps the requests that were answered with success. The program ends with an
``AssertionError`` if

- a task of such a request has not ended ("lost");
- a task began again in a process that had begun it, or while the process that had begun it
  first lived, which shows by a later line of that process ("twice alive"). Tasks that began
  again after the death of the process are allowed, and only counted;
- a task began before the tasks of its request that were added before it had ended ("order");
- a file is damaged ("integrity").

``--requests`` and ``--kills`` are for both servers together. The program prints its seed: the
same seed chooses the same signals, but the moments are those of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

from wsgi_bg import BackgroundTasksMiddleware, DurableRunner, background_tasks, registered_task
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks

CLIENTS = 8
TASKS = 5
LONGEST = 0.01
LONG, OF_LONG = 0.3, 0.005
"""The length of a long task in seconds, and how many tasks are long."""
DRAIN_TIMEOUT = 0.2
"""Shorter than a long task: the drain after a SIGTERM cuts some tasks."""
STOPPED = 2.0
"""The longest time for which a process is stopped, in seconds."""
TIMEOUT = 60.0
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM] * 2 + [signal.SIGSTOP] * 2
OF_MASTER = 0.1
GUNICORN = [
    "gunicorn", "--config=python:wsgi_bg.gunicorn", "--worker-class=gthread", "--workers=3",
    "--threads=4", "--graceful-timeout=5", "--no-control-socket",
]  # fmt: skip

Runs = dict[tuple[int, int], list[tuple[int, str, str]]]

journal = os.open(os.environ.get("JOURNAL", os.devnull), os.O_WRONLY | os.O_APPEND)
process = f"{os.getpid()}.{time.time_ns()}"  # process ids come again


def note(event: str, request: int, number: int) -> None:
    os.write(journal, f"{event} {process} {request} {number}\n".encode())


@registered_task(name="kill.plain")
def plain(request: int, number: int, seconds: float) -> None:
    note("begun", request, number)
    time.sleep(seconds)
    note("ended", request, number)


@registered_task(name="kill.coroutine")
async def coroutine(request: int, number: int, seconds: float) -> None:
    note("begun", request, number)
    await asyncio.sleep(seconds)
    note("ended", request, number)


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answer ``/REQUEST/TASKS``."""
    request, tasks = map(int, environ["PATH_INFO"][1:].split("/"))
    for number in range(tasks):
        seconds = LONG if random.random() < OF_LONG else random.uniform(0, LONGEST)
        func: Callable[..., Any] = random.choice([plain, coroutine])
        background_tasks.add_task(func, request, number, seconds)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


if "FOLDER" in os.environ:
    # A task that runs at three kills is no task to be put aside here.
    runner = DurableRunner(
        os.environ["FOLDER"], max_crashes=1000, drain_timeout=DRAIN_TIMEOUT, keep_done=(0, 0)
    )
    application = BackgroundTasksMiddleware(app, runner=runner)


class Server:
    """A server that is started again when it has ended.

    :ivar folder: the folder of the tasks.
    :ivar has_workers: True if the first process has children that handle the requests.
    """

    def __init__(
        self, command: list[str], environ: dict[str, str], log: Any, file: int
    ) -> None:
        self.folder = Path(environ["FOLDER"])
        self.has_workers = "gunicorn" in command
        self._start: Callable[[], subprocess.Popen[bytes]] = lambda: subprocess.Popen(
            command, env=environ, stdout=log, stderr=log, pass_fds=[file]
        )
        self.process = self._start()

    def choose(self, chance: random.Random) -> int:
        """Return the id of a process to kill."""
        is_master = chance.random() < OF_MASTER
        place = chance.random()
        if is_master or not self.has_workers:
            return self.process.pid
        while not (children := children_of(self.process.pid)):
            time.sleep(0.01)  # the master starts
        return children[int(place * len(children))]

    def revive(self, timeout: float) -> None:
        """Start the server again if it has ended, or ends within ``timeout`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
            self.process = self._start()

    def stop(self) -> None:
        """Send SIGKILL to the master, then to the workers."""
        children = children_of(self.process.pid)
        self.process.kill()
        self.process.wait(TIMEOUT)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def keep_busy(port: int, numbers: Iterator[int], done: Semaphore, stop: Event) -> Counter[str]:
    """Make requests until ``stop``; count their results, and the tasks of each success."""
    results: Counter[str] = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT / 4)
    while not stop.is_set():
        request, tasks = next(numbers), random.randint(1, TASKS)
        try:
            connection.request("GET", f"/{request}/{tasks}")
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            results["no answer"] += 1
            connection.close()
            stop.wait(0.01)
            continue
        results[str(response.status)] += 1
        if response.status == 200:
            successes[request] = tasks
            done.release()
        if random.random() < 0.2:
            connection.close()  # the next connection may be another worker's
    connection.close()
    return results


successes: dict[int, int] = {}
"""The number of tasks of each request that was answered with success."""


def check_files(folder: Path) -> None:
    for path in sorted(folder.glob("*.sqlite")):
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                found = connection.execute("PRAGMA integrity_check").fetchall()
        except sqlite3.Error as exc:
            # A process makes or removes the file at this moment.
            found = [("ok",)] if not path.exists() or "locked" in str(exc) else [(str(exc),)]
        assert found == [("ok",)], f"{path} is damaged: {found}"


def attack(server: Server, chance: random.Random) -> str:
    """Send a signal, and check the files; return the name of the signal."""
    number, pid = chance.choice(SIGNALS), server.choose(chance)
    pause = chance.uniform(0.01, STOPPED)
    is_master = pid == server.process.pid
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(pause)
            os.kill(pid, signal.SIGCONT)
    check_files(server.folder)
    if is_master and number != signal.SIGSTOP:
        server.revive(DRAIN_TIMEOUT + 30)
    return number.name + " master" * (is_master and server.has_workers)


def kill_one_server(
    server: Server,
    port: int,
    requests: int,
    kills: int,
    chance: random.Random,
    numbers: Iterator[int],
) -> None:
    done, stop, sent = Semaphore(0), Event(), Counter[str]()
    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            clients = [
                pool.submit(keep_busy, port, numbers, done, stop) for _ in range(CLIENTS)
            ]
            waits = sorted(chance.randrange(requests) for _ in range(kills))
            for before, now in itertools.pairwise([0, *waits, requests]):
                for _ in range(now - before):
                    assert done.acquire(timeout=TIMEOUT), "no request was answered"
                if sum(sent.values()) < kills:
                    sent[attack(server, chance)] += 1
        finally:
            stop.set()
            server.stop()
    results = sum((client.result() for client in clients), Counter[str]())
    print(f"  {dict(sent)}; responses {dict(results)}", flush=True)


@contextmanager
def last_process(environ: dict[str, str]) -> Iterator[None]:
    """Run a process that only takes over."""
    code = "from benchmarks.kill import runner; runner.start(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, env=environ
    ) as last:
        yield
        last.communicate(b"\n", TIMEOUT)


def work_off(environ: dict[str, str]) -> Counter[str]:
    """Run the tasks that are left; return the number of tasks by state."""
    folder = check_folder(environ["FOLDER"])

    def states() -> Counter[str]:
        return Counter(task.outcome.state for task in list_tasks(folder))

    left = states()
    began = time.monotonic()
    with last_process(environ):
        while (now := states())["waiting"] + now["running"]:
            assert time.monotonic() < began + 5 * TIMEOUT, f"not worked off: {now}"
            time.sleep(0.1)
    print(f"{dict(left)} left, worked off in {time.monotonic() - began:.1f} s", flush=True)
    return states()


def check(lines: list[str]) -> None:
    """Compare the journal with the successes."""
    last_line: dict[str, int] = {}
    begun: Runs = {}
    ended: dict[tuple[int, int], int] = {}
    faults: dict[str, list[Any]] = {"lost": [], "twice alive": [], "order": []}
    for place, line in enumerate(lines):
        event, process, *task = line.split()
        last_line[process] = place
        request, number = map(int, task)
        if event == "ended":
            ended.setdefault((request, number), place)
            continue
        begun.setdefault((request, number), []).append((place, process, line))
        if number and (request, number - 1) not in ended:
            faults["order"].append((request, number))
    again = 0
    for runs in begun.values():
        for (_, first, line), (place, second, _) in itertools.pairwise(runs):
            again += 1
            if first == second or last_line[first] > place:
                faults["twice alive"].append((line, second))
    wanted = [(request, n) for request, tasks in successes.items() for n in range(tasks)]
    faults["lost"] = [task for task in wanted if task not in ended]
    print(f"{len(successes)} successes, {len(wanted)} tasks; {len(begun)} begun", end="; ")
    print(
        f"{again} again after a death; faults:", *(f"{k} {len(v)}" for k, v in faults.items())
    )
    for name, found in faults.items():
        assert not found, f"{name}: {found[:20]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--only", choices=("gunicorn", "wsgi_bg"), help="kill this server only")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    chance, numbers = random.Random(given.seed), itertools.count(1)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        socket.create_server(("127.0.0.1", 0)) as listener,
        Path(name, "log").open("w+") as log,
    ):
        journal = Path(name, "journal")
        journal.touch()
        environ = {**os.environ, "JOURNAL": str(journal), "FOLDER": str(Path(name, "tasks"))}
        file, port = listener.fileno(), listener.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as free:
            other_port = free.getsockname()[1]
        servers = [
            (port, [*GUNICORN, f"--bind=fd://{file}"]),
            (other_port, ["wsgi_bg", f"--port={other_port}", "--threads=8"]),
        ]
        servers = [each for each in servers if given.only in (None, each[1][0])]
        share = len(servers)
        for port, arguments in servers:
            command = [sys.executable, "-m", *arguments, "benchmarks.kill:application"]
            print(arguments[0], flush=True)
            server = Server(command, environ, log, file)
            kill_one_server(
                server, port, given.requests // share, given.kills // share, chance, numbers
            )
        states = work_off(environ)
        check_files(server.folder)
        log.seek(0)
        errors = [line for line in log if "Error" in line or " ERROR" in line]
        print(f"not done: {dict(states)}; lines with errors in the log: {len(errors)}")
        print(*[f"  {n} {line}" for line, n in Counter(errors).most_common(5)], sep="", end="")
        check(journal.read_text().splitlines())


if __name__ == "__main__":
    main()
