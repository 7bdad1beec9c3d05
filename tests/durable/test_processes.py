"""Several processes: killed, stopped and forked while they use the store."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.durable.support import (
    child,
    dead_store,
    done,
    is_sound,
    names,
    open_folder,
    task,
    work_off,
)
from tests.support import TIMEOUT
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._store.owner import locks_of
from wsgi_bg._store.rows import Outcome, Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError

# Done tasks end at a time long ago.
SETTINGS = Settings(keep_done=(10_000, float("inf")))

LOAD = """
store = Store.own(folder, settings)
work = []

def request(number):
    for count in range(100_000):
        rows = [Row("shop.mail", "", "", "", 0.0) for _ in range(count % 3 + 1)]
        rows = store.add(rows)
        tell("added", *(row.id for row in rows))
        work.extend(rows)

def run():
    while True:
        if not work:
            time.sleep(0)
            continue
        row = work.pop(0)
        store.begin(row)
        tell("begun", row.id)
        if row.key % 7 == 0:
            children = store.end_with(Outcome(row), [Row("shop.child", "")])
            tell("added", *(row.id for row in children))
            work.extend(children)
        else:
            store.end(Outcome(row))
        tell("ended", row.id)

def tidy():
    while True:
        store.tidy()

for number in range(3):
    threading.Thread(target=request, args=(number,)).start()
threading.Thread(target=run).start()
tidy()
"""


def adopt(folder: Folder, settings: Settings = SETTINGS) -> Store:
    store = Store.adopt(folder, settings)
    assert store is not None
    return store


@pytest.mark.parametrize("seed", range(10))
def test_kill_loses_no_added_row_and_runs_no_ended_row_again(
    store: Store, folder: Folder, seed: int
) -> None:
    told: dict[str, set[str]] = {"added": set(), "begun": set(), "ended": set()}
    with child(folder, LOAD) as process:
        lines = [process.line() for _ in range(random.Random(seed).randrange(1, 4000))]
        process.kill()
        lines += process.rest()
    for line in lines:
        what, *ids = line.split()
        told[what].update(ids)
    left = adopt(folder)
    rows = {row.id: row for row in left.read(0.0, 100_000)}
    assert told["added"] - told["begun"] - rows.keys() == set()
    assert told["ended"] & rows.keys() == set()
    ran = {row.id for row in rows.values() if row.crashes}
    assert len(ran) <= 1
    assert told["begun"] - told["ended"] <= ran | (told["begun"] - rows.keys())
    assert is_sound(left)
    for row in rows.values():
        assert left.begin(row)
        left.end(done(row))
    assert left.remove(store)
    assert not os.path.exists(left.path)


def test_rows_that_ran_when_the_process_died_have_a_crash_more(folder: Folder) -> None:
    dead_store(
        folder,
        """
        rows = store.add([Row(name, "") for name in ("ran", "waited", "ended", "failed")])
        store.begin(rows[0])
        store.begin(rows[2])
        store.end(Outcome(rows[2]))
        store.begin(rows[3])
        store.end(Outcome(rows[3], "failed"))
        """,
    )
    for crashes in (1, 2):
        left = adopt(folder)
        assert left.count() == {"waiting": 2, "running": 0, "failed": 1, "aside": 0, "done": 1}
        rows = left.read(0.0, 10)
        assert [(row.name, row.crashes) for row in rows] == [("ran", crashes), ("waited", 0)]
        left.begin(rows[0])
        left._end(is_removed=False)  # as if this process had died, without its notes


def test_a_row_that_was_taken_back_before_the_death_is_not_kept_as_done(folder: Folder) -> None:
    dead_store(folder, "store.take_back(store.add([Row('a', '')]))")
    assert list(list_tasks(folder)) == []
    left = adopt(folder)
    assert left.is_empty
    assert list(list_tasks(folder)) == []
    left.close()


def test_the_last_attempt_of_a_task_that_failed_before_the_death_counts(folder: Folder) -> None:
    dead_store(
        folder,
        """
        (row,) = store.add([Row("failed", "")])
        row = row._replace(due=1.0, attempts=4)
        store.postpone([row])
        store.begin(row)
        store.end(Outcome(row, "failed"))
        """,
    )

    def found() -> list[tuple[str, int]]:
        return [(each.outcome.state, each.outcome.row.attempts) for each in list_tasks(folder)]

    assert found() == [("failed", 5)]
    left = adopt(folder)
    assert found() == [("failed", 5)]
    left.close()


def test_a_death_during_the_take_over_counts_once(folder: Folder) -> None:
    dead_store(folder, "store.begin(store.add([Row('ran', '')])[0])")
    notes = Path(folder.file(1, ".notes"))
    before = notes.read_bytes()
    adopt(folder)._end(is_removed=False)
    notes.write_bytes(before)  # the process died before it had forgotten the notes
    left = adopt(folder)
    assert [row.crashes for row in left.read(0.0, 10)] == [1]
    left.close()


def test_keys_are_never_used_again(folder: Folder) -> None:
    dead_store(folder, "store.add([Row('parent', '')])")
    left = adopt(folder)
    (row,) = left.read(0.0, 10)
    left.begin(row)
    (kid,) = left.end_with(done(row), [task("child")])
    left.begin(kid)
    left.end(done(kid))
    left.tidy()
    left._end(is_removed=False)
    again = adopt(folder)
    assert again.add([task()])[0].key > kid.key > row.key
    again.close()


def test_an_empty_file_is_removed_and_its_failed_tasks_are_kept(
    store: Store, folder: Folder
) -> None:
    dead_store(
        folder,
        """
        rows = store.add([Row("failed", "") for _ in range(30)] + [Row("waits", "")])
        for row in rows[:30]:
            store.end(Outcome(row, "failed", 1.0, time.time(), "ValueError", "traceback"))
        store.tidy()
        """,
    )
    left = adopt(folder)
    assert not left.is_empty
    assert not left.remove(store)
    assert names(work_off(left)) == ["waits"]
    assert left.remove(store)
    assert folder.numbers() == [store.number]
    assert store.count() == {"waiting": 0, "running": 0, "failed": 30, "aside": 0, "done": 1}
    assert Store.adopt(folder, SETTINGS) is None


def test_a_file_that_was_half_removed_when_the_process_died_is_removed(
    folder: Folder,
) -> None:
    dead_store(folder, "store.add([Row('a', '')])")
    os.unlink(folder.file(1))
    assert Store.adopt(folder, SETTINGS) is None
    assert os.listdir(folder.path) == ["owners.lock"]


def test_a_process_that_lives_keeps_its_file(store: Store, folder: Folder) -> None:
    code = "store = Store.own(folder, settings); store.add([Row('a', '')]); tell(1); input()"
    with child(folder, code) as process:
        assert process.line() == "1"
        assert Store.adopt(folder, SETTINGS) is None
        process.kill()
        left = adopt(folder)
    assert names(work_off(left)) == ["a"]
    assert left.remove(store)


def test_a_process_that_is_stopped_keeps_its_tasks_and_stops_no_other(
    store: Store, folder: Folder
) -> None:
    code = """
    store = Store.own(folder, settings)
    row, = store.add([Row("a", "")])
    with store._writer.hold():
        store._writer.connection.execute("BEGIN IMMEDIATE")
        tell("writes")
        input()
        store._writer.connection.execute("COMMIT")
    tell(len(store.add([Row("b", "")])), store.begin(row))
    """
    with child(folder, code) as process:
        assert process.line() == "writes"
        process.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process._process.pid, os.WSTOPPED)
        assert store.add([task()])
        store.tidy()
        assert Store.adopt(folder, SETTINGS) is None
        with open_folder(Path(folder.path)) as (_, same):
            assert same is store
            process.signal(signal.SIGCONT)
            process.answer()
            assert process.line() == "1 True"


def test_two_processes_do_not_adopt_the_same_file(folder: Folder) -> None:
    dead_store(folder, "store.add([Row('a', '')])")
    code = "tell(Store.adopt(folder, settings) is not None); input()"
    with child(folder, code) as first:
        assert first.line() == "True"
        with child(folder, code) as second:
            assert second.line() == "False"


def test_new_processes_never_get_a_number_again(folder: Folder) -> None:
    code = "store = Store.own(folder, settings); tell(store.number); store.close()"
    numbers = []
    for _ in range(3):
        with child(folder, code) as process:
            numbers += process.rest()
    assert numbers == ["1", "2", "3"]


def test_a_removed_lock_file_is_an_error_in_processes_that_run(
    store: Store, folder: Folder
) -> None:
    dead_store(folder, "store.add([Row('a', '')])")
    os.unlink(os.path.join(folder.path, "owners.lock"))
    with pytest.raises(StoreError, match="lock file was removed"):
        Store.adopt(folder, SETTINGS)
    code = """
    new = Store.own(folder, settings)  # the count of numbers begins anew
    tell(new.number)
    """
    with child(folder, code) as process:
        assert process.rest() == ["3"]


def test_a_folder_that_was_replaced_before_its_first_use_has_a_single_owner(
    tmp_path: Path,
) -> None:
    checked = check_folder(tmp_path / "tasks")
    (tmp_path / "tasks").rename(tmp_path / "before")
    replaced = check_folder(tmp_path / "tasks")
    assert checked.identity != replaced.identity
    store = Store.own(checked, SETTINGS)
    try:
        store.add([task()])
        assert locks_of(replaced).is_owned(store.number)
        assert Store.own(replaced, SETTINGS) is store
        assert Store.adopt(replaced, SETTINGS) is None
    finally:
        store.close()


def test_a_lock_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    folder = Folder(os.fspath(tmp_path), (0, 0))
    (tmp_path / "owners.lock").mkdir()
    with pytest.raises(StoreError, match="lock file cannot be opened"):
        locks_of(folder)


def test_a_process_that_looks_who_owns_a_file_is_not_the_owner(folder: Folder) -> None:
    code = """
    import fcntl
    from wsgi_bg._store.owner import locks_of
    lockf = fcntl.lockf

    def lock(*given):
        lockf(*given)
        tell("looks")
        threading.Event().wait()

    fcntl.lockf = lock
    locks_of(folder).is_owned(7)
    """
    locks = locks_of(folder)
    with child(folder, code) as process:
        assert process.line() == "looks"
        assert not locks.is_owned(7)
        assert not locks.take(7)  # the look may have to end first


def test_threads_that_look_at_once_take_none_of_them_for_the_owner(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = locks_of(folder)
    lockf, looks, go_on = fcntl.lockf, threading.Event(), threading.Event()
    found: list[bool] = []

    def lock(*given: Any) -> None:
        lockf(*given)
        looks.set()
        go_on.wait(TIMEOUT)

    monkeypatch.setattr(fcntl, "lockf", lock)
    threads = [
        threading.Thread(target=lambda: found.append(locks.is_owned(7))) for _ in range(2)
    ]
    threads[0].start()
    assert looks.wait(TIMEOUT)
    threads[1].start()
    threads[1].join(0.2)  # it waits for the first, and else it would end here
    go_on.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == [False, False]


FORKS = """
own = Store.own(folder, settings)
requests = threading.Semaphore(0)

def request():
    for _ in range(400):
        requests.acquire()
        own.add([Row("parent", "")])
        own.read(0.0, 10)

threads = [threading.Thread(target=request) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(40):
    requests.release(30)  # for the time of the fork
    pid = os.fork()
    if not pid:
        store = Store.own(folder, settings)
        assert store is not own
        store.add([Row("child", "")])
        sys.exit()  # an exit that frees the objects of the parent
    if os.waitpid(pid, 0)[1]:
        os._exit(1)
for thread in threads:
    thread.join()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_forks_lose_nothing_in_parent_and_child(store: Store, folder: Folder) -> None:
    with child(folder, FORKS) as process:
        assert process.rest() == []
    found: list[str] = []
    while (left := Store.adopt(folder, SETTINGS)) is not None:
        assert is_sound(left)
        while rows := work_off(left):
            found += names(rows)
        assert left.remove(store)
    assert found.count("parent") == 1200
    assert found.count("child") == 40


def test_a_forked_child_adopts_the_file_of_its_dead_parent(folder: Folder) -> None:
    code = """
    own = Store.own(folder, settings)
    own.add([Row("parent", "") for _ in range(100)])
    pipe, end = os.pipe()
    with own._writer.hold():
        own._writer.connection.execute("BEGIN IMMEDIATE")  # SQLite knows of locks of the parent
        pid = os.fork()
    if pid:
        os._exit(0)
    os.close(end)
    os.read(pipe, 1)  # until the parent has died
    check_folder(folder.path)
    left = Store.adopt(folder, settings)
    rows = left.read(0.0, 1000)
    children = left.add([Row("child", "")])
    tell(len(rows), len(children))
    """
    with child(folder, code) as process:
        assert process.rest() == ["100 1"]
    left = adopt(folder)
    assert is_sound(left)
    assert len(left.read(0.0, 1000)) == 101
    left.close()


def test_a_handler_that_forks_does_not_write_to_the_file_of_the_parent(folder: Folder) -> None:
    code = """
    own = Store.own(folder, settings)
    execute = own._writer._execute

    def fork_in_a_transaction(sql, *values):
        execute(sql, *values)
        if sql == "BEGIN IMMEDIATE":
            tell(os.fork() > 0)

    own._writer._execute = fork_in_a_transaction
    try:
        own.add([Row("parent", "") for _ in range(60)])
        own._end(is_removed=False)
    except StoreError as error:
        tell("a forked child must not write" in str(error))
    """
    with child(folder, code) as process:
        assert sorted(process.rest()) == ["False", "True", "True"]
    left = adopt(folder)
    assert len(left.read(0.0, 1000)) == 60
    left.close()


def test_tasks_put_aside_without_a_begin_are_kept(store: Store) -> None:
    (row,) = store.add([task()])
    store.end(Outcome(row._replace(crashes=3), "aside", 0.0, 9e9))
    store.tidy()
    assert store.count()["aside"] == 1
