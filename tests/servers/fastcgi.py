"""A web server in front of a FastCGI process: HTTP to the client, FastCGI 1.0 to the process.

The server sends the parameters that the specification of CGI requires (RFC 3875, section 4.1)
except SERVER_SOFTWARE, which some web servers omit. A response ends when the process has ended
the request.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

Address = tuple[str, int]

_BEGIN_REQUEST, _END_REQUEST, _PARAMS, _STDIN, _STDOUT = 1, 3, 4, 5, 6
_RESPONDER = 1
_HEADER = struct.Struct("!BBHHBx")  # version, type, request's id, length, padding


def serve(address: Address, backend: Address) -> None:
    """Listen on ``address`` for HTTP and ask the process at ``backend``, on threads."""
    listener = socket.create_server(address)
    threading.Thread(target=_accept, args=(listener, backend), daemon=True).start()


def _accept(listener: socket.socket, backend: Address) -> None:
    while True:
        client, (host, _) = listener.accept()
        threading.Thread(target=_answer, args=(client, host, backend), daemon=True).start()


def _answer(client: socket.socket, host: str, backend: Address) -> None:
    process = socket.create_connection(backend)
    with client, client.makefile("rb") as lines, process:
        method, target, _ = lines.readline().decode("latin-1").split()
        while lines.readline().strip():
            pass
        path, _, query = target.partition("?")
        port = client.getsockname()[1]
        params = {
            "GATEWAY_INTERFACE": "CGI/1.1",
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REMOTE_ADDR": host,
            "SERVER_NAME": "test",
            "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": "HTTP/1.1",
        }
        process.sendall(
            _record(_BEGIN_REQUEST, struct.pack("!HB5x", _RESPONDER, 0))
            + _record(_PARAMS, b"".join(map(_pair, params.items())))
            + _record(_PARAMS)
            + _record(_STDIN)
        )
        output = _output(process)
        with suppress(OSError):  # the client has disconnected
            _pass_on(output, client, has_body=method != "HEAD")
        for _ in output:  # flup's process of one thread ends if a write fails
            pass


def _record(kind: int, content: bytes = b"") -> bytes:
    return _HEADER.pack(1, kind, 1, len(content), 0) + content


def _pair(pair: tuple[str, str]) -> bytes:
    name, value = (text.encode("latin-1") for text in pair)
    return struct.pack("!II", len(name) | 1 << 31, len(value) | 1 << 31) + name + value


def _output(process: socket.socket) -> Iterator[bytes]:
    """The output of the process, until the process ends the request."""
    with process.makefile("rb") as records:
        while header := records.read(_HEADER.size):
            _, kind, _, length, padding = _HEADER.unpack(header)
            content = records.read(length + padding)[:length]
            if kind == _END_REQUEST:
                return
            if kind == _STDOUT:
                yield content


def _pass_on(output: Iterator[bytes], client: socket.socket, *, has_body: bool) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        head += next(output)
    head, _, body = head.partition(b"\r\n\r\n")
    status, _, headers = head.removeprefix(b"Status: ").partition(b"\r\n")
    client.sendall(b"HTTP/1.1 %s\r\nConnection: close\r\n%s\r\n\r\n" % (status, headers))
    for chunk in itertools.chain([body], output):
        if has_body:
            client.sendall(chunk)
