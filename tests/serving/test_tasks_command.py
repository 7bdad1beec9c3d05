"""``wsgi-bg tasks PATH list|show|retry|discard``, mostly on folders that processes use."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.support import TIMEOUT, wait_until
from tests.support.command import write as write_module
from tests.support.durable import (
    COMMAND,
    ROOT,
    Shop,
    at_gate,
    change,
    forge,
    id_of,
    kill,
    leave_failed,
    left_by_a_dead_process,
    listed,
    said,
    tasks,
)
from wsgi_bg._serving import tasks_command
from wsgi_bg._serving.cli import main
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.inspection import Found, list_tasks, order
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import StoreError

NOBODY = "wsgi-bg tasks: no process uses the folder now: the next one that starts"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def names_and_states(shop: Shop, *arguments: str) -> list[tuple[str, str]]:
    return [(task["name"], task["state"]) for task in listed(shop, *arguments)]


def proceed(process: subprocess.Popen[str]) -> None:
    """Let the process read a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


# Looking.


def test_a_table_shows_the_tasks_while_a_process_runs_them(shop: Shop) -> None:
    with at_gate(shop):
        result = tasks(shop.folder, "list")
        assert (result.returncode, result.stderr) == (0, "")
        titles, *lines = result.stdout.splitlines()
    assert titles.split() == [
        *("ID", "NAME", "STATE", "ADDED", "DUE", "ENDED", "ATTEMPTS", "CRASHES", "ERROR")
    ]
    assert [line.split()[1:3] for line in lines] == [
        ["durable.fail", "failed"],
        ["durable.wait_for_line", "running"],
        ["durable.write", "waiting"],
        ["durable.add_two", "waiting"],
    ]
    assert lines[0].split()[-3:] == ["1", "0", "ValueError"]
    states = ("failed", "running", "waiting", "waiting")
    assert (
        len({line.index(f" {state}") for line, state in zip(lines, states, strict=True)}) == 1
    )


def test_only_show_has_messages_tracebacks_and_arguments(shop: Shop) -> None:
    leave_failed(shop, 7)
    for options in ([], ["--json"]):
        result = tasks(shop.folder, "list", *options)
        assert "ValueError" in result.stdout
        for secret in ("secret", "Traceback", "arguments"):
            assert secret not in result.stdout
    result = tasks(shop.folder, "show", id_of(shop, "durable.fail"))
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"task {id_of(shop, 'durable.fail')}"
    assert all(line.startswith("  ") for line in lines[1:])
    assert "  error     ValueError" in lines
    assert lines[lines.index("  arguments") + 1] == "    7"
    assert lines[lines.index("  traceback") + 1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    ValueError: secret 7"


def test_json_has_times_in_utc_and_everything_of_a_task_in_show(shop: Shop) -> None:
    before = time.time()
    leave_failed(shop, 7)
    (task,) = listed(shop)
    assert before <= datetime.fromisoformat(task["added"]).timestamp() <= time.time()
    assert task["begun"] <= task["ended"]
    assert task["ended"].endswith("+00:00")
    assert (task["due"], task["attempts"], task["crashes"]) == (None, 1, 0)
    assert (task["error"], task["owned"]) == ("ValueError", False)
    (shown,) = json.loads(tasks(shop.folder, "show", task["id"], "--json").stdout)
    assert json.loads(shown.pop("arguments")) == [1, [7], {}]
    assert shown.pop("traceback").endswith("ValueError: secret 7\n")
    assert shown.pop("options") is None
    assert json.loads(shown.pop("context")) == {"x-wsgi-bg-request": "GET /"}
    assert shown == task


def test_filters_choose_by_name_state_and_age(shop: Shop) -> None:
    with at_gate(shop):
        by_state = names_and_states(shop, "--state", "failed", "--state", "running")
        assert by_state == [("durable.fail", "failed"), ("durable.wait_for_line", "running")]
        assert names_and_states(shop, "--name", "*.w*", "--state", "waiting") == [
            ("durable.write", "waiting")
        ]
        assert len(listed(shop, "--newer-than", "2h", "--name", "durable.*")) == 4
        assert listed(shop, "--older-than", "0.5d") == []
        change(shop, "UPDATE kept SET added = added - 3000")
        assert names_and_states(shop, "--older-than", "49m") == [("durable.fail", "failed")]
        assert names_and_states(shop, "--newer-than", "49m", "--name", "*fail") == []
        nothing = tasks(shop.folder, "list", "--older-than", "4000s")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert nothing.stderr == "wsgi-bg tasks: no task matches\n"


def test_only_a_star_stands_for_other_text_in_a_name(shop: Shop) -> None:
    names = "shop[eu].mail", "shope.mail", "shop?.mail", "shop\n.mail"
    left_by_a_dead_process(shop.folder, *(Row(name, "[1,[],{}]") for name in names))
    for given in names:
        assert [name for name, _ in names_and_states(shop, "--name", given)] == [given]
    assert len(listed(shop, "--name", "shop*l")) == 4
    assert listed(shop, "--name", "shop*L") == []


def test_done_tasks_are_listed_by_name_and_times(shop: Shop) -> None:
    with shop.process("handle(runner, (write, 1)); input()") as process:
        done = [("durable.write", "done")]
        assert wait_until(lambda: shop.calls and names_and_states(shop) == done)
        kill(process)
    (task,) = listed(shop)
    assert task["added"] <= task["begun"] <= task["ended"]
    assert (task["attempts"], task["crashes"]) == (None, None)  # not kept
    _, line = tasks(shop.folder, "list").stdout.splitlines()
    assert line.split()[-3:] == ["-", "-", "-"]
    result = tasks(shop.folder, "show", task["id"])
    for title in ("arguments", "attempts", "crashes"):
        assert title not in result.stdout
    assert result.stderr == ""


def test_a_task_that_ran_when_its_process_died_waits_with_a_crash_more(shop: Shop) -> None:
    with at_gate(shop) as process:
        kill(process)
    found = [(task["name"], task["state"], task["crashes"]) for task in listed(shop)]
    assert found == [
        ("durable.fail", "failed", 0),
        ("durable.wait_for_line", "waiting", 1),
        ("durable.write", "waiting", 0),
        ("durable.add_two", "waiting", 0),
    ]
    result = tasks(shop.folder, "list")
    assert (result.returncode, result.stderr) == (0, f"{NOBODY} runs them\n")
    task = id_of(shop, "durable.write")
    shown = tasks(shop.folder, "show", task)
    assert "  process   none\n" in shown.stdout
    assert shown.stderr == f"{NOBODY} runs it\n"


# Orders.


def test_a_process_that_lives_runs_a_retried_task_again(shop: Shop) -> None:
    code = "handle(runner, (fail, 1)); wait_for(2); print('again', flush=True); input()"
    with shop.process(code) as process:
        assert wait_until(lambda: shop.states == ["failed"])
        (before,) = listed(shop)
        result = tasks(shop.folder, "retry", before["id"])
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{before['id']} durable.fail: runs again\n"
        said(process, "again")
        assert wait_until(lambda: shop.states == ["failed"])
        (after,) = listed(shop)
    assert (after["id"], after["added"]) == (before["id"], before["added"])
    assert after["ended"] > before["ended"]


def test_a_discarded_task_never_begins(shop: Shop) -> None:
    rest = "print(wait_for(4), flush=True); input()"
    with at_gate(shop, rest) as process:
        task = id_of(shop, "durable.write")
        result = tasks(shop.folder, "discard", task)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{task} durable.write: discarded\n"
        assert "durable.write" not in dict(names_and_states(shop))
        proceed(process)
        said(process, "[1, 3, '3.1', '3.2']")


def test_a_running_task_is_refused_and_the_others_are_discarded(shop: Shop) -> None:
    with at_gate(shop):
        running, failed = id_of(shop, "durable.wait_for_line"), id_of(shop, "durable.fail")
        for what, wanted in (
            ("retry", "failed, aside"),
            ("discard", "failed, aside, waiting"),
        ):
            result = tasks(shop.folder, what, running)
            assert (result.returncode, result.stdout) == (1, "")
            assert f"task {running} is running; {what} is for: {wanted}\n" in result.stderr
            assert result.stderr.count("\n") == 1
        result = tasks(shop.folder, "discard", running, failed, "nothing")
        assert result.returncode == 1
        assert result.stdout == f"{failed} durable.fail: discarded\n"
        assert result.stderr.count("\n") == 2
        assert "no task has the id 'nothing'" in result.stderr
        assert ("durable.wait_for_line", "running") in names_and_states(shop)


def test_all_with_filters_discards_what_matches_and_does_not_run(shop: Shop) -> None:
    with at_gate(shop):
        result = tasks(shop.folder, "discard", "--all", "--name", "*.w*")
        assert result.returncode == 0
        assert result.stdout.endswith("durable.write: discarded\n")
        assert result.stderr == "wsgi-bg tasks: running tasks, which were left alone: 1\n"
        result = tasks(shop.folder, "discard", "--all", "--name", "*.w*", "--state", "failed")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == "wsgi-bg tasks: no task to discard matches\n"
        left = names_and_states(shop)
    assert [name for name, _ in left] == [
        "durable.fail",
        "durable.wait_for_line",
        "durable.add_two",
    ]


def test_without_a_process_the_next_one_obeys_before_it_runs_tasks(shop: Shop) -> None:
    with at_gate(shop) as process:
        kill(process)
    waits, fail = id_of(shop, "durable.wait_for_line"), id_of(shop, "durable.fail")
    result = tasks(shop.folder, "discard", waits, fail)  # first one, and then another order
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        f"{fail} durable.fail: will be discarded",
        f"{waits} durable.wait_for_line: will be discarded",
    ]
    assert result.stderr == f"{NOBODY} discards them\n"
    result = tasks(shop.folder, "retry", fail)
    assert (result.returncode, result.stderr) == (0, f"{NOBODY} runs it\n")
    assert result.stdout == f"{fail} durable.fail: will run again\n"
    orders = list(shop.folder.glob("*.order"))
    assert len(orders) == 2
    assert {order.stat().st_mode & 0o777 for order in orders} == {0o600}
    code = "runner.start(); print(sorted(map(str, wait_for(5))), flush=True); input()"
    with shop.process(code) as process:
        said(process, "['1', '2', '3', '3.1', '3.2']")
        assert wait_until(lambda: shop.states == ["failed"]), shop.states
        assert list(shop.folder.glob("*.order")) == []


def test_an_order_waits_for_its_process_for_days(shop: Shop) -> None:
    leave_failed(shop, 1)
    assert tasks(shop.folder, "retry", "--all").returncode == 0
    (order,) = shop.folder.glob("*.order")
    day_before = order.stat().st_mtime - 86400
    os.utime(order, (day_before, day_before))
    other = check_folder(shop.folder)
    with closing(Store.own(other, Settings())) as store:
        store.tidy()
        assert order.exists()
    with shop.process("runner.start(); wait_for(1); print('again', flush=True)") as process:
        said(process, "again")


def test_a_process_that_is_stopped_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks_command, "MAX_LOOKS", 2)
    with at_gate(shop) as process:
        task = id_of(shop, "durable.write")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert main(["tasks", str(shop.folder), "discard", task]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"task {task}: its process did not obey within" in err
        assert "the order stays" in err
        process.send_signal(signal.SIGCONT)
        assert wait_until(lambda: "durable.write" not in dict(names_and_states(shop)))


@contextmanager
def command_in_thread(path: Path, *arguments: str) -> Iterator[list[int]]:
    """Run the command until the block has ended; the list then has the exit status."""
    status: list[int] = []
    thread = threading.Thread(
        target=lambda: status.append(main(["tasks", str(path), *arguments]))
    )
    thread.start()
    assert wait_until(lambda: list(path.glob("*.order")))
    try:
        yield status
    finally:
        thread.join(TIMEOUT)


def test_an_order_for_a_task_that_began_meanwhile_is_too_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store.own(check_folder(tmp_path), Settings())) as store:
        (row,) = store.add([Row("shop.mail", "")])
        with command_in_thread(tmp_path, "discard", row.id) as status:
            assert store.begin(row)
            store.tidy()
        assert status == [1]
        late = f"task {row.id} is running now: the order to discard came too late"
        assert capsys.readouterr().err == f"wsgi-bg tasks: {late}\n"
        store.end(Outcome(row, "failed", 1.0, time.time()))
        store.tidy()
        with command_in_thread(tmp_path, "retry", row.id) as status:
            next(iter(tmp_path.glob("*.order"))).unlink()
        assert status == [1]
        late = f"task {row.id} is failed now: the order to retry came too late"
        assert capsys.readouterr().err == f"wsgi-bg tasks: {late}\n"


def test_the_command_waits_as_long_as_orders_are_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [["1"], ["1"], ["1", "2"], ["1", "2"], ["1", "2"]]

    class Obeyed(Folder):
        def orders(self) -> list[str]:
            return left.pop() if left else []

    monkeypatch.setattr(tasks_command, "MAX_LOOKS", 3)
    folder = Obeyed(*check_folder(tmp_path))
    assert tasks_command._wait(folder, {"1", "2"}) == set()


# Nothing by accident.


@pytest.mark.parametrize("what", ["retry", "discard"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give the ids of the tasks to {what}, or --all"),
        (["--name", "*"], "give the ids of the tasks to {what}, or --all"),
        (["1-1", "--all"], "give either ids or --all with filters to {what}, not both"),
        (["1-1", "--older-than", "1h"], "give either ids or --all"),
        (["--all", "--state", "running"], "invalid choice: 'running'"),
        (["--all", "--older-than", "soon"], "'soon' is no age, for instance 90s"),
        (["--a"], "unrecognized arguments: --a"),
    ],
)
def test_wrong_arguments_order_nothing(
    what: str,
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(Store.own(check_folder(tmp_path), Settings())) as store:
        (row,) = store.add([Row("shop.mail", "")])
        assert store.begin(row)
        store.end(Outcome(row, "failed", 1.0, time.time()))
        store.tidy()
        assert main(["tasks", str(tmp_path), what, *arguments]) == 2
        assert list(tmp_path.glob("*.order")) == []
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"wsgi-bg tasks: {reason.format(what=what)}") or reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("action", ["list", "show", "retry", "discard"])
def test_a_folder_that_is_not_there_is_not_made(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no\x1b[31m"
    ids = [] if action == "list" else ["1-1"]
    assert main(["tasks", str(path), action, *ids]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"wsgi-bg tasks: the durable tasks in {str(path)!r}: there is no such folder\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_of_tasks_is_one_line_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = tasks(file, "list")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("it is not a folder\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    result = tasks(folder, "list", "--json")
    assert (result.returncode, result.stdout, result.stderr) == (1, "[]\n", "")
    result = tasks(folder, "show", "1-1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "wsgi-bg tasks: no task has the id '1-1'\n"
    assert list(folder.iterdir()) == []
    (folder / "00000001.sqlite").write_bytes(b"no database" * 100)
    result = tasks(folder, "list")
    assert (result.returncode, result.stdout) == (2, "")
    assert "not a database" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_lock_file_is_named_and_not_made(shop: Shop) -> None:
    leave_failed(shop, 1)
    (shop.folder / "owners.lock").unlink()
    result = tasks(shop.folder, "list")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("the lock file owners.lock is missing\n")
    assert not (shop.folder / "owners.lock").exists()


def test_an_order_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with closing(Store.own(check_folder(tmp_path), Settings())) as store:
        (row,) = store.add([Row("shop.mail", "")])
        monkeypatch.setattr(os, "replace", full)
        assert main(["tasks", str(tmp_path), "discard", row.id]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("the order cannot be written: No space left on device\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_order_of_root_belongs_to_the_user_whose_process_has_the_task(
    tmp_path: Path,
) -> None:
    folder = check_folder(tmp_path)  # a folder of root, in which others may write
    found = Found(1, False, Outcome(Row("shop.mail", "", id="1-1"), "failed"))
    Path(folder.file(1)).touch()
    os.chown(folder.file(1), 65534, 65534)
    assert os.stat(order(folder, found, "retry")).st_uid == 65534
    os.unlink(folder.file(1))  # the process removes the file meanwhile
    os.chown(tmp_path, 65533, 65533)
    assert os.stat(order(folder, found, "retry")).st_uid == 65533


# Rows are data.


def test_a_forged_row_cannot_write_to_the_terminal(shop: Shop) -> None:
    leave_failed(shop, 1)
    (known,) = json.loads(tasks(shop.folder, "list", "--json").stdout)
    evil = "\x1b[31m\r\n1-9  fine\u202e\udcff".encode("utf-8", "surrogatepass")
    invalid = "x" * 200
    row = [evil, "{", evil, evil, 1e300, 0, 0, evil, float("inf"), 7, 7]
    forge(shop, "kept", *row, evil, -1.0, 1e300, evil, evil)
    wrong_types = [memoryview(b"bytes"), 5, None, None, "no", "no", "no", invalid, "no", 8, 8]
    forge(shop, "tasks", *wrong_types)
    forge(shop, "tasks", "evil\x1b[1m" * 20, "", "", "", 1.0, 0, 0, "9-9", 1.0, 9, 9)
    for arguments in (["list"], ["list", "--json"], ["show", "9-9", invalid, known["id"]]):
        result = tasks(shop.folder, *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.replace("\n", "").isprintable()
    table = tasks(shop.folder, "list").stdout.splitlines()
    assert len(table) == 5
    assert max(map(len, table)) < 5 * 80
    assert r"\x1b[31m\r\n1-9" in table[1]
    assert table[2].split()[:2] == [f"{'x' * 77}...", "-"]


def test_a_forged_task_is_shown_in_its_own_block_and_ordered_in_vain(shop: Shop) -> None:
    leave_failed(shop, 1)
    text = "Traceback\ntask 1-1\n\x1b[31m\ttext"
    row = ["shop.mail", "{", "", "{}", 0.0, 0, 0, "a\nb", 1.0, 7, 7]
    forge(shop, "kept", *row, "fine", 1.0, 1.0, "", text)
    result = tasks(shop.folder, "show", "a\nb")
    assert result.stdout.splitlines()[0] == r"task a\nb"
    assert result.stdout.splitlines()[-6:] == [
        "  arguments",
        "    stored as: {",
        "  traceback",
        "    Traceback",
        "    task 1-1",
        r"    \x1b[31m\ttext",
    ]
    result = tasks(shop.folder, "retry", "a\nb")
    assert (result.returncode, result.stdout) == (1, "")
    assert r"task a\nb is fine; retry is for: failed, aside" in result.stderr


def test_any_encoding_of_the_terminal_will_do(shop: Shop) -> None:
    leave_failed(shop, 1)
    row = ["größe", "[1,[],{}]", "", "", 0.0, 0, 0, "ü", 1.0, 7, 7]
    forge(shop, "kept", *row, "failed", 1.0, 1.0, "", "")
    assert " größe " in tasks(shop.folder, "list", PYTHONIOENCODING="utf-8").stdout
    assert r" gr\xf6\xdfe " in tasks(shop.folder, "list", PYTHONIOENCODING="ascii").stdout
    shown = tasks(shop.folder, "show", "ü", PYTHONIOENCODING="utf-8", PYTHONUTF8="1")
    assert shown.stdout.startswith("task ü\n  name      größe\n")


def test_a_reader_that_has_seen_enough_is_no_error(shop: Shop) -> None:
    leave_failed(shop, 1)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            [*COMMAND, str(shop.folder), "list"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=3 * TIMEOUT,
            check=False,
            cwd=ROOT,
        )
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


# Files of processes that have died.


def test_ends_that_a_dead_process_has_noted_count(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.rows import Outcome, Row, Settings
from wsgi_bg._store.store import Store

store = Store.own(check_folder(sys.argv[1]), Settings())
for row in store.add([Row(name, "") for name in ("done", "failed", "aside", "running", "x")]):
    if row.name != "x":
        assert store.begin(row)
    if row.name not in ("running", "x"):
        store.end(Outcome(row, row.name))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False, timeout=TIMEOUT)
    folder = check_folder(tmp_path)

    def states() -> list[tuple[str, str, int]]:
        rows = [task.outcome for task in list_tasks(folder)]
        return [(each.row.name, each.state, each.row.crashes) for each in rows]

    expected = [
        ("failed", "failed", 0),
        ("aside", "aside", 0),
        ("running", "waiting", 1),
        ("x", "waiting", 0),
    ]
    assert states() == expected
    with closing(sqlite3.connect(folder.file(1))) as file, file:
        # As if the process that applies the notes had died before it cleared them.
        file.execute("UPDATE meta SET epoch = 1")
    assert [name_state[:2] for name_state in states()][-2:] == [
        ("running", "waiting"),
        ("x", "waiting"),
    ]
    assert all(crashes == 0 for _, _, crashes in states())
    Path(folder.file(1, ".notes")).unlink()
    assert len(states()) == 5


def test_a_file_that_goes_while_it_is_read_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = check_folder(tmp_path)
    (tmp_path / "owners.lock").touch()
    monkeypatch.setattr(type(folder), "numbers", lambda self: [1])
    assert list_tasks(folder) == []
    (tmp_path / "00000001.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        list_tasks(folder)


# Beside the other command.


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--help"], "wsgi-bg tasks PATH list|show|retry|discard"),
        (["tasks", "--help"], "run failed tasks"),
        (["tasks", ".", "discard", "--help"], "discard all tasks that match the filters"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert text in " ".join(capsys.readouterr().out.split())
    assert main(["tasks"]) == 2
    assert "required: PATH" in capsys.readouterr().err


def test_a_module_named_tasks_can_be_served(tmp_path: Path) -> None:
    write_module(tmp_path, "tasks", "print('imported', flush=True)\napp = 1\n")
    result = subprocess.run(
        [sys.executable, "-m", "wsgi_bg", "tasks:app"],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "imported\n"
    assert "tasks:app is not callable" in result.stderr
