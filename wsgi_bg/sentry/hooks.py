"""``SentryHooks``: a scope and a transaction for each task, and an event for its error."""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from wsgi_bg._messages import headers
from wsgi_bg._process import log
from wsgi_bg._tasks.task_log import fields_of
from wsgi_bg.exceptions import ExtraMissingError, OptionTypeError
from wsgi_bg.hooks import Hooks, TaskRecord

try:
    import sentry_sdk
    from sentry_sdk.scope import global_event_processors, use_isolation_scope
    from sentry_sdk.tracing import BAGGAGE_HEADER_NAME as _BAGGAGE
    from sentry_sdk.utils import event_from_exception
except ImportError as _exc:
    raise ExtraMissingError("sentry", "wsgi_bg.sentry") from _exc

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    from sentry_sdk.types import Event, Hint

_LONGEST = 250  # characters of the name of a function

_OP = "queue.task.wsgi_bg"
_ORIGIN = "auto.queue.wsgi_bg"

_IS_SENT = "_wsgi_bg_is_sent"
"""The attribute of an exception that the hooks have sent."""

_running: ContextVar[str | None] = ContextVar("wsgi_bg.sentry", default=None)
"""The id of the task of this context, or of the task that has added it."""


class SentryHooks(Hooks):
    """Shows tasks to Sentry; pass an object as ``hooks=`` of the middleware.

    Each attempt has an isolation scope, a copy of the request's: tags that a task sets are seen
    in this task only, and what ``on_error`` sends belongs to the task. Each attempt is a
    transaction (``op`` is ``"queue.task.wsgi_bg"``), which continues the trace of the span
    that was current in ``add_task``; the trace travels with stored and sent tasks. If the
    integration of the engine (``CeleryIntegration``, for example) has made a transaction on the
    worker, the hooks leave the task to it.

    A task that has failed is one event, with ``handled`` False, and not a second one by the
    ``LoggingIntegration``, also if the engine logs the exception on a worker. An attempt after
    which the task is called again is no event.
    Without a client (``sentry_sdk.init``) the hooks do nothing.

    The methods are called on the threads of the tasks and on the event loop's thread, and do
    not block. An error of Sentry's is logged; the task runs.

    :param show_arguments: True if events may have the local variables of the frames, as
        Sentry's ``include_local_variables`` says. They show the arguments of the task.
    :raises TypeError: if ``show_arguments`` is no ``bool``.
    """

    def __init__(self, *, show_arguments: bool = False) -> None:
        if not isinstance(show_arguments, bool):
            raise OptionTypeError("show_arguments", show_arguments, "True or False")
        self._show_arguments = show_arguments
        headers.carriers["sentry"] = _add_headers
        if _drop_logged not in global_event_processors:
            # First: Sentry's own processor for duplicates would take the event of the log
            # record for the first, and drop the one with the task's scope.
            global_event_processors.insert(0, _drop_logged)

    def task_added(self, record: TaskRecord) -> None:
        """Note the trace that the task continues."""
        if sentry_sdk.get_client().is_active():
            given: dict[str, str] = {}
            _add_headers(given)
            record.data[self] = given

    def around(self, record: TaskRecord) -> _Attempt | None:
        """Return the context manager of an attempt: see :class:`~wsgi_bg.hooks.Hooks`."""
        if not sentry_sdk.get_client().is_active():
            return None
        before = record.data.get(self)
        if isinstance(before, _Attempt):
            given = before.given
        elif before is not None:
            given = before
        elif _is_of_engine():
            _rename(record.name[:_LONGEST])
            return None
        else:
            given = _carried()
        attempt = record.data[self] = _Attempt(record, given)
        return attempt

    def task_failed(self, record: TaskRecord) -> None:
        """Send the error of the last attempt."""
        attempt = record.data.get(self)
        if isinstance(attempt, _Attempt) and record.error is not None:
            attempt.capture(record.error, show_arguments=self._show_arguments)


class _Attempt:
    """The scope and the transaction of an attempt.

    The scope stays current in the context of the attempt, which is a copy that nothing else
    runs in, but for the log record of an error and ``on_error``: they belong to the task.
    The record refers to this object, which does not refer to the record: no cycle is left.

    :ivar given: the headers of the trace that the transaction continues.
    """

    __slots__ = ("_context", "_name", "_scope", "_trace", "_transaction", "given")

    _trace: Any
    _transaction: AbstractContextManager[Any]

    def __init__(self, record: TaskRecord, given: Mapping[str, str]) -> None:
        self._name = record.name[:_LONGEST]
        self._context: dict[str, object] = {
            "name": self._name,
            "id": record.id,
            "attempt": record.attempt,
            "runner": record.runner,
            "request": record.request,
        }
        self.given: Mapping[str, str] = given
        self._scope: Any = None

    def __enter__(self) -> None:
        try:
            scope = sentry_sdk.get_isolation_scope().fork()
            sentry_sdk.Scope.set_isolation_scope(scope)
            sentry_sdk.Scope.set_current_scope(sentry_sdk.get_current_scope().fork())
        except Exception as exc:
            extra = self._fields()
            log.error("Sentry has no scope for %s", self._name, exc_info=exc, extra=extra)
            return
        try:
            self._begin(scope)
        except Exception as exc:
            extra = self._fields()
            log.error("Sentry has no transaction for %s", self._name, exc_info=exc, extra=extra)
            return
        self._scope = scope
        _running.set(str(self._context["id"]))

    def _begin(self, scope: Any) -> None:
        scope.set_context("background task", self._context)
        self._transaction = _transaction(self._name, dict(self.given))
        self._transaction.__enter__()
        self._trace = sentry_sdk.get_current_scope().get_trace_context()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._scope is None:
            return
        try:
            self._transaction.__exit__(kind, exc, traceback)
        except Exception as error:
            extra = self._fields()
            log.error("Sentry could not end %s", self._name, exc_info=error, extra=extra)

    def _fields(self) -> dict[str, Any]:
        """The attributes of a log record about the task."""
        context = self._context
        found = fields_of(self._name, str(context["id"]))
        for name in ("attempt", "runner", "request"):
            found[f"wsgi_bg_{name}"] = context[name]
        return found

    def capture(self, exc: BaseException, *, show_arguments: bool) -> None:
        """Send ``exc`` with the scope of the attempt, unless the attempt has none."""
        if self._scope is None:
            return
        with suppress(Exception):  # a class of the user may refuse attributes
            setattr(exc, _IS_SENT, True)
        options = sentry_sdk.get_client().options
        if not show_arguments:
            options = {**options, "include_local_variables": False}
        event, hint = event_from_exception(
            exc, client_options=options, mechanism={"type": "wsgi_bg", "handled": False}
        )
        event["transaction"] = self._name
        event["contexts"] = {"trace": self._trace}
        with use_isolation_scope(self._scope):
            sentry_sdk.capture_event(event, hint=hint)


def _transaction(name: str, given: dict[str, str]) -> AbstractContextManager[Any]:
    if _is_streamed():
        sentry_sdk.traces.continue_trace(given)
        attributes: dict[str, Any] = {
            "sentry.op": _OP,
            "sentry.origin": _ORIGIN,
            "sentry.segment.name.source": "task",
        }
        return sentry_sdk.traces.start_span(name, attributes, parent_span=None)
    transaction = sentry_sdk.continue_trace(
        given, op=_OP, name=name, source="task", origin=_ORIGIN
    )
    return sentry_sdk.start_transaction(transaction)


def _is_streamed() -> bool:
    """True if the client sends spans one by one, and knows no transactions."""
    options = sentry_sdk.get_client().options
    given = options.get("trace_lifecycle")
    return bool((given or options["_experiments"].get("trace_lifecycle")) == "stream")


def _is_of_engine() -> bool:
    """True if Sentry's integration of the engine has made a transaction for the task."""
    scope = sentry_sdk.get_current_scope()
    if _is_streamed():
        streamed = scope.streamed_span
        op = None if streamed is None else streamed.get_attributes().get("sentry.op")
    else:
        op = None if scope.span is None else scope.span.op
    return str(op).startswith(("queue.task.", "queue.process"))


def _rename(name: str) -> None:
    """Name the engine's transaction after the task, if RQ calls all tasks by one function."""
    scope = sentry_sdk.get_current_scope()
    transaction: Any = scope.streamed_span if _is_streamed() else scope.transaction
    if str(getattr(transaction, "name", "")).startswith("wsgi_bg."):
        scope.set_transaction_name(name, source="task")


def _carried() -> Mapping[str, str]:
    """The headers of a task that was not added here, or of an extra call by hand."""
    carried = headers.carried.get()
    if carried is not None:
        return carried
    given: dict[str, str] = {}
    _add_headers(given)
    return given


def _add_headers(carrier: dict[str, str]) -> None:
    """Add the headers of the current trace to those of a message."""
    for name, value in sentry_sdk.get_current_scope().iter_trace_propagation_headers():
        others = carrier.get(name)  # the baggage of another tracer
        carrier[name] = f"{others},{value}" if others and name == _BAGGAGE else value


def _drop_logged(event: Event, hint: Hint) -> Event | None:
    """Drop the event that ``LoggingIntegration`` makes of a log record about a failed task.

    :meth:`SentryHooks.task_failed` sends the error. The log record is the package's, or one of
    the engine, which logs the same exception on a worker.
    """
    logged = hint.get("log_record") if hint else None
    if logged is None:
        return event
    outcome = getattr(logged, "wsgi_bg_outcome", None)
    is_sent = outcome == "failed" and getattr(logged, "wsgi_bg_id", None) == _running.get()
    error = logged.exc_info[1] if logged.exc_info else None
    return None if is_sent or hasattr(error, _IS_SENT) else event
