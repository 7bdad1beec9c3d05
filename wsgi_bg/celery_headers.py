"""What travels beside the arguments of a task: a correlation id and the trace context.

Other context variables stay in the process that set them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import Context, ContextVar
from types import NoneType

from .exceptions import OptionTypeError

correlation_id: ContextVar[str | None] = ContextVar("wsgi_bg.correlation_id", default=None)
"""Set it while a request is handled, and the registered tasks that are added find it on the
worker."""

traceparent: ContextVar[str | None] = ContextVar("wsgi_bg.traceparent", default=None)
"""The trace context as W3C writes it. Where OpenTelemetry is imported and has a span, that
is what travels; else what is set here."""

_HEADERS = {"x-correlation-id": correlation_id, "traceparent": traceparent}


def current() -> dict[str, str]:
    """The headers for a task that is added here and now.

    :raises TypeError: if a variable was set to what no header can be.
    """
    found = {name: variable.get() for name, variable in _HEADERS.items()}
    found.update(_from_opentelemetry())
    for name, value in found.items():
        if not isinstance(value, (str, NoneType)):
            raise OptionTypeError(_HEADERS[name].name, value, "a str or None")
    return {name: value for name, value in found.items() if value is not None}


def restore(context: Context, header: Callable[[str], object]) -> None:
    """Set the variables in ``context`` as they were where the task was added.

    :param header: what the message has under a name, or None.
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
