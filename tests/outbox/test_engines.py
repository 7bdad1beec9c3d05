"""Real workers of RQ and Dramatiq call registered functions, and no others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from tests.conftest import Log
from tests.support import free_port, run_python, text_of, wait_until
from tests.support.brokers import RedisServer
from tests.support.encoding import CARRIED
from tests.support.engine_shop import (
    NAME,
    fail_always,
    fail_twice,
    look,
    look_async,
    note_call,
    note_moment,
    spread,
    spread_and_fail,
)
from tests.support.engines import RQ, TIMEOUT, Dramatiq, Engine, Worker, request, send, worker
from wsgi_bg import Retry, background_tasks, wait
from wsgi_bg._messages.codec import encode
from wsgi_bg._tasks.registry import find
from wsgi_bg.dramatiq import DramatiqRunner
from wsgi_bg.outbox import OutboxRunner, correlation_id


class Shop(NamedTuple):
    """An engine with a worker, and a runner that sends to the engine."""

    engine: Any
    worker: Worker
    runner: OutboxRunner

    def works(self, path: Path) -> None:
        """Run a task: by then the worker has taken all earlier messages."""
        send(self.runner, note_call, str(path))
        self.worker.wait_for(path)


@pytest.fixture(scope="module", params=[RQ, Dramatiq], ids=["rq", "dramatiq"])
def shop(
    request: pytest.FixtureRequest, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    engine: Engine = request.param(redis.fresh_url())
    with worker(engine, tmp_path_factory.mktemp("worker")) as started:
        yield Shop(engine, started, engine.runner())


def test_arguments_of_every_kind_come_back(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "call"
    carried = [each for each in CARRIED if each == each]
    send(shop.runner, note_call, str(path), *carried, named=carried)
    pid, args, kwargs = _evaluate(shop.worker.wait_for(path))
    assert pid != os.getpid()
    assert list(args) == carried
    assert kwargs == {"named": carried}


def _evaluate(text: str) -> Any:
    import datetime
    import zoneinfo
    from decimal import Decimal
    from math import inf
    from uuid import UUID

    names = {"datetime": datetime, "zoneinfo": zoneinfo, "Decimal": Decimal, "inf": inf}
    return eval(text, {**names, "UUID": UUID, "nan": float("nan")})


@pytest.mark.parametrize("func", [look, look_async])
def test_a_task_runs_in_a_context_of_its_own_which_is_torn_down(
    shop: Shop, tmp_path: Path, func: Any
) -> None:
    path = tmp_path / "seen"

    def do() -> None:
        correlation_id.set("request-7")
        background_tasks.add_task(func, str(path))

    request(shop.runner, do)
    request(shop.runner, lambda: background_tasks.add_task(func, str(path)))
    lines = shop.worker.wait_for_lines(path, 4)
    first, second = f"{NAME}, False, request-7", f"{NAME}, False, None"
    assert sorted(lines) == sorted([first, second, "torn down", "torn down"])


def test_a_task_with_a_delay_runs_when_it_is_due(shop: Shop, tmp_path: Path) -> None:
    path, added = tmp_path / "moment", time.time()
    send(shop.runner, note_moment, str(path), using={"delay": 1.2})
    assert float(shop.worker.wait_for(path)) >= added + 1.2


def test_a_functions_retry_calls_the_function_again(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "attempts"

    def do() -> None:
        correlation_id.set("request-8")
        background_tasks.add_task(fail_twice, str(path), "sec-ret")

    request(shop.runner, do)
    assert shop.worker.wait_for_lines(path, 3) == ["request-8 sec-ret"] * 3
    repeated = "raised KeyError in attempt 1 of 4, and is called again"
    assert wait_until(lambda: repeated in shop.worker.log)
    assert "sec-ret" not in shop.worker.log


def test_the_retry_of_a_task_wins_and_waits(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "attempts"
    retry = Retry(2, first=0.3, jitter=False, on=ConnectionError)
    send(shop.runner, fail_always, str(path), using={"retry": retry})
    shop.worker.wait_for_lines(path, 2)
    shop.works(tmp_path / "after")
    assert text_of(path).splitlines() == ["called"] * 2


def test_tasks_that_a_task_adds_run_or_are_sent_after_its_last_attempt(
    shop: Shop, tmp_path: Path
) -> None:
    path, sent = tmp_path / "path", tmp_path / "sent"

    def do() -> None:
        correlation_id.set("request-9")
        background_tasks.add_task(spread, str(path), str(sent))

    request(shop.runner, do)
    assert "request-9" in shop.worker.wait_for(sent)
    assert text_of(path).splitlines() == ["attempt", "attempt", "local"]


def test_tasks_that_a_failed_task_has_added_run(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "path"
    send(shop.runner, spread_and_fail, str(path))
    assert shop.worker.wait_for_lines(path, 2) == [f"{NAME}, False, None", "torn down"]


def test_the_id_of_a_task_is_the_engines(shop: Shop, redis: RedisServer) -> None:
    engine = type(shop.engine)(redis.fresh_url())
    runner = engine.runner()
    plain = send(runner, look, "nowhere")
    assert wait(TIMEOUT) == []
    assert engine.ids() == [plain.id]


def test_a_function_that_is_not_registered_runs_in_this_process(shop: Shop) -> None:
    pids: list[int] = []
    send(shop.runner, lambda: pids.append(os.getpid()))
    assert wait(TIMEOUT) == []
    assert pids == [os.getpid()]


def text_for(func: Any, *args: Any) -> str:
    registration = find(func)
    assert registration is not None
    return encode(registration, args, {})


@pytest.mark.parametrize(
    "name",
    [
        "tests.support.engine_shop.not_registered",
        "os.system",
        "",
        "tests.support.engine_shop",
        "builtins.eval",
    ],
)
def test_a_forged_name_runs_nothing(shop: Shop, tmp_path: Path, name: str) -> None:
    path = tmp_path / "forged"
    id_ = shop.engine.forge(name, text_for(look, str(path)), {})
    _assert_refused(shop, id_)
    shop.works(tmp_path / "after")
    assert not path.exists()


@pytest.mark.parametrize(
    "message",
    [
        ("[1,[],{}]", {}),  # the function does not take the arguments
        ("not encoded", {}),
        (["text"], None),
        ([], {}),
        (None, 3),
    ],
)
def test_forged_arguments_run_nothing(shop: Shop, tmp_path: Path, message: Any) -> None:
    id_ = shop.engine.forge("tests.support.engine_shop.look", *message)
    _assert_refused(shop, id_)
    if message[0] == "[1,[],{}]":
        assert wait_until(lambda: "the function does not take" in shop.worker.log)


def test_forged_headers_are_ignored(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "seen"
    headers = {"x-correlation-id": 3, "x-wsgi-bg-retry": '{"on": 3}'}
    shop.engine.forge("tests.support.engine_shop.look", text_for(look, str(path)), headers)
    assert shop.worker.wait_for_lines(path, 2) == [f"{NAME}, False, None", "torn down"]


def _assert_refused(shop: Shop, id_: str) -> None:
    if isinstance(shop.engine, RQ):
        job = shop.engine.job(id_)
        assert wait_until(lambda: job.get_status() == "failed", TIMEOUT), shop.worker.log
        assert wait_until(lambda: "MessageError" in shop.worker.log)
    else:
        assert wait_until(lambda: id_ in shop.engine.dead(), TIMEOUT), shop.worker.log


@pytest.mark.parametrize("kind", [RQ, Dramatiq], ids=["rq", "dramatiq"])
def test_tasks_that_are_added_while_redis_is_away_are_sent_when_it_is_back(
    tmp_path: Path, kind: type[Engine]
) -> None:
    server = RedisServer(tmp_path)
    try:
        engine = kind(server.fresh_url())
        runner = engine.runner()
        with server.away():
            ids = {send(runner, look, "nowhere").id for _ in range(5)}
            assert runner.statistics().sent == 0
        assert wait(TIMEOUT) == []
        assert set(engine.ids()) == ids
    finally:
        server.stop()


@pytest.mark.parametrize("kind", ["rq", "dramatiq", "rabbitmq"])
def test_a_task_that_no_broker_has_seen_has_not_been_sent(kind: str, log: Log) -> None:
    address = f"127.0.0.1:{free_port()}"
    limits: dict[str, Any] = {"when_unsent": "discard", "publish_timeout": 0.1}
    if kind == "rabbitmq":
        rabbit = RabbitmqBroker(url=f"amqp://{address}", confirm_delivery=True)
        runner: OutboxRunner = DramatiqRunner(rabbit, **limits)
    else:
        engine = {"rq": RQ, "dramatiq": Dramatiq}[kind]
        runner = engine(f"redis://{address}").runner(**limits)
    send(runner, note_call, "")
    assert wait(TIMEOUT) == []
    [error] = log.tracebacks
    assert str(error).endswith("was not sent: the broker has not answered in time")


@pytest.mark.parametrize("kind", [RQ, Dramatiq], ids=["rq", "dramatiq"])
def test_a_folder_keeps_the_messages_of_a_process_that_has_died(
    redis: RedisServer, tmp_path: Path, kind: type[Engine]
) -> None:
    engine, folder = kind(redis.fresh_url()), tmp_path / "outbox"
    done = run_python(
        f"""
        import os
        from tests.support.engines import {kind.__name__}, send
        from tests.support.engine_shop import look
        runner = {kind.__name__}("redis://127.0.0.1:1/0").runner(outbox={str(folder)!r})
        print(send(runner, look, "nowhere", using={{"delay": 3600}}).id, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    id_ = done.stdout.strip()
    assert id_, done.stderr
    runner = engine.runner(outbox=folder)
    request(runner, lambda: None)
    scheduled: Any = _scheduled(engine)
    assert wait_until(lambda: scheduled() == [id_], TIMEOUT)


def _scheduled(engine: Engine) -> Any:
    if isinstance(engine, Dramatiq):
        return engine.ids
    from tests.support.engine_shop import make_queue

    return make_queue(engine.url).scheduled_job_registry.get_job_ids


@pytest.mark.parametrize(
    ("package", "name"), [("rq", "RQRunner"), ("dramatiq", "DramatiqRunner")]
)
def test_without_the_engine_the_error_names_the_package_to_install(
    package: str, name: str
) -> None:
    done = run_python(
        f"""
        import sys
        sys.modules[{package!r}] = None
        try: from wsgi_bg.{package} import {name}
        except ImportError as exc: print(exc)
        """
    )
    wanted = f"pip install 'wsgi_bg[{package}]'"
    assert done.stdout == (
        f"wsgi_bg.{package} needs a package that is not installed: {wanted}\n"
    ), done.stderr
