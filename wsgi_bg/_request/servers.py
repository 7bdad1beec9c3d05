"""Tells if a WSGI server has sent the whole response before the server calls ``close()``.

PEP 3333 says that ``close()`` is called at the end of the request, not that the client
has the response by then. A single case was found safe on every server but tornado: an
exhausted body with a declared length above zero. Clients of streams wait for the terminator,
clients of empty bodies for the headers, HTTP/1.0 clients for the end of the connection. Many
servers send these only after ``close()``. tornado writes nothing before ``close()`` and cannot
be recognised by its environ, so an unknown server is treated like tornado.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from io import BytesIO
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.util import FileWrapper

from wsgi_bg.exceptions import UnsupportedServerError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Server(NamedTuple):
    """How a server that writes a declared length before ``close()`` is recognised."""

    name: str
    key: str
    """The environ key that only this server sets, or ``"SERVER_SOFTWARE"``."""
    values: tuple[str, ...] = ()
    """The values of ``SERVER_SOFTWARE``, compared whole, with VERSION for any version."""


# Servers with a key of their own come first: SERVER_SOFTWARE can be changed by
# configuration.
SERVERS = (
    Server("waitress", "waitress.client_disconnected"),
    Server("werkzeug", "werkzeug.socket"),
    Server("uWSGI", "uwsgi.version"),
    Server("a2wsgi", "asgi.scope"),
    Server(
        "gunicorn", "SERVER_SOFTWARE", ("gunicorn/VERSION", "gevent/VERSION gunicorn/VERSION")
    ),
    Server(
        "cheroot",
        "SERVER_SOFTWARE",
        ("Cheroot/VERSION Server", "CherryPy/VERSION Cheroot/VERSION Server"),
    ),
    Server("gevent", "SERVER_SOFTWARE", ("gevent/VERSION Python/VERSION",)),
    Server("granian", "SERVER_SOFTWARE", ("Granian",)),
    Server(
        "wsgiref",
        "SERVER_SOFTWARE",
        # The second from Python 3.15 on.
        ("WSGIServer/0.2", "WSGIServer", "WSGIServer/0.2 CPython/VERSION"),
    ),
)

_VERSION = "[0-9][A-Za-z0-9.+!_-]*"

# Servers and gateways set some of these keys; SCGI is in each request of that protocol.
_OF_GATEWAYS = ("SERVER_SOFTWARE", "GATEWAY_INTERFACE", "REMOTE_PORT", "SCGI")

# Middlewares for tests, which wrap input and errors.
_LINTERS = ("werkzeug.middleware.lint", "wsgiref.validate")

_FLAGS = ("multithread", "multiprocess", "run_once")

# Also matches "unable to send websocket binary message". The third is of write().
_UWSGI_CLOSED = (
    "unable to receive websocket ",
    "unable to send websocket ",
    "write error",
)

BODYLESS = ("1", "204", "304")
"""Statuses, or how they begin, after which no body follows (RFC 9110, section 6.4.1)."""


def refuse_eventlet(environ: WSGIEnvironment) -> None:
    """Refuse to serve under eventlet.

    eventlet's threads are greenlets of one thread, which would all wait for an async task.
    With monkey-patching the portal's loop would run on that thread too, and the
    application's ``asyncio.run()`` would fail. gevent has an API that avoids both (see
    :mod:`wsgi_bg._process.greenlets`).

    :raises RuntimeError: if eventlet made ``environ`` or has patched :mod:`threading`.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if "eventlet.posthooks" in environ or (patcher and patcher.is_monkey_patched("thread")):
        raise UnsupportedServerError(
            "eventlet", "gevent, waitress or gunicorn's gthread worker"
        )


def is_asked_for(environ: WSGIEnvironment, exc: BaseException) -> bool:
    """True if ``exc`` is the server's normal end of a connection the application took over.

    gunicorn closes the connection on a ``StopIteration`` and logs no error: the views of
    flask-sock and python-engineio end in this way. uWSGI's ``write()`` and functions for
    WebSockets raise an ``OSError`` when the client has closed the connection.
    """
    if issubclass(type(exc), StopIteration):  # isinstance() reads __class__, which may raise
        return "gunicorn.socket" in environ
    return (
        "uwsgi.version" in environ
        and type(exc) is OSError
        and str(exc).startswith(_UWSGI_CLOSED)
    )


def is_client_gone(start_response: object, exc: BaseException) -> bool:
    """True if the server's ``write()`` has raised ``exc``, since the client has left.

    ``exc`` has passed a frame of the server then. An error of another connection, to a database
    for example, has not.

    :param start_response: the server's function, of the same module as its ``write()``.
    """
    kind = type(exc)
    if not (
        issubclass(kind, (ConnectionError, TimeoutError))
        or kind.__name__ == "ClientDisconnected"  # waitress's, which is no OSError
    ):
        return False
    module = getattr(start_response, "__module__", None)
    frames = walk_tb(exc.__traceback__)
    return any(frame.f_globals.get("__name__") == module for frame, _ in frames)


def recognise(environ: WSGIEnvironment) -> Server | None:
    """The server that made ``environ``, or None if the server is not in :data:`SERVERS`."""
    for server in SERVERS:
        if not server.values and server.key in environ:
            return server
    found = _by_software(str(environ.get("SERVER_SOFTWARE")))
    if found is None:
        return None
    # A gateway may pass on the name of the server in front, and further servers call
    # themselves as Python's does. Neither sets these values.
    if found.name == "wsgiref":
        is_itself = environ.get("wsgi.file_wrapper") is FileWrapper
    else:
        is_itself = "wsgi.input_terminated" in environ
    return found if is_itself else None


@lru_cache(maxsize=16)
def _by_software(software: str) -> Server | None:
    for server in SERVERS:
        for value in server.values:
            if re.fullmatch(re.escape(value).replace("VERSION", _VERSION), software):
                return server
    return None


def describe(environ: WSGIEnvironment) -> str:
    """The server's name for a log."""
    if is_test_client(environ):
        return "a test client"
    server = recognise(environ)
    if server is not None:
        return server.name
    return str(environ.get("SERVER_SOFTWARE", "a server that does not name itself"))


def is_test_client(environ: WSGIEnvironment) -> bool:
    """True if a test client made ``environ``.

    Each client is recognised by a value that no server and no gateway puts into an environ.
    """
    payload = type(environ.get("wsgi.input"))
    if payload.__name__ == "FakePayload" and payload.__module__.startswith("django."):
        return True
    if environ.get("paste.testing"):  # WebTest's
        return True
    if _is_falcons_client(environ):
        return True
    if any(key in environ for key in _OF_GATEWAYS):
        return False
    if recognise(environ) is not None:
        return False
    flags = [environ.get(f"wsgi.{name}", True) for name in _FLAGS]
    if any(flags):
        return False
    # The client of werkzeug (and so of Flask) sets RAW_URI. A gateway may get such a parameter
    # too, but has an input and a stream of errors of its own.
    is_werkzeugs = "RAW_URI" in environ and (
        payload is BytesIO
        or payload.__module__ in _LINTERS
        or environ.get("wsgi.errors") is sys.stderr
    )
    return is_werkzeugs or (
        # setup_testing_defaults() of wsgiref. Small servers also write 0 for False, but they
        # do not discard wsgi.errors (wsgiref.validate wraps that) and set REMOTE_ADDR.
        all(type(flag) is int for flag in flags)
        and type(environ.get("wsgi.errors")).__name__ in ("StringIO", "ErrorWrapper")
        and environ.get("SERVER_NAME") == "127.0.0.1"
        and "REMOTE_ADDR" not in environ
    )


def _is_falcons_client(environ: WSGIEnvironment) -> bool:
    """True if Falcon's test client made ``environ``, which names a gunicorn of 2012.

    The real gunicorn puts ``gunicorn.socket`` into each environ.
    """
    return (
        environ.get("SERVER_SOFTWARE") == "gunicorn/0.17.0"
        and "RAW_URI" in environ
        and "gunicorn.socket" not in environ
        and "GATEWAY_INTERFACE" not in environ
    )


def is_written(
    environ: WSGIEnvironment,
    status: str,
    headers: Iterable[tuple[str, str]],
    *,
    declared_late: bool = False,
) -> bool:
    """True if the client has the whole response, provided that the body was exhausted.

    :param status: the status line as given to ``start_response``.
    :param headers: the headers as given to ``start_response``.
    :param declared_late: True if the application called ``start_response`` after returning
        the iterable. granian reads status and headers when the application returns, so
        granian does not send a length that is declared later.
    """
    return (
        not declared_late
        and declared_length(headers) > 0
        and environ.get("REQUEST_METHOD") != "HEAD"
        and not status.startswith(BODYLESS)
        and recognise(environ) is not None
    )


def declared_length(headers: Iterable[tuple[str, Any]]) -> int:
    """The ``Content-Length`` in bytes; 0 if there is none or it is not a number."""
    for name, value in headers:
        if name.lower() == "content-length":
            return int(value) if str(value).isdecimal() else 0
    return 0
