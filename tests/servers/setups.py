"""The set-ups: each server as started, recognised, and left alive between requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

from tests.servers import apache, commands
from tests.servers.commands import Command

CLOSES = "closes the connection without an answer"
SILENT = "never answers, and leaves the connection open"

NOTHING: Mapping[str, int | str] = MappingProxyType({})


class Setup(NamedTuple):
    """A server and the way to start the server.

    :ivar name: the server's name first, in front of a hyphen.
    :ivar command: makes the command.
    :ivar missing: the reason why this set-up cannot run here, or None.
    :ivar mark: the entry of ``wsgi_bg._request.servers.SERVERS`` that recognises the server.
    :ivar keeps_alive: whether another request may follow a response with a length.
    :ivar forks: whether a parent of the worker's process imports the application.
    :ivar instead: the server's replacement for a kind of response: another status,
        :data:`CLOSES` or :data:`SILENT`.
    """

    name: str
    command: Command
    missing: Callable[[], str | None]
    mark: str | None
    keeps_alive: bool = False
    forks: bool = False
    instead: Mapping[str, int | str] = NOTHING

    def __str__(self) -> str:
        return self.name


def _package(*names: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        absent = [name for name in names if find_spec(name) is None]
        return f"{' and '.join(absent)} cannot be imported" if absent else None

    return missing


# The server sends the headers with the first chunk.
_HYPERCORN = dict.fromkeys(("length-0-no-chunk", "204", "304", "empty"), 500)
_TORNADO = {"head": CLOSES, "raises": SILENT, "raises-always": SILENT}
_UWSGI = {"raises": CLOSES, "raises-always": CLOSES}


SETUPS = (
    Setup(
        "waitress",
        commands.serve("waitress"),
        _package("waitress"),
        "waitress",
        keeps_alive=True,
    ),
    Setup("werkzeug", commands.serve("werkzeug"), _package("werkzeug"), "werkzeug"),
    Setup(
        "werkzeug-threaded",
        commands.serve("werkzeug-threaded"),
        _package("werkzeug"),
        "werkzeug",
    ),
    Setup(
        "werkzeug-debugger",
        commands.serve("werkzeug-debugger"),
        _package("werkzeug"),
        "werkzeug",
    ),
    Setup("wsgiref", commands.serve("wsgiref"), _package("wsgiref"), "wsgiref"),
    Setup("gunicorn-sync", commands.gunicorn(), _package("gunicorn"), "gunicorn"),
    Setup(
        "gunicorn-gthread",
        commands.gunicorn("-k", "gthread", "--threads", "4"),
        _package("gunicorn"),
        "gunicorn",
        keeps_alive=True,
    ),
    Setup(
        "gunicorn-preload",
        commands.gunicorn("--preload"),
        _package("gunicorn"),
        "gunicorn",
        forks=True,
    ),
    Setup(
        "gunicorn-gevent",
        commands.gunicorn("-k", "gevent"),
        _package("gunicorn", "gevent"),
        "gunicorn",
        keeps_alive=True,
    ),
    Setup(
        "gunicorn-uvicorn",
        commands.gunicorn_uvicorn(),
        _package("gunicorn", "uvicorn_worker", "a2wsgi"),
        "a2wsgi",
        keeps_alive=True,
    ),
    Setup(
        "cheroot", commands.serve("cheroot"), _package("cheroot"), "cheroot", keeps_alive=True
    ),
    Setup(
        "cherrypy",
        commands.serve("cherrypy"),
        _package("cherrypy"),
        "cheroot",
        keeps_alive=True,
    ),
    Setup("gevent", commands.serve("gevent"), _package("gevent"), "gevent", keeps_alive=True),
    Setup(
        "gevent-monkey",
        commands.serve("gevent-monkey"),
        _package("gevent"),
        "gevent",
        keeps_alive=True,
    ),
    Setup("granian", commands.granian, _package("granian"), "granian", keeps_alive=True),
    Setup(
        "uvicorn-a2wsgi",
        commands.serve("uvicorn-a2wsgi"),
        _package("uvicorn", "a2wsgi"),
        "a2wsgi",
        keeps_alive=True,
    ),
    Setup(
        "uvicorn-starlette",
        commands.serve("uvicorn-starlette"),
        _package("uvicorn", "starlette"),
        None,
        keeps_alive=True,
    ),
    Setup(
        "uvicorn-asgiref",
        commands.serve("uvicorn-asgiref"),
        _package("uvicorn", "asgiref"),
        None,
        keeps_alive=True,
    ),
    Setup("django", commands.serve("django"), _package("django"), "wsgiref", keeps_alive=True),
    Setup(
        "hypercorn",
        commands.hypercorn,
        _package("hypercorn"),
        None,
        keeps_alive=True,
        instead=_HYPERCORN,
    ),
    Setup("twisted", commands.serve("twisted"), _package("twisted"), None, keeps_alive=True),
    Setup(
        "tornado",
        commands.serve("tornado"),
        _package("tornado"),
        None,
        keeps_alive=True,
        instead=_TORNADO,
    ),
    Setup(
        "tornado-threads",
        commands.serve("tornado-threads"),
        _package("tornado"),
        None,
        keeps_alive=True,
        instead=_TORNADO,
    ),
    Setup("uWSGI", commands.uwsgi(), _package("pyuwsgi"), "uWSGI", instead=_UWSGI),
    Setup(
        "uWSGI-master",
        commands.uwsgi("--master", "--die-on-term"),
        _package("pyuwsgi"),
        "uWSGI",
        forks=True,
        instead=_UWSGI,
    ),
    Setup(
        "uWSGI-gevent",
        commands.uwsgi("--gevent", "10"),
        _package("pyuwsgi", "gevent"),
        "uWSGI",
        instead=_UWSGI,
    ),
    Setup("flup", commands.serve("flup"), _package("flup"), None),
    Setup("flup-single", commands.serve("flup-single"), _package("flup"), None),
    Setup(
        "mod_wsgi-daemon",
        commands.mod_wsgi(apache.DAEMON),
        apache.missing,
        None,
        keeps_alive=True,
    ),
    Setup(
        "mod_wsgi-embedded",
        commands.mod_wsgi(apache.EMBEDDED),
        apache.missing,
        None,
        keeps_alive=True,
    ),
    Setup("bjoern", commands.serve("bjoern"), _package("bjoern"), None, keeps_alive=True),
)

MISSING = {setup.name: setup.missing() for setup in SETUPS}
"""Why a set-up is not run here, or None, by its name."""

HERE = [setup for setup in SETUPS if MISSING[setup.name] is None]
"""The set-ups that are run."""
