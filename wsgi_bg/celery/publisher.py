"""Sends messages to Celery's broker; no caller waits longer than the publish timeout."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from celery import Celery
from kombu import Producer

from wsgi_bg._process import log
from wsgi_bg._process.workers import Workers
from wsgi_bg.exceptions import PublishError

CONNECTIONS = 8
"""The most messages that are sent at the same time, each on a separate connection."""

# Retry once, on a new connection, because an idle process's connection may be dead. Do not
# retry more: publish_timeout limits the time, and a retry may send a message twice.
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.05, "interval_max": 0.05}


class Message(NamedTuple):
    """A registered task's call, encoded when the task was added."""

    name: str
    text: str
    headers: Mapping[str, str]
    options: Mapping[str, Any]


class Publisher:
    """A process's connections to one broker.

    Each message is sent on a daemon thread, because a transport may block without a limit.
    :meth:`publish` waits for that thread for ``timeout`` seconds at most.
    """

    def __init__(self, app: Celery, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._threads: Workers[_Job] = Workers(self._work, CONNECTIONS, "wsgi_bg-publish")
        self._idle: list[Producer] = []  # a stack: last in, first out
        self._silent_until = 0.0

    def publish(self, message: Message) -> None:
        """Send a message; blocks until the broker has the message, or the timeout.

        After a timeout, calls raise at once for another ``timeout`` seconds, so that not
        every task waits for a silent broker.

        :raises PublishError: if the message was not sent, or was perhaps sent but the broker
            did not answer.
        """
        if monotonic() < self._silent_until:
            raise PublishError(message.name, "the broker has not answered others in time")
        job = _Job(message)
        if not self._threads.submit(job):
            raise PublishError(message.name, "no thread can be had")
        # If the answer and the timeout coincide, whichever calls settle() first wins.
        if not job.is_done.acquire(timeout=self._timeout) and job.settle():
            self._silent_until = monotonic() + self._timeout
            raise PublishError(
                message.name, f"the broker has not answered in {self._timeout:g} seconds"
            )
        if job.error is not None:
            reason = f"{type(job.error).__name__}: {job.error}"
            raise PublishError(message.name, reason) from job.error

    def _work(self, job: _Job) -> None:
        """Send the message of ``job``; runs on a thread of this publisher."""
        if job.is_settled():
            return
        producer = None
        try:
            with suppress(IndexError):
                producer = self._idle.pop()
            producer = producer or self._connect()
            # Receivers of Celery's signals read the context of add_task(): a span, an id.
            job.context.run(self._send, producer, job.message)
        except BaseException as exc:
            job.error = exc
            job.settle()
            job.is_done.release()
            del job  # else the error would refer to itself through this frame
            if producer is not None:
                with suppress(Exception):
                    producer.connection.release()
        else:
            self._idle.append(producer)
            self._silent_until = 0.0
            if job.settle():
                job.is_done.release()
            else:
                log.warning(
                    "background task %s was sent after its time was up: it may run twice",
                    job.message.name,
                )

    def _connect(self) -> Producer:
        app, timeout = self._app, self._timeout
        # The application's own options come last, so they win.
        options = {**_RETRY, "connect_retries_timeout": timeout}
        # Twice the timeout, so that publish() times out before the socket does.
        options |= _for_transport(app.connection_for_write().transport_cls, 2 * timeout)
        options |= app.conf.broker_transport_options
        connection = app.connection_for_write(transport_options=options, heartbeat=0)
        return Producer(connection, auto_declare=False)

    def _send(self, producer: Producer, message: Message) -> None:
        options = {"retry_policy": _RETRY, **message.options}
        self._app.tasks[message.name].apply_async(
            (message.text,),
            producer=producer,
            headers=dict(message.headers),
            serializer="json",
            retry=True,
            add_to_parent=False,
            **options,
        )


class _Job:
    """A message, its result, and the lock that :meth:`Publisher.publish` waits for."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.error: BaseException | None = None
        self.context = copy_context()
        self.is_done = threading.Lock()
        self.is_done.acquire()
        # The caller that acquires this lock decides whether the job was sent or timed out.
        settled = threading.Lock()
        self.settle = partial(settled.acquire, blocking=False)
        self.is_settled = settled.locked


def _for_transport(name: str, timeout: float) -> dict[str, Any]:
    """Return a transport's timeout options, which free a thread from a silent broker."""
    if name in ("redis", "rediss", "sentinel"):
        return {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    if name in ("amqp", "amqps", "pyamqp"):
        # Without confirm_publish RabbitMQ does not answer, and messages may be lost.
        return {"confirm_publish": True, "read_timeout": timeout, "write_timeout": timeout}
    return {}
