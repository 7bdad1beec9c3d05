"""A connection to Celery's broker, over which a thread of the outbox sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from threading import current_thread
from typing import Any

from celery import Celery
from kombu import Producer

from wsgi_bg._outbox.outbox import OF_MESSAGE, NotKeptError
from wsgi_bg._outbox.stored import Message
from wsgi_bg._process import log
from wsgi_bg.celery.captured import Published, timestamp

_REDIS = ("redis", "rediss", "sentinel")
_AMQP = ("amqp", "amqps", "pyamqp")

_DELAYING = "celery_delayed_27"
"""The exchange by which Celery lets RabbitMQ delay messages to quorum queues."""

_SYNTAX_ERROR = 502
"""AMQP's code for a header that cannot be encoded; py-amqp's class is a connection error."""


class BrokerConnection:
    """See :class:`wsgi_bg._outbox.outbox.Connection`.

    :param timeout: seconds for which a step waits for the broker.
    :ivar options: the options of the transport.
    :raises Exception: if the broker cannot be reached.
    """

    def __init__(self, app: Celery, timeout: float) -> None:
        self._timeout = timeout
        transport = app.connection_for_write().transport_cls
        # The application's own options come last, so they win.
        options = {**_for_transport(transport, timeout), **app.conf.broker_transport_options}
        if transport in _AMQP:
            options["confirm_publish"] = False  # or each message would wait for the last one
        self._connection = app.connection_for_write(
            transport_options=options, heartbeat=0, connect_timeout=timeout
        )
        self.options: dict[str, Any] = options
        self._published = 0  # on the channel, since its confirms were selected
        try:
            # Each host once. connect() would try the first two, and a single one again after 2
            # seconds; the outbox has pauses of its own.
            hosts = len(self._connection.alt)
            self._connection.ensure_connection(
                max_retries=max(0, hosts - 1), reraise_as_library_errors=False
            )
            self._producer = Producer(self._connection, auto_declare=False)
            channel = self._producer.channel
            self._confirms = transport in _AMQP and hasattr(channel, "confirm_select")
            self._is_blocked = False
            if self._confirms:
                channel.confirm_select()
                channel.connection.on_blocked = self._block
                channel.connection.on_unblocked = self._unblock
        except BaseException:
            self._connection.collect()
            raise

    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        """Send the messages; blocks until the broker has confirmed all of them.

        :raises Exception: the error of the connection, or of a message that is refused.
        """
        if self._confirms:
            # An error of an exchange or a queue ends the channel. If confirms of messages to
            # others were lost with the channel, they would be sent twice.
            places = [_destination(each) for each in messages]
            order = sorted(range(len(messages)), key=places.__getitem__)
            are_kept = [
                self._send_with_confirms([(each, messages[each]) for each in group], confirmed)
                for _, group in groupby(order, key=places.__getitem__)
            ]
            if not all(are_kept):
                raise NotKeptError("the broker could not keep a message (basic.nack)")
            return
        batch = getattr(self._producer, "batch", nullcontext)  # since kombu 5.7
        if getattr(self._producer, "supports_batch_publish", False):
            with batch():
                self._publish_all(messages)
            for index in range(len(messages)):
                confirmed(index)
            return
        for index, message in enumerate(messages):
            self._publish_all([message])
            confirmed(index)

    def _publish_all(self, messages: Sequence[Message], **more: Any) -> None:
        for message in messages:
            for part in message.data:
                self._publish(part, more)

    def _publish(self, part: Published, more: dict[str, Any]) -> None:
        options = {**part.options, **more}
        headers = options["headers"] = dict(options["headers"])  # kombu writes into them
        if getattr(options["exchange"], "name", options["exchange"]) == _DELAYING:
            # Its key begins with the delay in bits, which Celery has counted from add_task.
            left = int(max(0.0, timestamp(headers.get("eta"), 0.0) - time.time()))
            *_, key = options["routing_key"].split(".", 28)
            options["routing_key"] = ".".join([*f"{left:028b}", key])
        self._producer.publish(part.body, **options)

    def _send_with_confirms(
        self,
        messages: Sequence[tuple[int, Message]],
        confirmed: Callable[[int], object],
        *,
        is_first: bool = True,
    ) -> bool:
        """Send all messages, then wait for all confirms: AMQP's numbers of messages.

        RabbitMQ confirms a message that no queue gets, too, but returns a mandatory one before.
        The queue may have been deleted since this connection has declared it.

        :param messages: each with its index, for ``confirmed``.
        :param is_first: False if no queue has got the messages, and may get none this time.
        :return: False if the broker could not keep a message.
        """
        channel = self._producer.channel
        waiting: dict[int, int] = {}  # the index of a message by the number of its last part
        refused: list[int] = []
        returned: set[str | None] = set()
        again: list[tuple[int, Message]] = []
        by_index = dict(messages)
        error: Exception | None = None

        def on_return(exc: object, exchange: str, key: str, message: Any) -> None:
            returned.add(message.properties.get("correlation_id"))

        def on_ack(number: int, multiple: bool) -> None:
            for each in _numbers(waiting, number, multiple):
                index = waiting.pop(each)
                if returned.isdisjoint(_ids(by_index[index])):
                    confirmed(index)
                else:
                    again.append((index, by_index[index]))

        def on_nack(number: int, multiple: bool) -> None:
            for each in _numbers(waiting, number, multiple):
                refused.append(waiting.pop(each))

        channel.events["basic_ack"].add(on_ack)
        channel.events["basic_nack"].add(on_nack)
        channel.events["basic_return"].add(on_return)
        try:
            for index, message in messages:
                if not message.data:  # an apply_async of the user has sent nothing
                    confirmed(index)
                    continue
                try:
                    self._publish_all([message], mandatory=is_first)
                except Exception as exc:
                    if not _is_unwritable(exc):
                        raise
                    error = exc  # raised after the confirms of the messages before
                    break
                self._published += len(message.data)
                waiting[self._published] = index
            while waiting:
                try:
                    self._connection.drain_events(timeout=self._timeout)
                except TimeoutError:
                    # RabbitMQ takes these messages when it has room again, and copies as well.
                    if not (self._is_blocked and current_thread().daemon):  # not at exit
                        raise
        finally:
            channel.events["basic_ack"].discard(on_ack)
            channel.events["basic_nack"].discard(on_nack)
            channel.events["basic_return"].discard(on_return)
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it refers to itself, by this frame
        if again:
            self._connection.declared_entities.clear()
            return self._send_with_confirms(again, confirmed, is_first=False) and not refused
        return not refused

    def _block(self, reason: str) -> None:
        self._is_blocked = True
        log.warning("tasks wait, since RabbitMQ takes no messages at present: %s", reason)

    def _unblock(self) -> None:
        self._is_blocked = False

    def is_lost(self, exc: Exception) -> bool:
        """True if the broker is away; False if a message was refused."""
        if _is_unwritable(exc):
            return False
        # An exchange or queue is missing, or of another type.
        if self._confirms and isinstance(exc, tuple(self._connection.channel_errors)):
            return False
        # Redis: the key of the queue is no list, so no message to that queue can be sent.
        return "WRONGTYPE" not in str(exc)

    def close(self) -> None:
        """Close the connection; may block for ``timeout`` seconds."""
        self._connection.release()


def _destination(message: Message) -> tuple[str, ...]:
    """The names of the exchanges and queues that a message needs."""
    return tuple(
        str(getattr(each, "name", each))
        for part in message.data
        for each in (part.options.get("exchange"), *(part.options.get("declare") or ()))
    )


def _ids(message: Message) -> set[str | None]:
    """The ids by which RabbitMQ's answer names the parts of a message."""
    return {part.options.get("correlation_id") for part in message.data}


def _is_unwritable(exc: Exception) -> bool:
    """True if a message cannot be encoded; nothing of the message was sent."""
    return isinstance(exc, OF_MESSAGE) or getattr(exc, "code", 0) == _SYNTAX_ERROR


def _numbers(waiting: dict[int, int], number: int, multiple: bool) -> list[int]:
    """The numbers that an answer of the broker stands for."""
    if multiple:
        return [each for each in waiting if each <= number]
    return [number] if number in waiting else []


def _for_transport(name: str, timeout: float) -> dict[str, Any]:
    """Return a transport's timeout options, which free a thread from a silent broker."""
    if name in _REDIS:
        return {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    if name in _AMQP:
        return {"read_timeout": timeout, "write_timeout": timeout}
    return {}
