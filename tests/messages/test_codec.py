"""The arguments of registered functions as text: accepted values and refused values."""

from __future__ import annotations

import enum
import inspect
import json
import math
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.support.encoding import CARRIED, order, written
from wsgi_bg._messages.codec import MAX_DEPTH, decode, describe, encode
from wsgi_bg._tasks.registry import Registration
from wsgi_bg.exceptions import ArgumentError, MessageError, WsgiBgError


def carried(value: Any) -> Any:
    args, kwargs = decode(written(value))
    assert kwargs == {}
    (back,) = args
    return back


@pytest.mark.parametrize("value", CARRIED, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_the_same_value_of_the_same_type(value: Any) -> None:
    for sent in (value, [value], {"key": value}, {"$key": [value]}):
        back = carried(sent)
        # The ``repr`` shows types, zones, folds and the sign of a zero.
        assert type(back) is type(sent)
        assert back == sent
        assert repr(back) == repr(sent)


def test_an_int_of_more_digits_than_python_writes_is_carried() -> None:
    assert carried(10**5000) == 10**5000


@pytest.mark.parametrize("value", [math.nan, Decimal("NaN"), Decimal("sNaN12")])
def test_infinity_and_nan_come_back_as_none(value: Any) -> None:
    back = carried(value)
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_the_text_is_ascii_and_names_its_version() -> None:
    text = written("Zoë", note=[1])
    assert text.isascii()
    assert json.loads(text) == [1, ["Zoë"], {"note": [1]}]


def test_positional_and_keyword_arguments_stay_apart() -> None:
    args, kwargs = decode(written([1], 2, 3, note=4, **{"$bytes": "x"}))
    assert (args, kwargs) == ([[1], 2, 3], {"note": 4, "$bytes": "x"})


def test_later_changes_are_not_in_the_text() -> None:
    items = [1]
    text = written(items)
    items.append(2)
    assert decode(text)[0] == [[1]]


class Text(str):
    __slots__ = ()


class Words(enum.StrEnum):
    YES = "yes-secret"


class Number(enum.IntEnum):
    ONE = 1


class Zone(ZoneInfo):
    pass


def endless() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def nested(depth: int) -> Any:
    value: Any = "innermost"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ((1, 2), "a tuple would come back as a list: give a list"),
        ({1, 2}, "a set would come back as a list: give a list"),
        (frozenset(), "a frozenset would come back as a list: give a list"),
        ({1: "secret"}, "it has a key of type int, and keys come back as str"),
        ({Text("secret"): 1}, "it has a key of type Text, and keys come back as str"),
        ({"half \ud800": 1}, "half of a surrogate pair"),
        (Words.YES, "Words is an Enum, which a worker would not get back: give its value"),
        (Number.ONE, "Number is an Enum, which a worker would not get back: give its value"),
        (Text("secret"), "Text is a subclass of str and would come back as str"),
        (OrderedDict(a=1), "OrderedDict is a subclass of dict and would come back as dict"),
        (defaultdict(list), "defaultdict is a subclass of dict and would come back as dict"),
        (object(), "cannot be given an object of type object: pass what it needs of it"),
        (bytearray(b"secret"), "an object of type bytearray"),
        (memoryview(b"secret"), "an object of type memoryview"),
        (1j, "an object of type complex"),
        (timedelta(1), "an object of type timedelta"),
        (order, "an object of type function"),
        ("half \udc00 secret", "it has half of a surrogate pair, which is no text"),
        ("\ud83d\ude00", "it has half of a surrogate pair, which is no text"),
        (datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "secret")), "its time zone is"),
        (datetime(2024, 1, 1, tzinfo=Zone("Europe/Berlin")), "its time zone is neither"),
        (nested(MAX_DEPTH + 1), "it is nested more than 100 levels deep, or contains itself"),
        (endless(), "it is nested more than 100 levels deep, or contains itself"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_would_change_are_refused_with_the_reason(value: Any, reason: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        written(value)
    message = str(caught.value)
    assert reason in message
    assert message.startswith("shop.order was not added, argument order")
    assert "secret" not in message
    assert isinstance(caught.value, (WsgiBgError, TypeError))


def test_a_zone_without_a_key_is_refused() -> None:
    with open("/usr/share/zoneinfo/UTC", "rb") as file:
        zone = ZoneInfo.from_file(file)
    with pytest.raises(TypeError, match="its time zone is neither"):
        written(datetime(2024, 1, 1, tzinfo=zone))


def test_values_nested_to_the_limit_are_accepted() -> None:
    assert carried(nested(MAX_DEPTH)) == nested(MAX_DEPTH)


@pytest.mark.parametrize(
    ("args", "kwargs", "argument"),
    [
        (({"items": [0, 1, {1}]},), {}, "order['items'][2]"),
        (({1},), {}, "order"),
        ((1, {1}), {}, "count"),
        ((1, 2, 3, {1}), {}, "rest[1]"),
        ((1,), {"note": [{1}]}, "note[0]"),
        ((1,), {"other": {"a b": {1}}}, "other['a b']"),
        ((1,), {"$other": {1}}, "$other"),
        ((1, [{"$x": [[], {1}]}]), {}, "count[0]['$x'][1]"),
    ],
)
def test_the_error_names_the_argument_and_the_place_inside(
    args: tuple[Any, ...], kwargs: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ArgumentError, match="would come back as a list") as caught:
        written(*args, **kwargs)
    assert caught.value.argument == argument
    assert f"argument {argument} cannot be sent" in str(caught.value)
    assert caught.value.name == "shop.order"


def test_a_long_key_is_shown_in_part() -> None:
    with pytest.raises(ArgumentError) as caught:
        written({"k" * 1000: {1}})
    assert len(caught.value.argument) < 50


FUNCTIONS: list[Callable[..., object]] = [
    lambda: None,
    lambda first, second: None,
    lambda first, second=1, /, third=2: None,
    lambda first, *rest: None,
    lambda *rest, note=None, **more: None,
    lambda first=1, *, note: None,
    lambda first, **more: None,
]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_as_many_positional_arguments_are_taken_as_the_function_takes(
    number: int, count: int
) -> None:
    function, args = FUNCTIONS[number], list(range(count))
    registration = Registration("shop.any", function, inspect.signature(function), None)
    try:
        function(*args)
    except TypeError:
        with pytest.raises(TypeError, match="was not added"):
            encode(registration, args, {})
    else:
        assert decode(encode(registration, args, {})) == (args, {})


def strict(first: int, *, second: int) -> None:
    pass


STRICT = Registration("shop.strict", strict, inspect.signature(strict), None)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {"second": 1}, "missing a required argument: 'first'"),
        ((1, 2), {"second": 1}, "too many positional arguments"),
        ((1,), {"second": 1, "third": 1}, "got an unexpected keyword argument 'third'"),
    ],
)
def test_arguments_that_the_function_does_not_take_are_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TypeError) as caught:
        encode(STRICT, args, kwargs)
    assert str(caught.value) == f"shop.strict was not added, it would not run: {reason}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"[1,[],{}]",
        [1, [], {}],
        "",
        "{",
        "null",
        "[]",
        "[2,[],{}]",
        "[true]",
        "[1,[]]",
        "[1,[],{},{}]",
        "[1,{},{}]",
        "[1,[],[]]",
        '[1,[],{"a":{"$import":"os"}}]',
        '[1,[{"$bytes":"A"}],{}]',
        '[1,[{"$bytes":[]}],{}]',
        '[1,[{"$bytes":"","b":1}],{}]',
        '[1,[{"$decimal":"x"}],{}]',
        '[1,[{"$decimal":1.5}],{}]',
        '[1,[{"$uuid":5}],{}]',
        '[1,[{"$int":"12z"}],{}]',
        '[1,[{"$int":1.5}],{}]',
        '[1,[{"$date":"2024-13-01"}],{}]',
        '[1,[{"$datetime":["2024-01-01",0,"../../etc/passwd"]}],{}]',
        '[1,[{"$datetime":["2024-01-01",0,"Europe"]}],{}]',
        '[1,[{"$datetime":["2024-01-01",0,"os"]}],{}]',
        '[1,[{"$datetime":["2024-01-01",7,null]}],{}]',
        '[1,[{"$datetime":["2024-01-01",0,1e300]}],{}]',
        '[1,[{"$datetime":{}}],{}]',
        '[1,[{"$dict":[[1,2]]}],{}]',
        '[1,[{"$dict":[["a"]]}],{}]',
        "[1,[" + "[" * 100_000 + "]" * 100_000 + "],{}]",
        '[1,[{"__reduce__":1,"$a":1}],{}]',
    ],
    ids=range(33),
)
def test_a_forged_text_is_refused_and_its_content_is_not_shown(text: Any) -> None:
    with pytest.raises(MessageError, match=r"^the arguments are not wsgi_bg's") as caught:
        decode(text)
    assert caught.value.__cause__ is None
    assert "passwd" not in str(caught.value)


def test_reading_a_forged_text_imports_nothing() -> None:
    before = set(sys.modules)
    with pytest.raises(MessageError):
        decode('[1,[{"$datetime":["2024-01-01",0,"antigravity"]}],{}]')
    assert "antigravity" not in set(sys.modules) - before


def test_arguments_are_described_for_people() -> None:
    assert describe(written("a", [1], note=None)) == ["'a'", "[1]", "note=None"]
    for stored in (written(10**5000), "a message for an engine"):
        assert describe(stored) == [f"stored as: {stored}"]
