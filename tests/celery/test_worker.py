"""A real Celery worker calls registered functions, and no others.

The broker is Celery's filesystem transport, and Redis if redis-server is installed.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from tests.support import text_of, wait_until
from tests.support.celery import (
    PARENT,
    TIMEOUT,
    RedisServer,
    Shop,
    Worker,
    filesystem,
    request,
    wait_for,
    worker,
)
from tests.support.celery_shop import (
    add_line,
    fail_always,
    fail_once,
    fail_twice,
    hold,
    not_registered,
    not_travelling,
    note,
    note_context,
    note_context_async,
    note_loop,
    note_on_other_queue,
    note_time,
    outlast,
)
from tests.support.encoding import CARRIED
from wsgi_bg import BackgroundTask, Retry, background_tasks, status
from wsgi_bg._messages.codec import encode
from wsgi_bg._tasks.registry import Registration, find
from wsgi_bg.celery import correlation_id, traceparent

QUEUES = ("-Q", "celery,other")


@pytest.fixture(scope="session", params=["filesystem", "redis"])
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """A worker with two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "filesystem":
        broker = filesystem(folder)
    else:
        broker = request.getfixturevalue("redis").broker(0)
    started = Worker(broker, folder, "--pool=prefork", "--concurrency=2", *QUEUES)
    try:
        yield Shop(broker, started, broker.runner())
    finally:
        started.kill()  # a graceful stop takes seconds


def test_every_kind_of_argument_arrives_unchanged(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "note"
    values = [value for value in CARRIED if not isinstance(value, int) or abs(value) < 2**500]
    shop.send(note, str(path), *values, values=values)
    written = wait_for(path, shop.worker)
    assert written.endswith(f", {tuple(values)!r}, {{'values': {values!r}}})")


def test_a_call_is_made_in_another_process(shop: Shop, tmp_path: Path) -> None:
    written = shop.works(tmp_path / "note")
    assert int(written[1:].split(",")[0]) != os.getpid()


def test_changes_that_the_view_makes_afterwards_are_not_sent(
    shop: Shop, tmp_path: Path
) -> None:
    items, path = [1], tmp_path / "note"

    def do() -> None:
        background_tasks.add_task(note, str(path), items)
        items.append(2)

    request(shop.runner, do)
    assert wait_for(path, shop.worker).endswith(", ([1],), {})")


def test_a_mixed_batch_runs_in_two_places(shop: Shop, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def do() -> None:
        background_tasks.add_task(here.write_text, "here")
        background_tasks.add_task(note, str(there))

    request(shop.runner, do)
    wait_for(there, shop.worker)
    assert wait_for(here, shop.worker) == "here"


def test_a_task_goes_to_the_queue_of_its_function(shop: Shop, tmp_path: Path) -> None:
    shop.send(note_on_other_queue, str(tmp_path / "queue"))
    assert wait_for(tmp_path / "queue", shop.worker) == "other"


def test_each_process_keeps_its_loop_for_async_tasks(shop: Shop, tmp_path: Path) -> None:
    for number in range(2):  # two at the same time: a call for each process
        path = tmp_path / f"{number}"
        shop.send(note_loop, str(path), 2)
        shop.send(note_loop, str(path), 2)
        met = partial(has_lines, path, 2)
        assert wait_until(met), shop.worker.log
        shop.works(tmp_path / f"between {number}")
    first, second = (sorted(text_of(tmp_path / name).splitlines()) for name in ("0", "1"))
    assert first == second
    assert len({line.split()[0] for line in first}) == 2


def has_lines(path: Path, count: int) -> bool:
    return len(text_of(path).splitlines()) == count


@pytest.mark.parametrize("func", [note_context, note_context_async])
def test_only_a_correlation_id_the_trace_and_the_request_travel(
    shop: Shop, tmp_path: Path, func: Any
) -> None:
    def do() -> None:
        correlation_id.set("request-7")
        traceparent.set(PARENT)
        not_travelling.set("set in the request")
        background_tasks.add_task(func, str(tmp_path / "set"))

    request(shop.runner, do)
    shop.send(func, str(tmp_path / "unset"))
    assert json.loads(wait_for(tmp_path / "set", shop.worker)) == [
        "request-7",
        PARENT,
        "GET /",
        "not set",
    ]
    unset = json.loads(wait_for(tmp_path / "unset", shop.worker))
    assert unset == [None, None, "GET /", "not set"]


def test_a_task_is_retried_with_its_arguments_and_its_correlation_id(
    shop: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "tries"

    def do() -> None:
        correlation_id.set("request-8")
        background_tasks.add_task(fail_once, str(path), "sec-ret")

    request(shop.runner, do)
    assert wait_until(lambda: has_lines(path, 2)), shop.worker.log
    assert text_of(path) == "request-8 sec-ret\n" * 2
    assert "sec-ret" not in shop.worker.log  # arguments are data, in a retry too


def test_the_retry_of_a_function_is_celerys_own_on_the_worker(
    shop: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "tries"

    def do() -> None:
        correlation_id.set("request-9")
        background_tasks.add_task(fail_twice, str(path), "sec-ret")

    request(shop.runner, do)
    assert wait_until(lambda: has_lines(path, 3)), shop.worker.log
    assert text_of(path) == "request-9 sec-ret\n" * 3
    repeated = "fail_twice raised KeyError in attempt 2 of 4, and is called again in 0 s"
    assert wait_until(lambda: repeated in shop.worker.log)
    assert "sec-ret" not in shop.worker.log


def test_the_retry_of_a_task_goes_with_its_message(shop: Shop, tmp_path: Path) -> None:
    repeated, given_up = tmp_path / "repeated", tmp_path / "given up"

    def do() -> None:
        tasks = background_tasks.using(retry=Retry(3, first=0, on=ConnectionError))
        tasks.add_task(fail_always, str(repeated))
        tasks = background_tasks.using(retry=Retry(3, first=0, on=(KeyError, ValueError)))
        tasks.add_task(fail_always, str(given_up))

    request(shop.runner, do)
    assert wait_until(lambda: has_lines(repeated, 3)), shop.worker.log
    assert wait_until(lambda: has_lines(given_up, 1)), shop.worker.log
    shop.works(tmp_path / "first")
    shop.works(tmp_path / "second")  # by each of the two processes, perhaps
    assert has_lines(repeated, 3)
    assert has_lines(given_up, 1)


def test_a_delay_is_celerys_countdown(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "time"
    before = time.time()
    request(
        shop.runner, lambda: background_tasks.using(delay=0.5).add_task(note_time, str(path))
    )
    assert float(wait_for(path, shop.worker)) - before >= 0.5


def test_a_time_limit_ends_an_async_task_on_the_loop(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "outlast"
    shop.send(outlast, str(path))
    assert wait_for(path, shop.worker) == "cancelled"
    assert wait_until(lambda: "SoftTimeLimitExceeded" in shop.worker.log)


def text(func: Any, *args: Any) -> str:
    registration = find(func)
    assert registration is not None
    return encode(registration, args, {})


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.check_call",
        "builtins.eval",
        "os.getcwd",
        "tests.support.celery_shop.not_registered",
        "antigravity.geohash",
    ],
)
def test_a_message_with_a_name_that_is_not_registered_is_refused_and_logged(
    shop: Shop, tmp_path: Path, name: str
) -> None:
    forged = tmp_path / "forged"
    marker = f"{uuid.uuid4()}"
    args: Any = {
        "subprocess.check_call": [["touch", str(forged)]],
        "builtins.eval": [f"open({str(forged)!r}, 'w')"],
    }.get(name, [str(forged)])
    shop.forge(name, args, task_id=marker)
    signature = inspect.signature(not_registered)
    ours = encode(Registration(name, not_registered, signature, None), [str(forged)], {})
    shop.forge(name, [ours], task_id=f"{marker}-2")
    shop.works(tmp_path / "after")
    assert wait_until(lambda: f"{marker}-2" in shop.worker.log)
    assert wait_until(lambda: f"unregistered task of type {name!r}" in shop.worker.log)
    assert not forged.exists()


BAD_BODIES: list[tuple[Any, Any]] = [
    ((), {}),
    (("path", "path"), {}),
    ((["path"],), {}),
    (({"$bytes": "AA=="},), {}),
    (('[1,[{"$import":"os"}],{}]',), {}),
    (('{"py/object":"os.system"}',), {}),
    ((), {"path": "path"}),
    (("[2,[],{}]",), {}),
]


@pytest.mark.parametrize(("args", "kwargs"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_forged_body_for_a_registered_name_fails_and_calls_nothing(
    shop: Shop, tmp_path: Path, args: Any, kwargs: Any
) -> None:
    path, marker = tmp_path / "forged", str(uuid.uuid4())
    args = json.loads(json.dumps(args).replace("path", str(path)))
    shop.forge("tests.support.celery_shop.note", args, kwargs, task_id=marker)
    shop.works(tmp_path / "after")
    failed = f"note[{marker}] raised unexpected: MessageError("
    assert wait_until(lambda: failed in shop.worker.log), shop.worker.log
    assert not path.exists()


CANVAS: list[tuple[str, Any]] = [
    ("celery.map", [{"task": "subprocess.check_call"}, [["touch", "path"]]]),
    ("celery.starmap", [{"task": "subprocess.check_call"}, [[["touch", "path"]]]]),
    ("celery.starmap", [{"task": "tests.support.celery_shop.not_registered"}, [["path"]]]),
    ("celery.map", [{"task": "tests.support.celery_shop.stand_still"}, ["path"]]),
    ("celery.chunks", [{"task": "tests.support.celery_shop.not_registered"}, [["path"]], 1]),
    ("celery.chain", [{"task": "tests.support.celery_shop.not_registered", "args": ["path"]}]),
]


@pytest.mark.parametrize(("name", "args"), CANVAS, ids=range(len(CANVAS)))
def test_celerys_own_tasks_reach_no_unregistered_function(
    shop: Shop, tmp_path: Path, name: str, args: Any
) -> None:
    path, marker = tmp_path / "forged", str(uuid.uuid4())
    args = json.loads(json.dumps(args).replace("path", str(path)))
    shop.forge(name, args, task_id=marker)
    end = "succeeded" if name == "celery.chunks" else "raised unexpected"
    assert wait_until(lambda: f"{name}[{marker}] {end}" in shop.worker.log)
    shop.works(tmp_path / "after")  # behind the messages that they have sent, too
    assert not path.exists()


def test_a_callback_in_a_message_reaches_no_unregistered_function(
    shop: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "forged"
    callback = {
        "task": "tests.support.celery_shop.not_registered",
        "args": [str(path)],
        "options": {},
    }
    marker = str(uuid.uuid4())
    called = tmp_path / "called"
    shop.forge(
        "tests.support.celery_shop.note",
        [text(note, str(called))],
        link=[callback],
        task_id=marker,
    )
    wait_for(called, shop.worker)
    shop.works(tmp_path / "after")
    assert not path.exists()


def test_a_pickled_message_is_refused(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "forged"

    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(path), "w")

    marker = str(uuid.uuid4())
    with Connection(shop.broker.url, transport_options=shop.broker.options) as connection:
        connection.Producer().publish(
            pickle.dumps([[Bomb()], {}, {}]),
            routing_key="celery",
            content_type="application/x-python-serialize",
            content_encoding="binary",
            headers={"task": "tests.support.celery_shop.note", "id": marker, "lang": "py"},
        )
    shop.works(tmp_path / "after")
    assert wait_until(lambda: "Refusing to deserialize" in shop.worker.log), shop.worker.log
    assert not path.exists()


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_celerys_pools_without_processes_keep_a_loop_too(tmp_path: Path, pool: str) -> None:
    broker, path = filesystem(tmp_path), tmp_path / "loops"
    with worker(broker, tmp_path, f"--pool={pool}", "--concurrency=2") as started:
        shop = Shop(broker, started, broker.runner())
        shop.send(note_loop, str(path))
        shop.send(note_loop, str(path))
        assert wait_until(lambda: has_lines(path, 2)), started.log
        assert len(set(text_of(path).splitlines())) == 1
        started.kill()


def test_a_task_whose_process_was_killed_in_the_middle_runs_again(
    shop: Shop, tmp_path: Path
) -> None:
    """A process of the pool is killed: the worker itself lives and still has the message."""
    path = tmp_path / "held"
    shop.send(hold, str(path))
    assert wait_until(lambda: text_of(path).startswith("begun")), shop.worker.log
    os.kill(int(text_of(path).split()[1]), signal.SIGKILL)
    assert wait_until(lambda: "done" in text_of(path), TIMEOUT), shop.worker.log
    words = [line.split()[0] for line in text_of(path).splitlines()]
    assert words == ["begun", "begun", "done"]


def test_a_task_whose_worker_was_killed_in_the_middle_runs_again(
    redis: RedisServer, tmp_path: Path
) -> None:
    """On Redis only: the filesystem transport forgets a message that a worker takes."""
    broker, path = redis.broker(1, visibility_timeout=1), tmp_path / "held"
    with worker(broker, tmp_path, "--pool=solo") as first:
        Shop(broker, first, broker.runner()).send(hold, str(path))
        assert wait_until(lambda: text_of(path).startswith("begun")), first.log
        first.kill()
    # A worker gives back messages that were held for longer than that: when the worker starts
    # and every ten seconds.
    assert wait_until(lambda: redis.seconds_held(1) > 1)
    with worker(broker, tmp_path, "--pool=solo") as second:
        assert wait_until(lambda: "done" in text_of(path), TIMEOUT), second.log
        assert [line.split()[0] for line in text_of(path).splitlines()] == [
            "begun",
            "begun",
            "done",
        ]


def test_on_redis_a_lower_priority_comes_first(redis: RedisServer, tmp_path: Path) -> None:
    broker, path = redis.fresh(), tmp_path / "lines"
    runner = broker.runner()

    def do() -> None:
        for priority in (9, 3, None):
            options = {} if priority is None else {"priority": priority}
            tasks = background_tasks.using(celery=options)
            tasks.add_task(add_line, str(path), f"{priority}")

    request(runner, do)
    with worker(broker, tmp_path, "--pool=solo") as started:
        assert wait_until(lambda: has_lines(path, 3)), started.log
        started.kill()
    assert text_of(path).split() == ["None", "3", "9"]


def test_the_status_has_the_tasks_of_pool_processes_that_have_ended(tmp_path: Path) -> None:
    broker, folder, added = filesystem(tmp_path), tmp_path / "status", list[BackgroundTask]()

    def do() -> None:
        added.append(background_tasks.add_task(note, str(tmp_path / "noted")))
        added.append(background_tasks.add_task(note, str(tmp_path / "no folder" / "noted")))

    options = ("--pool=prefork", "--concurrency=1", "--max-tasks-per-child=1")
    environ = {"SHOP_STATUS": str(folder)}
    with worker(broker, tmp_path, *options, environ=environ) as started:
        request(broker.runner(), do)
        wait_for(tmp_path / "noted", started)
        assert wait_until(lambda: "FileNotFoundError" in started.log, TIMEOUT)
    assert [status.of(task.id, folder) for task in added] == ["succeeded", "failed"]
    counts = status.snapshot(folder).counts
    assert (counts.succeeded, counts.failed, counts.lost) == (1, 1, 0)
