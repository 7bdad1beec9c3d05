"""Hooks for ``gunicorn.conf.py``: a worker drains at exit, and gunicorn does not kill it.

.. code-block:: python

    from wsgi_bg.gunicorn import child_exit, post_fork, worker_exit

``child_exit`` is for prometheus_client's multiprocess mode and does nothing without that mode.
Without the others gunicorn kills a worker that drains for longer than ``timeout``, and a
``UvicornWorker`` ends at SIGTERM without draining. They need gunicorn 23 or newer, whose
arbiter reads the time that a worker writes.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from wsgi_bg._process import log
from wsgi_bg.runners import shutdown
from wsgi_bg.runners.waiting import Notice

__all__ = ["child_exit", "post_fork", "worker_exit"]

# How long before gunicorn's SIGKILL a drain ends, in seconds, to log unfinished tasks.
_MARGIN = 1.0

# This signal ends the drain of every worker class, if sent to the worker or the arbiter.
_ENDS_DRAIN = "SIGQUIT"

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

# Each signal of a Ctrl-C, and the other one. A Ctrl-C comes to the workers as SIGINT, and to
# the arbiter, which sends them SIGQUIT: these two are one stop, in either order.
_CTRL_C: dict[int, int] = {signal.SIGINT: signal.SIGQUIT, signal.SIGQUIT: signal.SIGINT}


def post_fork(server: Any, worker: Any) -> None:
    """Prepare the exit of ``worker``; gunicorn calls this in the new process.

    A ``DurableRunner`` of the application takes tasks over when the worker has loaded the
    application, and not only with the first request.

    :param server: gunicorn's arbiter.
    :param worker: the worker, whose ``init_signals`` and ``load_wsgi`` are wrapped.
    """
    worker.wsgi_bg_exit = exit_ = _Exit(worker)
    worker.init_signals = partial(_init_signals, worker.init_signals, exit_)
    worker.load_wsgi = partial(_load_wsgi, worker.load_wsgi)


def worker_exit(server: Any, worker: Any) -> None:
    """Drain all runners; gunicorn calls this on the main thread of an exiting worker.

    Blocks for the longest ``drain_timeout`` of the runners at most. After a signal the drain
    ends a second before ``graceful_timeout`` is over, by SIGALRM. Tasks that are not finished
    then are logged at ERROR. During the drain the arbiter sees the worker as alive.

    :param server: gunicorn's arbiter.
    :param worker: the worker that was given to :func:`post_fork`.
    :raises SystemExit: if a signal ends the drain.
    """
    exit_: _Exit | None = getattr(worker, "wsgi_bg_exit", None)
    # The arbiter also calls this hook in its own process, for a worker that has vanished.
    if exit_ is not None:
        exit_.drain()


def child_exit(server: Any, worker: Any) -> None:
    """Let prometheus_client drop the gauges of ``worker``; gunicorn calls this in its arbiter.

    Does nothing unless the environment has ``PROMETHEUS_MULTIPROC_DIR``, and imports
    prometheus_client only then. An error is logged, and does not end the arbiter.

    :param server: gunicorn's arbiter.
    :param worker: the worker that has ended, in whatever way.
    """
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    try:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)
    except ModuleNotFoundError:  # the variable is that of another program
        pass
    except Exception as exc:
        log.error("the gauges of worker %d could not be dropped", worker.pid, exc_info=exc)


def _init_signals(init_signals: Callable[[], None], exit_: _Exit) -> None:
    init_signals()
    exit_.watch_signals()


def _load_wsgi(load_wsgi: Callable[[], None]) -> None:
    """Load the application, then let its durable runners take over tasks."""
    load_wsgi()
    shutdown.start_runners()


class _Exit:
    """The drain of one worker, and its time limit after a stop signal."""

    def __init__(self, worker: Any) -> None:
        self._graceful_timeout: float = worker.cfg.graceful_timeout
        # A duplicate: gunicorn closes the heartbeat file before worker_exit is called.
        self._heartbeat = os.dup(worker.tmp.fileno())
        self._previous: dict[int, Any] = {}
        # When a drain must end, by time.monotonic(); infinite until a signal has come.
        self._ends_at = math.inf
        # Logs during the drain; None before and after.
        self._notice: Notice | None = None
        # The second signal of a Ctrl-C whose first signal has come; None if there is none.
        self._second: int | None = None
        config = getattr(worker, "config", None)
        if config is not None and hasattr(config, "timeout_notify"):  # uvicorn's
            # A heartbeat each second, for _came(): uvicorn handles the signals itself.
            config.timeout_notify = 0
            # The event loop calls this at SIGQUIT. The worker's own method stops no server.
            worker.handle_exit = self._stop_uvicorn

    def watch_signals(self) -> None:
        """Install handlers that note the time of a stop signal and then exit the worker."""
        for number in _STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous != self._stop:
                self._previous[number] = previous
                signal.signal(number, self._stop)
                if number == signal.SIGTERM:  # the same as in gunicorn
                    signal.siginterrupt(number, False)

    def drain(self) -> None:
        """Drain all runners; see :func:`worker_exit`."""
        self._notice = notice = Notice(ended_by=_ENDS_DRAIN)
        self.watch_signals()  # again: an event loop has removed its handlers when it was closed
        signal.signal(signal.SIGALRM, _end_drain)
        self._set_alarm(notice)
        # The arbiter compares this time with its clock: the worker is alive for the drain time.
        limit = min(shutdown.longest_limit(), threading.TIMEOUT_MAX)  # no time is infinite
        alive_until = min(time.monotonic() + limit, self._ends_at)
        os.utime(self._heartbeat, (alive_until, alive_until))
        try:
            shutdown.finish(notice=notice)
        except BaseException:  # from the alarm, perhaps before finish() had begun
            shutdown.log_all_unfinished("before gunicorn ends the worker")
            raise
        finally:
            self._notice = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _set_alarm(self, notice: Notice) -> None:
        """Let SIGALRM end the drain in time; each runner also has its own limit."""
        if self._ends_at < math.inf:
            notice.latest = self._ends_at
            left = self._ends_at - time.monotonic()
            # Repeat the alarm: a wait that is about to begin misses a signal. 0 sets no alarm.
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), 0.1)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == self._second:
            self._second = None
            return
        self._second = _CTRL_C.get(number, self._second)
        previous = self._previous[number]
        # Event loops leave these behind when they are closed.
        if previous is signal.default_int_handler or _belongs_to_closed_loop(previous):
            previous = signal.SIG_DFL
        if self._ends_at == math.inf:
            self._ends_at = self._came(previous) + self._graceful_timeout - _MARGIN
            if self._notice is not None:  # draining, for instance because of max_requests
                self._set_alarm(self._notice)
        if callable(previous):
            previous(number, frame)
        elif self._notice is None or number != signal.SIGTERM:
            raise SystemExit(0)

    def _stop_uvicorn(self, number: int, frame: FrameType | None) -> None:
        self._second = _CTRL_C.get(number)
        signal.raise_signal(signal.SIGTERM)

    def _came(self, previous: Any) -> float:
        """Return when the signal came, by :func:`time.monotonic`.

        uvicorn first answers the requests in hand and then raises the signal again, for
        which the worker has no handler. The last heartbeat was at most a second before the
        first signal.
        """
        if callable(previous) or self._notice is not None:
            return time.monotonic()
        return os.fstat(self._heartbeat).st_mtime


def _belongs_to_closed_loop(handler: Any) -> bool:
    """True for the handler that uvloop leaves behind, which does nothing any more."""
    loop: Any = getattr(handler, "__self__", None)
    return hasattr(loop, "is_closed") and hasattr(loop, "call_soon") and bool(loop.is_closed())


class GracefulTimeout(SystemExit):
    """Ends the drain because gunicorn is about to kill the worker."""


def _end_drain(*args: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)  # no more alarms while the tasks are logged
    raise GracefulTimeout(0)
