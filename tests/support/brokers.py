"""Real brokers for tests and benchmarks: RabbitMQ, Redis, and a proxy in front of either.

A broker listens on free ports of 127.0.0.1 and keeps all files in a folder of the test. The
kernel kills a broker when the thread that started the broker ends, however that happens.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest
import redis
from kombu import Connection

from tests.support import free_port, text_of, wait_until

if TYPE_CHECKING:
    from celery import Celery

    from wsgi_bg.celery import CeleryRunner

TIMEOUT = 60.0
"""Seconds for a broker to start, on a machine that is busy."""

REQUIRED = [*filter(None, os.environ.get("WSGI_BG_REQUIRE_BROKERS", "").split(","))]
"""Names of the brokers without which tests fail instead of being skipped."""

PROGRAMS = {
    "rabbitmq": "/usr/lib/rabbitmq/bin/rabbitmq-server",  # the one on the path changes the user
    "redis": "redis-server",
}


def find(name: str) -> str | None:
    """Return the program of the broker ``name``; None if the broker is not installed."""
    return shutil.which(PROGRAMS[name])


_kept: list[CeleryRunner] = []
"""Runners of this process: py-amqp does not close the connections of a runner that is freed,
and pytest fails for a socket that is freed open."""


def _states_of_threads(pid: int) -> Iterator[str]:
    """The letter of each thread's state: ``"T"`` is stopped (proc_pid_stat(5))."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            yield (thread / "stat").read_text().rpartition(") ")[2][0]


class Broker(NamedTuple):
    """The address of a broker, and the options of its transport."""

    url: str
    options: dict[str, Any]

    # The imports are here because the benchmarks have tasks of their own.
    def app(self, **options: Any) -> Celery:
        from tests.support.celery_shop import make_app

        return make_app(self.url, {**self.options, **options})

    def runner(self, **options: Any) -> CeleryRunner:
        from wsgi_bg.celery import CeleryRunner

        runner = CeleryRunner(self.app(), **options)
        if self.url.startswith("amqp:"):
            _kept.append(runner)
        return runner


class _Process:
    """A process that ends with the thread that started it."""

    def __init__(self, command: list[str], folder: Path, **environ: str) -> None:
        setpriv = shutil.which("setpriv")  # Linux only
        prefix = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
        self._log = folder / f"{Path(command[0]).name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, *command],
                cwd=folder,
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the broker
            )
        self.pid = self._process.pid
        """The broker itself: the scripts in between replace themselves."""

    def wait_until(self, answers: Callable[[], bool]) -> None:
        wait_until(lambda: answers() or self._process.poll() is not None, TIMEOUT)
        assert self._process.poll() is None, text_of(self._log)
        assert answers(), text_of(self._log)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT)


class BrokerServer:
    """A broker's process, which a test may let hang, kill, and start again.

    A test that shares the broker with other tests uses :meth:`hung` and :meth:`away`, which
    leave the broker as it was.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        program = find(self.name)
        if program is None:
            reason = f"{self.name} is not here: apt install {self.name}-server"
            if self.name in REQUIRED:
                pytest.fail(f"{reason}; WSGI_BG_REQUIRE_BROKERS names it")
            pytest.skip(reason)
        self.port = free_port()
        self._program = program
        self._folder = folder
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def sessions(self) -> list[int]:
        """Session ids of all processes of the broker."""
        return [self.pid]

    def start(self) -> None:
        """Start the broker, on the same port each time; blocks until the broker answers."""
        self._process = self._run()
        self._process.wait_until(self._answers)

    def stop(self) -> None:
        """Kill the broker with SIGKILL, hung or not."""
        self._process.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def hang(self) -> None:
        """Stop the process: the kernel still accepts connections, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        # A thread that runs on another processor answers until it stops, too.
        assert wait_until(lambda: set(_states_of_threads(self.pid)) == {"T"})

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Let the broker hang for a while."""
        self.hang()
        try:
            yield
        finally:
            self.go_on()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Kill the broker, and start it again at the end: connections are refused meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def fresh_url(self) -> str:
        """Return the URL of an empty database or virtual host, which no other test gets."""
        raise NotImplementedError

    def fresh(self, **options: Any) -> Broker:
        """Return an empty broker with ``options`` for the transport."""
        return Broker(self.fresh_url(), options)

    def _run(self) -> _Process:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class RedisServer(BrokerServer):
    """A Redis process.

    :param keeps: if the databases outlive the process; else a start makes them empty.
    """

    name = "redis"

    def __init__(self, folder: Path, *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._fresh = count(16)  # databases that no test asks for by number
        super().__init__(folder)
        self.url = f"redis://127.0.0.1:{self.port}"

    def _run(self) -> _Process:
        options = {
            "port": f"{self.port}",
            "bind": "127.0.0.1",
            "databases": "4096",
            "save": "",
            "appendonly": "yes" if self._keeps else "no",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        return _Process([self._program, *arguments], self._folder)

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # also while Redis reads its file
            return False

    def fresh_url(self) -> str:
        return f"{self.url}/{next(self._fresh)}"

    def broker(self, database: int, **options: Any) -> Broker:
        return Broker(f"{self.url}/{database}", options)

    def waiting(self, database: int) -> int:
        """Number of messages that no worker has taken."""
        return waiting(f"{self.url}/{database}")

    def seconds_held(self, database: int) -> float:
        """Seconds since a worker has last taken a message that is not acknowledged."""
        with redis.Redis(port=self.port, db=database) as client:
            taken: Any = client.zrange("unacked_index", -1, -1, withscores=True)
        return time.time() - taken[0][1] if taken else 0.0


class RabbitServer(BrokerServer):
    """A RabbitMQ process without plugins, and the epmd that the process needs.

    Durable messages outlive the process. A start takes about 5 seconds.
    """

    name = "rabbitmq"
    _VHOSTS = 12  # added at a time: 40 ms each, where a start of rabbitmqctl takes a second

    def __init__(self, folder: Path) -> None:
        self._vhosts = 0
        self._unused: list[str] = []
        self._node = {"HOME": str(folder), "ERL_EPMD_PORT": f"{free_port()}"}
        self._node["ERL_EPMD_ADDRESS"] = "127.0.0.1"
        self._node["RABBITMQ_NODENAME"] = "wsgi_bg@localhost"  # unique by the port of its epmd
        self._definitions = folder / "definitions.json"
        self._epmd: _Process | None = None
        super().__init__(folder)

    @property
    def sessions(self) -> list[int]:
        return [self.pid] if self._epmd is None else [self.pid, self._epmd.pid]

    def start(self) -> None:
        if self._epmd is None:
            # Else RabbitMQ would start an epmd that outlives the tests.
            epmd = shutil.which("epmd")
            assert epmd is not None
            command = [epmd, "-port", self._node["ERL_EPMD_PORT"], "-address", "127.0.0.1"]
            self._epmd = _Process(command, self._folder)
            self._add_vhosts()
        super().start()

    def end(self) -> None:
        """Kill RabbitMQ and its epmd."""
        self.stop()
        if self._epmd is not None:
            self._epmd.kill()

    def _run(self) -> _Process:
        folder = self._folder
        plugins, config = folder / "enabled_plugins", folder / "rabbitmq.conf"
        plugins.write_text("[].", encoding="ascii")
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "load_definitions": self._definitions,
            "vm_memory_high_watermark.absolute": "512MB",
            "disk_free_limit.absolute": "1MB",
            "log.console": "true",
            "log.file": "false",
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        config.write_text("".join(lines), encoding="utf-8")
        return _Process(
            [self._program],
            folder,
            **self._node,
            detached="true",  # makes the script replace itself with the broker
            RABBITMQ_CONF_ENV_FILE="/dev/null",
            RABBITMQ_CONFIG_FILE=str(config),
            RABBITMQ_DIST_PORT=f"{free_port()}",
            RABBITMQ_ENABLED_PLUGINS_FILE=str(plugins),
            RABBITMQ_LOG_BASE=str(folder / "log"),
            RABBITMQ_MNESIA_BASE=str(folder / "data"),
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}",
        )

    def _answers(self) -> bool:
        try:
            with Connection(self._url(self._vhosts - 1), connect_timeout=TIMEOUT) as connection:
                connection.connect()
        except Exception:  # refused, or in the middle of the start
            return False
        return True

    def _url(self, vhost: int) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost}"

    def fresh_url(self) -> str:
        if not self._unused:
            self._add_vhosts()
            self.control("import_definitions", str(self._definitions))
        return self._unused.pop()

    def control(self, *arguments: str) -> str:
        """Run ``rabbitmqctl``, which takes more than a second; return the output."""
        done = subprocess.run(
            [str(Path(self._program).with_name("rabbitmqctl")), "--quiet", *arguments],
            env={**os.environ, **self._node},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
        return done.stdout

    def _add_vhosts(self) -> None:
        """Write all virtual hosts and more into the file that RabbitMQ reads at its start."""
        more = range(self._vhosts, self._vhosts + self._VHOSTS)
        self._vhosts = more.stop
        self._unused += map(self._url, reversed(more))
        salt = b"salt"
        digest = hashlib.sha256(salt + b"guest").digest()
        user = {
            "name": "guest",
            "password_hash": base64.b64encode(salt + digest).decode(),
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": "administrator",
        }
        names = [f"{number}" for number in range(self._vhosts)]
        every = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [user],
            "vhosts": [{"name": name} for name in names],
            "permissions": [{**every, "vhost": name} for name in names],
        }
        self._definitions.write_text(json.dumps(definitions), encoding="utf-8")


@contextmanager
def redis_server(folder: Path, *, keeps: bool = False) -> Iterator[RedisServer]:
    server = RedisServer(folder, keeps=keeps)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def rabbit_server(folder: Path) -> Iterator[RabbitServer]:
    server = RabbitServer(folder)
    try:
        yield server
    finally:
        server.end()


def waiting(url: str, queue: str = "celery") -> int:
    """Number of messages in a queue that no worker has taken; 0 if there is no such queue."""
    with Connection(url) as connection:
        try:
            found = connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return 0
        return int(found.message_count)


_RESETS = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
"""The option of a socket whose close resets the connection."""


class _Flow:
    """A connection through the proxy: the client's side and the broker's side."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.is_dropped = False

    def cut(self) -> None:
        for writer in self.writers:
            connection = writer.get_extra_info("socket")
            with suppress(OSError):  # closed already
                connection.setsockopt(*_RESETS)
            writer.transport.abort()


class Proxy:
    """Passes TCP connections on to a port of 127.0.0.1, as badly as the test wants.

    :ivar delay: seconds that each chunk takes, in each direction; the rate has no limit.
    :ivar accepted: number of connections so far.
    """

    def __init__(self, target: int) -> None:
        self.delay = 0.0
        self.accepted = 0
        self.port = free_port()
        self._target = target
        self._flows: set[_Flow] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.accept()

    def url(self, url: str) -> str:
        """Return the broker's URL with the port of the proxy."""
        return url.replace(f":{self._target}", f":{self.port}")

    def broker(self, broker: Broker) -> Broker:
        return broker._replace(url=self.url(broker.url))

    @property
    def open(self) -> int:
        """Number of connections that are neither closed nor dropped."""
        return sum(not flow.is_dropped for flow in list(self._flows))

    def drop(self) -> None:
        """Forget all connections in silence, as a NAT does with idle connections.

        Both sides go on believing in their connection: nothing that they write arrives, a
        close neither. Unlike behind a NAT, the kernel acknowledges the client's bytes and
        keepalive probes. New connections work.
        """

        async def drop() -> None:
            for flow in self._flows:
                flow.is_dropped = True

        self._do(drop())

    def cut(self) -> None:
        """Reset all connections; new connections work."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Accept no more connections; the existing ones stay."""

        async def refuse() -> None:
            if self._listener is not None:
                self._listener.close()

        self._do(refuse())

    def accept(self) -> None:
        """Accept connections, as at the beginning."""

        async def accept() -> None:
            self._listener = await asyncio.start_server(
                self._begin, "127.0.0.1", self.port, reuse_address=True
            )

        self._do(accept())

    def end(self) -> None:
        self.refuse()
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    async def _cut(self) -> None:
        for flow in list(self._flows):
            flow.cut()

    async def _end(self) -> None:
        await self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not by the listener, which logs an error when the proxy ends.
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _Flow(writer).cut()
            return
        flow = _Flow(writer, there[1])
        self._flows.add(flow)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(flow, reader, there[1]))
                both.create_task(self._forward(flow, there[0], writer))
        except* OSError:  # reset by a side
            flow.cut()
        finally:
            self._flows.discard(flow)

    async def _forward(
        self, flow: _Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            more = True
            while more:
                chunk = await reader.read(65536)
                chunks.put_nowait((self._loop.time() + self.delay, chunk))
                more = bool(chunk)

        async def write() -> None:
            while True:
                due, chunk = await chunks.get()
                await asyncio.sleep(due - self._loop.time())
                if flow.is_dropped:
                    await asyncio.Event().wait()  # until a side resets, or the proxy ends
                if not chunk:
                    writer.close()
                    return
                writer.write(chunk)
                await writer.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(read())
            both.create_task(write())


@contextmanager
def proxy_to(server: BrokerServer | int) -> Iterator[Proxy]:
    """Start a proxy in front of a broker, or of another port."""
    proxy = Proxy(server if isinstance(server, int) else server.port)
    try:
        yield proxy
    finally:
        proxy.end()
