"""The Celery options that ``registered_task`` and ``using(celery=...)`` accept.

The options are checked without Celery, so that a mistake raises in the call that made the
mistake, even in a process whose runner ignores the options. Of most values only the type is
checked; Celery knows the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from wsgi_bg._tasks.checks import Kind, entries
from wsgi_bg.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from wsgi_bg._tasks.registry import Registration

_FLAG: Kind = (bool,), "True or False"
_SECONDS: Kind = (int, float), "a number of seconds"
_TEXT: Kind = (str,), "a str"
_DICT: Kind = (dict,), "a dict"
_ERRORS: Kind = (tuple,), "a tuple of exception classes"

_MODES = (1, 2, "transient", "persistent")


def _each(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


# How a worker treats a function: options of Celery's ``app.task``.
_OF_TASK = {
    **_each(_FLAG, "acks_late acks_on_failure_or_timeout ignore_result reject_on_worker_lost"),
    **_each(_FLAG, "retry_jitter send_events store_errors_even_if_ignored track_started"),
    **_each(_ERRORS, "autoretry_for dont_autoretry_for throws"),
    **_each(_SECONDS, "default_retry_delay retry_backoff_max"),
    **_each(_DICT, "retry_kwargs"),
    "max_retries": ((int, NoneType), "a whole number, or None for no limit"),
    "rate_limit": ((str, int, float), 'a number a second, or a str such as "10/m"'),
    "retry_backoff": ((bool, int), "True or False, or a number of seconds"),
}

# How one message is sent: options of Celery's ``apply_async``.
_OF_MESSAGE = {
    **_each(_TEXT, "compression exchange queue routing_key shadow"),
    **_each(_SECONDS, "countdown soft_time_limit time_limit"),
    **_each(_DICT, "retry_policy"),
    "delivery_mode": ((str, int), f"one of {_MODES}", _MODES.__contains__),
    "eta": ((datetime,), "a datetime"),
    "expires": ((int, float, datetime), "a number of seconds or a datetime"),
    "priority": ((int,), "a whole number from 0 to 255", range(256).__contains__),
}


TIMES = ("countdown", "eta")
"""The options of a message that a delay replaces."""


class CeleryOptions(NamedTuple):
    """Celery options, split by the Celery function that takes them."""

    task: Mapping[str, Any]
    """Options for ``app.task``."""
    message: Mapping[str, Any]
    """Options for ``apply_async``."""


NO_OPTIONS = CeleryOptions({}, {})


def for_function(given: Mapping[str, Any]) -> CeleryOptions:
    """Check and split the options of ``registered_task(celery=...)``.

    :raises TypeError: if a value has the wrong type.
    :raises ValueError: if an option is unknown, or a number is infinite or NaN.
    """
    _check("celery", given, {**_OF_TASK, **_OF_MESSAGE})
    return CeleryOptions(
        {name: given[name] for name in given if name in _OF_TASK},
        {name: given[name] for name in given if name in _OF_MESSAGE},
    )


def for_one_call(given: Mapping[str, Any], option: str = "celery") -> dict[str, Any]:
    """Check and copy the options of ``using(celery=...)``.

    :param option: the name of the option, ``"engine"`` for ``using(engine=...)``.
    :raises TypeError: if a value has the wrong type.
    :raises ValueError: if an option is unknown or only for ``registered_task``, or if a
        number is infinite or NaN.
    """
    _check(option, given, _OF_MESSAGE)
    return dict(given)


def for_messages(registration: Registration) -> dict[str, Any]:
    """Return the options of a registered function's messages.

    :raises TypeError: as :func:`for_one_call` does for ``registered_task(engine=...)``.
    :raises ValueError: as :func:`for_one_call` does for ``registered_task(engine=...)``.
    """
    engine = for_one_call(registration.engine or {}, "engine")
    return {**(registration.celery or NO_OPTIONS).message, **engine}


def override(of_function: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one message: those given, and the others of the function.

    A ``countdown`` or an ``eta`` that is given replaces both of the function.
    """
    has_time = any(given.get(name) is not None for name in TIMES)
    kept = {each: of_function[each] for each in of_function if not (has_time and each in TIMES)}
    return {**kept, **given}


def refuse_time(given: Mapping[str, Any], delay: float, option: str = "celery") -> None:
    """Raise if ``given`` sets the time of a task that has a delay.

    :raises ValueError: if ``given`` has ``countdown`` or ``eta``.
    """
    for name in TIMES:
        if name in given:
            wanted = f"None beside {option}={{{name!r}: ...}}, which sets the time too"
            raise OptionValueError("delay", delay, wanted)


def _check(option: str, given: Any, known: Mapping[str, Kind]) -> None:
    if not isinstance(given, Mapping):
        raise OptionTypeError(option, given, "a dict of Celery's options")
    for name in given:
        if name in _OF_TASK and name not in known:
            wanted = "options of one message; this one goes to registered_task(celery=...)"
            raise OptionValueError(option, name, wanted)
    entries(option, given, known)
