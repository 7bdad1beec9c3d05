"""``OpenTelemetryHooks``: a span for each attempt of each task."""

from wsgi_bg.opentelemetry.hooks import OpenTelemetryHooks

__all__ = ["OpenTelemetryHooks"]
