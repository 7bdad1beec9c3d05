"""The options ``status`` and ``status_path``, and their keys in configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from tests.status.support import fail, nothing
from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, background_tasks, status
from wsgi_bg._status.recorder import recorder
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks, TaskRecord


def make(**options: Any) -> BackgroundTasksMiddleware:
    app = app_that(lambda environ: background_tasks.add_task(nothing))
    return BackgroundTasksMiddleware(app, **options)


def test_nothing_is_recorded_unless_asked_for() -> None:
    make()
    make(status=False)
    assert not recorder.is_on


def test_a_folder_implies_the_recording(tmp_path: Path) -> None:
    make(status_path=tmp_path / "status")
    assert recorder.is_on
    assert (tmp_path / "status").is_dir()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"status": "yes"}, TypeError, r"^status must be True or False; got 'yes'$"),
        ({"status_path": 3}, TypeError, r"^status_path must be the path of a folder; got 3$"),
        (
            {"status": False, "status_path": "x"},
            ValueError,
            r"^status must be True, since status_path is given; got False$",
        ),
        (
            {"status_path": ":memory:"},
            ValueError,
            "^status_path must be the path of a folder on a local disk, which this user can "
            "write; got ':memory:'$",
        ),
        ({"status_path": __file__}, ValueError, "^status_path must be the path of a folder on"),
    ],
)
def test_a_wrong_value_is_refused_early(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_flask_has_keys_for_the_options(tmp_path: Path) -> None:
    app = Flask(__name__)
    app.config["WSGI_BG_STATUS_PATH"] = str(tmp_path / "status")
    Background(app)
    assert [folder.path for folder in recorder.folders] == [str(tmp_path / "status")]
    app = Flask(__name__)
    app.config["WSGI_BG_STATUS"] = "on"
    with pytest.raises(TypeError, match="WSGI_BG_STATUS must be True or False; got 'on'"):
        Background(app)


def test_an_inner_layer_keeps_the_recorder_of_the_outer_layer() -> None:
    seen: list[str] = []

    class Seen(Hooks):
        def task_finished(self, record: TaskRecord) -> None:
            seen.append(record.name)

    app = BackgroundTasksMiddleware(make(hooks=Seen()), status=True)
    Server().run(app, make_server_environ())
    assert seen == ["tests.status.support.nothing"]
    assert status.snapshot().counts.succeeded == 1


def test_an_inner_layer_may_ask_for_the_recorder() -> None:
    def view(environ: object) -> None:
        background_tasks.add_task(nothing)

    inner = BackgroundTasksMiddleware(app_that(view), status=True)

    def outer(environ: Any, start_response: Any) -> Any:
        background_tasks.add_task(fail)
        return inner(environ, start_response)

    Server().run(BackgroundTasksMiddleware(outer), make_server_environ())
    counts = status.snapshot().counts
    assert (counts.succeeded, counts.failed) == (1, 0)


def test_several_tasks_of_a_layer_are_counted_while_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsgi_bg._status.recorder.MAX_ENTRIES", 2)

    def view(environ: object) -> None:
        for function in (nothing, nothing, nothing, fail, fail, fail):
            background_tasks.add_task(function)

    Server().run(BackgroundTasksMiddleware(app_that(view), status=True), make_server_environ())
    journal = recorder.process().journal
    assert journal.counted == 6
    assert not journal.successes
    assert not journal.entries
