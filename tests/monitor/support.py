"""Requests for a monitor, with and without a server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.validate import validator

from werkzeug.serving import make_server

from tests.support import App, Server, make_environ
from wsgi_bg.monitor import Monitor

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def yes(environ: object) -> bool:
    return True


def open_monitor(**options: Any) -> Monitor:
    """A monitor that everybody may see."""
    return Monitor(allowed=yes, **options)


class Answer:
    """The response of an application without a server."""

    def __init__(self, app: App, path: str = "/", method: str = "GET", **environ: Any) -> None:
        path, _, query = path.partition("?")
        server = Server()
        request = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
        given = make_environ(**{"SCRIPT_NAME": "", **request, **environ})
        self.body = server.run(validator(app), given)
        self.code = int(server.status.split()[0])
        self.headers = dict(server.headers)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def serving(app: App) -> Iterator[int]:
    """Serve on threads, for a browser: waitress would wait for the connections it keeps."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def token_of(page: bytes) -> str:
    """The token in the HTML of a page."""
    found = re.search(rb'name="token" content="([^"]*)"', page)
    assert found
    return found[1].decode()


def post(app: App, path: str) -> Answer:
    """Load the page, and post as the page does."""
    page = Answer(app, "/")
    cookie = page.headers["Set-Cookie"].partition(";")[0]
    sent = {"HTTP_COOKIE": cookie, "HTTP_X_WSGI_BG_TOKEN": token_of(page.body)}
    return Answer(app, path, "POST", **sent)
