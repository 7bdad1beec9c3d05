"""The server's side of the gate: a task goes on when the client opens the gate.

A task connects to the test's process, sends its token and waits for an answer. The address
comes from the environment of the server's process, since a request must bring only data: the
token.
"""

from __future__ import annotations

import asyncio
import os
import socket

BOUND = float(os.environ.get("WSGI_BG_TEST_BOUND", "5"))
"""How long a task waits to be let through, in seconds."""

ADDRESS = "WSGI_BG_TEST_GATE"
"""The environment variable with the port of the test's process on loopback."""


def _port() -> int:
    return int(os.environ[ADDRESS])


def _announcement(token: str) -> bytes:
    return f"{token} {os.getpid()}\n".encode()


def _report(answer: bytes) -> bytes:
    return b"passed\n" if answer == b"go\n" else b"late\n"


def visit(token: str) -> None:
    """Wait at the gate; return how the wait ended. Blocks."""
    with socket.create_connection(("127.0.0.1", _port()), timeout=BOUND) as connection:
        connection.sendall(_announcement(token))
        try:
            answer = connection.recv(16)
        except TimeoutError:
            answer = b""
        connection.sendall(_report(answer))


def announce(token: str) -> None:
    """Tell the test that this point was reached, and go on."""
    with socket.create_connection(("127.0.0.1", _port()), timeout=BOUND) as connection:
        connection.sendall(_announcement(token) + b"passed\n")


async def visit_async(token: str) -> None:
    """Wait at the gate as ``visit`` does, without holding a thread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", _port())
    try:
        writer.write(_announcement(token))
        try:
            answer = await asyncio.wait_for(reader.readline(), BOUND)
        except TimeoutError:
            answer = b""
        writer.write(_report(answer))
        await writer.drain()
    finally:
        writer.close()
