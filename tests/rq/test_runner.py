"""``RQRunner``: what its jobs look like, and what RQ does with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import SpawnWorker

from tests.conftest import Log
from tests.support import app_that, text_of, wait_until
from tests.support.brokers import RedisServer
from tests.support.engine_shop import (
    SpawningWorker,
    block,
    fail_always,
    look,
    make_queue,
    note_call,
    note_slowly,
    spread_and_fail,
    spread_and_leave,
)
from tests.support.engines import RQ, TIMEOUT, Worker, request, send, worker
from wsgi_bg import (
    BackgroundTasksMiddleware,
    Retry,
    background_tasks,
    registered_task,
    status,
    wait,
)
from wsgi_bg.exceptions import MessageError, OptionTypeError, OptionValueError, PublishError
from wsgi_bg.rq import RQRunner
from wsgi_bg.rq import worker as rq_worker

HERE = Redis.from_url("redis://127.0.0.1:1")
"""A Redis that is never asked."""


@pytest.fixture
def engine(redis: RedisServer) -> RQ:
    return RQ(redis.fresh_url())


@pytest.fixture(scope="module")
def rq_and_worker(
    redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RQ, Worker]]:
    engine = RQ(redis.fresh_url())
    with worker(engine, tmp_path_factory.mktemp("worker")) as started:
        yield engine, started


def test_a_queue_with_pickle_is_refused() -> None:
    with pytest.raises(OptionValueError, match=r"serializer=JSONSerializer\): pickle can run"):
        RQRunner(Queue("shop", connection=HERE))


@pytest.mark.parametrize("serializer", [JSONSerializer, JSONSerializer(), "json"])
def test_json_is_accepted_however_it_is_given(serializer: Any) -> None:
    runner = RQRunner(Queue("shop", connection=HERE, serializer=serializer), local="inline")
    assert repr(runner) == "RQRunner('shop', local=InlineRunner())"


def test_another_object_is_no_queue() -> None:
    queue: Any = "shop"
    with pytest.raises(OptionTypeError, match=r"queue must be an rq\.Queue; got 'shop'"):
        RQRunner(queue)


def test_the_module_has_no_other_names() -> None:
    import wsgi_bg.rq

    with pytest.raises(AttributeError, match="has no attribute 'Runner'"):
        getattr(wsgi_bg.rq, "Runner")  # noqa: B009


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"quue": "x"}, OptionValueError, "at_front, failure_ttl, job_timeout.*; got 'quue'"),
        ({"ttl": "1"}, OptionTypeError, r"engine\['ttl'\] must be a whole number of seconds"),
        ({"ttl": True}, OptionTypeError, "whole number"),
        ({"at_front": 1}, OptionTypeError, "True or False"),
        ({"ttl": 10**30}, OptionValueError, "a finite number, 1e15 at most"),
        ({"ttl": 0}, OptionValueError, r"engine\['ttl'\] must be .*, 1 or more; got 0"),
        ({"ttl": -1}, OptionValueError, "1 or more"),
        ({"job_timeout": 0}, OptionValueError, "-1 for no limit"),
        ({"job_timeout": -2}, OptionValueError, "-1 for no limit"),
        ({"result_ttl": -2}, OptionValueError, "seconds, or -1"),
        ({"failure_ttl": -2}, OptionValueError, "seconds, or -1"),
        ({"max_crashes": -1}, OptionValueError, "0 or more"),
    ],
)
def test_a_wrong_option_raises_in_add_task(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        send(RQRunner(make_queue("redis://127.0.0.1:1")), look, "", using={"engine": options})


def test_an_option_of_another_engine_at_a_function_raises_in_add_task() -> None:
    with pytest.raises(OptionValueError, match="'queue_name'"):
        send(RQRunner(make_queue("redis://127.0.0.1:1")), note_slowly, "")


def test_options_reach_the_job(engine: RQ) -> None:
    runner = engine.runner()
    options = {"job_timeout": 7, "ttl": 70, "result_ttl": 71, "failure_ttl": 72}
    first = send(runner, look, "")
    assert wait(TIMEOUT) == []
    task = send(runner, look, "", using={"engine": {**options, "at_front": True}})
    crashes = send(runner, look, "", using={"engine": {"queue": "slow", "max_crashes": 2}})
    delayed = send(
        runner, look, "", using={"delay": 600, "engine": {"queue": "slow", "ttl": 900}}
    )
    assert wait(TIMEOUT) == []
    assert engine.ids() == [task.id, first.id]
    job = engine.job(task.id)
    assert (job.timeout, job.ttl, job.result_ttl, job.failure_ttl) == (7, 70, 71, 72)
    assert job.retries_left is None
    slow = Queue("slow", connection=job.connection, serializer=JSONSerializer)
    assert slow.job_ids == [crashes.id]
    assert slow.scheduled_job_registry.get_job_ids() == [delayed.id]
    job = engine.job(crashes.id)
    assert (job.retries_left, job.origin) == (2, "slow")
    assert engine.job(delayed.id).origin == "slow"


def test_the_scheduler_puts_a_job_with_a_delay_at_the_front_if_asked_for(engine: RQ) -> None:
    using = {"delay": 600, "engine": {"at_front": True}}
    task = send(engine.runner(), look, "", using=using)
    assert engine.job(task.id).should_enqueue_at_front()


def test_the_default_timeout_of_the_queue_holds(engine: RQ) -> None:
    queue = make_queue(engine.url)
    queue = Queue("shop", queue.connection, default_timeout=33, serializer=JSONSerializer)
    task = send(RQRunner(queue), look, "")
    assert wait(TIMEOUT) == []
    assert engine.job(task.id).timeout == 33


def test_neither_the_description_nor_the_result_shows_data(
    rq_and_worker: tuple[RQ, Worker], tmp_path: Path
) -> None:
    engine, started = rq_and_worker
    task = send(engine.runner(), note_call, str(tmp_path / "call"), "sec-ret")
    job = engine.job(task.id)
    assert wait_until(lambda: job.get_status() == "finished", TIMEOUT), started.log
    assert job.description == "tests.support.engine_shop.note_call"
    assert job.return_value() is None
    assert "sec-ret" not in started.log


def test_a_time_limit_is_no_crash(rq_and_worker: tuple[RQ, Worker], tmp_path: Path) -> None:
    engine, started = rq_and_worker
    path = tmp_path / "path"
    options = {"job_timeout": 1, "max_crashes": 3}
    task = send(engine.runner(), block, str(path), using={"engine": options})
    job = engine.job(task.id)
    assert wait_until(lambda: job.get_status() == "failed", TIMEOUT), started.log
    assert len(text_of(path).splitlines()) == 1


def test_a_task_that_ends_its_process_drops_the_tasks_that_it_has_added(
    rq_and_worker: tuple[RQ, Worker], tmp_path: Path
) -> None:
    engine, started = rq_and_worker
    task = send(engine.runner(), spread_and_leave, str(tmp_path / "sent"))
    job = engine.job(task.id)
    assert wait_until(lambda: job.get_status() == "failed", TIMEOUT), started.log
    send(engine.runner(), note_call, str(tmp_path / "after"))
    started.wait_for(tmp_path / "after")
    assert not (tmp_path / "sent").exists()


def test_a_job_whose_process_was_killed_begins_again(
    rq_and_worker: tuple[RQ, Worker], tmp_path: Path
) -> None:
    engine, started = rq_and_worker
    path, other = tmp_path / "path", tmp_path / "other"
    runner = engine.runner()
    send(runner, block, str(path), using={"engine": {"max_crashes": 1}})
    os.kill(int(started.wait_for_lines(path, 1)[0]), signal.SIGKILL)
    assert started.wait_for_lines(path, 3)[2] == "done"
    task = send(runner, block, str(other))
    os.kill(int(started.wait_for_lines(other, 1)[0]), signal.SIGKILL)
    job = engine.job(task.id)
    assert wait_until(lambda: job.get_status() == "failed", TIMEOUT)


@pytest.mark.parametrize("kind", ["Worker", "SimpleWorker"])
def test_the_status_has_all_jobs_of_a_worker_that_has_ended(
    engine: RQ, tmp_path: Path, kind: str
) -> None:
    runner, folder = engine.runner(), tmp_path / "status"
    path, retry = str(tmp_path / "path"), Retry(2, first=0, jitter=False)
    tasks = [
        send(runner, note_call, path),
        send(runner, fail_always, path, using={"retry": retry}),
        send(runner, spread_and_fail, path),
    ]
    assert wait(TIMEOUT) == []
    shop = json.dumps([engine.name, engine.url, {}])
    command = [each for each in engine.command() if each != "--with-scheduler"]  # ends at once
    subprocess.run(
        [*command, "--burst", "--worker-class", f"rq.worker.{kind}"],
        env={**os.environ, "ENGINE_SHOP": shop, "ENGINE_STATUS": str(folder)},
        timeout=2 * TIMEOUT,
        check=True,
    )
    states = [status.of(task.id, folder) for task in tasks]
    assert states == ["succeeded", "failed", "failed"]
    counts = status.snapshot(folder).counts
    ended = counts.succeeded, counts.failed, counts.retried, counts.lost
    assert ended == (2, 2, 1, 0)  # with the task that spread_and_fail() adds


def test_the_job_of_a_work_horse_that_was_killed_shows_as_lost(
    engine: RQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "status", tmp_path / "path"
    monkeypatch.setenv("ENGINE_STATUS", str(folder))
    with worker(engine, tmp_path) as started:
        task = send(engine.runner(), block, str(path))
        pid = int(started.wait_for_lines(path, 1)[0])
        assert wait_until(lambda: list(folder.glob("*.status")), TIMEOUT)
        assert wait_until(lambda: status.of(task.id, folder) == "running", TIMEOUT)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: status.of(task.id, folder) == "lost", TIMEOUT)


@pytest.mark.parametrize(("kind", "calls"), [(SpawnWorker, False), (SpawningWorker, True)])
def test_a_spawned_work_horse_needs_a_class_of_the_module_that_makes_the_runner(
    engine: RQ, tmp_path: Path, kind: type, *, calls: bool
) -> None:
    out = tmp_path / "out"
    send(engine.runner(), note_call, str(out))
    assert wait(TIMEOUT) == []
    done = subprocess.run(
        [*engine.command(), "--burst", "-w", f"{kind.__module__}.{kind.__qualname__}"],
        env={**os.environ, "ENGINE_SHOP": json.dumps(["rq", engine.url, {}])},
        stderr=subprocess.PIPE,
        check=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert out.exists() is calls, done.stderr
    assert ("-w MODULE.CLASS" in done.stderr) is not calls


def test_the_entry_function_is_for_jobs() -> None:
    with pytest.raises(MessageError, match=r"no RQRunner is in this worker"):
        rq_worker.run("tests.support.engine_shop.look", "[1,[],{}]", {})


def test_a_job_that_rq_refuses_is_given_up_alone(engine: RQ) -> None:
    class Refusing(Queue):
        def create_job(self, *args: Any, **kwargs: Any) -> Job:
            if "ttl" in kwargs:
                raise ValueError
            return super().create_job(*args, **kwargs)

    errors: list[BaseException] = []
    queue = make_queue(engine.url)
    runner = RQRunner(Refusing(queue.name, queue.connection, serializer=JSONSerializer))

    def note(task: object, exc: BaseException) -> None:
        errors.append(exc)

    refused = {"engine": {"ttl": 1}, "on_error": note}
    send(runner, look, "", using=refused)
    good = send(runner, look, "")
    assert wait(TIMEOUT) == []
    assert engine.ids() == [good.id]
    assert [type(each) for each in errors] == [PublishError]


def test_a_queue_whose_key_is_no_list_holds_up_no_other(engine: RQ) -> None:
    queue = make_queue(engine.url)
    queue.connection.set("rq:queue:taken", "by another program")
    runner, errors = engine.runner(), list[BaseException]()
    refused = {
        "engine": {"queue": "taken"},
        "on_error": lambda task, exc: errors.append(exc),
    }
    send(runner, look, "", using=refused)
    good = send(runner, look, "")
    assert wait(TIMEOUT) == []
    # Twice if both were in a transaction: Redis carries out its other commands all the same.
    assert set(engine.ids()) == {good.id}
    assert [type(each) for each in errors] == [PublishError]


def test_a_job_with_a_delay_holds_up_no_other(engine: RQ, log: Log) -> None:
    runner = engine.runner()

    def do() -> None:
        background_tasks.using(delay=60).add_task(look, "")
        background_tasks.add_task(look, "")

    request(runner, do)
    assert wait(TIMEOUT) == []
    assert runner.statistics().sent == 2
    assert log.warnings == []


@pytest.mark.parametrize(
    "row",
    [
        "[]",
        '["tests.support.engine_shop.look", "", {}, {}, "id"]',
        '["other", "", {}, {}, "id", 0.0]',
        '["tests.support.engine_shop.look", 3, {}, {}, "id", 0.0]',
        '["tests.support.engine_shop.look", "", {}, {}, "id", 1e18]',
        '["tests.support.engine_shop.look", "", {}, {}, "id", NaN]',
        '["tests.support.engine_shop.look", "", {}, {"ttl": "x"}, "id", 0.0]',
    ],
)
def test_a_forged_row_of_the_outbox_is_no_message(engine: RQ, row: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        engine.runner().load("tests.support.engine_shop.look", row)


def test_engine_options_are_a_dict() -> None:
    options: Any = "slow"
    with pytest.raises(OptionTypeError, match="engine must be a dict of options"):
        registered_task(engine=options)


def test_queues_of_the_same_server_may_share_a_folder(tmp_path: Path) -> None:
    """An application factory makes a client of Redis with each call."""

    wrapped: list[Any] = []

    def wrap(url: str, name: str = "shop") -> None:
        queue = Queue(name, connection=Redis.from_url(url), serializer=JSONSerializer)
        runner = RQRunner(queue, outbox=tmp_path / "tasks")
        wrapped.append(BackgroundTasksMiddleware(app_that(print), runner=runner))

    before = dict(rq_worker.runners)
    for url in ("redis://localhost", "redis://localhost:6379/0?socket_timeout=5"):
        wrap(url)
    for url, name in (
        ("redis://localhost/1", "shop"),
        ("redis://localhost:1", "shop"),
        ("unix:///redis.sock", "shop"),
        ("redis://localhost", "other"),
    ):
        with pytest.raises(OptionValueError, match="outbox must be another folder"):
            wrap(url, name)
    rq_worker.runners.clear()
    rq_worker.runners.update(before)
