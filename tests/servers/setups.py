"""The set-ups: each server as it is started, recognised and left alive between requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.servers import apache

APP = "tests.servers.app"
"""The module whose ``application`` is served."""

CLOSES = "closes the connection without an answer"
SILENT = "never answers, and leaves the connection open"

NOTHING: Mapping[str, int | str] = MappingProxyType({})


class Launch(NamedTuple):
    """What a command is made for."""

    port: int
    folder: Path
    """A folder of this process alone, which every user of the machine can read."""
    module: str = APP


class Setup(NamedTuple):
    """A server and the way in which it is started.

    :ivar name: the server's name first, in front of a hyphen.
    :ivar command: makes the command.
    :ivar missing: says why this cannot be run here, or None.
    :ivar mark: the entry of ``wsgi_bg.servers.SERVERS`` that it is recognised as.
    :ivar keeps_alive: whether another request may follow a response with a length.
    :ivar forks: whether the application is imported in a parent of the worker's process.
    :ivar instead: what the server makes of a kind of response itself: another status,
        :data:`CLOSES` or :data:`SILENT`.
    """

    name: str
    command: Callable[[Launch], list[str]]
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


def _serve(name: str) -> Callable[[Launch], list[str]]:
    program = [sys.executable, "-m", "tests.servers.serve", name]
    return lambda launch: [*program, str(launch.port), launch.module]


def _gunicorn(*options: str) -> Callable[[Launch], list[str]]:
    return lambda launch: [
        *(sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{launch.port}"),
        *("--no-control-socket", *options, f"{launch.module}:application"),
    ]


def _granian(launch: Launch) -> list[str]:
    return [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1"),
        *("--port", str(launch.port), f"{launch.module}:application"),
    ]


def _hypercorn(launch: Launch) -> list[str]:
    return [
        *(sys.executable, "-m", "hypercorn", "-b", f"127.0.0.1:{launch.port}"),
        f"wsgi:{launch.module}:application",
    ]


def _uwsgi(*options: str) -> Callable[[Launch], list[str]]:
    return lambda launch: [
        *(str(Path(sys.executable).with_name("uwsgi")), "--enable-threads", *options),
        *("--http-socket", f"127.0.0.1:{launch.port}"),
        *("--module", f"{launch.module}:application", "--pythonpath", str(launch.folder)),
    ]


# It sends the headers with the first chunk.
_HYPERCORN = dict.fromkeys(("length-0-no-chunk", "204", "304", "empty"), 500)
_TORNADO = {"head": CLOSES, "raises": SILENT, "raises-always": SILENT}
_UWSGI = {"raises": CLOSES, "raises-always": CLOSES}


def _mod_wsgi(mode: str) -> Callable[[Launch], list[str]]:
    return lambda launch: apache.command(launch.folder, launch.port, launch.module, mode)


SETUPS = (
    Setup("waitress", _serve("waitress"), _package("waitress"), "waitress", keeps_alive=True),
    Setup("werkzeug", _serve("werkzeug"), _package("werkzeug"), "werkzeug"),
    Setup("werkzeug-threaded", _serve("werkzeug-threaded"), _package("werkzeug"), "werkzeug"),
    Setup("werkzeug-debugger", _serve("werkzeug-debugger"), _package("werkzeug"), "werkzeug"),
    Setup("wsgiref", _serve("wsgiref"), _package("wsgiref"), "wsgiref"),
    Setup("gunicorn-sync", _gunicorn(), _package("gunicorn"), "gunicorn"),
    Setup(
        "gunicorn-gthread",
        _gunicorn("-k", "gthread", "--threads", "4"),
        _package("gunicorn"),
        "gunicorn",
        keeps_alive=True,
    ),
    Setup(
        "gunicorn-preload",
        _gunicorn("--preload"),
        _package("gunicorn"),
        "gunicorn",
        forks=True,
    ),
    Setup(
        "gunicorn-gevent",
        _gunicorn("-k", "gevent"),
        _package("gunicorn", "gevent"),
        "gunicorn",
        keeps_alive=True,
    ),
    Setup("cheroot", _serve("cheroot"), _package("cheroot"), "cheroot", keeps_alive=True),
    Setup("gevent", _serve("gevent"), _package("gevent"), "gevent", keeps_alive=True),
    Setup(
        "gevent-monkey",
        _serve("gevent-monkey"),
        _package("gevent"),
        "gevent",
        keeps_alive=True,
    ),
    Setup("granian", _granian, _package("granian"), "granian", keeps_alive=True),
    Setup(
        "uvicorn-a2wsgi",
        _serve("uvicorn-a2wsgi"),
        _package("uvicorn", "a2wsgi"),
        "a2wsgi",
        keeps_alive=True,
    ),
    Setup(
        "uvicorn-starlette",
        _serve("uvicorn-starlette"),
        _package("uvicorn", "starlette"),
        None,
        keeps_alive=True,
    ),
    Setup(
        "uvicorn-asgiref",
        _serve("uvicorn-asgiref"),
        _package("uvicorn", "asgiref"),
        None,
        keeps_alive=True,
    ),
    Setup("django", _serve("django"), _package("django"), "wsgiref", keeps_alive=True),
    Setup(
        "hypercorn",
        _hypercorn,
        _package("hypercorn"),
        None,
        keeps_alive=True,
        instead=_HYPERCORN,
    ),
    Setup("twisted", _serve("twisted"), _package("twisted"), None, keeps_alive=True),
    Setup(
        "tornado",
        _serve("tornado"),
        _package("tornado"),
        None,
        keeps_alive=True,
        instead=_TORNADO,
    ),
    Setup(
        "tornado-threads",
        _serve("tornado-threads"),
        _package("tornado"),
        None,
        keeps_alive=True,
        instead=_TORNADO,
    ),
    Setup("uWSGI", _uwsgi(), _package("pyuwsgi"), "uWSGI", instead=_UWSGI),
    Setup(
        "uWSGI-master",
        _uwsgi("--master"),
        _package("pyuwsgi"),
        "uWSGI",
        forks=True,
        instead=_UWSGI,
    ),
    Setup(
        "mod_wsgi-daemon",
        _mod_wsgi(apache.DAEMON),
        apache.missing,
        "mod_wsgi",
        keeps_alive=True,
    ),
    Setup(
        "mod_wsgi-embedded",
        _mod_wsgi(apache.EMBEDDED),
        apache.missing,
        "mod_wsgi",
        keeps_alive=True,
    ),
    Setup("bjoern", _serve("bjoern"), _package("bjoern"), None, keeps_alive=True),
)

MISSING = {setup.name: setup.missing() for setup in SETUPS}
"""Why a set-up is not run here, or None, by its name."""

HERE = [setup for setup in SETUPS if MISSING[setup.name] is None]
"""The set-ups that are run."""
