"""``using(engine=...)`` and ``registered_task(engine=...)`` with a ``CeleryRunner``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.celery import filesystem, messages
from tests.support.celery_shop import note
from tests.support.engines import TIMEOUT, send
from wsgi_bg import registered_task, wait
from wsgi_bg.celery import CeleryRunner
from wsgi_bg.exceptions import OptionTypeError, OptionValueError


@registered_task(engine={"queue": "heavy"}, celery={"queue": "light", "priority": 3})
def weigh() -> None:
    pass


def test_options_for_the_engine_are_options_of_the_message(tmp_path: Path) -> None:
    broker = filesystem(tmp_path)
    runner = broker.runner()
    send(runner, weigh)
    assert wait(TIMEOUT) == []
    send(runner, weigh, using={"engine": {"queue": "urgent"}, "celery": {"priority": 7}})
    assert wait(TIMEOUT) == []
    found = [message["properties"] for message in messages(broker)]
    keys = [each["delivery_info"]["routing_key"] for each in found]
    assert list(zip(keys, [each["priority"] for each in found], strict=True)) == [
        ("heavy", 3),
        ("urgent", 7),
    ]


def test_options_for_the_engine_hold_for_plain_calls(tmp_path: Path) -> None:
    broker = filesystem(tmp_path)
    app = broker.app()
    CeleryRunner(app, plain_calls=True)
    app.tasks[weigh.__module__ + ".weigh"].delay()
    [message] = messages(broker)
    assert message["properties"]["delivery_info"]["routing_key"] == "heavy"
    assert message["properties"]["priority"] == 3


@pytest.mark.parametrize(
    ("using", "error", "message"),
    [
        ({"engine": {"quue": "x"}}, OptionValueError, "engine must be a dict with keys of"),
        ({"engine": {"priority": "x"}}, OptionTypeError, r"engine\['priority'\] must be"),
        (
            {"engine": {"acks_late": True}},
            OptionValueError,
            r"engine must .* goes to registered_task\(celery=\.\.\.\); got 'acks_late'",
        ),
        (
            {"engine": {"countdown": 3}, "delay": 3},
            OptionValueError,
            r"None beside engine=\{'countdown': \.\.\.\}",
        ),
    ],
)
def test_wrong_options_for_the_engine_raise_in_add_task(
    tmp_path: Path, using: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        send(filesystem(tmp_path).runner(), note, "", using=using)
