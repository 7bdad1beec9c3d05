"""The files of a folder: what is read, what is ignored, what is removed."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Log
from tests.status.support import fail, handle, nothing
from tests.support import wait_until
from wsgi_bg import status
from wsgi_bg._status.document import Document, KeepDone, Past
from wsgi_bg._status.files import EndedFile, ProcessFile, open_folder, read_all
from wsgi_bg._status.model import Failure, ProcessStatus, RunningTask
from wsgi_bg._status.numbers import SUCCEEDED
from wsgi_bg._status.recorder import recorder
from wsgi_bg._store.folder import Folder
from wsgi_bg._store.owner import locks_of

PROCESS = ProcessStatus(7, 1.0, 2.0, True, "command", 1, 2, 3, 4, None, 5, None, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return open_folder(tmp_path / "status")


def document(**values: Any) -> Document:
    found = Document(**{"process": PROCESS, **values})
    found.tally_of("a").counts[SUCCEEDED] = 1
    return found


def write_as_dead(folder: Folder, *documents: Document, ended: Any = ()) -> None:
    """Write the files of processes that have ended."""
    for each in documents:
        file = ProcessFile(folder)
        file.write(each, ended)
        locks_of(folder).give(file.number)


def test_a_document_is_read_as_it_was_written(folder: Folder) -> None:
    task = RunningTask("a", "1", None, 3.5, 2, 7, "thread")
    written = document(
        failures=[Failure("a", "2", "GET /", 1.0, 1, 7, "Error", "text", "traceback")],
        running=[(task, True)],
        running_by_name={"a": 1, "c": 4},
        unlisted={"c": 4},
        waiting={"b": 2},
        ids={"1": "running"},
        durable={"/folder": [3]},
        outboxes=["/other"],
        keep_done=KeepDone(3, 4.0),
        has_ended=True,
    )
    again = Document.load(json.loads(json.dumps(written.dump())))
    assert again.dump() == written.dump()
    past = Past(killed=[PROCESS], lost=[], added=[1])
    assert Past.load(json.loads(json.dumps(past.dump()))) == past


def test_what_is_no_document_of_this_version_is_ignored(folder: Folder) -> None:
    good = document().dump()
    bad: list[object] = [
        [],
        {},
        {**good, "version": 2},
        {**good, "process": good["process"][:-1]},
        {**good, "process": ["7", *good["process"][1:]]},
        {**good, "names": {"a": [1, 2]}},
        {**good, "names": {"a": [0] * 6 + [[0.0, 999, 1], [0.0]]}},
        {**good, "waiting": {"a": "x"}},
        {**good, "ids": {"a": 3}},
        {**good, "waiting": {"a": float("inf")}},
        {**good, "keep_done": [1, 10**400]},
        {**good, "names": {"a": [0] * 6 + [[0.0, 9, 10**400], [0.0]]}},
        {**good, "names": {"a": [0] * 6 + [[float("nan"), 9, 1], [0.0]]}},
    ]
    for number, each in enumerate(bad):
        text = json.dumps(each)
        Path(folder.path, f"{number}.status").write_text(text, encoding="utf-8")
    Path(folder.path, "98.status").write_text("{", encoding="utf-8")
    Path(folder.path, "99.status").write_text("[" * 100_000, encoding="utf-8")
    Path(folder.path, "past.status").write_text("{}", encoding="utf-8")
    locks_of(folder)
    assert read_all(folder) == ([], Past())
    assert status.snapshot(folder.path).names == ()


def test_dead_documents_that_cannot_be_read_are_removed(folder: Folder) -> None:
    Path(folder.path, "5.status").write_text("{", encoding="utf-8")
    ProcessFile(folder).add_ended_processes()
    assert sorted(os.listdir(folder.path)) == ["owners.lock", "past.status"]


def test_a_killed_process_is_never_alive_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as_dead(folder, document(ids={"1": "running"}))
    found: list[str | None] = []

    def add(*given: Any) -> None:
        found.append(status.of("1", folder.path))
        add_to_past(*given)

    add_to_past = Past.add
    monkeypatch.setattr(Past, "add", add)
    ProcessFile(folder).add_ended_processes()
    assert found == ["lost"]


def test_the_past_is_written_by_one_process_at_a_time(folder: Folder) -> None:
    write_as_dead(folder, document())
    locks = locks_of(folder)
    assert locks.take(0)
    ProcessFile(folder).add_ended_processes()
    assert [each.number for each in read_all(folder)[0]] == [1]
    locks.give(0)
    ProcessFile(folder).add_ended_processes()
    assert read_all(folder)[0] == []


def test_a_document_is_added_once_if_the_process_that_adds_dies(folder: Folder) -> None:
    write_as_dead(folder, document())
    text = Path(folder.path, "1.status").read_text(encoding="utf-8")
    file = ProcessFile(folder)
    file.add_ended_processes()
    Path(folder.path, "1.status").write_text(text, encoding="utf-8")  # as if it was not removed
    assert read_all(folder)[0] == []
    for _ in range(2):
        file.add_ended_processes()
        past = read_all(folder)[1]
        assert past.names["a"].counts[SUCCEEDED] == 1
    assert not Path(folder.path, "1.status").exists()


def test_a_killed_process_is_shown_for_an_hour(folder: Folder) -> None:
    now = time.time()
    running = [
        (RunningTask("a", None, None, None, 1, 1, None), is_stored)
        for is_stored in (True, False)
    ]
    new = replace(PROCESS, pid=1, updated=now - 1)
    old = replace(PROCESS, pid=2, updated=now - 3601)
    write_as_dead(
        folder,
        document(process=new, running=running, waiting={"a": 200}, ids={"1": "waiting"}),
        document(process=old, waiting={"a": 1}),
    )
    assert status.of("1", folder.path) == "lost"
    ProcessFile(folder).add_ended_processes()
    past = read_all(folder)[1]
    assert past.killed == [replace(new, is_alive=False)]
    assert len(past.lost) == 100
    assert status.snapshot(folder.path).counts.lost == 202
    assert status.of("1", folder.path) == "lost"


def test_of_lost_tasks_those_that_ran_come_first_and_are_kept(folder: Folder) -> None:
    running = [(RunningTask("a", "1", "GET /", 1.0, 1, 7, "thread"), False)]
    write_as_dead(folder, document(running=running, waiting={"b": 200}))
    seen = status.snapshot(folder.path).lost
    assert len(seen) == 100
    assert [task.id for task in seen[:2]] == ["1", None]
    write_as_dead(folder, document(waiting={"c": 99}))
    ProcessFile(folder).add_ended_processes()
    assert read_all(folder)[1].lost[0].id == "1"


@pytest.mark.parametrize("worker_is_first", [False, True])
@pytest.mark.parametrize("state", ["succeeded", "failed", "discarded"])
def test_a_process_that_knows_less_does_not_replace_the_end_of_a_task(
    state: str, folder: Folder, *, worker_is_first: bool
) -> None:
    now = time.time()
    worker, *others = [("1", state, now - 3.0)], [("1", "sent", now - 2.0)], []
    ends = [worker, *others] if worker_is_first else [*others, worker]
    states = []
    for ended in ends:
        ids: Any = {} if ended else {"1": "waiting"}
        write_as_dead(
            folder, document(process=replace(PROCESS, updated=now), ids=ids), ended=ended
        )
    states.append(status.of("1", folder.path))
    ProcessFile(folder).add_ended_processes()
    states.append(status.of("1", folder.path))
    assert states == [state, state]


@pytest.mark.parametrize("first", ["retrying", "other"])
@pytest.mark.parametrize(
    ("other", "seconds", "state"),
    [
        ("failed", 1.0, "failed"),
        ("discarded", 1.0, "discarded"),
        ("retrying", 1.0, "retrying"),
        ("sent", 1.0, "retrying"),
        ("sent", -1.0, "retrying"),
        ("lost", 1.0, "lost"),  # the next attempt was lost
        ("lost", -1.0, "retrying"),  # the attempt before was lost
    ],
)
def test_a_task_is_retrying_until_its_next_attempt_has_ended(
    other: str, seconds: float, state: str, first: str, folder: Folder
) -> None:
    moment = time.time() - 10.0
    documents: dict[str, tuple[Any, Any]] = {
        "retrying": ({}, [("1", "retrying", moment)]),
        "other": ({}, [("1", other, moment + seconds)]),
    }
    if other == "lost":
        documents["other"] = ({"1": "running"}, [])
    for name in sorted(documents, key=lambda name: name != first):
        ids, ended = documents[name]
        process = replace(PROCESS, updated=moment + seconds)
        write_as_dead(folder, document(process=process, ids=ids), ended=ended)
    before = status.of("1", folder.path)
    ProcessFile(folder).add_ended_processes()
    assert [before, status.of("1", folder.path)] == [state, state]


def test_ended_ids_are_bounded(folder: Folder) -> None:
    ended = EndedFile(folder, "1")
    ended.append([], 10)
    ended.append([("none", "succeeded", 1.0)], 0)
    assert ended.all() == []
    for number in range(35):
        ended.append([(str(number), "succeeded", float(number))], 10)
    assert [id for id, _, _ in ended.all()] == [str(each) for each in range(20, 35)]  # noqa: A001
    assert ended.find("34") == [("34", "succeeded", 34.0)]
    assert ended.find("20") == [("20", "succeeded", 20.0)]
    assert ended.find("3") == []
    again = EndedFile(folder, "1")
    again.append([(f"x{each}", "failed", 1.0) for each in range(6)], 10)
    again.append([("y", "failed", 1.0)], 10)
    assert [id for id, _, _ in again.all()][-2:] == ["x5", "y"]  # noqa: A001
    assert len(again.all()) < 20


def test_a_full_disk_displaces_no_ended_task(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = EndedFile(folder, "1")
    ended.append([("before", "succeeded", 1.0)], 10)

    def fill(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fill)
        for _ in range(30):
            with pytest.raises(OSError, match="No space"):
                ended.append([("after", "succeeded", 2.0)], 10)
    ended.append([("after", "succeeded", 2.0)], 10)
    assert [id for id, _, _ in ended.all()] == ["before", "after"]  # noqa: A001


@pytest.mark.parametrize("name", ["past.status", "3.status", "3.ended"])
def test_no_numbers_are_lost_while_a_file_cannot_be_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ended = [("1", "succeeded", time.time())]
    write_as_dead(folder, document())
    alive = ProcessFile(folder)
    alive.add_ended_processes()
    write_as_dead(folder, document(), ended=ended)

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(f"{os.sep}{name}"):
            raise OSError(errno.EMFILE, "Too many open files")
        return open(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("wsgi_bg._status.files.open", refuse, raising=False)
        with pytest.raises(OSError, match="Too many open files"):
            alive.add_ended_processes()
        with pytest.raises(OSError, match="Too many open files"):
            status.of("1", folder.path)
    alive.add_ended_processes()
    assert status.snapshot(folder.path).counts.succeeded == 2
    assert status.of("1", folder.path) == "succeeded"


@pytest.mark.parametrize("name", ["2.status", "2.ended"])
def test_a_file_of_another_user_is_passed_over(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(f"{os.sep}{name}"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, *args, **options)

    monkeypatch.setattr("wsgi_bg._status.files.open", refuse, raising=False)
    write_as_dead(folder, document(), document())
    assert status.snapshot(folder.path).counts.succeeded >= 1
    ProcessFile(folder).add_ended_processes()
    assert sorted(os.listdir(folder.path)) == ["owners.lock", "past.status"]


def test_many_tasks_that_end_in_a_second_do_not_fill_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._status.recorder.KEEP_DONE", KeepDone(10, 3600.0))
    first, *_, last = handle(*[nothing] * 50, status_path=tmp_path)
    recorder.process().write()
    lines = (tmp_path / "1.ended").read_text(encoding="utf-8").splitlines()
    assert 10 <= len(lines) < 20
    assert status.of(last.id, tmp_path) == "succeeded"
    assert not any(first.id in line for line in lines)


def test_a_line_that_was_not_written_to_its_end_is_ignored(folder: Folder) -> None:
    Path(folder.path, "1.ended").write_text('["1", "succ', encoding="utf-8")
    ended = EndedFile(folder, "1")
    assert ended.all() == []
    assert ended.find("1") == []


def test_an_unknown_or_old_state_is_no_state(folder: Folder) -> None:
    now = time.time()
    ended = [("1", "odd", now), ("2", "failed", now - 4000.0), ("3", "failed", now - 1.0)]
    write_as_dead(folder, document(ids={"4": "running"}, has_ended=True), ended=ended)
    alive = ProcessFile(folder)
    alive.write(document(ids={"5": "odd", "6": "running"}), ())
    states = [status.of(id, folder.path) for id in "123456"]  # noqa: A001
    assert states == [None, None, "failed", None, None, "running"]


def test_the_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "status"
    handle(nothing, status_path=path)
    assert wait_until((path / "1.status").exists)
    modes = {each.name: each.stat().st_mode & 0o777 for each in path.iterdir()}
    assert path.stat().st_mode & 0o777 == 0o700
    assert set(modes.values()) == {0o600}


def test_nothing_is_written_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(nothing, status_path=tmp_path)
    process = recorder.process()
    process.write()
    written: list[object] = []
    monkeypatch.setattr(ProcessFile, "write", lambda *given: written.append(given))
    process.write()
    assert written == []
    handle(nothing, status_path=tmp_path)
    process.write()
    assert written


def test_a_process_that_goes_on_after_a_drain_may_lose_tasks_again(tmp_path: Path) -> None:
    handle(nothing, status_path=tmp_path)
    process = recorder.process()

    def has_ended() -> list[bool]:
        return [each.document.has_ended for each in read_all(open_folder(tmp_path))[0]]

    process.write()
    assert has_ended() == [False]
    process.end()
    process.write()
    assert has_ended() == [True]
    handle(nothing, status_path=tmp_path)
    process.write()
    assert has_ended() == [False]


def test_an_error_of_the_disk_is_logged_once_and_the_next_write_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    handle(nothing, status_path=tmp_path)
    process = recorder.process()
    process.write()
    write: Callable[..., None] = ProcessFile.write

    def is_full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ProcessFile, "write", is_full)
    handle(fail, status_path=tmp_path)
    process.write()
    process.write()
    message = f"the status of this process could not be written to {tmp_path}"
    assert log.errors.count(message) == 1
    monkeypatch.setattr(ProcessFile, "write", write)
    process.write()
    assert status.snapshot(tmp_path).counts.failed == 1
    [found] = read_all(open_folder(tmp_path))[0]  # and no second file with the same numbers
    assert [tally.counts[SUCCEEDED] for tally in found.document.names.values()] == [1, 0]


def test_a_file_that_cannot_be_removed_makes_the_process_no_second_file(
    tmp_path: Path, log: Log
) -> None:
    handle(nothing, status_path=tmp_path)
    process = recorder.process()
    process.write()
    (tmp_path / "77.status").mkdir()
    process.write()
    process.write()
    assert log.errors == [f"the status of this process could not be written to {tmp_path}"]
    assert sorted(each.name for each in tmp_path.glob("[0-9].status")) == ["1.status"]


def test_a_fault_of_the_package_does_not_end_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def look(*given: object) -> None:
        raise LookupError

    handle(nothing, status_path=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("wsgi_bg._status.process.look", look)
        recorder.process().write()
    assert "the status of this process could not be written to its folder" in log.errors
    recorder.process().write()
    assert status.snapshot(tmp_path).counts.succeeded == 1


def test_the_thread_is_started_again_if_no_thread_could_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("wsgi_bg._status.process.start_daemon", start)
        handle(nothing, status_path=tmp_path)
    assert not (tmp_path / "1.status").exists()
    handle(nothing, status_path=tmp_path)
    assert wait_until((tmp_path / "1.status").exists)


def test_a_thread_that_cannot_have_the_turn_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._status.process.INTERVAL", 0.01)
    handle(nothing, status_path=tmp_path)
    process = recorder.process()
    assert wait_until((tmp_path / "1.status").exists)
    turn = process._turns.take(10.0)
    assert turn is not None
    handle(fail, status_path=tmp_path)
    process.write()
    turn.give()
    assert wait_until(lambda: "not today" in (tmp_path / "1.status").read_text())
