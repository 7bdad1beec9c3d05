"""A waitress server that stops without losing a request; imports waitress.

waitress has no handler for SIGTERM. On SIGINT waitress waits five seconds for the threads,
but the loop that sends their output has already ended. Here the loop goes on until the
requests in hand are answered and the kernel has the last byte.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer
from waitress.trigger import trigger

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from wsgi_bg.runners.waiting import Notice

# How long waitress's threads may take to end if no time is left, in seconds.
_THREADS_TIMEOUT = 0.1


class GracefulServer:
    """A server that listens on construction and accepts once :meth:`run` is called.

    :param options: the options of ``waitress.create_server``.
    :raises ValueError: if waitress refuses the options.
    :raises OSError: if the server cannot listen on an address.
    """

    def __init__(self, app: WSGIApplication, options: dict[str, Any]) -> None:
        # The objects that the loop watches: listeners, connections, triggers.
        self._watched: dict[int, Any] = {}
        self._is_stopping = False
        try:
            create_server(app, map=self._watched, **options)
        except OSError:  # perhaps for the second of two addresses
            for listener in self._of_type(BaseWSGIServer):
                listener.task_dispatcher.shutdown()
            wasyncore.close_all(self._watched)
            raise
        self._listeners = self._of_type(BaseWSGIServer)
        self._adjustments = self._listeners[0].adj
        self._dispatcher = self._listeners[0].task_dispatcher
        # A separate trigger: those of the listeners are for the threads that answer.
        self._trigger = trigger(self._watched)

    @property
    def addresses(self) -> list[str]:
        """The addresses of the listeners, as URLs or ``unix:`` paths."""
        return [_address_of(listener) for listener in self._listeners]

    def run(self) -> None:
        """Serve, on the main thread, until :meth:`stop` is called."""
        # A signal that comes right before the system call of select() does not interrupt the
        # call, and its handler would not run before select() returns. So each signal pulls the
        # trigger. See https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd
        writer = self._trigger.trigger
        os.set_blocking(writer, False)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            while not self._is_stopping:
                self._turn(self._adjustments.asyncore_loop_timeout)
        finally:
            signal.set_wakeup_fd(previous)

    def stop(self) -> None:
        """Make :meth:`run` return; safe in signal handlers: takes no lock, does not block."""
        self._is_stopping = True
        self._trigger.pull_trigger()  # select() resumes after a handler that returns

    def finish(self, deadline: float, notice: Notice) -> int:
        """Accept no more connections, answer all requests, end the threads, close all.

        All requests whose first byte has come are answered, on accepted connections and on
        connections that waited to be accepted: these clients could not know of the stop.

        :param deadline: when to stop waiting, by :func:`time.monotonic`.
        :param notice: logs during the wait.
        :return: how many requests were not finished.
        """
        self._announce_end()
        self._stop_listening()
        self._turn(0.0)
        limit = self._adjustments.asyncore_loop_timeout
        while (busy := self._close_idle()) and time.monotonic() < deadline:
            self._announce_end()
            until = min(deadline, notice.due)
            self._turn(min(max(0.0, until - time.monotonic()), limit))
            notice.log_if_due(deadline, requests=len(busy))
        unfinished = self._end_threads(deadline, notice)
        self._close()
        return unfinished

    def _turn(self, timeout: float) -> None:
        use_poll = self._adjustments.asyncore_use_poll
        wasyncore.loop(timeout=timeout, use_poll=use_poll, map=self._watched, count=1)

    def _announce_end(self) -> None:
        """Send ``Connection: close`` with the last response on each connection.

        Without this header a client sends the next request into a closed connection, and
        cannot repeat a POST.
        """
        for channel in self._of_type(HTTPChannel):
            for request in channel.requests[-1:]:
                request.headers["CONNECTION"] = "close"  # as if the client had sent this header

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            connections = -1
            while listener.readable() and len(self._watched) != connections:
                connections = len(self._watched)
                listener.handle_accept()
            # Not listener.close(): the threads still need the listener's trigger.
            wasyncore.dispatcher.close(listener)

    def _close_idle(self) -> list[Any]:
        """Close the idle connections; return the busy connections."""
        busy = []
        for channel in self._of_type(HTTPChannel):
            # In this order: a thread drops the request after it has written the response.
            if channel.requests or channel.request is not None or channel.total_outbufs_len:
                busy.append(channel)
            else:
                channel.handle_close()
        return busy

    def _end_threads(self, deadline: float, notice: Notice) -> int:
        """Wait for the threads; return how many requests are running, queued or unread.

        A request is unread if the client has not read the whole response.
        """
        while True:
            until = min(deadline, notice.due)
            timeout = max(_THREADS_TIMEOUT, until - time.monotonic())
            self._dispatcher.shutdown(cancel_pending=False, timeout=timeout)
            if not self._dispatcher.threads or time.monotonic() >= deadline:
                break
            notice.log_if_due(deadline, requests=len(self._dispatcher.threads))
        unread = [c for c in self._close_idle() if c.total_outbufs_len and not c.requests]
        return len(self._dispatcher.threads) + len(self._dispatcher.queue) + len(unread)

    def _close(self) -> None:
        for channel in self._of_type(HTTPChannel):
            channel.handle_close()  # releases a thread that waits to write
        if not self._dispatcher.threads:
            # A thread that goes on may pull its trigger, and must not write to a new file
            # that has got the trigger's file descriptor.
            wasyncore.close_all(self._watched)

    def _of_type(self, kind: type) -> list[Any]:
        return [item for item in list(self._watched.values()) if isinstance(item, kind)]


def _address_of(listener: Any) -> str:
    host, port = listener.effective_host, listener.effective_port
    if host == "unix":
        return f"unix:{port}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
