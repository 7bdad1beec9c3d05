"""The worker's side: each registered function is an actor of the broker."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import dramatiq
from dramatiq.middleware import CurrentMessage, Middleware, Shutdown, TimeLimitExceeded

from wsgi_bg._tasks import registry
from wsgi_bg._tasks.registry import Registration
from wsgi_bg._worker.calls import RetryLater, run_call
from wsgi_bg.exceptions import MessageError

if TYPE_CHECKING:
    from wsgi_bg._outbox.runner import OutboxRunner

CALL = "wsgi_bg"
"""The option of a message that has the arguments. Dramatiq logs its own arguments."""

QUEUE = "default"

_FAILURES = Exception, TimeLimitExceeded


class _Trace(Middleware):
    """Gives each message the trace of its request, for Sentry's integration on the worker.

    Sentry's own middleware, which comes first, takes the trace from the thread that sends.
    """

    def before_enqueue(self, broker: dramatiq.Broker, message: Any, delay: int | None) -> None:
        with suppress(LookupError, TypeError):  # of a message that is not ours
            headers = message.options[CALL][1]
            if "sentry-trace" in headers:
                message.options["_sentry_headers"] = headers


class Actors:
    """Makes each registered function an actor of ``broker``, also if registered later."""

    def __init__(self, runner: OutboxRunner, broker: dramatiq.Broker) -> None:
        self._runner = runner
        self._broker = broker
        for kind in (CurrentMessage, _Trace):
            if not any(isinstance(each, kind) for each in broker.middleware):
                broker.add_middleware(kind())
        registry.subscribe(self._add)

    def _add(self, registration: Registration) -> None:
        name, options = registration.name, registration.engine or {}
        if name in self._broker.actors:  # ours; or another one, and add_task raises
            return
        dramatiq.actor(
            actor_name=name,
            queue_name=options.get("queue_name", QUEUE),
            broker=self._broker,
            retry_when=_is_retried,
        )(partial(self._run, name))

    def has(self, name: str) -> bool:
        """True if the actor of this name calls a registered function."""
        return self._broker.actors[name].options.get("retry_when") is _is_retried

    def _run(self, name: str) -> None:
        message: Any = CurrentMessage.get_current_message()
        try:
            text, headers = message.options[CALL]
        except (LookupError, TypeError, ValueError):
            raise MessageError("the message has no arguments of wsgi_bg") from None
        attempt = message.options.get("retries", 0) + 1
        try:
            id_ = message.message_id
            run_call(self._runner, name, text, headers, attempt, id_, failures=_FAILURES)
        except RetryLater as exc:
            raise dramatiq.Retry(str(exc), delay=ceil(1000 * exc.seconds)) from exc


def _is_retried(retries: int, exc: BaseException) -> bool:
    return isinstance(exc, (dramatiq.Retry, Shutdown))
