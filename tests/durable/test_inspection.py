"""The functions for the command line, while a process runs and when none does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.durable.support import child, dead_store, done, task
from wsgi_bg._status import stored
from wsgi_bg._store import inspection
from wsgi_bg._store.folder import Folder
from wsgi_bg._store.inspection import Found, list_tasks
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError


def states(folder: Folder) -> dict[str, str]:
    return {found.outcome.row.name: found.outcome.state for found in list_tasks(folder)}


def find(folder: Folder, name: str) -> Found:
    (found,) = (found for found in list_tasks(folder) if found.outcome.row.name == name)
    return found


def look(store: Store) -> None:
    """Tidy as if a second had passed."""
    store._next_look = 0.0
    store.tidy()


@pytest.fixture
def rows(store: Store) -> list[Row]:
    """A row in each state."""
    names = ["waits", "runs", "done", "failed", "aside", "ended"]
    rows = store.add([task(name) for name in names])
    store.begin(rows[1])
    now = time.time()
    store.end(done(rows[2]))
    store.end(Outcome(rows[3], "failed", now, now, "ValueError", "ValueError: bad"))
    store.end(Outcome(rows[4], "aside", now, now))
    store.tidy()
    store.end(done(rows[5]))
    return rows


def test_all_tasks_are_listed_with_their_state(folder: Folder, rows: list[Row]) -> None:
    assert states(folder) == {
        "waits": "waiting",
        "runs": "running",
        "done": "done",
        "failed": "failed",
        "aside": "aside",
    }
    found = find(folder, "failed")
    assert found.is_owned
    assert found.outcome.traceback == "ValueError: bad"
    assert found.outcome.row == rows[3]
    assert find(folder, "done").outcome.row.arguments == ""


def test_tasks_of_a_dead_process_are_listed(folder: Folder) -> None:
    dead_store(folder, "store.begin(store.add([Row('a', ''), Row('b', '')])[0])")
    os.unlink(folder.file(1, ".notes"))  # by hand
    assert states(folder) == {"a": "waiting", "b": "waiting"}
    assert not find(folder, "a").is_owned


@pytest.mark.usefixtures("rows")
def test_another_process_lists_the_tasks_and_takes_nothing_over(
    store: Store, folder: Folder
) -> None:
    code = """
    from wsgi_bg._store.inspection import list_tasks
    tell(*sorted(found.outcome.state for found in list_tasks(folder)))
    tell(all(found.is_owned for found in list_tasks(folder)))
    """
    with child(folder, code) as process:
        assert process.rest() == ["aside done failed running waiting", "True"]
    assert store.add([task()])


@pytest.mark.usefixtures("rows")
def test_a_failed_task_that_is_retried_waits_again(store: Store, folder: Folder) -> None:
    found = find(folder, "failed")
    inspection.order(folder, found, "retry")
    look(store)
    (row,) = store.read(time.time(), 10)
    assert (row.name, row.id) == ("failed", found.outcome.row.id)
    assert folder.orders() == []


@pytest.mark.usefixtures("rows")
def test_a_failed_task_is_discarded(store: Store, folder: Folder) -> None:
    inspection.order(folder, find(folder, "aside"), "discard")
    look(store)
    assert "aside" not in states(folder)


def state_of(folder: Folder, id: str) -> str | None:
    return stored.state_of(folder, id)


@pytest.mark.usefixtures("rows")
def test_the_id_of_a_discarded_task_is_known_and_no_action_finds_the_task(
    store: Store, folder: Folder
) -> None:
    ids = {name: find(folder, name).outcome.row.id for name in ("waits", "failed", "aside")}
    inspection.order(folder, find(folder, "failed"), "retry")
    look(store)
    for name in ids:
        inspection.order(folder, find(folder, name), "discard")
    look(store)
    assert states(folder).keys() & ids.keys() == set()
    assert [state_of(folder, id) for id in ids.values()] == ["discarded"] * 3  # noqa: A001


def test_a_discarded_task_is_known_after_its_file_has_gone(
    store: Store, folder: Folder
) -> None:
    dead_store(folder, "store.add([Row('dead', '', id='1')])")
    inspection.order(folder, find(folder, "dead"), "discard")
    left = Store.adopt(folder, Settings())
    assert left is not None
    assert left.remove(store)
    assert state_of(folder, "1") == "discarded"
    assert states(folder) == {}


def test_a_failed_task_that_is_discarded_has_failed(store: Store, folder: Folder) -> None:
    (row,) = store.add([task("failed")._replace(id="1")])
    store.end(Outcome(row, "failed", 1.0, time.time()))
    store.tidy()
    inspection.order(folder, find(folder, "failed"), "discard")
    look(store)
    assert state_of(folder, "1") is None  # the processes that have recorded the end know it


def test_kept_tasks_that_a_killed_process_has_left_in_two_files_are_one(
    store: Store, folder: Folder
) -> None:
    code = """
        rows = store.add([Row('failed', '', id='1'), Row('waits', '', id='2')])
        store.end(Outcome(rows[0], 'failed', 1.0, time.time()))
        store.tidy()
        """
    dead_store(folder, code)
    (row,) = store.add([task("failed")._replace(id="1")])
    store.end(Outcome(row, "failed", 1.0, time.time()))
    store.tidy()
    assert sorted(each.outcome.row.id for each in list_tasks(folder)) == ["1", "2"]
    inspection.order(folder, find(folder, "failed"), "retry")
    look(store)
    left = Store.adopt(folder, Settings())
    assert left is not None
    look(left)
    due = [*store.read(time.time(), 9), *left.read(time.time(), 9)]
    assert sorted(each.id for each in due) == ["1", "2"]
    left.close()


def test_a_waiting_task_that_is_discarded_does_not_begin(
    store: Store, folder: Folder, rows: list[Row]
) -> None:
    inspection.order(folder, find(folder, "waits"), "discard")
    (left,) = store.add([task("left")])
    store.leave([left])
    inspection.order(folder, find(folder, "left"), "discard")
    look(store)
    assert states(folder).keys() & {"waits", "left"} == set()
    assert not store.begin(rows[0])


def test_a_task_that_has_begun_before_its_order_is_obeyed_runs(
    store: Store, folder: Folder, rows: list[Row]
) -> None:
    inspection.order(folder, find(folder, "waits"), "discard")
    assert store.begin(rows[0])
    look(store)
    assert states(folder)["waits"] == "running"
    assert folder.orders() == []


@pytest.mark.parametrize(
    ("name", "what"), [("runs", "discard"), ("runs", "retry"), ("waits", "retry")]
)
@pytest.mark.usefixtures("rows")
def test_an_order_that_the_state_does_not_allow_is_refused(
    folder: Folder, name: str, what: str
) -> None:
    with pytest.raises(StoreError, match=f"is (running|waiting); {what} is for: failed, aside"):
        inspection.order(folder, find(folder, name), what)


def test_the_next_owner_obeys_orders_for_a_dead_process(store: Store, folder: Folder) -> None:
    dead_store(folder, "store.add([Row('dead', '')])")
    inspection.order(folder, find(folder, "dead"), "discard")
    look(store)
    assert len(folder.orders()) == 1
    left = Store.adopt(folder, Settings())
    assert left is not None
    assert left.remove(store)
    assert folder.orders() == []


def test_orders_that_nobody_can_obey_go_after_a_minute(store: Store, folder: Folder) -> None:
    gone = Found(99, False, Outcome(task()._replace(id="gone"), "failed"))
    inspection.order(folder, gone, "retry")
    look(store)
    (path,) = folder.orders()
    os.utime(path, (0, 0))
    forged = '{"what": "retry", "number": 1, "key": 1, "id": {}}'
    for text in ("{", "[]", '{"what": 1}', forged):
        Path(folder.path, "bad.order").write_text(text)
        look(store)
        assert folder.orders() == [os.path.join(folder.path, "bad.order")]


def test_each_of_the_calls_that_come_once_a_second_looks_for_orders(
    store: Store, folder: Folder, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = time.monotonic() + 10.0
    clock = SimpleNamespace(time=time.time, monotonic=lambda: moment)
    monkeypatch.setattr("wsgi_bg._store.store.time", clock)
    store.tidy()
    inspection.order(folder, find(folder, "failed"), "discard")
    moment += 0.999  # the first call was the slower one to get here
    store.tidy()
    assert folder.orders() == []


def test_an_order_that_cannot_be_read_holds_up_no_other(
    store: Store, folder: Folder, rows: list[Row]
) -> None:
    """As one of root, in a container in which root may not give files away."""
    unreadable = os.path.join(folder.path, "00000000.order")
    os.mkdir(unreadable)  # the tests may run as root, who may read each file
    too_deep = os.path.join(folder.path, "00000001-0.order")
    Path(too_deep).write_text("[" * 50_000)
    inspection.order(folder, find(folder, "failed"), "discard")
    look(store)
    assert folder.orders() == [unreadable, too_deep]
    assert "failed" not in states(folder)


def test_an_order_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    found = Found(1, False, Outcome(task(), "failed"))
    with pytest.raises(StoreError, match="order cannot be written"):
        inspection.order(Folder(os.fspath(tmp_path / "missing"), (0, 0)), found, "retry")


def test_a_damaged_file_is_named(store: Store, folder: Folder) -> None:
    Path(folder.file(9)).write_bytes(b"no database" * 1000)
    Path(folder.file(10)).write_bytes(b"")
    with pytest.raises(StoreError, match=r"00000009\.sqlite.*not a database"):
        list_tasks(folder)


def test_a_file_whose_process_died_while_it_made_the_file_has_no_tasks(folder: Folder) -> None:
    Path(folder.path, "owners.lock").touch()  # made before any file
    Path(folder.file(9)).write_bytes(b"")
    assert list_tasks(folder) == []
