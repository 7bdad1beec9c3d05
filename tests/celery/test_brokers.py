"""Tasks of a real server reach real workers by real brokers, also if these are ill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from kombu import Connection

from tests.support import app_that, celery_site, client, text_of, wait_until, waitress
from tests.support.brokers import (
    PROGRAMS,
    REQUIRED,
    Broker,
    BrokerServer,
    Proxy,
    RedisServer,
    proxy_to,
    waiting,
)
from tests.support.celery import worker
from tests.support.celery_shop import note_line, note_line_late
from wsgi_bg import BackgroundTasksMiddleware, background_tasks, wait

TIMEOUT = 60.0
TASKS = range(200)
LAST = len(TASKS)
HELD = 10  # the task in which the worker is killed

POOLS = {
    "prefork": ["--concurrency=2"],
    "threads": ["--concurrency=4"],
    "gevent": ["--concurrency=20"],
    "solo": [],
}


@pytest.fixture(params=["rabbitmq", "redis"])
def server(request: pytest.FixtureRequest) -> BrokerServer:
    server: BrokerServer = request.getfixturevalue(request.param)
    return server


@contextmanager
def site(
    broker: Broker, add: Callable[[int], object], **options: Any
) -> Iterator[Callable[[Iterable[int]], None]]:
    """Serve a view that adds a task; yield a function that makes a request for each number."""
    app = app_that(lambda environ: add(int(environ["PATH_INFO"][1:])))
    runner = broker.runner(**{"publish_timeout": TIMEOUT, **options})

    def order(numbers: Iterable[int]) -> None:
        with client.connect(port) as connection:
            for number in numbers:
                assert connection.ask(path=f"/{number}").status == 200

    with waitress(BackgroundTasksMiddleware(app, runner=runner)) as port:
        yield order


def noting(path: Path) -> Callable[[int], object]:
    return lambda number: background_tasks.add_task(note_line, str(path), number)


def pool_of(name: str) -> list[str]:
    return [f"--pool={name}", *POOLS[name]]


def numbers(path: Path) -> list[int]:
    return sorted(map(int, text_of(path).splitlines()))


def has_all(path: Path, expected: Iterable[int]) -> Callable[[], bool]:
    return lambda: {*numbers(path)} >= {*expected}


def wait_for_confirms(broker: Broker, count: int) -> None:
    """Wait until the broker has ``count`` messages, and until the server knows this."""
    assert wait_until(lambda: waiting(broker.url) >= count)
    assert wait(TIMEOUT) == []
    assert waiting(broker.url) == count


def test_no_unknown_broker_is_required() -> None:
    assert {*REQUIRED} <= {*PROGRAMS}


@pytest.mark.parametrize("pool", POOLS)
def test_each_task_of_a_server_runs_once(
    server: BrokerServer, tmp_path: Path, pool: str
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with worker(broker, tmp_path, *pool_of(pool)) as started:
        with site(broker, noting(path)) as order:
            order(TASKS)
            assert wait_until(has_all(path, TASKS), TIMEOUT), started.log
            order([LAST])  # by then the worker has taken all earlier messages
            assert wait_until(has_all(path, [LAST])), started.log
        started.kill()  # a graceful stop takes seconds
    assert numbers(path) == [*TASKS, LAST]


@pytest.mark.slow
def test_tasks_outlive_a_broker_that_is_killed_and_the_server_reaches_the_next(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with site(broker, noting(path)) as order:
        order(TASKS[:100])
        wait_for_confirms(broker, 100)
        server.restart()
        order(TASKS[100:])
        wait_for_confirms(broker, 200)
    with worker(broker, tmp_path, *pool_of("threads")) as started:
        assert wait_until(has_all(path, TASKS), TIMEOUT), started.log
        started.kill()
    assert numbers(path) == [*TASKS]


def test_tasks_acknowledged_late_outlive_a_worker_that_is_killed(
    server: BrokerServer, tmp_path: Path
) -> None:
    options = {"visibility_timeout": 1} if isinstance(server, RedisServer) else {}
    broker, path, gate = server.fresh(**options), tmp_path / "numbers", tmp_path / "gate"

    def add(number: int) -> None:
        held = str(gate) if number == HELD else ""
        background_tasks.add_task(note_line_late, str(path), number, held)

    with site(broker, add) as order, worker(broker, tmp_path, "--pool=solo") as first:
        order(TASKS[:HELD])
        assert wait_until(has_all(path, TASKS[:HELD])), first.log
        order([HELD])
        # One more than have ended: the worker is in the task that it will not end.
        assert wait_until(lambda: first.log.count("] received") > HELD), first.log
        first.kill()
        order(TASKS[HELD + 1 :])
    assert numbers(path) == [*TASKS[:HELD]]
    gate.touch()
    if isinstance(server, RedisServer):
        # A worker gives back only messages that were held for longer than that.
        database = int(broker.url.rpartition("/")[2])
        assert wait_until(lambda: server.seconds_held(database) > 1)
    with worker(broker, tmp_path, *pool_of("prefork")) as second:
        # The worker may have been killed before it told of an end, so a task may run twice.
        assert wait_until(has_all(path, TASKS), TIMEOUT), second.log
        second.kill()


def test_messages_of_a_web_process_that_is_killed_or_stopped_reach_the_worker(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with celery_site.site(broker, tmp_path, path) as first:
        first.order(range(20))
        assert wait_until(lambda: waiting(broker.url) == 20), first.log
        first.kill()
    with celery_site.site(broker, tmp_path, path) as second:
        second.order(range(20, 40))
        second.stop()
        assert waiting(broker.url) == 40
    with worker(broker, tmp_path, "--pool=solo") as started:
        assert wait_until(has_all(path, range(40))), started.log
        started.kill()
    assert numbers(path) == [*range(40)]


def test_a_response_does_not_wait_for_a_broker_that_hangs(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with (
        worker(broker, tmp_path, "--pool=solo") as started,
        site(broker, noting(path)) as order,
    ):
        order([0])  # opens the connections
        assert wait_until(has_all(path, [0])), started.log
        with server.hung():
            order([1])
            assert numbers(path) == [0]
        assert wait_until(has_all(path, [0, 1])), started.log
        started.kill()


def test_tasks_arrive_by_a_long_wire_and_after_the_network_has_cut_it(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with proxy_to(server) as proxy, site(proxy.broker(broker), noting(path)) as order:
        proxy.delay = 0.02
        order(range(5))
        wait_for_confirms(broker, 5)
        assert proxy.accepted >= 1
        proxy.cut()
        order(range(5, 10))
        wait_for_confirms(broker, 10)
    with worker(broker, tmp_path, "--pool=solo") as started:
        assert wait_until(has_all(path, range(10))), started.log
        started.kill()
    assert numbers(path) == [*range(10)]


@pytest.mark.slow
def test_no_task_is_lost_while_the_network_cuts_all_connections_again_and_again(
    server: BrokerServer, tmp_path: Path
) -> None:
    """A message whose confirm was cut off is sent once more, and runs twice."""
    broker, path, orders = server.fresh(), tmp_path / "numbers", range(1_000)
    is_over = threading.Event()
    with proxy_to(server) as wire, site(wire.broker(broker), noting(path)) as order:

        def cut() -> None:
            while not is_over.wait(0.05):
                wire.cut()

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            order(orders)
        finally:
            is_over.set()
            thread.join(TIMEOUT)
        assert wait(TIMEOUT) == []
        assert wire.accepted > 1
    with worker(broker, tmp_path, *pool_of("threads")) as started:
        assert wait_until(has_all(path, orders), TIMEOUT), started.log
        started.kill()
    assert {*numbers(path)} == {*orders}


def test_a_task_is_not_lost_in_a_connection_that_the_network_has_dropped(
    server: BrokerServer, tmp_path: Path
) -> None:
    broker, path = server.fresh(), tmp_path / "numbers"
    with (
        proxy_to(server) as proxy,
        worker(broker, tmp_path, "--pool=solo") as started,
        site(proxy.broker(broker), noting(path), publish_timeout=0.5) as order,
    ):
        order([0])
        assert wait_until(has_all(path, [0])), started.log
        proxy.drop()
        order([1])
        assert wait_until(has_all(path, [0, 1])), started.log
        started.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_broker_that_hangs_is_connected_to_and_one_that_is_away_refuses(
    redis: RedisServer,
) -> None:
    with redis.hung():
        assert wait_until(lambda: state(redis.pid) == "T")
        socket.create_connection(("127.0.0.1", redis.port)).close()
    assert wait_until(lambda: state(redis.pid) != "T")
    with redis.away(), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", redis.port))
    socket.create_connection(("127.0.0.1", redis.port)).close()


def state(pid: int) -> str:
    """The state of a process, as Linux shows it."""
    return fields_of(Path(f"/proc/{pid}"))[0]


def fields_of(process: Path) -> list[str]:
    return text_of(process / "stat").rpartition(")")[2].split()


def test_each_broker_of_a_process_is_empty(server: BrokerServer) -> None:
    first, second = server.fresh(), server.fresh()
    with Connection(first.url) as connection:
        connection.SimpleQueue("celery").put("message")
    assert (waiting(first.url), waiting(second.url)) == (1, 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not here")
def test_no_process_of_a_broker_outlives_a_killed_process_of_the_tests(
    server: BrokerServer, tmp_path: Path
) -> None:
    kind = type(server).__name__
    code = f"""
        import pathlib, sys, time
        from tests.support.brokers import {kind}
        print({kind}(pathlib.Path({str(tmp_path)!r})).sessions)
        sys.stdout.flush()
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=PIPE)
    with process:
        assert process.stdout is not None
        sessions = {*json.loads(process.stdout.readline())}
        assert processes_of(sessions)
        process.kill()
    have_ended = wait_until(lambda: not processes_of(sessions))
    for left in processes_of(sessions):
        os.kill(int(left.name), signal.SIGKILL)
    assert have_ended


def processes_of(sessions: set[int]) -> list[Path]:
    return [
        process
        for process in Path("/proc").glob("[0-9]*")
        if (fields := fields_of(process)) and int(fields[3]) in sessions and fields[0] != "Z"
    ]


class Echo(socketserver.BaseRequestHandler):
    """Sends back all bytes."""

    def handle(self) -> None:
        while received := self.request.recv(1024):
            self.request.sendall(received)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy in front of an echo."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever).start()
        with proxy_to(echo.server_address[1]) as proxy:
            yield proxy
        echo.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT)


def echo(connection: socket.socket) -> bytes:
    connection.sendall(b"?")
    return connection.recv(1024)


def test_a_proxy_passes_bytes_on_and_delays_them(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echo(connection) == b"?"
        proxy.delay = 0.01
        before = time.monotonic()
        assert echo(connection) == b"?"
        assert time.monotonic() - before >= 0.02
        assert (proxy.accepted, proxy.open) == (1, 1)
    assert wait_until(lambda: proxy.open == 0)


def test_a_proxy_drops_connections_in_silence_and_passes_new_ones_on(proxy: Proxy) -> None:
    with connect(proxy) as dropped, connect(proxy) as other:
        assert echo(dropped) == b"?"
        proxy.drop()
        dropped.sendall(b"?")
        with connect(proxy) as new:
            assert echo(new) == b"?"
        other.setblocking(False)
        dropped.setblocking(False)
        for connection in (dropped, other):
            with pytest.raises(BlockingIOError):
                connection.recv(1024)


def test_a_proxy_cuts_connections_and_refuses_new_ones(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echo(connection) == b"?"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1024)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.accept()
    with connect(proxy) as connection:
        assert echo(connection) == b"?"
