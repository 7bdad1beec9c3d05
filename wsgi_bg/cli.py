"""``wsgi-bg MODULE:APP``: serves an application with waitress and drains when it stops.

What the user has to put right in the command is one line on standard error and status 2.
An error inside the user's module keeps its traceback.
"""

from __future__ import annotations

import argparse
import getopt
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, serving
from .exceptions import ExtraMissingError, OptionError
from .runners import set_default

if TYPE_CHECKING:
    from .graceful import GracefulServer

_DESCRIPTION = """\
Serve a WSGI application with waitress and run its background tasks after the responses.
SIGTERM and SIGINT stop it: requests in hand are answered, tasks are waited for. The exit
status is then 0, or 1 if something was left, which is named. A second signal ends it at once.
"""

# Options of waitress that are not to be given to it.
_NOT_BEHIND = ("help", "host", "port", "threads", "sockets")


class _UsageError(Exception):
    """The command cannot be obeyed; says why in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status.

    :param arguments: those of the command line; None for the process's own.
    """
    try:
        own, behind = _split(sys.argv[1:] if arguments is None else arguments)
        given = _parser().parse_args(own)
        server = _prepare(given, behind)
    except _UsageError as exc:
        print(f"wsgi-bg: {exc}", file=sys.stderr)
        return 2
    return 1 if serving.run(server, given.drain_timeout) else 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first ``--``, and what stands behind it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wsgi-bg",
        usage="%(prog)s [OPTIONS] MODULE:APP [-- OPTIONS OF WAITRESS]",
        description=_DESCRIPTION,
        epilog="Behind -- stand options of waitress, as waitress-serve --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("app", metavar="MODULE:APP", help="for instance shop.wsgi:app; APP may have dots")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("--host", help=f"the address to listen on (default: {serving.HOST})")
    add("--port", type=int, help=f"0 for any that is free (default: {serving.PORT})")
    add(
        "--threads",
        type=int,
        default=serving.THREADS,
        help="how many requests are handled at the same time (default: %(default)s)",
    )
    add(
        "--runner",
        choices=("pool", "inline"),
        help="where tasks run: on threads of their own, or on the server's (default: what "
        "the application's own middleware names, else pool)",
    )
    add(
        "--drain-timeout",
        type=float,
        metavar="SECONDS",
        help="how long a stop may take, from the signal (default: what the runners say, 30)",
    )
    return parser


def _prepare(given: argparse.Namespace, behind: list[str]) -> GracefulServer:
    options = {"host": given.host, "port": given.port, "threads": given.threads}
    try:
        serving.check(**options, drain_timeout=given.drain_timeout)
    except (ExtraMissingError, OptionError) as exc:
        raise _UsageError(exc) from exc
    of_waitress, is_factory = _parse_waitress(behind)
    set_default(given.runner or "pool")  # before middleware is made in the user's module
    app = _load(given.app, is_factory)
    options = serving.complete({**options, **of_waitress})
    try:
        return serving.listen(app, given.runner, options)
    except (OSError, ValueError) as exc:
        where = options.get("listen") or options.get("unix_socket")
        where = where or "{host}:{port}".format(**options)
        reason = getattr(exc, "strerror", None) or exc
        given_too = f" (with {' '.join(behind)})" if behind else ""
        raise _UsageError(f"cannot listen on {where}: {reason}{given_too}") from exc


def _parse_waitress(arguments: list[str]) -> tuple[dict[str, str], bool]:
    """The options of waitress, and whether APP has to be called to get the application."""
    from waitress.adjustments import Adjustments

    try:
        options, rest = Adjustments.parse_args(arguments)
    except getopt.GetoptError as exc:
        raise _UsageError(f"{exc} (see waitress-serve --help)") from exc
    wrong = [f"--{name}" for name in _NOT_BEHIND if options.get(name)] + rest
    if wrong:
        raise _UsageError(f"{wrong[0]} does not belong behind --")
    if "listen" in options:
        options["listen"] = options["listen"].strip()
    del options["help"]
    return options, options.pop("call")


def _load(target: str, is_factory: bool) -> Any:
    """The application that ``target`` names, with the current directory to import from."""
    module_name, _, path = target.partition(":")
    if path.endswith("()"):
        factory = target.removesuffix("()")
        raise _UsageError(f"for an application factory write {factory} -- --call")
    if not all(name.isidentifier() for name in f"{module_name}.{path}".split(".")):
        raise _UsageError(f"{target!r} is not MODULE:APP, for instance shop.wsgi:app")
    directory = os.getcwd()
    if sys.path[:1] != [directory]:  # python -m has put it there
        sys.path.insert(0, directory)
    app = _find(module_name, path)
    if is_factory and callable(app):
        app = app()
    if not callable(app):
        raise _UsageError(f"{target} is not callable: it is a {type(app).__name__}")
    return app


def _find(module_name: str, path: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # One that the user's module imports is an error inside that module.
        if not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise _UsageError(f"{exc} (looked for in {sys.path[0]} first)") from exc
    for name in path.split("."):
        if not hasattr(found, name):
            raise _UsageError(f"module {module_name!r} has no attribute {path!r}")
        found = getattr(found, name)
    return found
