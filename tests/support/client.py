"""A client on a raw socket that sees from the framing when a response is complete."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import h11

from tests.support import TIMEOUT


class Response(NamedTuple):
    """The part of a response that has arrived."""

    status: int
    body: bytes
    headers: dict[bytes, bytes]


class Connection:
    """A connection for requests in sequence."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._framing = h11.Connection(h11.CLIENT)

    def ask(self, method: str = "GET", path: str = "/", version: str = "1.1") -> Response:
        """Make a request and read until the response is complete.

        If a response has no length, the response is complete when the server closes the
        connection.
        """
        if self._framing.our_state is h11.DONE:
            self._framing.start_next_cycle()
        self.send(method, path, version)
        status, body, headers = 0, b"", {}
        while True:
            event = self._framing.next_event()
            if event is h11.NEED_DATA:
                self._framing.receive_data(self._socket.recv(65536))
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, dict(event.headers)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return Response(status, body, headers)

    def send(self, method: str = "GET", path: str = "/", version: str = "1.1") -> None:
        """Send a request and read nothing."""
        head = f"{method} {path} HTTP/{version}\r\nHost: test\r\n\r\n"
        self._socket.sendall(head.encode())
        self._framing.send(h11.Request(method=method, target=path, headers=[("Host", "test")]))
        self._framing.send(h11.EndOfMessage())

    @property
    def is_kept_alive(self) -> bool:
        """True if another request may follow the response on this connection."""
        return self._framing.our_state is h11.DONE

    def leave(self) -> None:
        """Disconnect in the middle of a response: the server's next write fails."""
        reset = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


@contextmanager
def connect(port: int) -> Iterator[Connection]:
    """Open a connection that is closed at the end of the block."""
    with closing(Connection(port)) as connection:
        yield connection


def ask(port: int, method: str = "GET", path: str = "/", version: str = "1.1") -> Response:
    """Make a single request on a new connection."""
    with connect(port) as connection:
        return connection.ask(method, path, version)
