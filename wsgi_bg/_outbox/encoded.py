"""The call of a registered function as text: the message of engines that have no own tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from wsgi_bg._messages.codec import encode
from wsgi_bg._messages.retries import headers_of_call
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.checks import Kind, entries
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg.exceptions import MessageError, RegistrationError

EngineOptions = Mapping[str, Kind]
"""The options of an engine, each with its types, the words for them in an error message, and
perhaps a function that says whether a value is in range:
``{"ttl": ((int,), "a whole number of seconds, 1 or more", lambda each: each > 0)}``."""

_YEAR_10000 = 253402300800.0


class EncodedCall(NamedTuple):
    """The call of a registered function, for a worker that calls ``run_call``."""

    name: str
    """The name of the registered function."""
    text: str
    """The arguments."""
    headers: dict[str, str]
    """The correlation id, the trace context, and the ``Retry`` of a single task."""
    options: dict[str, Any]
    """The options for the engine, of ``registered_task`` and of ``using``."""
    id: str
    """The id of the task."""
    due: float
    """The time from which the task may run (:func:`time.time`); 0.0 for at once."""


def encode_call(task: BackgroundTask, known: EngineOptions | None = None) -> EncodedCall | None:
    """Encode the call of an added task; None if its function is not registered.

    For ``message()`` of a runner: called in ``add_task``, in the context of the request.

    :param known: the options of the engine; none by default.
    :raises TypeError: if an argument cannot be sent, an option for the engine has the wrong
        type, or there are such options for a function that is not registered.
    :raises ValueError: if an option for the engine is unknown or out of range.
    """
    registration = registry.find(task.func)
    given = task.options.engine or {}
    if registration is None:
        if given:
            raise RegistrationError(
                f"{task.name} has options for the runner's engine, and is not registered: "
                "decorate it with @registered_task",
                task.func,
            )
        return None
    options = {**(registration.engine or {}), **given}
    entries("engine", options, known or {})
    text = encode(registration, task.args, task.kwargs)
    carried = headers_of_call(task.options.retry)
    delay = task.options.delay
    due = time.time() + delay if delay else 0.0
    return EncodedCall(registration.name, text, carried, options, task.id, due)


def load_call(name: str, text: str, known: EngineOptions) -> EncodedCall:
    """Return the call in a text from a file, which may be forged.

    :raises ValueError: or a ``TypeError``, if ``text`` is no call of the function ``name``.
    """
    call = EncodedCall(*json.loads(text))
    kinds = (str, str, dict, dict, str, float)
    if call.name != name or not all(map(isinstance, call, kinds)):
        raise MessageError("the message is for another task, or no message")
    if not 0 <= call.due < _YEAR_10000:
        raise MessageError("the message has no time")
    entries("engine", call.options, known)
    return call
