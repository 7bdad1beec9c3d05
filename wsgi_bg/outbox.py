"""What a runner for another engine needs: see docs/how-to/own-runner.md."""

from wsgi_bg._messages.headers import correlation_id, traceparent
from wsgi_bg._outbox.encoded import EncodedCall, EngineOptions, encode_call
from wsgi_bg._outbox.outbox import Connection
from wsgi_bg._outbox.runner import OutboxOptions, OutboxRunner
from wsgi_bg._outbox.stored import Message
from wsgi_bg._worker.calls import RetryLater, run_call

__all__ = [
    "Connection",
    "EncodedCall",
    "EngineOptions",
    "Message",
    "OutboxOptions",
    "OutboxRunner",
    "RetryLater",
    "correlation_id",
    "encode_call",
    "run_call",
    "traceparent",
]
