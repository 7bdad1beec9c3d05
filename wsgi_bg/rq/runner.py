"""``RQRunner``: sends registered tasks to RQ's workers; all others run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from datetime import UTC, datetime
from math import ceil
from typing import Any, ClassVar, Unpack

from wsgi_bg._outbox.address import address_of
from wsgi_bg.exceptions import ExtraMissingError, OptionTypeError, OptionValueError
from wsgi_bg.outbox import Connection, EngineOptions, Message, OutboxOptions, OutboxRunner

try:
    from redis import ConnectionPool, Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry as RedisRetry
    from rq import Queue, Retry
    from rq.serializers import JSONSerializer
except ImportError as _exc:
    raise ExtraMissingError("rq", "wsgi_bg.rq") from _exc

from wsgi_bg.rq import worker

_SENTRY = "_sentry_trace_headers"


class RQRunner(OutboxRunner):
    """Sends each task whose function is registered to RQ; other tasks run on ``local``.

    The worker imports the module that makes the runner: ``rq worker -c MODULE``. Delays, and a
    ``Retry`` with a wait, need ``--with-scheduler``. Options by ``engine={...}``: RQ's
    ``at_front``, ``job_timeout``, ``ttl``, ``result_ttl`` and ``failure_ttl``; the name of a
    ``queue``; ``max_crashes``, how often a job begins again whose process has died (0).

    :param queue: an :class:`rq.Queue` with ``serializer=JSONSerializer``.
    :param options: see :class:`~wsgi_bg.outbox.OutboxRunner`.
    :raises ValueError: if the queue uses pickle; if an option is out of range.
    :raises TypeError: if an option has the wrong type.
    :raises StoreError: a ``RuntimeError``, if the folder of the outbox cannot be used.
    """

    holds_delays = True
    engine_options: ClassVar[EngineOptions] = {
        "queue": ((str,), "the name of a queue"),
        "at_front": ((bool,), "True or False"),
        "max_crashes": ((int,), "a whole number, 0 or more", lambda each: each >= 0),
        "job_timeout": ((int,), "seconds, or -1 for no limit", lambda n: n > 0 or n == -1),
        "ttl": ((int,), "a whole number of seconds, 1 or more", lambda each: each > 0),
        **dict.fromkeys(("result_ttl", "failure_ttl"), ((int,), "seconds, or -1", (-1).__le__)),
    }

    def __init__(self, queue: Queue, **options: Unpack[OutboxOptions]) -> None:
        if not isinstance(queue, Queue):
            raise OptionTypeError("queue", queue, "an rq.Queue")
        if JSONSerializer not in (queue.serializer, type(queue.serializer)):
            wanted = "an rq.Queue(..., serializer=JSONSerializer): pickle can run any code"
            raise OptionValueError("queue", queue, wanted)
        super().__init__(**options)
        self._queue = queue
        self.destination: object = queue.key, address_of(queue.connection)
        worker.runners[queue.name] = self

    def connect(self) -> Connection:
        """Make a client of the queue's Redis; its calls block for ``publish_timeout``."""
        return _Connection(self._queue, self.publish_timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._queue.name!r}, local={self.local!r})"


class _Connection(Connection):
    """A client of its own, whose threads come back from a Redis that does not answer."""

    def __init__(self, queue: Queue, timeout: float) -> None:
        given = queue.connection.connection_pool
        limits = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        options = {**given.connection_kwargs, **limits, "retry": RedisRetry(NoBackoff(), 0)}
        self._redis = Redis.from_pool(ConnectionPool(given.connection_class, **options))
        self._redis.ping()  # or the client would connect with the first message
        self._queue = copy(queue)
        self._queue.connection = self._redis

    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        """Enqueue the jobs of all messages in one transaction; blocks."""
        with self._redis.pipeline() as pipeline:
            pipeline.multi()  # else RQ does, which Redis refuses after a job with a delay
            for message in messages:
                self._enqueue(message, pipeline)
            pipeline.execute()
        list(map(confirmed, range(len(messages))))

    def _enqueue(self, message: Message, pipeline: Any) -> None:
        call, queue, options = message.data, copy(self._queue), dict(message.data.options)
        crashes, at_front = options.pop("max_crashes", 0), options.pop("at_front", False)
        name, timeout = options.pop("queue", queue.name), options.pop("job_timeout", None)
        job = queue.create_job(
            worker.ENTRY,
            call[:3],
            job_id=call.id,
            description=call.name,  # RQ's own would show the arguments
            timeout=timeout,
            retry=Retry(crashes) if crashes else None,
            # Sentry's integration would take the trace from this thread, which has none.
            meta={_SENTRY: call.headers} if "sentry-trace" in call.headers else None,
            **options,
        )
        if name != queue.name:
            job.origin, queue = name, type(queue)(name, self._redis, serializer=JSONSerializer)
        if call.due:
            job.enqueue_at_front = at_front  # by the scheduler, which keeps whole seconds
            queue.schedule_job(job, datetime.fromtimestamp(ceil(call.due), UTC), pipeline)
        else:
            queue.enqueue_job(job, pipeline=pipeline, at_front=at_front)

    def close(self) -> None:
        """Close the client; does not wait for Redis."""
        self._redis.close()
