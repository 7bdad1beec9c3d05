"""``OpenTelemetryHooks``: a span for each attempt of each task.

Names, kind and links follow OpenTelemetry's semantic conventions 1.44: the page "Semantic
conventions for messaging spans" (in development), and the attributes ``code.function.name`` and
``error.type`` (stable). https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, get_args

from wsgi_bg._messages import headers
from wsgi_bg._process import log
from wsgi_bg._tasks.task_log import fields
from wsgi_bg._version import __version__
from wsgi_bg.exceptions import ExtraMissingError, OptionTypeError, OptionValueError
from wsgi_bg.hooks import Hooks, TaskRecord

try:
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context, attach, get_current
    from opentelemetry.trace import (
        INVALID_SPAN,
        Link,
        SpanKind,
        Status,
        StatusCode,
        get_current_span,
        set_span_in_context,
    )
except ImportError as _exc:
    raise ExtraMissingError("opentelemetry", "wsgi_bg.opentelemetry") from _exc

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.trace import Span, Tracer, TracerProvider

Parent = Literal["link", "child"]

_LONGEST = 250  # characters of the name of a function

_is_inside: ContextVar[bool] = ContextVar("wsgi_bg.opentelemetry", default=False)
"""True in a task that another process has added, and in the tasks that it adds."""


_NO_SPAN = set_span_in_context(INVALID_SPAN, Context())


class OpenTelemetryHooks(Hooks):
    """Makes a span of each attempt of a task; pass an object as ``hooks=`` of the middleware.

    The span is current in the task, in the log record of its error and in ``on_error``: the
    task's own spans are its children. A task that raises has a span with the error and its
    traceback. Spans have no arguments.

    The trace context of the request travels with stored and sent tasks, by the propagators of
    :mod:`opentelemetry.propagate`. If an instrumentation of the engine has made a span on the
    worker, the span of the task is a child of that span.

    The attributes for the sampler are ``code.function.name``, ``messaging.destination.name``
    (the same), ``messaging.system`` (``"wsgi_bg"``), ``messaging.operation.name`` and
    ``messaging.operation.type`` (``"process"``). A span that is recorded also has
    ``messaging.message.id``, which is the task's id, ``wsgi_bg.attempt`` from the second
    attempt on, and ``error.type`` after an error.

    The methods are called on the threads of the tasks and on the event loop's thread. They do
    not block, unless a span processor does. An error of a sampler or a processor is logged;
    the task runs.

    :param tracer_provider: makes the tracer; None for the global provider, which may be set
        later.
    :param parent: ``"link"``: each task has a trace of its own, whose span is linked to the
        span that was current in ``add_task``; ``"child"``: the span of the task is a child of
        that span.
    :raises ValueError: if ``parent`` is neither.
    :raises TypeError: if ``tracer_provider`` is no ``TracerProvider``.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, parent: Parent = "link"
    ) -> None:
        if parent not in get_args(Parent):
            raise OptionValueError("parent", parent, "'link' or 'child'")
        if not isinstance(tracer_provider, (trace.TracerProvider, type(None))):
            raise OptionTypeError("tracer_provider", tracer_provider, "a TracerProvider")
        self._is_child = parent == "child"
        self._tracer = trace.get_tracer("wsgi_bg", __version__, tracer_provider)
        headers.carriers["opentelemetry"] = propagate.inject

    def around(self, record: TaskRecord) -> _Attempt:
        """Return the context manager of an attempt: see :class:`~wsgi_bg.hooks.Hooks`."""
        return _Attempt(self._tracer, record, is_child=self._is_child)


class _Attempt:
    """The span of an attempt.

    The span stays current in the context of the attempt, which is a copy that nothing else
    runs in, but for the log record of an error and ``on_error``: they have the span's ids.
    """

    __slots__ = ("_is_child", "_record", "_span", "_tracer")

    _span: Span | None

    def __init__(self, tracer: Tracer, record: TaskRecord, *, is_child: bool) -> None:
        self._tracer = tracer
        self._record = record
        self._is_child = is_child

    def __enter__(self) -> None:
        self._span = None
        try:
            self._begin()
        except Exception as exc:
            name, extra = self._record.name, fields(self._record.task)
            log.error("the span of %s could not be begun", name, exc_info=exc, extra=extra)

    def _begin(self) -> None:
        record = self._record
        name = record.name[:_LONGEST]
        parent = get_current()
        origin = get_current_span(parent).get_span_context()
        kind, is_child = SpanKind.CONSUMER, self._is_child
        carried = headers.carried.get()
        if carried is not None:
            if not origin.is_valid:
                parent = propagate.extract(carried, parent)
                origin = get_current_span(parent).get_span_context()
            elif not _is_inside.get():  # an instrumentation of the engine has made a span
                kind, is_child = SpanKind.INTERNAL, True
            _is_inside.set(True)  # for this task only, whose context is a copy
        links, start_in = None, parent
        if origin.is_valid and not is_child:
            links = [Link(origin)]
            has_baggage = len(parent) > 1  # or has something else beside the span
            start_in = set_span_in_context(INVALID_SPAN, parent) if has_baggage else _NO_SPAN
        attributes = {
            "messaging.system": "wsgi_bg",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": name,
            "code.function.name": name,
        }
        span = self._tracer.start_span(f"process {name}", start_in, kind, attributes, links)
        if span.is_recording():
            span.set_attribute("messaging.message.id", record.id)
            if record.attempt > 1:
                span.set_attribute("wsgi_bg.attempt", record.attempt)
        self._span = span
        # Without an SDK the span is not valid: the task keeps the trace of its request.
        if span.get_span_context().is_valid:
            attach(set_span_in_context(span, parent))
        elif carried is not None:
            attach(parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        span = self._span
        if span is None:
            return
        try:
            try:
                if exc is not None and span.is_recording():
                    _note(span, exc)
            finally:
                span.end()
        except Exception as error:
            name, extra = self._record.name, fields(self._record.task)
            log.error("the span of %s could not be ended", name, exc_info=error, extra=extra)


def _note(span: Span, exc: BaseException) -> None:
    name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
    span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR, name))
    try:
        span.record_exception(exc)
    except Exception:  # str(exc) has raised
        traceback = "".join(log.format_error(exc))
        span.add_event("exception", {"exception.type": name, "exception.stacktrace": traceback})
