"""The monitor of an application whose tasks are recorded, without a browser."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from tests.monitor.shop import make_app
from tests.monitor.support import Answer, open_monitor
from tests.support import App
from wsgi_bg import wait
from wsgi_bg._status.recorder import Recorder
from wsgi_bg.exceptions import OptionValueError
from wsgi_bg.flask import Background
from wsgi_bg.monitor import Monitor

OVERVIEW = "/admin/tasks/overview.json"


def new_shop(status_path: Path, **options: Any) -> App:
    app: App = make_app(str(status_path), **options).wsgi_app
    return app


def overview(app: App, path: str = OVERVIEW) -> Any:
    answer = Answer(app, path)
    assert answer.code == 200, answer.body
    return answer.json


def add(app: App, name: str) -> None:
    assert Answer(app, f"/add/{name}", "POST").code == 200
    assert wait(10) == []


def test_message_and_traceback_are_sent_when_they_are_asked_for(tmp_path: Path) -> None:
    app = new_shop(tmp_path)
    add(app, "fail")
    answer = Answer(app, OVERVIEW)
    assert b"secret" not in answer.body  # no number: a time may have the digits
    (row,) = answer.json["failures"]["rows"]
    assert (row["name"], row["error"]) == ("tests.monitor.shop.fail", "LookupError")
    found = Answer(app, f"/admin/tasks/error.json?key={row['key']}").json
    assert found["message"] == "secret 4711"
    assert found["traceback"].endswith("LookupError: secret 4711\n")
    gone = Answer(app, "/admin/tasks/error.json?key=unknown")
    assert (gone.code, gone.json) == (404, {"error": "Newer failures have displaced this one."})


def test_without_show_errors_nobody_can_ask_for_a_message() -> None:
    assert Answer(open_monitor(show_errors=False), "/error.json?key=1").code == 404


@pytest.mark.parametrize("has_written", [True, False])
def test_a_process_shows_itself_before_its_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_written: bool
) -> None:
    if not has_written:  # as if the thread that writes had not run yet
        monkeypatch.setattr(Recorder, "start", lambda self: None)
    app = new_shop(tmp_path / "new")
    assert len(overview(app)["processes"]["rows"]) == 1
    assert Answer(app, "/admin/tasks/task.json?id=1").code == 404


def test_without_a_path_the_monitor_shows_the_folder_of_the_process(tmp_path: Path) -> None:
    new_shop(tmp_path)
    monitor = open_monitor()
    add(new_shop(tmp_path), "succeed")
    assert overview(monitor, "/overview.json")["counts"]["succeeded"] == 1


def test_a_process_that_records_nothing_shows_what_runs_and_no_times() -> None:
    data = overview(open_monitor(), "/overview.json")
    assert (data["minutes"], data["failures"]["rows"]) == ([], [])


@pytest.mark.parametrize(
    ("options", "has_minutes"),
    [({}, True), ({"status": True}, True), ({"status": False}, False)],
    ids=["by default", "asked for", "forbidden"],
)
def test_a_mounted_monitor_turns_the_recording_on_unless_it_is_off(
    options: dict[str, Any], has_minutes: bool
) -> None:
    app = Flask("shop")
    Background(app, monitor=open_monitor(), **options)
    data = overview(app.wsgi_app, "/background-tasks/overview.json")
    assert bool(data["minutes"]) is has_minutes


def test_a_path_of_the_application_is_stronger_than_that_of_the_monitor(tmp_path: Path) -> None:
    monitor = open_monitor(path=tmp_path / "of_monitor")
    Background(Flask("shop"), monitor=monitor, status_path=tmp_path / "of_app")
    assert [path.name for path in tmp_path.iterdir()] == ["of_app"]
    with pytest.raises(OptionValueError, match="status must be True"):
        Background(Flask("shop"), monitor=monitor, status=False)


def test_polls_leave_nothing_in_memory(tmp_path: Path) -> None:
    app = new_shop(tmp_path)
    add(app, "fail")

    def poll() -> None:
        for _ in range(50):
            Answer(app, OVERVIEW)

    poll()
    gc.collect()
    before = len(gc.get_objects())
    poll()
    gc.collect()
    assert len(gc.get_objects()) - before < 200


def test_the_monitor_is_named_by_its_public_module() -> None:
    assert f"{Monitor.__module__}.{Monitor.__qualname__}" == "wsgi_bg.monitor.Monitor"
