"""Times sending tasks to Celery: ``python -m benchmarks.publish``.

The peer is Celery's own ``task.delay()``, in the same process, in turns, to the same broker: a
Redis and a RabbitMQ that the program starts if they are installed. No worker runs.
"""

from __future__ import annotations

import http.client
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

from celery import Celery

from benchmarks.measure import HEADERS, begin, in_turns, options, row, run, time_calls
from tests.support import waitress
from tests.support.brokers import BrokerServer, find, proxy_to, rabbit_server, redis_server
from wsgi_bg import ENVIRON_KEY, BackgroundTasksMiddleware, registered_task, wait
from wsgi_bg.celery import CeleryRunner

options.seconds = 10  # for which a broker hangs

ARGUMENTS = ("ada@example.com", 4711)
TAKEN = "benchmark.taken"
LINES = ["tea", "sugar", "milk"]
NAMES = {"redis": "Redis", "rabbitmq": "RabbitMQ"}

WIRE = 0.1
"""Seconds of a round trip through the proxy."""

STUCK = 0.1
"""Seconds after which a view without tasks, which takes a millisecond, counts as stuck."""

PACE = 0.02
"""Seconds between two requests of a client."""

CLIENTS = 2
"""Number of clients that ask the view with a task, beside a client of the view without."""


@registered_task(name="benchmark.send_mail")
def send_mail(recipient: str, order: int, *, lines: list[str]) -> None:
    """A registered function; only a worker would call it."""


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Add as many tasks as the path says; append the seconds for all to the list ``TAKEN``."""
    tasks = environ[ENVIRON_KEY]
    count = int(environ.get("PATH_INFO", "/1")[1:])
    began = time.perf_counter()
    for _ in range(count):
        tasks.add_task(send_mail, *ARGUMENTS, lines=LINES)
    environ.get(TAKEN, []).append(time.perf_counter() - began)
    start_response("200 OK", HEADERS)
    return [b"ok"]


@contextmanager
def broker(name: str) -> Iterator[BrokerServer]:
    """Start a broker, which has to be installed."""
    start: Any = {"redis": redis_server, "rabbitmq": rabbit_server}[name]
    with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as server:
        yield server


@contextmanager
def installed(name: str) -> Iterator[BrokerServer | None]:
    if find(name) is None:
        print(f"{NAMES[name]} is not installed: left out")
        yield None
    else:
        with broker(name) as server:
            yield server


def queue(url: str) -> Celery:
    celery = Celery("benchmark", broker=url, set_as_current=False)
    celery.conf.task_ignore_result = True
    return celery


def delays(celery: Celery, count: int) -> Callable[[], None]:
    """Return a function that calls Celery's own ``delay()`` ``count`` times."""
    delay = celery.task(name="bare", shared=False)(send_mail).delay

    def call() -> None:
        for _ in range(count):
            delay(*ARGUMENTS, lines=LINES)

    return call


def compare(
    url: str,
    title: str,
    *,
    tasks: int,
    rounds: int,
    calls: int = 1,
    until_sent: bool = False,
    goal: str = "",
) -> None:
    """Time ``close()`` of a response with ``tasks`` tasks, beside as many ``delay()``."""
    celery = queue(url)
    ours = BackgroundTasksMiddleware(app, runner=CeleryRunner(celery, publish_timeout=60))
    theirs = delays(celery, tasks)

    def start() -> Callable[[], object]:
        close = begin(ours, PATH_INFO=f"/{tasks}")
        return (lambda: (close(), wait())) if until_sent else close

    subjects = time_calls(start, calls, wait), time_calls(lambda: theirs, calls)
    for subject in (begin(ours, PATH_INFO="/1"), wait, delays(celery, 1)):
        subject()  # opens the connections
    close, peer = in_turns(*subjects, rounds=rounds)
    many = f"{tasks} " if tasks > 1 else ""
    row(title, close, f"{many}delay()", peer, goal)


def close(name: str) -> None:
    """``close()`` with one task and with many, also if the broker is far away."""
    with installed(name) as server:
        if server is None:
            return
        to, url, rounds = NAMES[name], server.fresh_url(), options.rounds
        one, many = f"close(), a task to {to}", f"close(), 100 tasks to {to}"
        few = min(rounds, 10)
        compare(url, one, tasks=1, calls=50, rounds=rounds, goal="<= 30")
        compare(url, many, tasks=100, rounds=few, goal="<= 500")
        if name == "rabbitmq":
            title = "100 tasks to RabbitMQ, until confirmed"
            compare(url, title, tasks=100, rounds=few, until_sent=True, goal="ratio <= 2")
        with proxy_to(server) as proxy:
            proxy.delay = WIRE / 2
            url = proxy.url(url)
            away = f"{WIRE * 1000:.0f} ms away"
            compare(url, f"{one}, {away}", tasks=1, rounds=few, goal="<= 30")
            compare(url, f"{many}, {away}", tasks=100, rounds=1, goal="<= 500")


def add_task() -> None:
    """``add_task`` of a registered function, which encodes the arguments."""
    with installed("redis") as server:
        if server is None:
            return
        celery = queue(server.fresh_url())
        ours = BackgroundTasksMiddleware(app, runner=CeleryRunner(celery))
        delay = delays(celery, 1)

        def add() -> float:
            """Return the microseconds of one ``add_task`` of ten."""
            taken: list[float] = []
            begin(ours, PATH_INFO="/10", **{TAKEN: taken})()
            wait()
            return taken[0] / 10 * 1e6

        for subject in (delay, add):
            subject()  # opens the connections
        added, peer = in_turns(add, time_calls(lambda: delay, 10))
    row("add_task, a task for Celery", added, "delay()", peer)


def ask(port: int, path: str, seconds: float) -> list[float]:
    """Ask for ``path`` every ``PACE`` seconds; return the seconds of each answer.

    A request counts from the time when it is due: a server that is stuck for seconds delays
    all requests of these seconds, and not a single one for each client.
    """
    taken = []
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        time.sleep(max(0.0, due - time.perf_counter()))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().read() == b"ok"
        connection.close()
        taken.append(time.perf_counter() - due)
        due += PACE
    return taken


def ask_both(port: int) -> tuple[list[float], float]:
    """Return the seconds of views with a task, and the share of stuck views without."""
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(ask, port, "/1", options.seconds) for _ in range(CLIENTS)]
        bare = pool.submit(ask, port, "/0", options.seconds).result()
        taken = [seconds for client in clients for seconds in client.result()]
    return taken, sum(seconds > STUCK for seconds in bare) / len(bare)


def hung(name: str) -> None:
    """Views of a server with four threads, while the broker hangs and while it does not."""
    with installed(name) as server:
        if server is None:
            return
        logging.disable()  # else the package writes a record for each task
        ours = BackgroundTasksMiddleware(app, runner=CeleryRunner(queue(server.fresh_url())))
        with waitress(ours, threads=4) as port:
            healthy, _ = ask_both(port)
            with server.hung():
                taken, stuck = ask_both(port)
            wait(30)
        for percent, goal in ((50, ""), (99, "ratio <= 2")):
            row(
                f"a view with a task, {NAMES[name]} hangs, p{percent}",
                quantiles(taken, n=100)[percent - 1] * 1e3,
                "healthy",
                quantiles(healthy, n=100)[percent - 1] * 1e3,
                goal,
                " ms",
            )
        print(f"a view without tasks, {NAMES[name]} hangs: stuck {stuck:.0%} of the time   0%")


if __name__ == "__main__":
    run(
        "Sending to Celery",
        {
            "add_task": add_task,
            **{name: partial(close, name) for name in NAMES},
            **{f"{name}-hangs": partial(hung, name) for name in NAMES},
        },
    )
