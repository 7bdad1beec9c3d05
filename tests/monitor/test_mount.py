"""The options ``monitor`` and ``monitor_at`` of ``Background``."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, request
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from tests.monitor.support import Answer, open_monitor, yes
from wsgi_bg.exceptions import OptionError, OptionTypeError, OptionValueError
from wsgi_bg.flask import Background


def make_app(config: dict[str, Any] | None = None, **options: Any) -> Flask:
    app = Flask("shop")
    app.config.update(config or {})

    @app.route("/", defaults={"path": ""})
    @app.route("/<path:path>")
    def view(path: str) -> str:
        return f"view of {request.root_path}|{request.path}"

    Background(app, **options)
    return app


def body(app: Any, path: str, **environ: Any) -> str:
    return Answer(app, path, **environ).body.decode()


def test_the_page_is_below_its_path_and_all_else_is_the_applications() -> None:
    app = make_app(monitor=open_monitor(), monitor_at="/admin/tasks").wsgi_app
    assert "<title>Background tasks</title>" in body(app, "/admin/tasks/")
    assert Answer(app, "/admin/tasks/overview.json").code == 200
    assert Answer(app, "/admin/tasks").headers["Location"] == "./tasks/"
    for path in ("/", "/admin/tasks2", "/admin", "/x/admin/tasks/"):
        assert body(app, path) == f"view of |{path}"


def test_without_a_path_the_page_is_at_background_tasks() -> None:
    app = make_app(monitor=open_monitor()).wsgi_app
    assert Answer(app, "/background-tasks/page.js").code == 200


def test_the_path_may_have_any_letters() -> None:
    app = make_app(monitor=open_monitor(), monitor_at="/aufträge").wsgi_app
    assert Answer(app, "/auftr\xc3\xa4ge/").code == 200


def test_the_page_is_below_the_path_of_the_application() -> None:
    seen: list[tuple[str, str]] = []

    def allowed(environ: dict[str, Any]) -> bool:
        seen.append((environ["SCRIPT_NAME"], environ["PATH_INFO"]))
        return True

    from wsgi_bg.monitor import Monitor

    shop = make_app(monitor=Monitor(allowed=allowed)).wsgi_app
    app = DispatcherMiddleware(make_app().wsgi_app, {"/shop": shop})
    assert Answer(app, "/shop/background-tasks/page.css").code == 200
    assert seen == [("/shop/background-tasks", "/page.css")]
    assert body(app, "/shop/else") == "view of /shop|/else"


def test_the_configuration_names_monitor_and_path() -> None:
    config = {"WSGI_BG_MONITOR": open_monitor(), "WSGI_BG_MONITOR_AT": "/tasks"}
    app = make_app(config, monitor_at="/other").wsgi_app
    assert Answer(app, "/tasks/").code == 200
    assert body(app, "/other/") == "view of |/other/"


@pytest.mark.parametrize("at", ["tasks", "", "/", "/tasks/", "/a//b", "/a?b", "/a#b", "/%41"])
def test_a_path_that_is_none_is_refused(at: str) -> None:
    with pytest.raises(OptionValueError, match="monitor_at must be a path such as"):
        make_app(monitor=open_monitor(), monitor_at=at)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"monitor": yes}, OptionTypeError, "monitor must be a wsgi_bg.monitor.Monitor"),
        ({"monitor": True}, OptionTypeError, "monitor must be a wsgi_bg.monitor.Monitor"),
        ({"monitor_at": "/tasks"}, OptionValueError, "monitor_at must be given together"),
        ({"monitor": open_monitor(), "monitor_at": 5}, OptionTypeError, "monitor_at must be"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], kind: type[OptionError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        make_app(**options)


def test_a_wrong_value_of_the_configuration_is_named_by_its_key() -> None:
    with pytest.raises(OptionTypeError, match="WSGI_BG_MONITOR must be"):
        make_app({"WSGI_BG_MONITOR": "yes"})


def test_a_mount_shows_what_it_has() -> None:
    text = repr(make_app(monitor=open_monitor()).wsgi_app)
    assert "Monitor(" in text
    assert "'/background-tasks'" in text
