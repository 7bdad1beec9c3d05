"""What each WSGI server has sent to the client by the time it calls ``close()``.

PEP 3333 says that ``close()`` is called at the end of the request, not that the client
has its response by then. One case was found safe on every server but tornado: a body
with a declared length above zero that was used up. Streams wait for their terminator,
empty bodies for their headers, HTTP/1.0 clients for the connection to be closed, all of
which many servers send only after ``close()``. tornado writes nothing before it and
leaves no mark; a server that is not known here is taken to be like it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from .exceptions import UnsupportedServerError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Server(NamedTuple):
    """How a server that writes a declared length before ``close()`` is recognised."""

    name: str
    key: str
    """The environ key that only this server sets."""
    contains: str = ""
    """What the value of ``key`` contains."""


# A key of the server's own first: SERVER_SOFTWARE can be renamed by configuration.
SERVERS = (
    Server("waitress", "waitress.client_disconnected"),
    Server("werkzeug", "werkzeug.socket"),
    Server("uWSGI", "uwsgi.version"),
    Server("mod_wsgi", "mod_wsgi.version"),
    Server("a2wsgi", "asgi.scope"),
    Server("gunicorn", "SERVER_SOFTWARE", "gunicorn/"),
    Server("cheroot", "SERVER_SOFTWARE", "Cheroot/"),
    Server("gevent", "SERVER_SOFTWARE", "gevent/"),
    Server("granian", "SERVER_SOFTWARE", "Granian"),
    Server("wsgiref", "SERVER_SOFTWARE", "WSGIServer/"),
)

# "unable to send websocket binary message" is another one.
_UWSGI_CLOSED = ("unable to receive websocket ", "unable to send websocket ")

BODYLESS = ("1", "204", "304")
"""Statuses, or how they begin, after which no body follows (RFC 9110, section 6.4.1)."""


def refuse_eventlet(environ: WSGIEnvironment) -> None:
    """Refuse to serve under eventlet.

    Its threads are greenlets of one thread, which would all wait for an async task, and
    monkey-patched the portal's loop would live on that thread: ``asyncio.run()`` then fails
    for the application. gevent has what helps (see :mod:`wsgi_bg.greenlets`).

    :raises RuntimeError: if eventlet made ``environ`` or has patched :mod:`threading`.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if "eventlet.posthooks" in environ or (patcher and patcher.is_monkey_patched("thread")):
        raise UnsupportedServerError(
            "eventlet", "gevent, waitress or gunicorn's gthread worker"
        )


def is_asked_for(environ: WSGIEnvironment, exc: BaseException) -> bool:
    """Whether ``exc`` is how the server ends a connection that the application took over.

    gunicorn closes the connection for a ``StopIteration`` and logs no error: so end views
    of flask-sock and python-engineio. uWSGI raises an ``OSError`` out of its functions for
    WebSockets when the client has closed.
    """
    if isinstance(exc, StopIteration):
        return "gunicorn.socket" in environ
    return (
        "uwsgi.version" in environ
        and type(exc) is OSError
        and str(exc).startswith(_UWSGI_CLOSED)
    )


def recognise(environ: WSGIEnvironment) -> Server | None:
    """The server that made ``environ``, if it is one of :data:`SERVERS`."""
    for server in SERVERS:
        _, key, contains = server
        if key in environ and contains in str(environ[key]):
            return server
    return None


def describe(environ: WSGIEnvironment) -> str:
    """The server's name for a log."""
    server = recognise(environ)
    if server is not None:
        return server.name
    if is_test_client(environ):
        return "a test client"
    return str(environ.get("SERVER_SOFTWARE", "a server that does not name itself"))


def is_test_client(environ: WSGIEnvironment) -> bool:
    """Whether no server is there, but werkzeug's, Flask's, WebTest's or Django's client.

    They set no server's mark. Nor do tornado, hypercorn, twisted and some adapters, but
    of those each has threads or processes, and the test clients have neither. Django's
    has both, and is known by its input.
    """
    payload = type(environ.get("wsgi.input"))
    if payload.__name__ == "FakePayload" and payload.__module__.startswith("django."):
        return True
    if environ.get("wsgi.multithread", True) or environ.get("wsgi.multiprocess", True):
        return False
    return "SERVER_SOFTWARE" not in environ and recognise(environ) is None


def is_written(
    environ: WSGIEnvironment, status: str, headers: Iterable[tuple[str, str]]
) -> bool:
    """Whether a response whose body was used up needs nothing more from the application.

    :param status: the status line as given to ``start_response``.
    :param headers: the headers as given to ``start_response``.
    """
    return (
        declared_length(headers) > 0
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
