"""``SentryHooks``: a scope and a transaction for each task, and an event for its error."""

from wsgi_bg.sentry.hooks import SentryHooks

__all__ = ["SentryHooks"]
