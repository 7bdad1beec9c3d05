"""The Celery options that ``registered_task`` and ``using(celery=...)`` accept.

The options are checked without Celery, so that a mistake raises in the call that made the
mistake, even in a process whose runner ignores the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from math import isfinite
from numbers import Real
from typing import Any

from wsgi_bg.exceptions import OptionTypeError, OptionValueError

_NUMBER = (Real, "a number of seconds")
_TEXT = (str, "a str")
_FLAG = (bool, "True or False")
_COUNT = (int, "a whole number")

# How a worker treats a function: options of Celery's ``app.task``.
_OF_TASK: dict[str, tuple[Any, str]] = {
    "acks_late": _FLAG,
    "acks_on_failure_or_timeout": _FLAG,
    "autoretry_for": (tuple, "a tuple of exception classes"),
    "default_retry_delay": _NUMBER,
    "dont_autoretry_for": (tuple, "a tuple of exception classes"),
    "ignore_result": _FLAG,
    "max_retries": ((int, type(None)), "a whole number, or None for no limit"),
    "rate_limit": ((str, int, float), 'a number a second, or a str such as "10/m"'),
    "reject_on_worker_lost": _FLAG,
    "retry_backoff": ((bool, int), "True or False, or a number of seconds"),
    "retry_backoff_max": _NUMBER,
    "retry_jitter": _FLAG,
    "retry_kwargs": (dict, "a dict"),
    "send_events": _FLAG,
    "store_errors_even_if_ignored": _FLAG,
    "throws": (tuple, "a tuple of exception classes"),
    "track_started": _FLAG,
}

# How one message is sent: options of Celery's ``apply_async``.
_OF_MESSAGE: dict[str, tuple[Any, str]] = {
    "compression": _TEXT,
    "countdown": _NUMBER,
    "delivery_mode": ((str, int), "a str or a whole number"),
    "eta": (datetime, "a datetime"),
    "exchange": _TEXT,
    "expires": ((Real, datetime), "a number of seconds or a datetime"),
    "priority": _COUNT,
    "queue": _TEXT,
    "retry_policy": (dict, "a dict"),
    "routing_key": _TEXT,
    "shadow": _TEXT,
    "soft_time_limit": _NUMBER,
    "time_limit": _NUMBER,
}


@dataclass(frozen=True)
class CeleryOptions:
    """Celery options, split by the Celery function that takes them.

    :ivar task: options for ``app.task``.
    :ivar message: options for ``apply_async``.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    message: Mapping[str, Any] = field(default_factory=dict)


NO_OPTIONS = CeleryOptions()


def for_function(given: Mapping[str, Any]) -> CeleryOptions:
    """Check and split the options of ``registered_task(celery=...)``.

    :raises TypeError: if a value has the wrong type.
    :raises ValueError: if an option is unknown, or a number is infinite or NaN.
    """
    for name, value in _mapping(given).items():
        if name not in _OF_TASK and name not in _OF_MESSAGE:
            known = ", ".join(sorted({*_OF_TASK, *_OF_MESSAGE}))
            raise OptionValueError("celery", name, f"a dict with keys of {known}")
        _look_at(name, value)
    return CeleryOptions(
        {name: given[name] for name in given if name in _OF_TASK},
        {name: given[name] for name in given if name in _OF_MESSAGE},
    )


def for_one_call(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and copy the options of ``using(celery=...)``.

    :raises TypeError: if a value has the wrong type.
    :raises ValueError: if an option is unknown or only for ``registered_task``, or if a
        number is infinite or NaN.
    """
    for name, value in _mapping(given).items():
        if name in _OF_TASK:
            raise OptionValueError(
                "celery", name, "options of one message; this one goes to registered_task"
            )
        if name not in _OF_MESSAGE:
            known = ", ".join(sorted(_OF_MESSAGE))
            raise OptionValueError("celery", name, f"a dict with keys of {known}")
        _look_at(name, value)
    return dict(given)


def _mapping(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise OptionTypeError("celery", given, "a dict of Celery's options")
    return given


def _look_at(name: str, value: Any) -> None:
    kinds, wanted = _OF_TASK.get(name) or _OF_MESSAGE[name]
    is_flag_by_mistake = (
        isinstance(value, bool)
        and kinds is not bool
        and (not isinstance(kinds, tuple) or bool not in kinds)
    )
    if not isinstance(value, kinds) or is_flag_by_mistake:
        raise OptionTypeError(f"celery[{name!r}]", value, wanted)
    if isinstance(value, float) and not isfinite(value):
        raise OptionValueError(f"celery[{name!r}]", value, "a finite number")
