"""The commands that start the servers: each function makes the command of a set-up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.servers import apache

APP = "tests.servers.app"
"""The module whose ``application`` is served."""


class Launch(NamedTuple):
    """The port, folder and module of a command."""

    port: int
    folder: Path
    """A folder of this process alone, which every user of the machine can read."""
    module: str = APP


Command = Callable[[Launch], list[str]]


def serve(name: str) -> Command:
    program = [sys.executable, "-m", "tests.servers.serve", name]
    return lambda launch: [*program, str(launch.port), launch.module]


def gunicorn(*options: str, app: str = "{}:application") -> Command:
    return lambda launch: [
        *(sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{launch.port}"),
        *("--no-control-socket", *options, app.format(launch.module)),
    ]


def gunicorn_uvicorn(*options: str) -> Command:
    """uvicorn's worker, with a2wsgi around the application."""
    app = "tests.servers.serve:make_asgi('{}')"
    return gunicorn("-k", "uvicorn_worker.UvicornWorker", *options, app=app)


def granian(launch: Launch) -> list[str]:
    return [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1"),
        *("--port", str(launch.port), f"{launch.module}:application"),
    ]


def uvicorn(launch: Launch) -> list[str]:
    """uvicorn with the module's ASGI application ``app``."""
    return [
        *(sys.executable, "-m", "uvicorn", "--host", "127.0.0.1"),
        *("--port", str(launch.port), f"{launch.module}:app"),
    ]


def hypercorn(launch: Launch) -> list[str]:
    return [
        *(sys.executable, "-m", "hypercorn", "-b", f"127.0.0.1:{launch.port}"),
        f"wsgi:{launch.module}:application",
    ]


def uwsgi(*options: str) -> Command:
    return lambda launch: [
        *(str(Path(sys.executable).with_name("uwsgi")), "--enable-threads", *options),
        *("--http-socket", f"127.0.0.1:{launch.port}"),
        *("--module", f"{launch.module}:application", "--pythonpath", str(launch.folder)),
    ]


def mod_wsgi(mode: str) -> Command:
    return lambda launch: apache.command(launch.folder, launch.port, launch.module, mode)
