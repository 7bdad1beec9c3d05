"""Durable tasks on the page: details that are asked for, and orders to the owner."""

from __future__ import annotations

import http.client
import inspect
import itertools
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import Log
from tests.monitor.support import Answer, open_monitor, post, token_of
from tests.support import TIMEOUT, wait_until
from tests.support.command import running
from tests.support.durable import Shop, at_gate, forge, id_of, leave_failed
from wsgi_bg._messages.codec import encode
from wsgi_bg._store import folder as folders
from wsgi_bg._tasks.registry import Registration
from wsgi_bg.monitor import durable


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_failed_task_is_run_again_by_its_process(
    shop: Shop, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    with at_gate(shop, "while True: sys.stdin.readline()"):
        monitor = open_monitor(actions=True, path=shop.folder)
        task = id_of(shop, "durable.fail")
        answer = post(monitor, f"/retry?id={task}")
        assert (answer.code, answer.json) == (202, {"ordered": "retry"})
        assert wait_until(lambda: "failed" not in shop.states)
    message = "the monitor ordered to retry durable task durable.fail"
    assert message in log.at(20)
    [record] = [each for each in caplog.records if each.getMessage() == message]
    assert vars(record)["wsgi_bg_id"] == task


def test_a_waiting_task_is_discarded_and_never_runs(shop: Shop) -> None:
    with at_gate(shop) as process:
        monitor = open_monitor(actions=True, path=shop.folder)
        answer = post(monitor, f"/discard?id={id_of(shop, 'durable.write')}")
        assert (answer.code, answer.json) == (202, {"ordered": "discard"})
        assert wait_until(lambda: not any(shop.folder.glob("*.order")))
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert wait_until(lambda: shop.calls == ["3.1", "3.2"]), shop.calls


def test_an_order_that_the_state_forbids_is_refused(shop: Shop) -> None:
    with at_gate(shop):
        monitor = open_monitor(actions=True, path=shop.folder)
        answer = post(monitor, f"/discard?id={id_of(shop, 'durable.wait_for_line')}")
        assert (answer.code, answer.json) == (
            409,
            {"error": "The task is running now: too late to discard."},
        )
        answer = post(monitor, "/retry?id=unknown")
        assert (answer.code, answer.json) == (404, {"error": "The task is not there any more."})
        assert not any(shop.folder.glob("*.order"))


def test_an_order_that_cannot_be_written_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_failed(shop, 1)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    monitor = open_monitor(actions=True, path=shop.folder)
    answer = post(monitor, f"/retry?id={id_of(shop, 'durable.fail')}")
    assert (answer.code, answer.json["error"][-4:]) == (409, "full")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    monitor = open_monitor(actions=True, path=tmp_path / "none")
    answers = [
        post(monitor, "/retry?id=1"),
        Answer(monitor, "/task.json?id=1"),
        Answer(monitor, "/overview.json"),
        Answer(monitor, "/error.json?key=1"),
    ]
    for answer in answers:
        error = "No process has written its status into the folder yet."
        assert (answer.code, answer.json) == (503, {"error": error})
    assert not any(tmp_path.iterdir())


def test_a_forked_process_leaves_the_files_that_its_parent_has_open(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_failed(shop, 1)
    monitor = open_monitor(actions=True, path=shop.folder)
    (path,) = shop.folder.glob("*.sqlite")
    status = path.stat()
    monkeypatch.setitem(folders._opened, (status.st_dev, status.st_ino), os.getpid() + 1)
    answer = post(monitor, "/retry?id=1")
    assert answer.code == 503
    assert "wsgi-bg tasks" in answer.json["error"]


def test_a_forked_process_orders_tasks_in_files_that_its_parent_has_not_opened(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_failed(shop, 1)
    monitor = open_monitor(actions=True, path=shop.folder)
    task = id_of(shop, "durable.fail")
    parents = shop.folder / "00000099.sqlite"
    parents.touch()
    status = parents.stat()
    monkeypatch.setitem(folders._opened, (status.st_dev, status.st_ino), os.getpid() + 1)
    assert post(monitor, f"/retry?id={task}").code == 202


def test_a_discarded_task_has_no_details(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_failed(shop, 1)
    monkeypatch.setattr(durable, "state_of", lambda folder, task: "discarded")
    answer = Answer(open_monitor(path=shop.folder), "/task.json?id=1")
    assert (answer.code, answer.json["error"]) == (404, "The task is not there any more.")


def test_a_task_whose_end_is_being_written_may_be_asked_for_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_failed(shop, 1)
    monkeypatch.setattr(durable, "state_of", lambda folder, task: "failed")
    answer = Answer(open_monitor(path=shop.folder), "/task.json?id=1")
    assert (answer.code, answer.json["error"]) == (503, "The task is being written: try again.")


def test_a_request_waits_not_long_for_another_that_reads(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_failed(shop, 1)
    monkeypatch.setattr(durable, "_TIMEOUT", 0.01)
    turn = durable._turns.get().take(TIMEOUT)
    assert turn is not None
    with turn:
        answer = Answer(open_monitor(path=shop.folder), "/task.json?id=1")
    assert (answer.code, answer.json) == (503, {"error": "The folder is busy: try again."})


def test_arguments_and_traceback_are_shown_if_the_options_say_so(shop: Shop) -> None:
    leave_failed(shop, 4711)
    task = id_of(shop, "durable.fail")
    for has_arguments, has_traceback in itertools.product([True, False], repeat=2):
        monitor = open_monitor(
            show_arguments=has_arguments, show_errors=has_traceback, path=shop.folder
        )
        found = Answer(monitor, f"/task.json?id={task}").json
        assert found.get("arguments") == (["4711"] if has_arguments else None)
        assert ("ValueError: secret 4711" in found.get("traceback", "")) is has_traceback


def test_arguments_that_are_forged_or_gone_are_shown_as_such(shop: Shop) -> None:
    leave_failed(shop, 1)
    for task, arguments in (("forged", "[1"), ("gone", "")):
        row = ("f", arguments, "", "", 0.0, 1, 0, task, 5.0, 8, 8)
        forge(shop, "kept", *row, "failed", 1.0, 1.0, "", "")
    monitor = open_monitor(show_arguments=True, path=shop.folder)
    shown = [Answer(monitor, f"/task.json?id={task}").json for task in ("forged", "gone")]
    assert [each["arguments"] for each in shown] == [["stored as: [1"], None]


def test_long_arguments_are_cut() -> None:
    def called(*args: object, key: int) -> None:
        pass

    registration = Registration("name", called, inspect.signature(called), None)
    text = encode(registration, ("x" * 10_000, *range(500)), {"key": 5})
    shown = durable._arguments(text)
    assert shown is not None
    assert (len(shown), len(shown[0]), shown[1]) == (100, 2_000, "0")


SERVER = """
import sys
from waitress.server import create_server
from wsgi_bg.monitor import Monitor

app = Monitor(allowed=lambda environ: True, actions=True, path=sys.argv[1])
server = create_server(app, host="127.0.0.1", port=0)
print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
server.run()
"""


def test_each_worker_accepts_the_token_of_another_worker(shop: Shop, tmp_path: Path) -> None:
    leave_failed(shop, 1, 2)
    command = [sys.executable, "-c", SERVER, str(shop.folder)]
    with running(command, tmp_path) as first, running(command, tmp_path) as second:
        page = first.ask("/")
        token = token_of(page.read())
        cookie = str(page.headers["Set-Cookie"]).partition(";")[0]
        for worker in (first, second):
            connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=TIMEOUT)
            sent = {"Cookie": cookie, "X-WSGI-BG-Token": token}
            connection.request("POST", "/retry?id=unknown", headers=sent)
            answer = connection.getresponse()
            assert (answer.status, answer.read()[:9]) == (404, b'{"error":')
            connection.request("POST", "/retry?id=unknown", headers={"Cookie": cookie})
            assert connection.getresponse().status == 403
            connection.close()
