"""Several processes that write their status into one folder."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.status.support import fail, handle, nothing, process
from tests.support import TIMEOUT, free_port, wait_until
from tests.support.command import running, write
from wsgi_bg import status
from wsgi_bg.status import Snapshot

HANG = "tests.status.support.hang"
NOTHING = "tests.status.support.nothing"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "status"


def has(folder: Path) -> Snapshot:
    """The status of all processes, as soon as there is any."""
    assert wait_until((folder / "owners.lock").exists)
    return status.snapshot(folder)


HANGS = """
    (task, _) = handle(hang, nothing, path="/orders", status_path=PATH, runner="pool")
    say(task.id)
    input()
    """


def test_all_processes_are_in_a_snapshot(folder: Path) -> None:
    with process(HANGS, folder) as first, process(HANGS, folder) as second:
        ids = {each.line() for each in (first, second)} | {
            each.line() for each in (first, second)
        }
        assert wait_until(lambda: len(has(folder).running) == 2)
        snapshot = status.snapshot(folder)
        assert {each.pid for each in snapshot.processes} == {first.pid, second.pid}
        assert all(each.is_alive for each in snapshot.processes)
        assert {task.id for task in snapshot.running} | {"hangs"} == ids
        assert {task.request for task in snapshot.running} == {"GET /orders"}
        assert snapshot.waiting == {NOTHING: 2}
        assert [each.name for each in snapshot.names] == [HANG, NOTHING]
        assert snapshot.counts.running == 2
        for task in snapshot.running:
            assert task.id is not None
            assert status.of(task.id, folder) == "running"


def test_the_tasks_of_a_killed_process_are_lost(folder: Path) -> None:
    with process(HANGS, folder) as killed:
        assert wait_until(lambda: len(has(folder).running) == 1)
        (task,) = status.snapshot(folder).running
        killed.kill()
    snapshot = status.snapshot(folder)
    running, waiting = snapshot.lost
    assert (running.name, running.id, running.request) == (HANG, task.id, "GET /orders")
    assert (running.since, running.pid) == (task.since, killed.pid)
    assert (waiting.name, waiting.id, waiting.since) == (NOTHING, None, None)
    assert snapshot.running == ()
    assert snapshot.waiting == {}
    assert [(each.name, each.lost) for each in snapshot.names] == [(HANG, 1), (NOTHING, 1)]
    (of_killed,) = snapshot.processes
    assert not of_killed.is_alive
    assert task.id is not None
    assert status.of(task.id, folder) == "lost"


def test_running_tasks_without_room_in_the_list_are_lost_with_their_process(
    folder: Path,
) -> None:
    code = """
        from wsgi_bg._status import live
        live.MAX_RUNNING = 1
        for _ in range(3):
            handle(hang, status_path=PATH, runner="pool")
        input()
        """
    with process(code, folder) as killed:
        assert wait_until(lambda: has(folder).counts.running == 3)
        assert len(status.snapshot(folder).running) == 1
        killed.kill()
    snapshot = status.snapshot(folder)
    assert snapshot.counts.lost == 3
    assert [(task.name, task.id is None) for task in snapshot.lost] == [
        (HANG, False),
        (HANG, True),
        (HANG, True),
    ]


ENDS = """
    (first, second) = handle(nothing, fail, status_path=PATH)
    print(first.id, second.id)
    input()
    """


def test_a_process_that_ends_leaves_its_numbers_and_loses_nothing(folder: Path) -> None:
    with process(ENDS, folder) as ended:
        ids = ended.line().split()
        assert ended.end() == 0
    snapshot = status.snapshot(folder)
    assert snapshot.processes == ()
    assert snapshot.lost == ()
    assert (snapshot.counts.succeeded, snapshot.counts.failed) == (1, 1)
    assert [status.of(id, folder) for id in ids] == ["succeeded", "failed"]  # noqa: A001


def test_a_living_process_adds_ended_ones_to_the_past_and_removes_their_files(
    folder: Path,
) -> None:
    with process(HANGS, folder) as killed, process(ENDS, folder) as ended:
        killed.line()
        assert wait_until(lambda: len(has(folder).running) == 1)
        (task,) = status.snapshot(folder).running
        ids = [*ended.line().split(), task.id or ""]
        killed.kill()
        assert ended.end() == 0
    before = status.snapshot(folder)
    handle(nothing, status_path=folder)
    own = "3.status"
    assert wait_until(
        lambda: (
            [own, "past.status"]
            == sorted(name for name in os.listdir(folder) if name.endswith(".status"))
        )
    )
    snapshot = status.snapshot(folder)
    assert snapshot.counts.succeeded == before.counts.succeeded + 1
    assert snapshot.counts.failed == before.counts.failed == 1
    assert snapshot.counts.lost == before.counts.lost == 2
    assert snapshot.lost == before.lost
    assert snapshot.failures == before.failures
    assert [each.is_alive for each in snapshot.processes if each.pid == killed.pid] == [False]
    states = [status.of(id, folder) for id in ids]  # noqa: A001
    assert states == ["succeeded", "failed", "lost"]


def test_a_task_that_the_exit_names_is_discarded_and_not_lost(folder: Path) -> None:
    code = """
        (task, _) = handle(
            hang, nothing, status_path=PATH, runner=PoolRunner(threads=1, drain_timeout=0.0)
        )
        input()
        say(task.id)
        """
    with process(code, folder) as ended:
        assert ended.line() == "hangs"
        assert ended.end() == 0
        id = ended.line()  # noqa: A001
    snapshot = status.snapshot(folder)
    assert snapshot.lost == ()
    assert snapshot.counts.discarded == 2
    assert status.of(id, folder) == "discarded"


def test_a_forked_child_begins_a_status_of_its_own(folder: Path) -> None:
    code = """
        app = BackgroundTasksMiddleware(
            app_that(lambda environ: background_tasks.add_task(nothing)), status_path=PATH
        )
        for _ in range(2):
            respond(app)
        assert status.snapshot().counts.succeeded == 2
        is_child = os.fork() == 0
        if not is_child:
            os.wait()
        respond(app)
        say(f"{os.getpid()} {status.snapshot().counts.succeeded}")
        """
    with process(code, folder) as parent:
        child, count = parent.line().split()
        assert count == "1"
        assert parent.line() == f"{parent.pid} 3"
        assert parent.end() == 0
    snapshot = status.snapshot(folder)
    assert snapshot.counts.succeeded == 4
    assert child != str(parent.pid)


def test_a_forked_child_shows_a_task_that_runs_before_any_task_has_ended(folder: Path) -> None:
    code = """
        tasks = [nothing, hang]
        app = BackgroundTasksMiddleware(
            app_that(lambda environ: background_tasks.add_task(tasks.pop(0))),
            status_path=PATH,
            runner="pool",
        )
        respond(app)
        assert wait() == []
        if os.fork() == 0:
            status.snapshot()
            respond(app)
        else:
            os.wait()
        """
    with process(code, folder) as parent:
        assert parent.line() == "hangs"
        assert wait_until(lambda: has(folder).counts.running == 1)
        snapshot = status.snapshot(folder)
        (task,) = snapshot.running
        assert task.pid != parent.pid
        assert {each.pid for each in snapshot.processes} == {parent.pid, task.pid}
        os.kill(task.pid, signal.SIGKILL)
        assert wait_until(lambda: has(folder).counts.lost == 1)


def test_other_processes_know_at_once_what_was_sent_from_memory(folder: Path) -> None:
    code = """
    from tests.support.post import Post, send

    ids = []
    for number in range(5):
        add = lambda: ids.append(background_tasks.add_task(send, number).id)
        visit(add, runner=Post(), status_path=PATH)
        wait()
        say(ids[-1])
        input()
    """
    with process(code, folder) as sender:
        for _ in range(5):
            sent = sender.line()
            assert status.of(sent, folder) == "sent"  # the process waits, and writes nothing
            sender.tell()


def test_a_process_is_shown_from_its_first_request_on(folder: Path) -> None:
    with process("visit(int, status_path=PATH)\nprint('visited')\ninput()", folder) as other:
        assert other.line() == "visited"
        assert wait_until(lambda: len(has(folder).processes) == 1)


def test_a_process_may_look_at_the_folder_of_others(folder: Path, tmp_path: Path) -> None:
    with process(ENDS, folder) as other:
        other.line()
        assert other.end() == 0
    handle(nothing, status_path=tmp_path / "own")
    snapshot = status.snapshot(folder)
    assert (snapshot.counts.succeeded, snapshot.processes) == (1, ())


def test_a_removed_folder_is_made_again(folder: Path, tmp_path: Path) -> None:
    handle(nothing, status_path=folder)
    assert wait_until((folder / "1.status").exists)
    folder.rename(tmp_path / "other")
    handle(fail, status_path=folder)
    assert wait_until((folder / "1.status").exists)
    assert status.snapshot(folder).counts.failed == 1


SITE = """
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from tests.status.support import hang

def view(environ, start_response):
    if environ["PATH_INFO"] == "/hang":
        background_tasks.add_task(hang)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

app = BackgroundTasksMiddleware(view, runner="pool", status_path=PATH)
"""


@contextmanager
def gunicorn(tmp_path: Path, folder: Path, *options: str) -> Iterator[int]:
    """A gunicorn with two workers; yields its port."""
    write(tmp_path, "site_with_status", f"PATH = {str(folder)!r}\n{SITE}")
    port = free_port()
    config = "def when_ready(server): print('Serving on http:' + str(server.address[0][1]))"
    write(tmp_path, "conf", config)
    arguments = ["-b", f"127.0.0.1:{port}", "-w", "2", "-c", "conf.py", *options]
    command = [sys.executable, "-m", "gunicorn", *arguments, "site_with_status:app"]
    with running(command, tmp_path):
        yield port


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_all_workers_of_gunicorn_are_in_it(
    options: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    with gunicorn(tmp_path, folder, *options) as port:

        def both_hang() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
            connection.request("GET", "/hang")
            assert connection.getresponse().read() == b"ok"
            connection.close()
            return len({task.pid for task in has(folder).running}) == 2

        assert wait_until(both_hang)
        snapshot = status.snapshot(folder)
        assert {each.pid for each in snapshot.processes} == {
            task.pid for task in snapshot.running
        }
        first = snapshot.processes[0].pid
        os.kill(first, 9)
        assert wait_until(lambda: first in {task.pid for task in has(folder).lost})
