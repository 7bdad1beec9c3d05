"""The headers of a task's message: a correlation id and the trace context.

No other context variable is sent to a worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import Context, ContextVar
from types import NoneType

from wsgi_bg.exceptions import OptionTypeError

correlation_id: ContextVar[str | None] = ContextVar("wsgi_bg.correlation_id", default=None)
"""The correlation id. A view sets the variable; on the worker, registered tasks that the
request adds read the same value."""

traceparent: ContextVar[str | None] = ContextVar("wsgi_bg.traceparent", default=None)
"""The trace context in W3C's format. If OpenTelemetry is imported and has a current span,
the message carries the span's context; else the value of this variable."""

_HEADERS = {"x-correlation-id": correlation_id, "traceparent": traceparent}


def current() -> dict[str, str]:
    """Return the headers for a task that is added in the current context.

    :raises TypeError: if a variable's value is neither a ``str`` nor None.
    """
    found = {name: variable.get() for name, variable in _HEADERS.items()}
    found.update(_from_opentelemetry())
    for name, value in found.items():
        if not isinstance(value, (str, NoneType)):
            raise OptionTypeError(_HEADERS[name].name, value, "a str or None")
    return {name: value for name, value in found.items() if value is not None}


def restore(context: Context, header: Callable[[str], object]) -> None:
    """Give the variables in ``context`` the values that they had in ``add_task``.

    :param header: returns the message's header of a name, or None.
    """
    for name, variable in _HEADERS.items():
        value = header(name)
        context.run(variable.set, value if isinstance(value, str) else None)


def _from_opentelemetry() -> dict[str, str]:
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return {name: value for name, value in carrier.items() if name in _HEADERS}
