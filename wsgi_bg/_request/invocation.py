"""A call of a serverless handler, and the background tasks of its requests.

A serverless platform may freeze the process as soon as the handler has returned, so the
tasks have to be done before. :mod:`wsgi_bg.serverless` has the decorator.
"""

from __future__ import annotations

import os
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, final

from wsgi_bg._process import log
from wsgi_bg._process.greenlets import event
from wsgi_bg._request import servers
from wsgi_bg._request.unclosed import collectors
from wsgi_bg._tasks.task_log import fields
from wsgi_bg.runners.ledger import ledgers_here, tasks_to_send

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._request.observer import RequestObserver
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask

freezes: bool = "AWS_LAMBDA_RUNTIME_API" in os.environ
"""True on AWS Lambda and on all platforms that use its Runtime API."""

running: set[Invocation] = set()
"""The invocations of this process; a platform may call the handler on several threads."""

_warned: set[int] = set()  # process ids
_of_context: ContextVar[Invocation | None] = ContextVar("wsgi_bg.invocation", default=None)


def current() -> Invocation | None:
    """Return the invocation that the calling code belongs to, or None.

    Adapters that call the application on a separate thread copy the context. In a thread
    without that context, the invocation is known only if the process has a single one.
    """
    pid = os.getpid()
    invocations = [each for each in list(running) if each.pid == pid]
    mine = _of_context.get()
    if mine in invocations:  # a context may outlive its invocation
        return mine
    return invocations[0] if len(invocations) == 1 else None


class OpenRequest(Protocol):
    """A request with tasks that were not submitted yet."""

    @property
    def tasks(self) -> list[BackgroundTask]: ...

    @property
    def observer(self) -> RequestObserver | None: ...

    def end_unclosed(self, *, failed: bool) -> None:
        """End the request, if the server has not called ``close()``."""


@final
class Invocation:
    """A context manager around a call of a handler; knows the tasks to wait for."""

    def __init__(self) -> None:
        self.pid: int = os.getpid()
        # Requests with tasks whose batch was not submitted yet, and submitted batches. Two
        # threads may submit a batch of the same request at once, and a single one of these
        # batches runs the tasks: the invocation waits for both. No lock is held, as in a
        # Ledger: each step is an atomic operation of a dictionary.
        self._open: dict[OpenRequest, None] = {}
        self._batches: dict[Batch, None] = {}
        self._changed = event()  # set when a batch is done, and by interrupt()
        self._finish_began: float = time.monotonic()
        self._is_interrupted = False
        self._right_to_log = {"right": True}  # to name the unfinished tasks

    def __enter__(self) -> Invocation:
        running.add(self)
        self._token = _of_context.set(self)
        return self

    def __exit__(self, *args: object) -> None:
        _of_context.reset(self._token)
        running.discard(self)

    def begin(self, tasks: OpenRequest) -> None:
        """Wait for ``tasks``: the request has added its first task."""
        self._open.setdefault(tasks, None)

    def hand_over(self, tasks: OpenRequest, batch: Batch) -> None:
        """Wait for ``batch``, which is about to be submitted, in place of its request."""
        if tasks.observer is None or not tasks.observer.holds:
            batch.on_done((self._leave,))
            self._batches[batch] = None
        self._open.pop(tasks, None)

    def _leave(self, batch: Batch) -> None:
        self._batches.pop(batch, None)
        self._changed.set()

    def finish(self, timeout: float, *, failed: bool) -> None:
        """Wait until all tasks of this invocation are done; log unfinished tasks at ERROR.

        A task for another process is done when it was sent, whatever invocation has added it.
        Tasks whose time has not come when all others are done are logged and not waited for.
        Tasks that are logged go on for as long as the process is not frozen.

        :param timeout: seconds to wait at most.
        :param failed: True if the handler raised; its open requests then count as failed.
        :raises KeyboardInterrupt: if Ctrl-C ends the wait; unfinished tasks are logged too.
        """
        if os.getpid() != self.pid:
            return  # in a forked child: the tasks belong to the parent
        self._finish_began = time.monotonic()
        try:
            self._end_requests(failed)
            deadline = self._finish_began + min(timeout, threading.TIMEOUT_MAX)
            while (seconds := deadline - time.monotonic()) > 0:
                self._changed.clear()
                if self._is_interrupted:
                    break
                # A batch whose last task is done may still call hooks and on_error.
                batches = list(self._batches)
                if not self._left() and not any(batch.has_started for batch in batches):
                    break
                self._changed.wait(seconds)
            for ledger in ledgers_here():
                ledger.wait_for(list(ledger.unsent), deadline)
        finally:
            self._log_unfinished()

    def interrupt(self) -> None:
        """Log the unfinished tasks now: the handler returns while a thread is in finish()."""
        self._is_interrupted = True
        self._changed.set()
        self._log_unfinished()

    def _log_unfinished(self) -> None:
        if not self._right_to_log.pop("right", False):  # one atomic step
            return
        waited = time.monotonic() - self._finish_began
        unsent = [task for each in tasks_to_send() for task in each.tasks]
        for task in self._left() + self._waiting() + unsent:
            log.error(
                "background task %s was not finished when its handler returned, after a "
                "wait of %.3g seconds: it goes on only if this process does",
                task.name,
                waited,
                extra=fields(task),
            )

    def _end_requests(self, failed: bool) -> None:
        """End the requests whose responses the adapter has not closed."""
        requests = list(self._open)
        if requests:
            # First the freed responses: the collector knows how their bodies have ended.
            collectors.get().flush()
        for tasks in requests:
            tasks.end_unclosed(failed=failed)

    def _waiting(self) -> list[BackgroundTask]:
        """The tasks that wait for their time, because of a delay or for a further attempt."""
        waiting = [later for ledger in ledgers_here() for later in list(ledger.waiting)]
        return [task for later in waiting if later.invocation is self for task in later.tasks]

    def _left(self) -> list[BackgroundTask]:
        opened = [task for tasks in list(self._open) for task in tasks.tasks]
        submitted = [task for batch in list(self._batches) for task in batch.tasks]
        return list(dict.fromkeys(opened + submitted))


def warn_of_freezing(environ: WSGIEnvironment) -> None:
    """Log once a process that tasks outside of an invocation may be frozen; see ``freezes``.

    Nothing is logged if a real server made ``environ``, as under Lambda Web Adapter, because
    there is no handler to decorate.
    """
    if os.getpid() in _warned or _is_real_server(environ):
        return
    _warned.add(os.getpid())
    log.warning(
        "background tasks may be frozen in the middle: AWS Lambda stops this process when the "
        "handler returns. Decorate the handler with @wsgi_bg.serverless.finish_tasks, which "
        "waits for them (said once a process)"
    )


def _is_real_server(environ: WSGIEnvironment) -> bool:
    if servers.recognise(environ) is None:
        return False
    # Mangum calls a2wsgi, which recognise() knows, without a server.
    return "aws.event" not in environ.get("asgi.scope", ())
