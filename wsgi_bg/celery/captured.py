"""The messages that Celery makes of a call, captured in ``add_task`` and sent later."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from math import inf
from typing import Any, NamedTuple

from celery import Celery
from celery.utils.time import maybe_make_aware
from kombu import Connection, Exchange, Producer, Queue
from kombu.compression import compress
from kombu.serialization import dumps

from wsgi_bg._outbox.stored import Message
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg.celery.own_tasks import Call
from wsgi_bg.exceptions import MessageError


class Published(NamedTuple):
    """A message as Celery gives it to kombu, with its body encoded."""

    body: bytes | str
    options: Mapping[str, Any]
    """Arguments of :meth:`kombu.Producer.publish`."""


class _Capture(Producer):  # type: ignore[misc]
    """Keeps the messages that Celery publishes; never connects to the broker."""

    def __init__(self, connection: Connection, call: Call) -> None:
        super().__init__(connection, auto_declare=False)  # opens no connection
        self.published: list[Published] = []
        self.due = 0.0
        self.expires = inf
        self._call = call

    def publish(self, body: Any, **options: Any) -> None:
        """Keep a message: the arguments are those of :meth:`kombu.Producer.publish`."""
        serializer, compression = options.pop("serializer", None), options.pop("compression", 0)
        for name in ("retry", "retry_policy"):
            options.pop(name, None)
        content_type, encoding, data = dumps(body, serializer=serializer)
        headers = options["headers"] = dict(options.get("headers") or {})
        if headers.get("task") == self._call.name:
            headers["ignore_result"] = self._call.ignores_result
        # The first version of Celery's messages has the time in the body.
        times = body if isinstance(body, dict) and "task" in body else headers
        if times.get("task") == self._call.name:
            self.due = timestamp(times.get("eta"), self.due)
            self.expires = timestamp(times.get("expires"), self.expires)
        if compression:
            data, headers["compression"] = compress(data, compression)
        options.update(content_type=content_type, content_encoding=encoding)
        self.published.append(Published(data, options))

    def __deepcopy__(self, memo: Any) -> _Capture:
        return self  # Celery copies the options of a chain's first task


def capture(connection: Connection, call: Call, task: BackgroundTask) -> Message:
    """Return the message that Celery would send for ``call``.

    Called in ``add_task``: Celery's signals, a task's own ``apply_async`` and the headers of a
    trace see the request, and times count from there. The id in Celery becomes that of
    ``task``. An ``apply_async`` that sends nothing, since Celery has the same task already, for
    example, makes an empty message.

    :param connection: a connection that is never opened.
    """
    producer = _Capture(connection, call)
    # With ignore_result Celery does not tell the result backend, which may be away too.
    result = call.apply_async(
        task_id=call.id or task.id, producer=producer, ignore_result=True, add_to_parent=False
    )
    id_ = getattr(result, "id", None)
    if isinstance(id_, str):
        task.keep_id(id_)
    return Message(
        call.name,
        producer.published,
        producer.due,
        can_run_here=not call.runs_only_there,
        expires=producer.expires,
        call_here=call.here,
    )


def timestamp(text: str | None, default: float) -> float:
    """Return a time of Celery's headers; as on a worker, a time without a zone is UTC."""
    return maybe_make_aware(datetime.fromisoformat(text)).timestamp() if text else default


def dump(parts: list[Published]) -> str:
    """Encode messages for a file.

    :raises TypeError: if a header is no JSON.
    """
    return json.dumps([_part_to_json(part) for part in parts])


def load(app: Celery, name: str, text: str) -> list[Published]:
    """Return the messages in ``text``, which may be forged.

    :raises ValueError: or another error, if ``text`` has no message for the task ``name``.
    """
    parts = [_part_from_json(app, *part) for part in json.loads(text)]
    if {part.options["headers"].get("task", name) for part in parts} != {name}:
        raise MessageError("the message is for another task")
    return parts


def _part_to_json(part: Published) -> list[Any]:
    options = dict(part.options)
    declared = [
        each.name
        if isinstance(each, Queue)
        else [each.name, each.type, each.durable, each.auto_delete]
        for each in options.pop("declare", None) or ()
    ]
    if isinstance(options.get("exchange"), Exchange):
        options["exchange"] = options["exchange"].name
    body = part.body
    is_text = isinstance(body, str)
    data = body if isinstance(body, str) else base64.b64encode(body).decode()
    return [is_text, data, declared, options]


def _exchange(name: str, type: str, durable: bool, auto_delete: bool) -> Exchange:  # noqa: A002
    return Exchange(str(name), str(type), durable=bool(durable), auto_delete=bool(auto_delete))


def _part_from_json(
    app: Celery, is_text: bool, data: str, declared: list[Any], options: dict[str, Any]
) -> Published:
    options["declare"] = [
        _exchange(*each) if isinstance(each, list) else app.amqp.queues[str(each)]
        for each in declared
    ]
    dict.keys(options["headers"])
    return Published(data if is_text else base64.b64decode(data), options)
