"""Tasks and messages in files: any process knows their states at once."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.durable.support import dead_store
from tests.status.support import nothing, process, visit
from tests.support import TIMEOUT, app_that, wait_until
from tests.support.durable_shop import gate, wait_at, write
from wsgi_bg import (
    BackgroundTasksMiddleware,
    DurableRunner,
    background_tasks,
    status,
    wait,
)
from wsgi_bg._messages.codec import encode
from wsgi_bg._status import stored
from wsgi_bg._status.recorder import recorder
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks, order
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg._tasks.registry import find
from wsgi_bg.outbox import Connection, OutboxRunner, run_call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tasks"


def store_of(folder: Path, *rows: Row) -> Store:
    """A store of this process with these rows."""
    store = Store.own(check_folder(folder), Settings())
    store.add(list(rows))
    return store


def add(runner: Any, function: Any, *args: Any, delay: float = 0.0, **options: Any) -> str:
    """Handle a request that adds a task; return the id of the task."""
    ids: list[str] = []

    def view() -> None:
        ids.append(background_tasks.using(delay=delay).add_task(function, *args).id)

    visit(view, runner=runner, **options)
    return ids[0]


def test_another_process_knows_the_states_of_durable_tasks_at_once(folder: Path) -> None:
    code = """
        from tests.support.durable_shop import fail, hang, write
        runner = DurableRunner(PATH, keep_done=(5, 60.0))
        ids = []
        def view():
            add = background_tasks.add_task
            ids.extend([add(write, 1).id, add(fail, 2).id, add(hang, 3).id, add(write, 4).id])
        visit(view, status_path=PATH, runner=runner)
        input()
        say(" ".join(ids))
        input()
        """
    with process(code, folder) as other:
        assert other.line() == "hangs"
        other.tell()
        ids = other.line().split()
        states = [status.of(id, folder) for id in ids]  # noqa: A001
        assert states == ["succeeded", "failed", "running", "waiting"]
        assert wait_until(lambda: len(status.snapshot(folder).running) == 1)
        snapshot = status.snapshot(folder)
        assert {task.id: task.state for task in snapshot.durable} == dict(
            zip(ids, states, strict=True)
        )
        assert {task.pid for task in snapshot.durable} == {other.pid}

        def errors() -> list[str]:
            return [task.error for task in status.snapshot(folder).durable if task.error]

        assert wait_until(lambda: errors() == ["ValueError"])  # the row is written later
        assert snapshot.waiting == {"durable.write": 1}
        other.kill()
    snapshot = status.snapshot(folder)
    assert snapshot.lost == ()
    assert [status.of(id, folder) for id in ids[2:]] == ["waiting", "waiting"]  # noqa: A001
    assert snapshot.waiting == {"durable.hang": 1, "durable.write": 1}


def test_the_recorder_finds_the_folder_of_the_runner(folder: Path) -> None:
    runner = DurableRunner(folder, keep_done=(7, 8.0))
    name = add(runner, wait_at, "recorder", status=True)
    assert wait_until(lambda: status.of(name) == "running")
    later = add(runner, write, 1, delay=600.0)
    assert status.of(later) == "waiting"
    snapshot = status.snapshot()
    assert [task.id for task in snapshot.durable] == [later, name]
    assert [task.pid for task in snapshot.durable] == [os.getpid()] * 2
    assert snapshot.durable[0].due is not None
    assert snapshot.durable[1].due is None
    assert recorder.process().journal.keep_done == (7, 8.0)
    ids: list[str] = []

    def view() -> None:
        ids.extend(background_tasks.add_task(each, "second").id for each in (wait_at, write))

    visit(view, runner=runner)
    assert wait_until(lambda: status.of(ids[0]) == "running")
    assert status.snapshot().waiting == {"durable.write": 2}
    gate("second").set()
    gate("recorder").set()
    assert wait(TIMEOUT) == []
    assert status.of(name) == "succeeded"


@pytest.mark.parametrize("keep_done", [(5, 0.0), (0, 60.0)], ids=["age", "number"])
def test_an_ended_id_is_kept_as_the_durable_runner_says_without_a_folder_of_the_status(
    folder: Path, keep_done: tuple[int, float]
) -> None:
    ids: list[str] = []

    def view() -> None:
        ids.append(background_tasks.add_task(nothing).id)

    visit(view, runner=DurableRunner(folder, keep_done=keep_done))
    assert wait(TIMEOUT) == []
    assert status.of(ids[0]) is None


def test_a_durable_task_that_waits_for_its_next_attempt_is_retrying(folder: Path) -> None:
    store = store_of(folder, Row("a", "", id="1", due=9e9, attempts=2))
    assert stored.state_of(check_folder(folder), "1") == "retrying"
    (task,) = stored.newest(check_folder(folder), {store.number: 7})
    assert (task.attempt, task.due, task.pid) == (3, 9e9, 7)


def test_a_task_that_is_discarded_in_the_file_is_known_as_discarded(folder: Path) -> None:
    runner = DurableRunner(folder)
    gc.disable()
    try:
        name = add(runner, write, 1, delay=600.0, status=True)
        assert wait_until(lambda: runner.statistics().waiting == 1)
        assert status.of(name) == "waiting"
        (found,) = list_tasks(check_folder(folder))
        order(check_folder(folder), found, "discard")
        assert wait_until(lambda: status.of(name) == "discarded")
        assert [each.state for each in status.snapshot().durable] == ["discarded"]
    finally:
        gc.enable()


def test_a_task_that_was_put_aside_is_aside(folder: Path) -> None:
    store = store_of(folder)
    rows: list[Row] = []
    store.add([Row("a", "", id="1")], rows)
    (row,) = rows
    assert store.begin(row)
    store.end(Outcome(row, "aside", ended=time.time()))
    found = check_folder(folder)
    assert stored.state_of(found, "1") == "aside"  # the end is only noted
    assert stored.numbers(found).waiting == {}
    store.tidy()
    assert stored.state_of(found, "1") == "aside"
    assert stored.numbers(found).aside == {"a": 1}
    counts = status.snapshot(folder).counts
    assert (counts.aside, counts.waiting) == (1, 0)


def test_a_durable_task_that_its_request_takes_back_is_discarded_at_once(folder: Path) -> None:
    store = store_of(folder)
    store.take_back(store.add([Row("a", "", id="1")]))
    found = check_folder(folder)
    assert stored.state_of(found, "1") == "discarded"  # the end is only noted
    assert stored.numbers(found).waiting == {}
    store.tidy()
    assert stored.state_of(found, "1") is None


def test_an_unknown_id_is_in_no_file(folder: Path) -> None:
    store_of(folder, Row("a", "", id="1"))
    assert stored.state_of(check_folder(folder), "2") is None


def test_only_some_rows_are_counted_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_COUNTED", 2)
    store_of(folder, *(Row("a", "", id=str(number)) for number in range(5)))
    assert stored.numbers(check_folder(folder)).waiting == {"a": 2, "(other names)": 3}


def test_a_damaged_file_is_passed_over(folder: Path) -> None:
    store_of(folder, Row("a", "", id="1"))
    found = check_folder(folder)
    Path(found.file(99)).write_bytes(b"x" * 5000)
    Path(found.file(98)).write_bytes(b"")  # its process has died at once
    with closing(sqlite3.connect(found.file(97))) as connection:
        connection.executescript(
            "PRAGMA user_version=1; CREATE TABLE meta (epoch); INSERT INTO meta VALUES ('x')"
        )
    assert stored.state_of(found, "1") == "waiting"
    assert stored.numbers(found).waiting == {"a": 1}
    assert [task.id for task in stored.newest(found, {})] == ["1"]


def test_rows_with_wrong_types_are_shown_without_them(folder: Path) -> None:
    store = store_of(folder, Row("a", "", id="1"))
    store._writer.execute([("UPDATE tasks SET name = x'00ff', attempts = 'many'", ())])
    (task,) = stored.newest(check_folder(folder), {})
    assert (task.name, task.attempt) == ("", 1)


def test_a_file_that_the_parent_has_opened_is_not_read_in_a_fork(folder: Path) -> None:
    code = """
        from wsgi_bg._store.folder import check_folder
        from wsgi_bg._store.rows import Row, Settings
        from wsgi_bg._store.store import Store
        from wsgi_bg._status import stored
        store = Store.own(check_folder(PATH), Settings())
        store.add([Row("a", "", id="1")])
        if os.fork() == 0:
            say(str(stored.state_of(check_folder(PATH), "1")))
            os._exit(0)
        os.wait()
        say(str(stored.state_of(check_folder(PATH), "1")))
        """
    with process(code, folder) as other:
        assert [other.line(), other.line()] == ["None", "waiting"]


class Broker(Connection):
    """Confirms all messages, or none."""

    is_away = False
    refuses = False

    def send(self, messages: Sequence[Any], confirmed: Any) -> None:
        if Broker.is_away:
            raise ConnectionError
        if Broker.refuses:
            raise ValueError
        for index in range(len(messages)):
            confirmed(index)


class Sends(OutboxRunner):
    def connect(self) -> Connection:
        return Broker()


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> type[Broker]:
    monkeypatch.setattr(Broker, "is_away", False)
    monkeypatch.setattr(Broker, "refuses", False)
    return Broker


def test_sent_messages_of_a_folder_are_known_at_once(
    folder: Path, broker: type[Broker]
) -> None:
    runner = Sends(outbox=folder)
    sent = add(runner, write, 1)
    assert wait(TIMEOUT) == []
    broker.is_away = True
    unsent = add(runner, write, 2)
    assert status.of(unsent) == "waiting"
    assert wait_until(lambda: status.of(sent) == "sent")
    assert status.of("unknown") is None
    assert status.snapshot().waiting == {"durable.write": 1}
    assert status.snapshot().counts.sent == 1
    (process,) = status.snapshot().processes
    assert process.outbox == 1
    recorder.turn_off()  # as another process, which has only the files
    assert status.of(sent, folder) == "sent"
    assert status.of(unsent, folder) == "waiting"
    assert status.snapshot(folder).waiting == {"durable.write": 1}
    runner.prepare_drain()


def test_a_refused_message_in_a_folder_is_aside_until_an_order_lets_it_be_sent(
    folder: Path, broker: type[Broker]
) -> None:
    broker.refuses = True
    task = add(Sends(outbox=folder), write, 1, status_path=folder)
    assert wait_until(lambda: status.snapshot().counts.failed == 1)
    assert wait_until(lambda: status.of(task) == status.of(task, folder) == "aside")
    broker.refuses = False
    messages = check_folder(folder / "outbox")
    assert wait_until(lambda: bool(list_tasks(messages, lambda each: each.state == "aside")))
    [refused] = list_tasks(messages, lambda each: True)
    order(messages, refused, "retry")
    assert wait_until(lambda: status.of(task) == status.of(task, folder) == "sent")
    assert status.snapshot().counts.sent == 1


def test_a_message_in_a_folder_is_not_lost_with_its_process(
    folder: Path, broker: type[Broker]
) -> None:
    runner = Sends(outbox=folder)
    broker.is_away = True
    unsent = add(runner, write, 1, status_path=folder)
    process = recorder.process()
    process.write()
    assert unsent not in process.document().ids
    recorder.turn_off()  # as another process, after the death of this one
    assert status.of(unsent, folder) == "waiting"
    runner.prepare_drain()


def test_a_sent_task_is_known_at_once_between_two_writes(
    folder: Path, broker: type[Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._status.process.INTERVAL", TIMEOUT)
    visit(int, status_path=folder)
    recorder.process().write()
    sent = add(Sends(), write, 1, status_path=folder)
    assert wait(TIMEOUT) == []
    recorder.turn_off()  # as another process, which has only the files
    assert status.of(sent, folder) == "sent"


def test_sent_tasks_of_a_removed_folder_are_known_when_it_is_made_again(
    folder: Path, tmp_path: Path, broker: type[Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "wsgi_bg._status.process.INTERVAL", TIMEOUT
    )  # only sent ids are written
    runner = Sends()

    def send(value: int) -> str:
        sent = add(runner, write, value, status_path=folder)
        assert wait(TIMEOUT) == []
        return sent

    send(1)
    folder.rename(tmp_path / "away")
    sent = [send(2), send(3)]
    recorder.turn_off()  # as another process, which has only the files
    assert [status.of(each, folder) for each in sent] == ["sent", "sent"]


def test_the_call_of_a_worker_is_shown(tmp_path: Path) -> None:
    runner = Sends()
    visit(int, runner=runner, status_path=tmp_path)
    held = gate("worker")
    registration = find(wait_at)
    assert registration is not None
    arguments = encode(registration, ["worker"], {})
    call = threading.Thread(
        target=run_call, args=(runner, "durable.wait_at", arguments, {}, 1, "an-id")
    )
    call.start()
    assert wait_until(lambda: status.of("an-id") == "running")
    (running,) = status.snapshot().running
    assert (running.name, running.request) == ("tests.support.durable_shop.wait_at", None)
    held.set()
    call.join(TIMEOUT)
    assert status.of("an-id") == "succeeded"
    assert status.snapshot().running == ()


def test_messages_in_memory_are_known_to_their_process(broker: type[Broker]) -> None:
    broker.is_away = True
    runner = Sends()
    unsent = add(runner, write, 1)
    assert status.of(unsent) == "waiting"
    snapshot = status.snapshot()
    assert snapshot.waiting == {"tests.support.durable_shop.write": 1}
    assert snapshot.processes[0].outbox == 1
    broker.is_away = False
    assert wait_until(lambda: status.of(unsent) == "sent")


def test_a_process_without_requests_records_the_tasks_that_it_takes_over(
    folder: Path,
) -> None:
    registration = find(write)
    assert registration is not None
    text = encode(registration, ["left"], {})
    dead_store(check_folder(folder), f"store.add([Row({registration.name!r}, {text!r})])")
    runner = DurableRunner(folder)
    BackgroundTasksMiddleware(app_that(print), runner=runner, status=True)
    runner.start()
    assert wait_until(lambda: runner.statistics().succeeded == 1)
    (left,) = status.snapshot().names
    assert (left.name, left.succeeded) == ("tests.support.durable_shop.write", 1)
