"""``wsgi-bg MODULE:APP``: serve an application with waitress and drain at the stop.

``wsgi-bg tasks`` is in ``tasks_command``, ``wsgi-bg status`` in ``status_command``.

For a wrong command the program prints a line on standard error and exits with status 2. An
error inside the user's module keeps the traceback.
"""

from __future__ import annotations

import argparse
import getopt
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from wsgi_bg._request.layer import everywhere
from wsgi_bg._serving import serve as serving
from wsgi_bg._serving.usage import Parser, UsageError
from wsgi_bg._status.recorder import recorder
from wsgi_bg._tasks.callables import is_coroutine_callable
from wsgi_bg._version import __version__
from wsgi_bg.exceptions import ExtraMissingError, OptionError, StoreError
from wsgi_bg.runners import set_default

if TYPE_CHECKING:
    from wsgi_bg._serving.server import GracefulServer
    from wsgi_bg.runners import Runner

_DESCRIPTION = """\
Serve a WSGI application with waitress and run its background tasks after the responses.
SIGTERM, SIGINT and SIGHUP stop it: requests in hand are answered, tasks are waited for. The
exit status is then 0, or 1 if something was left, which is named. A second signal ends it at
once.
"""

# Options of waitress that are refused behind "--".
_NOT_BEHIND = ("help", "host", "port", "threads", "sockets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status.

    :param arguments: the command-line arguments; None for the arguments of the process.
    """
    _open_standard_files()
    own = list(sys.argv[1:] if arguments is None else arguments)
    if own[:1] == ["tasks"]:  # a module of that name is tasks:app
        from wsgi_bg._serving import tasks_command

        return tasks_command.main(own[1:])
    if own[:1] == ["status"]:
        from wsgi_bg._serving import status_command

        return status_command.main(own[1:])
    end = own.index("--") if "--" in own else len(own)
    try:
        given = _parser().parse_args(own[:end])
        server = _prepare(given, own[end + 1 :])
    except UsageError as exc:
        print(f"wsgi-bg: {exc}", file=sys.stderr)
        return 2
    return 1 if serving.run(server, given.drain_timeout) else 0


def _open_standard_files() -> None:
    """Open the null device for each of the file descriptors 0 to 2 that is closed.

    Otherwise a socket could get the number 1, and standard output would go to that socket.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="wsgi-bg",
        usage="%(prog)s [OPTIONS] MODULE:APP [-- OPTIONS OF WAITRESS]\n"
        "       %(prog)s tasks PATH list|show|retry|discard [OPTIONS]\n"
        "       %(prog)s status PATH [--json]",
        description=_DESCRIPTION,
        epilog="Behind -- stand options of waitress, as waitress-serve --help lists them. "
        "%(prog)s tasks looks at the durable tasks in a folder: see %(prog)s tasks --help. "
        "%(prog)s status prints what the tasks of all processes do.",
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
        "--durable",
        metavar="PATH",
        help="a folder that keeps tasks of registered functions until they have run, for an "
        "application whose own middleware names no runner",
    )
    add(
        "--drain-timeout",
        type=float,
        metavar="SECONDS",
        help="how long a stop may take, from the signal (default: what the runners say, 30)",
    )
    add(
        "--status-path",
        metavar="PATH",
        help="a folder in which all processes write the status of their tasks",
    )
    add("--log-tasks", action="store_true", help="write a line for each task that has ended")
    return parser


def _prepare(given: argparse.Namespace, behind: list[str]) -> GracefulServer:
    options = {"host": given.host, "port": given.port, "threads": given.threads}
    try:
        serving.check(**options, drain_timeout=given.drain_timeout)
    except (ExtraMissingError, OptionError) as exc:
        raise UsageError(exc) from exc
    of_waitress, is_factory = _parse_waitress(behind)
    default = _default_runner(given)
    _watch(given)
    set_default(default)  # before the user's module makes a middleware
    app = _load(given.app, is_factory)
    options = serving.complete({**options, **of_waitress})
    try:
        return serving.listen(app, given.runner, options, default)
    except (OSError, ValueError) as exc:
        where = options.get("listen") or options.get("unix_socket")
        where = where or "{host}:{port}".format(**options)
        reason = getattr(exc, "strerror", None) or exc
        given_too = f" (with {' '.join(behind)})" if behind else ""
        raise UsageError(f"cannot listen on {where}: {reason}{given_too}") from exc


def _watch(given: argparse.Namespace) -> None:
    """Let each middleware of this process have the hooks that the options ask for."""
    if given.log_tasks:
        from wsgi_bg._serving.log_tasks import TaskLog

        everywhere.append(TaskLog())
    if given.status_path is not None:
        try:
            recorder.turn_on(given.status_path)
        except OptionError as exc:
            raise UsageError(str(exc).replace("status_path", "--status-path", 1)) from exc
        everywhere.append(recorder)


def _default_runner(given: argparse.Namespace) -> Runner | Literal["inline", "pool"]:
    """The runner of an application that names none."""
    if given.durable is None:
        name: Literal["inline", "pool"] = given.runner or "pool"
        return name
    if given.runner is not None:
        raise UsageError("--durable and --runner both name a runner: give one of them")
    from wsgi_bg._durable.runner import DurableRunner

    try:
        return DurableRunner(given.durable)
    except StoreError as exc:
        raise UsageError(exc) from exc


def _parse_waitress(arguments: list[str]) -> tuple[dict[str, str], bool]:
    """Return the options of waitress, and True if APP is an application factory."""
    from waitress.adjustments import Adjustments

    try:
        options, rest = Adjustments.parse_args(arguments)
    except getopt.GetoptError as exc:
        raise UsageError(f"{exc} (see waitress-serve --help)") from exc
    wrong = [f"--{name}" for name in _NOT_BEHIND if options.get(name)] + rest
    if wrong:
        raise UsageError(f"{wrong[0]} does not belong behind --")
    if "listen" in options:
        options["listen"] = options["listen"].strip()
    del options["help"]
    return options, options.pop("call")


def _load(target: str, is_factory: bool) -> Any:
    """Import the application that ``target`` names, from the current directory first."""
    module_name, _, path = target.partition(":")
    if path.endswith("()"):
        factory = target.removesuffix("()")
        raise UsageError(f"for an application factory write {factory} -- --call")
    if not all(name.isidentifier() for name in f"{module_name}.{path}".split(".")):
        raise UsageError(f"{target!r} is not MODULE:APP, for instance shop.wsgi:app")
    directory = os.getcwd()
    if sys.path[:1] != [directory]:  # with python -m it is the first already
        sys.path.insert(0, directory)
    app = _find(module_name, path)
    if is_factory and callable(app) and not is_coroutine_callable(app):
        app = app()
        target += "()"  # its result is meant below
    if not callable(app):
        raise UsageError(f"{target} is not callable: it is a {type(app).__name__}")
    if is_coroutine_callable(app):
        reason = "is async, as ASGI applications are: give a WSGI application"
        raise UsageError(f"{target} {reason}")
    return app


def _find(module_name: str, path: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # If the user's module imports the missing module, the error is inside the user's code.
        if not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise UsageError(f"{exc} (looked for in {sys.path[0]} first)") from exc
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageError(f"module {module_name!r} has no attribute {path!r}")
        found = getattr(found, name)
    return found
