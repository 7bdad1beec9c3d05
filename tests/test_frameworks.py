"""The real frameworks: their views reach the tasks, and their errors decide which tasks run."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from typing import Any

import falcon.testing
import pytest

from tests.conftest import Log
from tests.support import Gate, client, frameworks, waitress
from tests.support.frameworks import (
    FRAMEWORKS,
    STRICT_BOTTLE,
    Framework,
    Seen,
    Site,
    check_failure,
    injected,
    service,
    via_falcon,
    via_werkzeug,
)
from tests.support.pages import Page
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
    get_background_tasks,
    inject,
)


def name_of(framework: Framework) -> str:
    return framework.name


each_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=name_of)


@each_framework
def test_proxy_environ_and_inject_give_a_view_the_same_object(framework: Framework) -> None:
    seen = Seen()

    def enter(tasks: BackgroundTasks) -> None:
        service(tasks)
        background_tasks.add_task(seen.put, "from the proxy")
        tasks.add_task(seen.put, "from the environ")
        injected().add_task(seen.put, "from inject")

    assert framework.get(framework.make(Site(enter)), "/") == (200, b"ok")
    assert seen.next(3) == ["from the proxy", "from the environ", "from inject"]


@pytest.mark.parametrize("path", ["/", "/missing", "/broken", "/stream"])
@each_framework
def test_a_task_runs_when_the_client_has_the_whole_response(
    framework: Framework, path: str, gate: Gate
) -> None:
    def enter(tasks: BackgroundTasks) -> None:
        tasks.using(run_on="always").add_task(gate.task)

    with waitress(framework.make(Site(enter))) as port:
        response = client.ask(port, path=path)
        gate.open()
        gate.wait()
    assert response.status == {"/missing": 404, "/broken": 500}.get(path, 200)
    assert gate.passed == [True]


@each_framework
def test_a_404_of_the_framework_is_no_failure(framework: Framework) -> None:
    seen = Seen()
    app = framework.make(Site(lambda tasks: tasks.add_task(seen.put, "ran")))
    status, _ = framework.get(app, "/missing")
    assert status == 404
    assert seen.next(1) == ["ran"]


@pytest.mark.parametrize("framework", [*FRAMEWORKS, STRICT_BOTTLE], ids=name_of)
def test_an_exception_in_a_view_is_a_failure(framework: Framework, log: Log) -> None:
    check_failure(framework, log)


@each_framework
def test_tasks_run_after_the_last_row_of_a_stream(framework: Framework) -> None:
    seen = Seen()
    kept: list[BackgroundTasks] = []

    def enter(tasks: BackgroundTasks) -> None:
        tasks.add_task(seen.put, "the view's task")
        kept.append(tasks)

    def rows() -> Iterator[bytes]:
        yield b"Ada,"
        kept[0].add_task(seen.put, "the row's task")
        seen.put("last row")
        yield b"Grace"

    app = framework.make(Site(enter, rows))
    assert framework.get(app, "/stream") == (200, b"Ada,Grace")
    assert seen.next(3) == ["last row", "the view's task", "the row's task"]


# Bottle and Falcon


def test_bottle_stays_a_bottle_whose_run_method_uses_the_middleware() -> None:
    from bottle import Bottle

    app = frameworks.make_bottle(Site(service))
    assert isinstance(app, Bottle)  # so app.run() exists
    assert isinstance(app.wsgi, BackgroundTasksMiddleware)  # which its __call__ calls


def test_an_exception_of_bottles_leaves_werkzeugs_test_client() -> None:
    # Bottle gives the exception to start_response; this client raises the exception there.
    with pytest.raises(ValueError, match="a bug"):
        via_werkzeug(frameworks.make_bottle(Site(service)), "/broken")


def test_in_falcons_test_client_a_streams_tasks_run_inline() -> None:
    threads: list[int] = []

    def enter(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: threads.append(threading.get_ident()))

    app = frameworks.make_falcon(Site(enter))
    via_falcon(app, "/")
    via_falcon(app, "/stream")
    assert threads == [threading.get_ident()] * 2


def test_the_return_value_of_a_falcon_responder_is_not_sent() -> None:
    class Page:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> Any:
            resp.media = {"from": "media"}
            return {"from": "return"}

    app: Any = falcon.App()
    app.add_route("/", Page())
    assert via_falcon(BackgroundTasksMiddleware(app), "/") == (200, b'{"from": "media"}')


# Pyramid


def test_pyramids_dummy_request_has_no_tasks() -> None:
    from pyramid.testing import DummyRequest

    request = DummyRequest()
    with pytest.raises(LookupError, match="BackgroundTasksMiddleware"):
        get_background_tasks(request.environ)


def test_an_injected_pyramid_view_takes_the_context_too() -> None:
    from pyramid.config import Configurator
    from pyramid.response import Response

    done: list[str] = []

    @inject
    def view(context: Any, request: Any, tasks: BackgroundTasks) -> Any:
        tasks.add_task(done.append, request.path)
        return Response("ok")

    config = Configurator()
    config.add_route("page", "/page")
    config.add_view(view, route_name="page")
    app = BackgroundTasksMiddleware(config.make_wsgi_app())
    assert frameworks.via_webtest(app, "/page") == (200, b"ok")
    assert done == ["/page"]


# The page about other frameworks


def table_rows() -> list[list[str]]:
    """The rows of the page's table, each a list of its cells."""
    text = Page("docs/how-to/other-frameworks.md").section("Other frameworks")
    rows = re.findall(r"^\| (\w.*) \|$", text, re.MULTILINE)
    return [row.split(" | ") for row in rows]


def test_each_framework_here_has_a_row_in_the_table() -> None:
    assert [row[0] for row in table_rows()] == [framework.name for framework in FRAMEWORKS]


@each_framework
def test_the_code_in_a_row_is_the_code_of_the_site(framework: Framework) -> None:
    [cells] = [row[1:3] for row in table_rows() if row[0] == framework.name]
    pieces = [code for cell in cells for code in re.findall("`(.+?)`", cell)]
    assert len(pieces) == 2
    for code in pieces:
        makers = (framework.make, frameworks.add_pages)
        assert any(code in inspect.getsource(maker) for maker in makers), code
