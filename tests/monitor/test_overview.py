"""The numbers that the page asks for: bounded, and with no more of an error than its class."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from wsgi_bg.monitor.overview import Query, find_error, overview
from wsgi_bg.status import (
    DurableTask,
    Failure,
    NameCounts,
    ProcessStatus,
    RunningTask,
    Snapshot,
    Times,
)

EMPTY = Snapshot(
    taken=1.0,
    processes=(),
    running=(),
    waiting={},
    failures=(),
    lost=(),
    names=(),
    minutes=(),
    durable=(),
    counts=NameCounts(""),
)

FAILURE = Failure(
    "shop.pay", "id-1", "POST /pay", 5.0, 1, 7, "Declined", "card 4242", "TB 4242"
)


def many(count: int) -> Snapshot:
    """A snapshot in which there is as much of everything as ``count``, with long names."""
    long = "x" * 5_000
    names = [f"shop.{number}.{long}" for number in range(count)]
    process = ProcessStatus(1, 0.0, 0.0, True, long, 0, 0, 0, 0, None, 0, None, 0)
    return replace(
        EMPTY,
        processes=tuple(replace(process, pid=number) for number in range(count)),
        running=tuple(RunningTask(name, None, long, 0.0, 1, 1, None) for name in names),
        waiting=dict.fromkeys(names, 1),
        names=tuple(map(NameCounts, names)),
    )


def test_the_size_is_bounded_whatever_there_is_to_show() -> None:
    snapshot = many(10_000)
    data = overview(snapshot, Query())
    assert len(json.dumps(data)) < 400_000
    for part in ("processes", "running", "waiting"):
        assert (len(data[part]["rows"]), data[part]["total"]) == (200, 10_000)
    assert (len(data["names"]["rows"]), data["names"]["total"]) == (100, 10_000)


def test_the_number_of_all_tasks_is_there_if_only_some_are_kept() -> None:
    snapshot = replace(
        EMPTY,
        failures=(FAILURE,),
        counts=NameCounts("", running=3_000, failed=5_000, lost=400),
        durable=(DurableTask("a", "id", "waiting", 0.0, None, 1, "", 1),) * 200,
    )
    data = overview(snapshot, Query())
    totals = {part: data[part]["total"] for part in ("running", "failures", "lost", "durable")}
    assert totals == {"running": 3_000, "failures": 5_000, "lost": 400, "durable": None}


def test_a_long_text_shows_that_it_is_cut() -> None:
    snapshot = replace(EMPTY, waiting={"x" * 301: 1, "y" * 300: 1})
    first, second = overview(snapshot, Query())["waiting"]["rows"]
    assert first["name"] == "x" * 299 + "…"
    assert second["name"] == "y" * 300


def test_a_filter_finds_names_that_are_not_among_the_first() -> None:
    data = overview(many(10_000), Query.of("name=SHOP.9876."))
    assert [row["name"][:10] for row in data["names"]["rows"]] == ["shop.9876."]
    assert (data["names"]["total"], data["names"]["all"]) == (1, 10_000)


def test_the_functions_come_in_the_order_that_is_asked_for() -> None:
    names = (
        NameCounts("a", succeeded=9, wait=Times(1, 1, 1, 1, 1)),
        NameCounts("b", running=1, waiting=1, run=Times(1, 9, 9, 9, 9)),
        NameCounts("c", failed=2, succeeded=1, wait=Times(1, 9, 9, 9, 9)),
    )
    snapshot = replace(EMPTY, names=names)

    def order(query: str) -> str:
        return "".join(
            row["name"] for row in overview(snapshot, Query.of(query))["names"]["rows"]
        )

    assert order("") == order("sort=active") == order("sort=unknown") == "bac"
    assert order("sort=ended") == "acb"
    assert order("sort=failed") == "cab"
    assert order("sort=wait") == "cab"
    assert order("sort=run") == "bac"
    assert order("sort=name") == "abc"


def test_what_waits_most_comes_first() -> None:
    snapshot = replace(EMPTY, waiting={"a": 1, "c": 5, "b": 5})
    rows = overview(snapshot, Query())["waiting"]["rows"]
    assert rows == [
        {"name": "b", "count": 5},
        {"name": "c", "count": 5},
        {"name": "a", "count": 1},
    ]


def test_the_overview_has_the_class_of_an_error_alone() -> None:
    data = overview(replace(EMPTY, failures=(FAILURE,)), Query())
    assert "4242" not in json.dumps(data)
    (row,) = data["failures"]["rows"]
    assert (row["name"], row["error"]) == ("shop.pay", "Declined")


def test_message_and_traceback_are_found_by_the_key_of_the_overview() -> None:
    snapshot = replace(
        EMPTY,
        failures=(
            replace(FAILURE, ended=6.0, message="other", traceback="\x00" * 50_000),
            replace(FAILURE, id=None),
        ),
    )
    rows: list[dict[str, Any]] = overview(snapshot, Query())["failures"]["rows"]
    first, second = (find_error(snapshot, row["key"]) for row in rows)
    assert first == {"message": "other", "traceback": "\x00" * 20_000}
    assert second == {"message": "card 4242", "traceback": "TB 4242"}
    assert find_error(snapshot, "unknown") is None
