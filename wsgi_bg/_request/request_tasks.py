"""The ``BackgroundTasks`` of one request, and their submission when the request ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsgi_bg._process import log, per_process
from wsgi_bg._process.interrupts import is_from_signal_handler, stops_worker
from wsgi_bg._request import arguments, invocation, servers
from wsgi_bg._request.unclosed import (
    ABANDONED,
    EXHAUSTED,
    RAISED,
    Collector,
    Outcome,
    Unclosed,
    collectors,
)
from wsgi_bg._tasks import successors
from wsgi_bg._tasks.background_tasks import CLOSED, OPEN
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.task import CRASHED, BackgroundTask
from wsgi_bg.runners.ledger import keep, ledger_of
from wsgi_bg.runners.pool import shared_pool
from wsgi_bg.runners.timer import Deferring

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from wsgi_bg._request.observer import Observe, RequestObserver
    from wsgi_bg._tasks.options import Options


class RequestTasks(Deferring):
    """The ``BackgroundTasks`` that the middleware puts into the environ.

    Every request makes such an object, even if the request adds no task. The first task sets
    the slots that only requests with tasks need.

    :ivar status: the status line of the last call of ``start_response``; empty before.
    :ivar headers: the headers of that call; None before.
    :ivar is_declared_late: True if that call may have come after the application returned.
    :ivar is_answered: True if the runner keeps tasks and the server may send the first byte:
        ``add_task`` lets the runner store each task from then on.
    :ivar is_used: True if the list of tasks was made; read without a call for each request.
    """

    __slots__ = (
        "_collector",
        "_is_handed_over",
        "headers",
        "invocation",
        "is_answered",
        "is_declared_late",
        "is_used",
        "status",
    )

    status: str
    headers: list[tuple[str, str]] | None
    is_answered: bool
    is_declared_late: bool
    is_used: bool
    # Set with the first task. The collector of this process holds the request until the tasks
    # begin to run.
    _collector: Collector
    invocation: invocation.Invocation | None
    _is_handed_over: bool

    observer: RequestObserver | None = None  # no slot: it would cost each request 3 %

    def __init__(self, options: Options, start_response: StartResponse) -> None:
        # Each slot here, and no call of super().__init__(): every request makes such an object.
        self._list = self.front = self.headers = None
        self._start_response = start_response
        self.options = options
        self.phase = OPEN
        self.status = ""
        self.is_answered = self.is_declared_late = self.is_used = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Any:
        """Call the server's ``start_response`` and keep status and headers."""
        self.status = status
        self.headers = [*headers]  # the application may change its list later
        start_response = self._start_response
        if exc_info is None:
            return start_response(status, headers)
        self.is_declared_late = True  # perhaps: the server may have sent a Content-Length
        return start_response(status, headers, exc_info)

    def _begin(self) -> list[BackgroundTask]:
        # Make all objects that a later step may need with the first task: a garbage
        # collection that frees the response can start no thread.
        successors.begin_request()
        collector = collectors.get()
        collector.start()
        new_list = [] if self.observer is None else self.observer.new_list()
        tasks, added = collector.unfinished.setdefault(id(self), (self, new_list))
        assert tasks is self
        self._collector = collector
        self._is_handed_over = False
        self.is_used = True
        self.invocation = invocation.current() if invocation.running else None
        if self.invocation is not None:
            self.invocation.begin(self)
        self._list = added  # last: a thread that sees the list sees the slots set above
        return added

    def may_start(self) -> bool:
        return self._collector.unfinished.pop(id(self), None) is not None

    def allow_start(self) -> None:
        assert self._list is not None
        self._collector.unfinished[id(self)] = self, self._list

    def expected(self, status: str, *, runs: bool = True) -> list[BackgroundTask]:
        """The tasks that run, or do not run, if the request ends with ``status``."""
        if self._list is None or self._collector.pid != per_process.pid():  # a forked child
            return []
        code = _code_of(_text_of(status))
        return [task for task in self._list if task.options.lets_run(code) is runs]

    def expects(self, task: BackgroundTask) -> bool:
        """See :meth:`BackgroundTasks.expects`."""
        return self.phase != OPEN or task.options.lets_run(_code_of(_text_of(self.status)))

    def has_lost_client(self, exc: BaseException) -> bool:
        """True if the server's ``write()`` has raised ``exc``, since the client has left."""
        return servers.is_client_gone(self._start_response, exc)

    def end(self, environ: WSGIEnvironment, outcome: Outcome, *, closed: bool = True) -> None:
        """Submit the tasks, if any: the application is done with the request.

        May be called again if the exception of a signal handler has ended the first call.
        Parameters and exceptions are those of :meth:`submit`.
        """
        if not self.close():
            self.submit(environ, outcome, closed=closed)

    def collect(self, environ: WSGIEnvironment, outcome: Outcome) -> None:
        """Let the collector's thread end the request, whose response was freed.

        Called by finalizers, perhaps within a garbage collection. So this method takes no lock
        and starts no thread, and the collector's thread reads a ``SimpleQueue``.
        """
        if not (self.close() or self._is_handed_over):
            self._collector.queue.put(Unclosed(self.end, environ, outcome))

    def submit(
        self, environ: WSGIEnvironment, outcome: Outcome, *, closed: bool = True
    ) -> None:
        """Submit the tasks to the runner, after :meth:`close` has returned False.

        :param closed: True if the server has called ``close()``, or an equivalent of it.
        :raises KeyboardInterrupt: or another exception that stops the server's worker.
        """
        batch = None
        self.is_answered = True
        try:
            if self._is_handed_over:
                return
            if invocation.freezes and self.invocation is None:
                invocation.warn_of_freezing(environ)
            batch = self._make_batch(environ, outcome, closed)
            self.note_request(environ)
            if self._collector.pid != per_process.pid():
                return  # in a forked child: the tasks belong to the parent
            if not batch.discard_excluded(list(self._list or ())):
                return
            self._submit(batch)
            self._is_handed_over = True
        except BaseException as exc:
            if batch is not None and self._collector.pid == per_process.pid():
                self._stop(batch, exc)
            raise

    @property
    def is_being_submitted(self) -> bool:
        """True if a thread ends the request now, and has not submitted its tasks yet."""
        return self.phase == CLOSED and not self._is_handed_over

    def end_unclosed(self, *, failed: bool) -> None:
        """End a request whose response was neither closed nor freed."""
        self.end({}, RAISED if failed else ABANDONED, closed=False)

    def _make_batch(self, environ: WSGIEnvironment, outcome: Outcome, closed: bool) -> Batch:
        status = self.status if type(self.status) is str else _text_of(self.status)
        try:
            complete = closed and (
                (
                    outcome is EXHAUSTED
                    and servers.is_written(
                        environ,
                        status,
                        self.headers or (),
                        declared_late=self.is_declared_late,
                    )
                )
                or servers.is_test_client(environ)
            )
        except Exception as exc:  # no legal headers, but this server has accepted them
            if is_from_signal_handler(exc):
                raise
            complete = False
        return Batch(
            self,
            response_complete=complete,
            status=CRASHED if outcome is RAISED else _code_of(status),
        )

    def _submit(self, batch: Batch) -> None:
        runner = self.options.runner
        assert runner is not None
        if self.invocation is not None:
            # The platform sends the response when the handler returns, and the handler's time
            # limit holds for the tasks. So no task may run in close().
            batch.response_complete = False
            self.awaited(batch)
        batch.sends = hasattr(runner, "send")
        if batch.has_hooks:
            batch.hand_over(ledger_of(runner).length)
        try:
            arguments.look_at(self._list or ())
            if self.observer is None:
                runner.submit(batch)
                if not batch.is_kept:
                    keep(batch)
            else:
                self.observer.submit(batch, runner)
        except BaseException as exc:
            if is_from_signal_handler(exc) or self._collector.pid != per_process.pid():
                raise
            if id(self) not in self._collector.unfinished:  # the batch has begun all the same
                log.error("%s raised in submit()", runner, exc_info=exc)
                return
            log.error(
                "%s did not take %s, which run in this process",
                runner,
                ", ".join(task.name for task in batch.tasks),
                exc_info=exc,
            )
            again = self.awaited(batch.again())
            if batch.response_complete:
                again.run()
            else:
                shared_pool.submit(again)

    def _stop(self, batch: Batch, exc: BaseException) -> None:
        """Stop or resubmit the tasks whose submission was interrupted by ``exc``."""
        self._is_handed_over = True
        if not self.may_start():
            # The tasks run, on some thread, or are done, or were logged as unfinished.
            batch.notify_if_ended()  # what was interrupted may have been this call
            return
        if stops_worker(exc):
            batch.stop(exc)
        else:  # perhaps a time limit, which stops this thread and not the tasks
            batch.unclaim_running()
            self.allow_start()
            shared_pool.submit(self.awaited(batch.again()))


class ObservedTasks(RequestTasks):
    """The ``BackgroundTasks`` of an observed request: see :mod:`wsgi_bg._request.observer`."""

    __slots__ = ("observer",)

    def __init__(
        self,
        options: Options,
        start_response: StartResponse,
        observe: Observe,
        environ: WSGIEnvironment,
    ) -> None:
        super().__init__(options, start_response)
        self.observer = observe(self, environ)


def _text_of(status: Any) -> str:
    """The status line; a server may accept bytes, or a number."""
    return status.decode("latin-1") if isinstance(status, bytes) else str(status)


def _code_of(status: str) -> int:
    """The status code; 0 if the status has no code, as before ``start_response``."""
    try:
        return int(status[:3])
    except ValueError:
        return 0
