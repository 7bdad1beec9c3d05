"""The rules that recognise a server, a test client and a complete response."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.handlers import BaseCGIHandler
from wsgiref.util import FileWrapper

import falcon.testing
import pytest
from flask import Flask
from webob import Request
from webtest import TestApp
from werkzeug.test import Client, EnvironBuilder

from tests.support import TIMEOUT, Environ, Server, app_that, make_environ, make_server_environ
from tests.support.django import RequestFactory
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg._request import servers

INPUT: Environ = {"wsgi.input_terminated": True}
"""Set by each server that is known by its name alone; not by a gateway."""

MARKS: dict[str, Environ] = {
    "waitress": {"waitress.client_disconnected": print, "SERVER_SOFTWARE": "renamed"},
    "werkzeug": {"werkzeug.socket": object(), "SERVER_SOFTWARE": "Werkzeug/3.1.3"},
    "uWSGI": {"uwsgi.version": b"2.0.28"},
    "a2wsgi": {"asgi.scope": {}},
    "gunicorn": {"SERVER_SOFTWARE": "gunicorn/23.0.0", **INPUT},
    "cheroot": {"SERVER_SOFTWARE": "Cheroot/11.0.0 Server", **INPUT},
    "gevent": {"SERVER_SOFTWARE": "gevent/25.5 Python/3.11", **INPUT},
    "granian": {"SERVER_SOFTWARE": "Granian", **INPUT},
    "wsgiref": {
        "SERVER_SOFTWARE": "WSGIServer/0.2 CPython/3.11.7",
        "wsgi.file_wrapper": FileWrapper,
    },
}


@pytest.mark.parametrize("name", MARKS)
def test_a_server_is_recognised_by_its_mark(name: str) -> None:
    environ = make_environ(**MARKS[name])
    server = servers.recognise(environ)
    assert server is not None
    assert server.name == servers.describe(environ) == name
    assert not servers.is_test_client(environ)


@pytest.mark.parametrize(
    ("name", "software"),
    [
        ("gunicorn", "gevent/25.5 gunicorn/23.0.0"),
        ("gunicorn", "gunicorn/24.0.0.dev1+local"),
        ("cheroot", "CherryPy/18.10.0 Cheroot/11.0.0 Server"),
    ],
)
def test_a_server_that_runs_in_another_is_recognised(name: str, software: str) -> None:
    server = servers.recognise(make_environ(SERVER_SOFTWARE=software, **INPUT))
    assert server is not None
    assert server.name == name


@pytest.mark.parametrize(
    "software",
    [
        *("mygunicorn/1", "gunicorn/1 patched", "gunicorn/", "gunicorn", "gunicorn/23.0.0\n"),
        *("Cheroot/11", "NotCheroot/11.0.0 Server", "gevent/25.5", "granian", "Granian/2"),
        *("WSGIServer/0.2", "WSGIServer/0.20 CPython/3.11.7", "WSGIServer/0.2 CPython/"),
    ],
)
def test_a_mark_is_compared_whole(software: str) -> None:
    environ = make_environ(SERVER_SOFTWARE=software, **INPUT)
    assert servers.recognise(environ) is None
    assert servers.describe(environ) == software


@pytest.mark.parametrize("name", ["gunicorn", "cheroot", "gevent", "granian", "wsgiref"])
def test_a_gateway_that_passes_on_the_name_of_the_server_in_front_is_unknown(name: str) -> None:
    software = MARKS[name]["SERVER_SOFTWARE"]
    environ = make_environ(SERVER_SOFTWARE=software, SCGI="1")
    assert servers.recognise(environ) is None


def test_mod_wsgi_is_unknown_since_a_filter_of_apache_may_hold_the_response_back() -> None:
    """mod_deflate drops the length, and sends the end of the response after ``close()``."""
    software = "Apache/2.4.62 (Debian)"
    environ = make_environ(SERVER_SOFTWARE=software, **{"mod_wsgi.version": (4, 9, 4)})
    assert servers.recognise(environ) is None


def test_pythons_server_is_told_from_servers_that_use_its_name() -> None:
    """The environ has no suffix; socketify's has the same name, but no file wrapper."""
    environ = make_environ(SERVER_SOFTWARE="WSGIServer/0.2")
    assert servers.describe({**environ, "wsgi.file_wrapper": FileWrapper}) == "wsgiref"
    assert servers.recognise({**environ, "wsgi.file_wrapper": None}) is None
    assert servers.recognise({**environ, "wsgi.file_wrapper": lambda file: file}) is None


def test_every_server_of_the_table_is_tried() -> None:
    assert set(MARKS) == {server.name for server in servers.SERVERS}


@pytest.mark.parametrize(
    ("environ", "description"),
    [
        ({"SERVER_SOFTWARE": "acme/1"}, "acme/1"),
        ({"wsgi.multithread": True}, "a server that does not name itself"),
        (make_environ(), "a test client"),
    ],
)
def test_an_unknown_server_is_described_by_its_environ(
    environ: Environ, description: str
) -> None:
    assert servers.recognise(environ) is None
    assert servers.describe(environ) == description


def test_no_header_of_a_request_makes_a_server() -> None:
    environ = make_server_environ()
    del environ["waitress.client_disconnected"], environ["SERVER_SOFTWARE"]
    environ["HTTP_SERVER_SOFTWARE"] = environ["HTTP_WAITRESS_CLIENT_DISCONNECTED"] = (
        "gunicorn/1"
    )
    assert servers.recognise(environ) is None


def via_werkzeug(app: Any) -> None:
    Client(app).get("/", buffered=True)


def via_flask(app: Any) -> None:
    flask = Flask(__name__)
    flask.wsgi_app = app  # type: ignore[method-assign]
    flask.test_client().get("/", buffered=True)


def via_webtest(app: Any) -> None:
    TestApp(app, lint=False).get("/")


def via_setup_testing_defaults(app: Any) -> None:
    Server().run(app, make_environ())


def via_django(app: Any) -> None:
    Server().run(app, RequestFactory()._base_environ())


def via_falcon(app: Any) -> None:
    falcon.testing.TestClient(app).simulate_get("/")


CLIENTS = [
    *(via_werkzeug, via_flask, via_webtest, via_setup_testing_defaults, via_django),
    via_falcon,
]


@pytest.mark.parametrize("status", ["200 OK", "204 NO CONTENT", "500 OOPS"])
@pytest.mark.parametrize("client", CLIENTS)
def test_in_a_test_client_everything_runs_inline(
    client: Callable[[Any], None], status: str
) -> None:
    threads: list[int] = []

    def add(environ: Environ) -> None:
        background_tasks.add_task(lambda: threads.append(threading.get_ident()))

    headers = [] if status[:3] == "204" else [("Content-Type", "text/plain")]
    app = BackgroundTasksMiddleware(
        app_that(add, status=status, headers=headers), run_on="always"
    )
    if client is via_webtest and status[0] == "5":
        with pytest.raises(Exception, match="500 OOPS"):
            client(app)
    else:
        client(app)
    assert threads == [threading.get_ident()]


def test_in_a_test_client_tasks_of_an_application_that_raises_run_inline() -> None:
    seen: list[str] = []

    def fail(environ: Environ) -> None:
        background_tasks.add_task(seen.append, "ran")
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        via_werkzeug(BackgroundTasksMiddleware(app_that(fail), run_on="error"))
    assert seen == ["ran"]


@pytest.mark.parametrize(
    "environ",
    [
        {"wsgi.multithread": True},
        {"wsgi.multiprocess": True},
        {"SERVER_SOFTWARE": "acme/1"},
        {"uwsgi.version": b"2"},
    ],
)
def test_nothing_else_is_a_test_client(environ: Environ) -> None:
    assert servers.is_test_client(make_environ())
    assert servers.is_test_client(EnvironBuilder().get_environ())
    assert not servers.is_test_client(make_environ(**environ))


GATEWAY: Environ = {
    "REQUEST_METHOD": "GET",
    "PATH_INFO": "/",
    "wsgi.multithread": False,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
    "wsgi.input": io.BytesIO(),
    "wsgi.errors": sys.stderr,
}
"""The environ of a gateway of one process and one thread, under any web server."""

GATEWAYS: dict[str, Environ] = {
    "FastCGI": {"GATEWAY_INTERFACE": "CGI/1.1", "REMOTE_ADDR": "192.0.2.1"},
    "FastCGI, all that nginx sends": {
        "GATEWAY_INTERFACE": "CGI/1.1",
        "SERVER_SOFTWARE": "nginx/1.22.1",
        "REMOTE_ADDR": "192.0.2.1",
        "REQUEST_URI": "/",
    },
    "FastCGI, the URI as sent too": {"GATEWAY_INTERFACE": "CGI/1.1", "RAW_URI": "/"},
    "SCGI, all that nginx sends": {"SCGI": "1", "REMOTE_ADDR": "192.0.2.1", "REQUEST_URI": "/"},
    "SCGI, the URI as sent too": {"SCGI": "1", "RAW_URI": "/"},
    "SCGI, the least": {"SCGI": "1", "CONTENT_LENGTH": "0"},
    "AJP": {"REMOTE_ADDR": "192.0.2.1", "REMOTE_HOST": "client"},
    "CGI": {"GATEWAY_INTERFACE": "CGI/1.1", "wsgi.run_once": True},
    "a small server, which writes 0 for False": {
        "wsgi.multithread": 0,
        "wsgi.multiprocess": 0,
        "wsgi.run_once": 0,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PROTOCOL": "HTTP/1.0",
    },
    "FastCGI, a parameter of that name": {
        "RAW_URI": "/",
        "REMOTE_ADDR": "192.0.2.1",
        "wsgi.input": io.BufferedReader(io.BytesIO()),
        "wsgi.errors": io.StringIO(),
    },
    "WebTest's key, which is false": {"paste.testing": False, "SCGI": "1"},
    "a server that writes no name": {"RAW_URI": "/", "REMOTE_PORT": "50000"},
    "AWS Lambda": {"serverless.event": {}, "REMOTE_ADDR": "192.0.2.1"},
}


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_with_a_single_thread_is_no_test_client(name: str) -> None:
    environ = {**GATEWAY, **GATEWAYS[name]}
    assert not servers.is_test_client(environ)
    headers = [("Content-Length", "2")]
    assert where_the_task_runs(lambda add: app_that(add, headers=headers), environ) == (
        "elsewhere"
    )


def test_a_gateway_that_a_werkzeug_application_has_seen_is_no_test_client() -> None:
    """Flask puts its request into the environ of each server."""
    environ = {**GATEWAY, "werkzeug.request": object(), "flask.app": object()}
    assert not servers.is_test_client(environ)


@pytest.mark.parametrize("multithread", [False, True])
def test_pythons_cgi_handler_is_no_test_client(multithread: bool) -> None:
    seen: list[bool] = []

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        seen.append(servers.is_test_client(environ))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]

    files = io.BytesIO(), io.BytesIO(), io.StringIO()
    params = {"GATEWAY_INTERFACE": "CGI/1.1", "REQUEST_METHOD": "GET"}
    BaseCGIHandler(*files, params, multithread=multithread).run(app)
    assert seen == [False]


def test_a_request_within_the_application_is_no_test_clients() -> None:
    """WebOb's ``Request.blank`` calls applications in production too."""
    assert not servers.is_test_client(Request.blank("/").environ)


def test_falcons_client_is_told_from_gunicorn_whose_name_the_client_uses() -> None:
    environ = falcon.testing.create_environ()
    assert servers.describe(environ) == "a test client"
    real = {**environ, "gunicorn.socket": object(), **INPUT}
    assert servers.describe(real) == "gunicorn"
    assert not servers.is_test_client({**environ, "GATEWAY_INTERFACE": "CGI/1.1"})
    newer = {**environ, "SERVER_SOFTWARE": "gunicorn/25.1.0", **INPUT}
    assert servers.describe(newer) == "gunicorn"


def test_an_empty_environ_is_not_a_test_clients() -> None:
    assert not servers.is_test_client({})


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([("Content-Length", "12")], 12),
        ([("content-LENGTH", "3")], 3),
        ([("A", "1"), ("Content-Length", "0")], 0),
        ([("Content-Length", "-1")], 0),
        ([("Content-Length", "many")], 0),
        ([], 0),
    ],
)
def test_the_declared_length(headers: list[tuple[str, str]], length: int) -> None:
    assert servers.declared_length(headers) == length


def where_the_task_runs(app: Any, environ: Environ) -> str:
    """``"here"``, or ``"elsewhere"`` if the task was handed to the pool."""
    done = threading.Event()
    threads: list[int] = []

    def task() -> None:
        threads.append(threading.get_ident())
        done.set()

    Server().run(
        BackgroundTasksMiddleware(app(lambda e: background_tasks.add_task(task))), environ
    )
    assert done.wait(TIMEOUT)
    return "here" if threads == [threading.get_ident()] else "elsewhere"


def test_only_a_declared_length_that_a_known_server_has_written_runs_inline() -> None:
    def app(**options: Any) -> Any:
        options.setdefault("headers", [("Content-Length", "2")])
        return lambda add: app_that(add, **options)

    known = make_server_environ
    unknown = make_environ(SERVER_SOFTWARE="acme/1", **{"wsgi.multithread": True})
    assert where_the_task_runs(app(), known()) == "here"
    assert where_the_task_runs(app(body=lambda: (c for c in (b"ok",))), known()) == "here"
    assert where_the_task_runs(app(body=lambda: iter((b"ok",))), known()) == "here"
    assert where_the_task_runs(app(), unknown) == "elsewhere"
    assert where_the_task_runs(app(), known(REQUEST_METHOD="HEAD")) == "elsewhere"
    assert where_the_task_runs(app(headers=[]), known()) == "elsewhere"
    assert where_the_task_runs(app(headers=[("Content-Length", "0")]), known()) == "elsewhere"
    for status in ("204 NO CONTENT", "304 NOT MODIFIED", "103 EARLY HINTS"):
        assert where_the_task_runs(app(status=status), known()) == "elsewhere"


def test_a_length_that_is_put_into_the_list_of_headers_later_does_not_count() -> None:
    def app(add: Any) -> Any:
        def call(environ: Environ, start_response: Any) -> list[bytes]:
            add(environ)
            headers = [("Content-Type", "text/plain")]
            start_response("200 OK", headers)
            headers.append(("Content-Length", "2"))
            return [b"ok"]

        return call

    assert where_the_task_runs(app, make_server_environ()) == "elsewhere"


@pytest.mark.parametrize("again", [False, True])
def test_a_length_declared_after_the_application_has_returned_does_not_count(
    again: bool,
) -> None:
    """granian reads status and headers when the application returns."""
    start = "200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")]

    def make(add: Callable[[Environ], None]) -> Any:
        def late(environ: Environ, start_response: Any) -> Iterator[bytes]:
            try:
                raise ValueError("of the application")
            except ValueError:
                start_response(*start, sys.exc_info() if again else None)
            yield b"ok"

        def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
            add(environ)
            if again:
                start_response("200 OK", [("Content-Length", "5")])
            return late(environ, start_response)

        return app

    assert where_the_task_runs(make, make_server_environ()) == "elsewhere"


def test_a_body_that_was_not_used_up_is_handed_over() -> None:
    done = threading.Event()
    threads: list[int] = []

    def add(environ: Environ) -> None:
        background_tasks.add_task(lambda: threads.append(threading.get_ident()))
        background_tasks.add_task(done.set)

    app = BackgroundTasksMiddleware(app_that(add, body=lambda: [b"o", b"k"]))
    body: Any = app(make_server_environ(), Server().start_response)
    next(iter(body))
    body.close()
    assert done.wait(TIMEOUT)
    assert threads != [threading.get_ident()]
