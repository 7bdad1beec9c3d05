"""``DramatiqRunner``: sends registered tasks to Dramatiq's workers; all others run here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, ClassVar, Unpack

from wsgi_bg import BackgroundTask, exceptions
from wsgi_bg._outbox.address import address_of
from wsgi_bg.outbox import Connection, EngineOptions, Message, OutboxOptions, OutboxRunner

try:
    import dramatiq
except ImportError as _exc:
    raise exceptions.ExtraMissingError("dramatiq", "wsgi_bg.dramatiq") from _exc

from wsgi_bg.dramatiq.actors import CALL, QUEUE, Actors

_LIMIT = (int,), "a whole number of milliseconds, 1 or more", lambda each: each > 0


class DramatiqRunner(OutboxRunner):
    """Sends each task whose function is registered to Dramatiq; others run on ``local``.

    Each registered function is an actor of the broker, under its registered name. The worker
    imports the module that makes the runner: ``dramatiq MODULE``. The id of a task is the id of
    its message. A ``Retry`` decides which calls are repeated, and Dramatiq's own options do
    not. Options for a function or a task, by ``engine={...}``: Dramatiq's ``queue_name``,
    ``time_limit``, ``max_age`` and, on RabbitMQ, ``broker_priority``.

    :param broker: a ``RedisBroker``, a ``RabbitmqBroker(confirm_delivery=True)``, or a
        ``StubBroker``. The runner adds ``CurrentMessage`` and a middleware of its own.
    :param options: see :class:`~wsgi_bg.outbox.OutboxRunner`.
    :raises ValueError: if the broker does not confirm messages, or has no middleware
        ``Retries``; if Dramatiq uses pickle; if an option is out of range.
    :raises TypeError: if an option has the wrong type.
    :raises StoreError: a ``RuntimeError``, if the folder of the outbox cannot be used.
    """

    engine_options: ClassVar[EngineOptions] = {
        "queue_name": ((str,), "the name of a queue"),
        **dict.fromkeys(("time_limit", "max_age"), _LIMIT),
        "broker_priority": ((int,), "0 to 255", lambda each: 0 <= each <= 255),
    }

    def __init__(self, broker: dramatiq.Broker, **options: Unpack[OutboxOptions]) -> None:
        if not isinstance(broker, dramatiq.Broker):
            raise exceptions.OptionTypeError("broker", broker, "a dramatiq.Broker")
        if isinstance(dramatiq.get_encoder(), dramatiq.PickleEncoder):
            wanted = "a broker, and JSON: dramatiq.set_encoder(dramatiq.JSONEncoder())"
            raise exceptions.OptionValueError("broker", broker, wanted)
        if "retry_when" not in broker.actor_options:
            wanted = "a broker with the middleware Retries"
            raise exceptions.OptionValueError("broker", broker, wanted)
        if not getattr(broker, "confirm_delivery", True):
            wanted = "a RabbitmqBroker(..., confirm_delivery=True): else messages are lost"
            raise exceptions.OptionValueError("broker", broker, wanted)
        super().__init__(**options)
        self.holds_delays: bool = not _is_rabbitmq(broker)  # which closes the worker's channel
        self._broker, self._actors = broker, Actors(self, broker)
        self.destination: object = getattr(broker, "parameters", broker)
        if hasattr(broker, "client"):  # of Redis
            self.destination = vars(broker)["namespace"], address_of(broker.client)

    def message(self, task: BackgroundTask) -> Message | None:
        """Encode an added task if Dramatiq is to run it.

        :raises TypeError: if an argument cannot be sent, or an option has the wrong type.
        :raises ValueError: if an option or the queue is unknown, or the broker has another
            actor of the same name.
        """
        message = super().message(task)
        if message is not None:
            if not self._actors.has(message.name):
                raise exceptions.NameTakenError(message.name, "an actor of the broker")
            queue = message.data.options.get("queue_name", QUEUE)
            known = self._broker.get_declared_queues() - self._broker.delay_queues
            if queue not in known:
                wanted = f"one of {', '.join(sorted(known))}"
                raise exceptions.OptionValueError("engine['queue_name']", queue, wanted)
        return message

    def connect(self) -> Connection:
        """Connect to the broker; blocks until the broker has answered."""
        return _Connection(self._broker)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._broker!r}, local={self.local!r})"


class _Connection(Connection):
    def __init__(self, broker: Any) -> None:
        self._broker = broker
        if _is_rabbitmq(broker):
            _ = broker.connection  # or Dramatiq would connect with the first message
        elif hasattr(broker, "client"):
            broker.client.ping()

    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        """Enqueue the messages one by one, since Dramatiq sends no batches; blocks."""
        try:
            for index, each in enumerate(messages):
                name, text, headers, options, id_, due = each.data
                options = {**options, CALL: [text, headers]}
                queue = options.pop("queue_name", QUEUE)
                message: Any = dramatiq.Message(queue, name, (), {}, options, id_)
                delay = max(0, ceil(1000 * (due - time.time()))) if due else None
                self._broker.enqueue(message, delay=delay)
                confirmed(index)
        finally:
            if _is_rabbitmq(self._broker):  # has a connection for each thread
                delattr(self._broker, "connection")


def _is_rabbitmq(broker: dramatiq.Broker) -> bool:
    return hasattr(type(broker), "connection")
