"""``serve``: an application on waitress that loses no request and no task when it stops."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from . import log, shutdown
from .checks import seconds, whole_number
from .exceptions import ExtraMissingError, MainThreadError, OptionTypeError
from .middleware import BackgroundTasksMiddleware
from .signals import StopSignals

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from .graceful import GracefulServer
    from .runners import Runner
    from .task import BackgroundTask

HOST, PORT, THREADS = "127.0.0.1", 8080, 4

# The options of waitress that take the place of host and port.
_ADDRESSES = ("listen", "unix_socket", "sockets")


@dataclass(frozen=True)
class Unfinished:
    """What was left when the time was up; true if anything was.

    :ivar requests: how many requests had no complete response, or ran tasks on the
        server's thread.
    :ivar tasks: the tasks that were handed over and had not ended.
    """

    requests: int
    tasks: list[BackgroundTask]

    def __bool__(self) -> bool:
        return bool(self.requests or self.tasks)


def serve(
    app: WSGIApplication,
    *,
    host: str | None = None,
    port: int | None = None,
    threads: int = THREADS,
    runner: Runner | Literal["inline", "pool"] | None = None,
    drain_timeout: float | None = None,
    **waitress_options: Any,
) -> Unfinished:
    """Serve ``app`` with waitress until SIGTERM or SIGINT; blocks, on the main thread.

    ``app`` is wrapped in a :class:`~wsgi_bg.BackgroundTasksMiddleware`. The first signal
    ends the accepting of connections; requests in hand are answered, then the tasks of
    all runners of the process are waited for, those that they add included. What is not
    finished by then is named at ERROR. The runners take no more work in after that: a
    batch submitted later runs in ``close()``. A second signal names what is left and ends
    the process by the signal's default action. The handlers of both signals are put back
    when ``serve`` returns.

    :param host: the address to listen on; None is ``"127.0.0.1"``.
    :param port: 0 is any that is free (it is printed); None is 8080.
    :param threads: how many requests are handled at the same time.
    :param runner: a runner, or the name of the process's shared one; None is the one that
        ``app`` names, being such a middleware itself or a Flask application with the
        extension, else ``"pool"``.
    :param drain_timeout: how long requests and tasks have, together, from the first
        signal, in seconds; None gives the tasks what their runner's ``drain_timeout``
        says, and the requests the longest of these.
    :param waitress_options: further arguments of ``waitress.serve``; ``listen``,
        ``unix_socket`` or ``sockets`` take the place of ``host`` and ``port``.
    :return: what was left undone.
    :raises TypeError: if an option is of the wrong type, or ``app`` not callable.
    :raises ValueError: if an option is out of range, or waitress refuses it.
    :raises OSError: if the address cannot be listened on.
    :raises RuntimeError: if this is not the main thread.
    :raises ImportError: if waitress is not installed.
    """
    check(host=host, port=port, threads=threads, drain_timeout=drain_timeout)
    options = complete({"host": host, "port": port, "threads": threads, **waitress_options})
    return run(listen(app, runner, options), drain_timeout)


def check(
    *, host: str | None, port: int | None, threads: int, drain_timeout: float | None
) -> None:
    """Raise what :func:`serve` raises, as far as it can be known without an application."""
    if find_spec("waitress") is None:
        raise ExtraMissingError("waitress", "serving an application")
    if threading.current_thread() is not threading.main_thread():
        raise MainThreadError
    if not isinstance(host, (str, NoneType)):
        raise OptionTypeError("host", host, "a name or an address")
    whole_number("port", port, least=0, most=65535, or_none=True)
    whole_number("threads", threads, least=1)
    seconds("drain_timeout", drain_timeout, or_none=True)


def complete(options: dict[str, Any]) -> dict[str, Any]:
    """The options for waitress, with a host and a port unless an address is among them."""
    given = {name: value for name, value in options.items() if value is not None}
    if any(given.get(name) for name in _ADDRESSES):
        return given
    return {"host": HOST, "port": PORT, **given}


def listen(
    app: WSGIApplication,
    runner: Runner | Literal["inline", "pool"] | None,
    options: dict[str, Any],
) -> GracefulServer:
    """A server that listens and does not accept yet; see :func:`serve`."""
    from .graceful import GracefulServer

    around = _Outermost if runner is None else BackgroundTasksMiddleware
    return GracefulServer(around(app, runner=runner or "pool"), options)


class _Outermost(BackgroundTasksMiddleware):
    """Around an application that may have such a middleware, with a runner, itself."""

    _runner_yields = True


def run(server: GracefulServer, drain_timeout: float | None) -> Unfinished:
    """Serve until a signal, then drain; see :func:`serve`."""
    logging.basicConfig()  # as waitress.serve does; nothing where logging is set up already
    signals = StopSignals(server.stop)
    with signals:
        for address in server.addresses:
            print(f"Serving on {address}", flush=True)
        server.run()
        began = signals.came
        assert began is not None
        limit = shutdown.longest_limit() if drain_timeout is None else drain_timeout
        requests = server.finish(began + limit)
        if requests:
            log.error(
                "%d requests, their inline tasks included, were not finished within the "
                "drain time of %g seconds: the process ends without them",
                requests,
                limit,
            )
        return Unfinished(requests, shutdown.leave(limit=drain_timeout, began=began))
