"""What a runner for another engine is made of: encode_call, connections, run_call."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import wait_until
from tests.support.durable import left_by_a_dead_process
from tests.support.engine_shop import (
    fail_always,
)
from tests.support.engines import TIMEOUT, request, send
from tests.support.list_runner import ListRunner, ToList
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    registered_task,
    wait,
)
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.rows import Row
from wsgi_bg.exceptions import (
    MessageError,
    OptionTypeError,
    OptionValueError,
    PublishError,
    RegistrationError,
)
from wsgi_bg.outbox import (
    RetryLater,
    correlation_id,
    encode_call,
    run_call,
)


@registered_task
def double(number: int) -> int:
    return 2 * number


@registered_task
async def double_async(number: int) -> int:
    return 2 * number


@registered_task(name="seam.weighed", engine={"weight": 1.5})
def weighed() -> None:
    pass


def text(*args: Any) -> str:
    return json.dumps([1, args, {}])


NAME = __name__
ROOT = Path(__file__).parents[2]


def test_a_runner_defines_a_connection_and_gets_batches_of_calls() -> None:
    runner = ListRunner()

    def do() -> None:
        correlation_id.set("request-3")
        background_tasks.add_task(double, 1)
        background_tasks.add_task(double_async, 2)

    request(runner, do)
    assert wait(TIMEOUT) == []
    first, second = [call for batch in runner.sent for call in batch]
    carried = {"x-correlation-id": "request-3", "x-wsgi-bg-request": "GET /"}
    assert first[:3] == (f"{NAME}.double", "[1,[1],{}]", carried)
    assert second.name == f"{NAME}.double_async"
    assert run_call(runner, *first[:3]) == 2
    assert run_call(runner, *second[:3]) == 4


def test_the_options_of_a_task_override_those_of_its_function() -> None:
    runner = ListRunner()
    send(runner, weighed)
    send(runner, weighed, using={"engine": {"weight": 2}, "retry": Retry(2), "delay": 5})
    assert wait(TIMEOUT) == []
    first, second = [call for batch in runner.sent for call in batch]
    assert (first.options, first.due) == ({"weight": 1.5}, 0.0)
    assert second.options == {"weight": 2}
    assert 0 < second.due - time.time() <= 5
    assert second.headers.keys() - first.headers.keys() == {"x-wsgi-bg-retry"}


def test_a_view_of_a_view_overrides_the_options() -> None:
    runner = ListRunner()

    def do() -> None:
        heavy = background_tasks.using(engine={"weight": 3})
        heavy.using(delay=1).add_task(double, 1)
        heavy.using(engine={}).add_task(double, 1)

    request(runner, do)
    assert wait(TIMEOUT) == []
    assert [call.options for batch in runner.sent for call in batch] == [{"weight": 3}, {}]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"wait": 3}, OptionValueError, "a dict with keys of weight; got 'wait'"),
        ({"weight": "3"}, OptionTypeError, r"engine\['weight'\] must be a number; got '3'"),
        ({"weight": float("nan")}, OptionValueError, "a finite number"),
        ("weight", OptionTypeError, "engine must be a dict"),
    ],
)
def test_a_wrong_option_for_the_engine_raises(
    options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        send(ListRunner(), double, 1, using={"engine": options})


def test_an_engine_without_options_takes_none() -> None:
    with pytest.raises(OptionValueError, match=r"engine must be .*; got 'weight'"):
        encode_call(_task(weighed))


def _task(func: Any, *args: Any) -> BackgroundTask:
    return BackgroundTasks([BackgroundTask(func, *args)]).tasks[0]


def test_options_for_a_function_that_is_not_registered_are_refused() -> None:
    assert encode_call(_task(print)) is None
    with pytest.raises(RegistrationError, match="decorate it with @registered_task"):
        send(ListRunner(), print, using={"engine": {"weight": 3}})


@pytest.mark.parametrize("runner", [InlineRunner(), PoolRunner()], ids=["inline", "pool"])
def test_runners_without_an_engine_ignore_the_options(runner: Any) -> None:
    done: list[int] = []
    send(runner, done.append, 3, using={"engine": {"any": object()}})
    assert wait(TIMEOUT) == []
    assert done == [3]


def test_a_connection_knows_refused_messages_by_their_errors() -> None:
    connection = ToList(ListRunner())
    assert connection.is_lost(ConnectionError())
    assert not connection.is_lost(ValueError())
    connection.close()


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (("os.system", text("true"), {}), "no function is registered"),
        ((3, text(), {}), "no function is registered"),
        ((f"{NAME}.double", text(), {}), "missing a required argument: 'number'"),
        ((f"{NAME}.double", "[2,[1],{}]", {}), "not wsgi_bg's"),
        ((f"{NAME}.double", None, None), "not wsgi_bg's"),
    ],
)
def test_a_forged_message_is_refused(message: Any, match: str) -> None:
    with pytest.raises(MessageError, match=match):
        run_call(ListRunner(), *message)


def test_the_retry_of_the_message_or_the_function_says_when_to_call_again(
    tmp_path: Any, log: Any
) -> None:
    path = str(tmp_path / "path")
    name = "tests.support.engine_shop.fail_always"
    with pytest.raises(RetryLater, match="again in 0 seconds") as caught:
        run_call(ListRunner(), name, text(path), {}, 8)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert caught.value.seconds == 0
    with pytest.raises(ConnectionResetError):
        run_call(ListRunner(), name, text(path), {}, 9)
    (warning,) = log.warnings
    assert "fail_always raised ConnectionResetError in attempt 8 of 9" in warning
    runner = ListRunner()
    send(runner, fail_always, path, using={"retry": Retry(2, first=7, jitter=False)})
    assert wait(TIMEOUT) == []
    call = runner.sent[0][0]
    with pytest.raises(RetryLater) as caught:
        run_call(runner, *call[:3])
    assert caught.value.seconds == 7


def test_tasks_that_a_call_adds_are_sent_by_the_runner_also_without_a_middleware(
    tmp_path: Any,
) -> None:
    runner, path = ListRunner(), tmp_path / "path"
    with pytest.raises(KeyError):
        run_call(runner, "tests.support.engine_shop.spread_and_fail", text(str(path)), {})
    ((call,),) = runner.sent
    assert call.name == "tests.support.engine_shop.look"


def test_tasks_that_an_interrupted_call_has_added_are_dropped(tmp_path: Any) -> None:
    runner = ListRunner()
    with pytest.raises(SystemExit):
        run_call(
            runner,
            "tests.support.engine_shop.spread_and_leave",
            text(str(tmp_path / "sent")),
            {},
        )
    assert wait(TIMEOUT) == []
    assert runner.sent == []


def test_a_call_fails_if_the_broker_does_not_take_the_tasks_that_it_has_added(
    tmp_path: Any,
) -> None:
    runner = ListRunner(drain_timeout=0.0)
    runner.away = True
    with pytest.raises(PublishError, match="tasks that it has added wait for the broker"):
        run_call(
            runner, "tests.support.engine_shop.spread_and_fail", text(str(tmp_path / "x")), {}
        )
    runner.away = False
    assert wait(TIMEOUT) == []
    assert len(runner.sent) == 1


@registered_task
def spread_to(folder: str, delay: float) -> list[str]:
    background_tasks.using(delay=delay).add_task(weighed)
    return files_of(folder)


@registered_task
def add_double() -> None:
    background_tasks.add_task(double, 1)


def files_of(folder: Any) -> list[str]:
    return sorted(each.name for each in Path(folder, "outbox").glob("*.sqlite"))


def test_the_folder_has_no_message_of_a_call_that_has_not_ended(tmp_path: Path) -> None:
    runner = ListRunner(outbox=tmp_path)
    assert run_call(runner, f"{NAME}.spread_to", text(str(tmp_path), 0), {}) == []
    assert [[each.name for each in batch] for batch in runner.sent] == [["seam.weighed"]]
    # A worker of RQ has a process for each call, and each process would leave a file.
    assert files_of(tmp_path) == []


def test_the_folder_keeps_messages_of_a_call_that_the_broker_does_not_take(
    tmp_path: Path,
) -> None:
    runner = ListRunner(outbox=tmp_path, drain_timeout=0.0)
    runner.away = True
    with pytest.raises(PublishError):
        run_call(runner, f"{NAME}.spread_to", text(str(tmp_path), 0), {})
    [found] = list_tasks(check_folder(tmp_path / "outbox"))
    assert found.outcome.row.name == "seam.weighed"
    runner.away = False
    assert wait(TIMEOUT) == []
    assert len(runner.sent) == 1


def test_a_call_does_not_wait_for_the_messages_of_another_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = ListRunner(drain_timeout=0.0)
    send_to_list = ToList.send

    def send_others(self: ToList, messages: Any, confirmed: Any) -> None:
        if any(each.name == f"{NAME}.double" for each in messages):
            raise ConnectionError("the engine closes the connection: the message is too big")
        send_to_list(self, messages, confirmed)

    monkeypatch.setattr(ToList, "send", send_others)
    with pytest.raises(PublishError):
        run_call(runner, f"{NAME}.add_double", text(), {})
    runner.drain_timeout = TIMEOUT
    run_call(runner, f"{NAME}.spread_to", text("", 0), {})
    assert [[each.name for each in batch] for batch in runner.sent] == [["seam.weighed"]]
    monkeypatch.undo()
    assert wait(TIMEOUT) == []


def test_a_long_delay_of_a_call_waits_in_the_folder(tmp_path: Path) -> None:
    runner = ListRunner(outbox=tmp_path)
    run_call(runner, f"{NAME}.spread_to", text(str(tmp_path), 1000), {})
    assert wait(TIMEOUT) == []
    assert runner.sent == []
    assert runner.statistics().waiting == 1
    assert "wsgi_bg-outbox-files" in {each.name for each in threading.enumerate()}


STORES_AND_DIES = """
import os, signal, sys
from tests.outbox.test_seam import *

runner = ListRunner(outbox=sys.argv[1])
run_call(runner, f"{NAME}.spread_to", text(sys.argv[1], 1000), {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_sends_a_message_with_a_long_delay_that_another_has_left(
    tmp_path: Path,
) -> None:
    process = [sys.executable, "-c", STORES_AND_DIES, str(tmp_path)]
    died = subprocess.run(process, cwd=ROOT, check=False, timeout=40)
    assert died.returncode == -signal.SIGKILL
    folder = check_folder(tmp_path / "outbox")
    [number] = folder.numbers()
    with closing(sqlite3.connect(folder.file(number))) as connection, connection:
        connection.execute("UPDATE tasks SET due = 1.0")  # the time has come
    runner = ListRunner(outbox=tmp_path)  # of the worker's next process, which has no requests
    assert run_call(runner, f"{NAME}.double", text(1), {}) == 2
    assert wait_until(lambda: runner.sent)
    assert [[each.name for each in batch] for batch in runner.sent] == [["seam.weighed"]]


def test_a_worker_leaves_the_folder_alone_if_its_engine_holds_delays(tmp_path: Path) -> None:
    left_by_a_dead_process(
        tmp_path / "outbox", Row("seam.weighed", "a call", due=time.time() + 1000)
    )
    files = files_of(tmp_path)
    runner = ListRunner(outbox=tmp_path)  # of a process that may live for this call only
    runner.holds_delays = True
    assert run_call(runner, f"{NAME}.double", text(1), {}) == 2
    assert files_of(tmp_path) == files != []


def test_a_call_on_a_worker_runs_although_the_folder_is_gone(tmp_path: Path, log: Log) -> None:
    runner = ListRunner(outbox=tmp_path)
    (tmp_path / "outbox").rmdir()
    assert run_call(runner, f"{NAME}.double", text(1), {}) == 2
    assert "cannot send the messages of other processes" in log.errors[0]
