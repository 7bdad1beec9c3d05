"""``wsgi-bg status PATH``, ``--log-tasks`` and ``--status-path``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.status.support import fail, handle, nothing, process
from tests.support import TIMEOUT, run_python, wait_until
from tests.support.command import ROOT, serving
from wsgi_bg import BackgroundTasks, status
from wsgi_bg._serving import cli
from wsgi_bg._serving.cli import main
from wsgi_bg._serving.log_tasks import TaskLog, logger
from wsgi_bg._status.files import ProcessFile, open_folder
from wsgi_bg._status.recorder import recorder
from wsgi_bg.hooks import TaskRecord

Result = subprocess.CompletedProcess[str]


def command(*arguments: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "wsgi_bg", "status", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=3 * TIMEOUT,
        check=False,
        cwd=ROOT,
    )


def test_the_status_of_all_processes_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "status"
    code = """
        handle(nothing, fail, path="/orders", status_path=PATH)
        handle(hang, nothing, path="/orders", status_path=PATH, runner=PoolRunner(threads=1))
        input()
        """
    with process(code, folder) as killed, process(code, folder) as other:
        assert killed.line() == other.line() == "hangs"
        assert wait_until(lambda: len(status.snapshot(folder).running) == 2)
        killed.kill()
        result = command(str(folder))
        as_json = json.loads(command(str(folder), "--json").stdout)
    assert (result.returncode, result.stderr) == (0, "")
    head, processes, running, functions, failed, lost = result.stdout.split("\n\n")
    assert head.startswith("1 running, 1 waiting, 2 succeeded, 2 failed, 0 retried")
    assert head.endswith("2 lost")
    assert "killed" in processes
    assert f"{other.pid} " in processes
    assert "1 of 1 busy, 0 idle" in processes
    assert "GET /orders" in running
    assert "tests.status.support.hang" in running
    assert "WAIT p50 / p95 / max" in functions
    assert "DISCARDED" not in functions
    assert "ValueError" in failed
    assert "not today" not in failed
    assert str(killed.pid) in lost
    assert as_json["counts"]["lost"] == 2
    assert as_json["processes"][0]["is_alive"] in (True, False)


def test_characters_that_a_terminal_obeys_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd() -> None: ...

    odd.__qualname__ = "\x1b[2J"
    handle(odd, path="/\x1b", status_path=tmp_path)
    recorder.process().write()
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J" in out


def test_durable_tasks_and_a_pool_without_a_limit_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        from tests.support.durable_shop import write
        from wsgi_bg import portal
        runner = DurableRunner(PATH, local=PoolRunner(max_pending=None))
        handle(nothing, status_path=PATH, runner=runner)
        portal().call(nothing)
        visit(
            lambda: background_tasks.using(delay=600.0).add_task(write, 1),
            status_path=PATH,
            runner=runner,
        )
        assert wait(10) == []
        say("done")
        input()
        """
    with process(code, tmp_path) as other:
        assert other.line() == "done"

        def has_no_limit() -> bool:
            processes = status.snapshot(tmp_path).processes
            return [each.max_pending for each in processes] == [None]

        assert wait_until(has_no_limit)
        assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "of no limit" in out
    assert "durable.write" in out.partition("\ndurable\n")[2]


@pytest.mark.parametrize("arguments", [["nowhere"], ["."], ["nowhere", "--odd"], []])
def test_a_wrong_command_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["status", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("wsgi-bg status: ")
    assert error.count("\n") == 1
    if arguments == ["."]:
        assert "no process has written its status into '.'" in error


@pytest.mark.parametrize("arguments", [["status", "."], ["tasks", ".", "list", "--json"]])
def test_an_output_that_cannot_be_written_is_one_line(
    arguments: list[str], tmp_path: Path
) -> None:
    ProcessFile(open_folder(tmp_path))
    with open("/dev/full", "w", encoding="utf-8") as full:
        found = subprocess.run(
            [sys.executable, "-m", "wsgi_bg", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=3 * TIMEOUT,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert found.returncode == 2
    assert found.stderr.startswith(f"wsgi-bg {arguments[0]}: ")
    assert found.stderr.count("\n") == 1


def test_a_folder_of_another_user_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything.
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["status", str(tmp_path)]) == 2
    expected = f"wsgi-bg status: {str(tmp_path)!r} cannot be read by this user\n"
    assert capsys.readouterr().err == expected


def test_an_empty_folder_of_a_living_process_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ProcessFile(open_folder(tmp_path))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 running")


def test_log_tasks_writes_a_line_for_each_task(tmp_path: Path) -> None:
    with serving(tmp_path, "--log-tasks", "--runner", "inline") as served:
        response = served.ask("/quick")
        assert response.read() == b"ok\n"
        assert served.line() == "task ran"
        line = served.next_error()
    words = line.split()
    assert words[2:4] == ["task", "shop.task"]
    assert len(words[4]) == 36
    assert (words[5], words[7], words[9]) == ("wait", "run", "succeeded")
    assert 0 <= float(words[6].removesuffix("s")) < TIMEOUT


def test_a_name_with_line_breaks_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def evil() -> None:
        pass

    evil.__qualname__ = "evil\n\x1b[31m"
    logger.handlers.clear()
    handle(evil, hooks=TaskLog())
    [line] = capsys.readouterr().err.splitlines()
    assert "evil\\n\\x1b[31m " in line


def test_an_error_whose_class_has_a_strange_name_has_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil: Any = type("Evil\n\x1b[31m", (Exception,), {})

    def fail_strangely() -> None:
        raise evil

    logger.handlers.clear()
    handle(fail_strangely, hooks=TaskLog())
    lines = capsys.readouterr().err.splitlines()
    assert any(line.endswith(" failed with Evil\\n\\x1b[31m") for line in lines)


def test_the_lines_name_each_outcome(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.handlers.clear()
    hooks = TaskLog()
    (task,) = handle(nothing, status=None)
    TaskLog()
    assert len(logger.handlers) == 1
    logger.disabled = True
    handle(nothing, fail, hooks=hooks)
    handle(nothing, run_on="error", hooks=hooks)
    hooks.task_sent(TaskRecord(task, BackgroundTasks()))
    written = [line.split() for line in capsys.readouterr().err.splitlines()]
    lines = [line[9:] for line in written if line[2:3] == ["task"]]
    assert lines == [
        ["succeeded"],
        ["failed", "with", "ValueError"],
        ["discarded"],
        ["sent"],
    ]
    logger.handlers.clear()


@pytest.mark.parametrize(
    ("loggers", "count"),
    [
        ({"wsgi_bg": {"level": "WARNING"}}, 1),
        ({"wsgi_bg": {"level": "INFO"}}, 1),
        ({"wsgi_bg": {"level": "INFO"}, "wsgi_bg.tasks": {"level": "WARNING"}}, 0),
        ({}, 1),
    ],
)
def test_the_lines_come_unless_a_configuration_names_their_logger(
    loggers: dict[str, Any], count: int
) -> None:
    """dictConfig() resets the loggers below one that it names."""
    ended = run_python(f"""
import logging.config
from tests.status.support import handle, nothing
from wsgi_bg._serving.log_tasks import TaskLog

hooks = TaskLog()
logging.config.dictConfig({{"version": 1, "loggers": {loggers}}})
handle(nothing, hooks=hooks)
""")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(" task tests.status.support.nothing ") == count


def test_the_command_has_a_status_path(tmp_path: Path) -> None:
    folder = tmp_path / "status"
    with serving(tmp_path, "--status-path", str(folder)) as served:
        assert served.ask("/quick").read() == b"ok\n"
        assert served.line() == "task ran"
        assert wait_until(lambda: status.snapshot(folder).counts.succeeded == 1)


def test_a_wrong_status_path_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shop:app", "--status-path", __file__]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "wsgi-bg: --status-path must be the path of a folder on a local disk"
    )
    assert error.count("\n") == 1


def test_the_options_are_for_each_middleware_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere: list[object] = []
    monkeypatch.setattr(cli, "everywhere", everywhere)
    cli._watch(Namespace(log_tasks=False, status_path=None))
    assert everywhere == []
    cli._watch(Namespace(log_tasks=True, status_path=str(tmp_path)))
    assert [type(each) for each in everywhere] == [TaskLog, type(recorder)]
    assert [folder.path for folder in recorder.folders] == [str(tmp_path)]


def test_a_filter_that_raises_for_a_line_stops_no_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(record: object) -> bool:
        raise ValueError("a filter of the application")

    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "filters", [refuse])
    done: list[int] = []
    handle(partial(done.append, 1), partial(done.append, 2), hooks=TaskLog(), status=None)
    assert done == [1, 2]
    assert "TaskLog.task_finished raised for background task" in caplog.text
