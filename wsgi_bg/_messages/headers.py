"""The headers of a task's message: a correlation id, the trace context, the request's label.

No other context variable is sent to a worker. Hooks for a tracer add the tracer's headers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from functools import cache
from typing import Any

from wsgi_bg._process import log
from wsgi_bg._tasks.task import current as current_tasks
from wsgi_bg.exceptions import OptionTypeError

correlation_id: ContextVar[str | None] = ContextVar("wsgi_bg.correlation_id", default=None)
"""The correlation id. A view sets the variable; on the worker, registered tasks that the
request adds read the same value."""

traceparent: ContextVar[str | None] = ContextVar("wsgi_bg.traceparent", default=None)
"""The trace context in W3C's format. If OpenTelemetry is imported and has a current span,
the message carries the span's context; else the value of this variable."""

carriers: dict[str, Callable[[dict[str, str]], object]] = {}
"""Functions that add the headers of a tracer to those of a message, by the tracer's name."""

carried: ContextVar[Mapping[str, str] | None] = ContextVar("wsgi_bg.carried", default=None)
"""The headers of the message or the row, in a task that was sent or read from a file."""

REQUEST = "x-wsgi-bg-request"
"""The header with the label of the request, if the label is known in ``add_task``."""

_HEADERS = {"x-correlation-id": correlation_id, "traceparent": traceparent}


def current() -> dict[str, str]:
    """Return the headers for a task that is added in the current context.

    :raises TypeError: if a variable's value is neither a ``str`` nor None.
    """
    found: dict[str, str] = {}
    for name, variable in _HEADERS.items():
        value = variable.get()
        if value is not None:
            if not isinstance(value, str):
                raise OptionTypeError(variable.name, value, "a str or None")
            found[name] = value
    found.update(of_request())
    if "opentelemetry.trace" in sys.modules and "opentelemetry" not in carriers:
        found.update(_from_opentelemetry())
    for name, carrier in list(carriers.items()):
        try:
            carrier(found)
        except Exception as exc:
            log.error("the trace of %s could not be added to a message", name, exc_info=exc)
    return found


def of_request() -> dict[str, str]:
    """Return the header with the label of the current request, if the label is known."""
    tasks = current_tasks.get(None)
    label = None if tasks is None else tasks.root.request
    return {} if label is None else {REQUEST: label}


def restore(context: Context, given: Mapping[str, object]) -> None:
    """Give the variables in ``context`` the values that they had in ``add_task``.

    :param given: the headers of the message, which may be forged.
    """
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    context.run(carried.set, texts)
    for name, variable in _HEADERS.items():
        context.run(variable.set, texts.get(name))


@cache
def _opentelemetry() -> tuple[Callable[[], object], object, Any]:
    from opentelemetry.trace import INVALID_SPAN, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return get_current_span, INVALID_SPAN, TraceContextTextMapPropagator()


def _from_opentelemetry() -> dict[str, str]:
    current_span, no_span, propagator = _opentelemetry()
    if current_span() is no_span:  # some client has imported OpenTelemetry, and nothing traces
        return {}
    carrier: dict[str, str] = {}
    propagator.inject(carrier)
    return {name: value for name, value in carrier.items() if name in _HEADERS}
