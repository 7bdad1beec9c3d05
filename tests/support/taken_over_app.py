"""Applications whose views take the connection over, with tasks for both outcomes.

``sock`` is Flask's with flask-sock, ``handled`` answers on gunicorn's socket itself, and
``by_uwsgi`` uses uWSGI's own functions for WebSockets.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from typing import Any, cast

from flask import Flask
from flask_sock import Sock

from wsgi_bg import BackgroundTasksMiddleware, background_tasks


def say(*words: str) -> None:
    os.write(1, " ".join(words).encode() + b"\n")


def add_tasks() -> None:
    for outcome in ("success", "error"):
        background_tasks.using(run_on=outcome).add_task(say, "the task of", outcome)


flask = Flask(__name__)
websockets = Sock(flask)


def echo(socket: Any) -> None:
    add_tasks()
    socket.send(socket.receive())


websockets.route("/")(echo)


def answer_on_the_socket(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    from gunicorn.workers.base_async import ALREADY_HANDLED

    add_tasks()
    environ["gunicorn.socket"].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    return cast(Iterable[bytes], ALREADY_HANDLED)


def echo_by_uwsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    import uwsgi

    # uWSGI lacks the handshake if it was built without OpenSSL.
    key = environ["HTTP_SEC_WEBSOCKET_KEY"].encode()
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    headers = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", base64.b64encode(digest).decode()),
    ]
    start_response("101 Switching Protocols", headers)(b"")
    add_tasks()
    while True:
        uwsgi.websocket_send(uwsgi.websocket_recv())


sock = BackgroundTasksMiddleware(flask)
handled = BackgroundTasksMiddleware(answer_on_the_socket)
by_uwsgi = BackgroundTasksMiddleware(echo_by_uwsgi)
