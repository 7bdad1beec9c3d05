"""Values that the codec carries."""

from __future__ import annotations

import inspect
import math
import sys
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from wsgi_bg._messages.codec import encode
from wsgi_bg._tasks.registry import Registration


def order(order: Any, count: int = 1, *rest: Any, note: Any = None, **more: Any) -> None:
    pass


ORDER = Registration("shop.order", order, inspect.signature(order), None)
BERLIN = ZoneInfo("Europe/Berlin")
EAST = timezone(timedelta(hours=5, minutes=45, seconds=1, microseconds=7))


def written(*args: Any, **kwargs: Any) -> str:
    return encode(ORDER, args, kwargs)


CARRIED = [
    None,
    True,
    False,
    0,
    -1,
    2**53 + 1,
    2**63,
    -(2**200),
    0.1,
    -0.0,
    5e-324,
    sys.float_info.max,
    math.inf,
    -math.inf,
    "",
    "Zoë 😀 \x00 \u2028",
    b"",
    bytes(range(256)),
    [],
    [[], [None]],
    {},
    {"": {"a": [1, "1", 1.0]}},
    {"$bytes": "AA=="},
    {"$": 1, "b": b"x"},
    {"__type__": "datetime", "__value__": "2024-01-01"},
    date(1, 1, 1),
    time(23, 59, 59, 999999),
    time(1, 2, tzinfo=UTC),
    datetime(2024, 2, 29, 1, 2, 3, 4),
    datetime(2024, 2, 29, tzinfo=UTC),
    datetime(2024, 2, 29, tzinfo=EAST),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2024, 10, 27, 2, 30, fold=1),
    Decimal("1.10"),
    Decimal("-0"),
    Decimal("Infinity"),
    Decimal("1E+999999"),
    uuid.UUID(int=2**127 + 1),
]
