"""``serve``: run an application on waitress and lose no request or task at the stop."""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from wsgi_bg._process import log
from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg._serving.signals import SECOND, StopSignals
from wsgi_bg._tasks.checks import bounded, seconds, whole_number
from wsgi_bg.exceptions import ExtraMissingError, MainThreadError, OptionTypeError
from wsgi_bg.runners import shutdown
from wsgi_bg.runners.waiting import Notice

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from wsgi_bg._serving.server import GracefulServer
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import Runner

HOST, PORT, THREADS = "127.0.0.1", 8080, 4

# The options of waitress that replace host and port.
_ADDRESSES = ("listen", "unix_socket", "sockets")


@dataclass(frozen=True)
class Unfinished:
    """The requests and tasks left when the time was up; false if none was left.

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
    """Serve ``app`` with waitress until SIGTERM, SIGINT or SIGHUP; blocks, on the main thread.

    ``serve`` wraps ``app`` in a :class:`~wsgi_bg.BackgroundTasksMiddleware`. After the first
    signal the server accepts no connections, answers the requests in hand, and waits for the
    tasks of all runners of the process, including tasks that these add. Requests and tasks
    that are not finished in time are logged at ERROR. Then the runners accept no more work: a
    batch submitted later runs in ``close()``. A second signal logs the unfinished tasks and
    ends the process by the signal's default action. ``serve`` restores the handlers of the
    signals when it returns. A SIGHUP that is ignored, as under ``nohup``, stays ignored.

    :param host: the address to listen on; None is ``"127.0.0.1"``.
    :param port: 0 is any free port (the port is printed); None is 8080.
    :param threads: how many requests are handled at the same time.
    :param runner: a runner, or the name of a shared runner of the process. None is the
        runner that ``app`` names, if ``app`` is such a middleware or a Flask application
        with the extension, else ``"pool"``.
    :param drain_timeout: how long requests and tasks have, together, from the first
        signal, in seconds. With None the tasks have the ``drain_timeout`` of their runner,
        and the requests have the longest of these.
    :param waitress_options: further arguments of ``waitress.serve``; ``listen``,
        ``unix_socket`` or ``sockets`` replace ``host`` and ``port``.
    :return: the unfinished requests and tasks.
    :raises TypeError: if an option is of the wrong type, or ``app`` is no WSGI application.
    :raises ValueError: if an option is out of range, or waitress refuses the option.
    :raises OSError: if the server cannot listen on the address.
    :raises RuntimeError: if this is not the main thread.
    :raises ImportError: if waitress is not installed.
    """
    check(host=host, port=port, threads=threads, drain_timeout=drain_timeout)
    options = complete({"host": host, "port": port, "threads": threads, **waitress_options})
    limit = None if drain_timeout is None else bounded(drain_timeout)
    return run(listen(app, runner, options), limit)


def check(
    *, host: str | None, port: int | None, threads: int, drain_timeout: float | None
) -> None:
    """Raise the errors of :func:`serve` that can be found without an application."""
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
    """Return the options for waitress; add host and port unless an address is given."""
    given = {name: value for name, value in options.items() if value is not None}
    if any(given.get(name) for name in _ADDRESSES):
        return given
    return {"host": HOST, "port": PORT, **given}


def listen(
    app: WSGIApplication,
    runner: Runner | Literal["inline", "pool"] | None,
    options: dict[str, Any],
    default: Runner | Literal["inline", "pool"] = "pool",
) -> GracefulServer:
    """Return a server that listens and does not accept yet; see :func:`serve`.

    :param default: the runner if ``runner`` is None and ``app`` names no runner.
    """
    from wsgi_bg._serving.server import GracefulServer

    around = _Outermost if runner is None else BackgroundTasksMiddleware
    return GracefulServer(around(app, runner=default if runner is None else runner), options)


class _Outermost(BackgroundTasksMiddleware):
    """Outermost middleware whose runner an inner middleware may replace."""

    _runner_is_default = True


def run(server: GracefulServer, drain_timeout: float | None) -> Unfinished:
    """Serve until a signal, then drain; see :func:`serve`."""
    logging.basicConfig()  # as in waitress.serve; no effect if logging is configured already
    signals = StopSignals(server.stop)
    with signals:
        for address in server.addresses:
            announce(f"Serving on {address}\n")
        shutdown.start_runners()
        server.run()
        began = signals.came
        assert began is not None
        limit = shutdown.longest_limit() if drain_timeout is None else drain_timeout
        notice = Notice(ended_by=SECOND)
        requests = server.finish(began + limit, notice)
        if requests:
            log.error(
                "%d requests, their inline tasks included, were not finished within the "
                "drain time of %g seconds: the process ends without them",
                requests,
                limit,
            )
        tasks = shutdown.finish(limit=drain_timeout, began=began, notice=notice)
        return Unfinished(requests, tasks)


def announce(text: str) -> None:
    """Write ``text`` to standard output; ignore a closed, full, broken or missing output.

    The text bypasses Python's buffer: unwritable text would stay in the buffer and fail again
    at exit.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        try:
            number = sys.stdout.fileno()
        except OSError:  # sys.stdout is an object without a file descriptor
            sys.stdout.write(text)
        else:
            os.write(number, text.encode())
