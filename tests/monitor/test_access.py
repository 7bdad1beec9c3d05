"""Who gets an answer of the monitor, and which headers protect the answer."""

from __future__ import annotations

import functools
from asyncio import CancelledError
from typing import Any

import pytest

from tests.conftest import Log
from tests.monitor.support import POLICY, Answer, open_monitor, yes
from tests.support import waitress
from tests.support.client import Connection
from wsgi_bg.exceptions import OptionTypeError
from wsgi_bg.monitor import Monitor

PATHS = ["/", "/page.css", "/page.js", "/overview.json", "/error.json", "/task.json", "/other"]


async def async_yes(environ: object) -> bool:
    return True


class AsyncCallable:
    async def __call__(self, environ: object) -> bool:
        return True


def test_allowed_has_to_be_given() -> None:
    with pytest.raises(TypeError, match="allowed"):
        Monitor()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"allowed": None}, "allowed"),
        ({"allowed": True}, "allowed"),
        ({"allowed": async_yes}, "allowed"),
        ({"allowed": functools.partial(async_yes)}, "allowed"),
        ({"allowed": AsyncCallable()}, "allowed"),
        ({"allowed": yes, "actions": 1}, "actions"),
        ({"allowed": yes, "show_arguments": "yes"}, "show_arguments"),
        ({"allowed": yes, "show_errors": None}, "show_errors"),
        ({"allowed": yes, "path": 3}, "path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionTypeError) as caught:
        Monitor(**options)
    assert caught.value.option == name


@pytest.mark.parametrize(
    "result", [False, None, 1, "yes", [True], object()], ids=lambda value: type(value).__name__
)
def test_anything_but_true_is_refused_and_logged(result: Any, log: Log) -> None:
    monitor = Monitor(allowed=lambda environ: result, actions=True)
    for path in [*PATHS, ""]:
        answer = Answer(monitor, path)
        assert (answer.code, answer.body) == (403, b"Forbidden")
    assert Answer(monitor, "/retry?id=1", "POST").code == 403
    assert log.warnings == [
        "1 requests for the monitor were refused since the last record of this kind: "
        f"allowed returned an object of type {type(result).__name__}, and not True"
    ]


def test_an_error_of_allowed_is_refused_and_logged_once_with_its_traceback(log: Log) -> None:
    def broken(environ: dict[str, Any]) -> bool:
        raise LookupError("no session")

    monitor = Monitor(allowed=broken)
    assert [Answer(monitor, path).code for path in PATHS] == [403] * len(PATHS)
    assert log.errors == ["allowed of the monitor raised: the request is refused"]
    assert [str(exc) for exc in log.tracebacks] == ["no session"]


@pytest.mark.parametrize("error", [SystemExit(1), CancelledError(), GeneratorExit()])
def test_an_error_that_is_no_exception_is_refused_too(error: BaseException, log: Log) -> None:
    def broken(environ: dict[str, Any]) -> bool:
        raise error

    assert Answer(Monitor(allowed=broken)).code == 403
    assert log.errors == ["allowed of the monitor raised: the request is refused"]


def test_a_signal_during_allowed_goes_through() -> None:
    def interrupted(environ: dict[str, Any]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Answer(Monitor(allowed=interrupted))


def test_allowed_sees_the_environ_of_each_request() -> None:
    monitor = Monitor(allowed=lambda environ: environ.get("REMOTE_USER") == "admin")
    assert Answer(monitor, "/overview.json", REMOTE_USER="admin").code == 200
    assert Answer(monitor, "/overview.json", REMOTE_USER="other").code == 403


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_allowed", [True, False])
def test_each_answer_has_headers_that_protect_it(path: str, is_allowed: bool) -> None:
    monitor = Monitor(allowed=lambda environ: is_allowed)
    for method in ("GET", "HEAD", "PUT"):
        headers = Answer(monitor, path, method).headers
        assert headers["Content-Security-Policy"] == POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Set-Cookie" not in headers


def test_the_types_of_the_files_are_named() -> None:
    monitor = open_monitor()
    types = [Answer(monitor, path).headers["Content-Type"] for path in PATHS[:4]]
    assert types == [
        "text/html; charset=utf-8",
        "text/css; charset=utf-8",
        "text/javascript; charset=utf-8",
        "application/json",
    ]


def test_a_head_request_gets_the_headers_alone() -> None:
    with waitress(open_monitor()) as port:
        connection = Connection(port)
        for path in PATHS:
            full, head = (connection.ask(method, path) for method in ("GET", "HEAD"))
            assert (head.status, head.body) == (full.status, b"")
            if path != "/overview.json":  # its numbers change
                assert head.headers[b"content-length"] == full.headers[b"content-length"]
        connection.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(method: str) -> None:
    answer = Answer(open_monitor(), "/overview.json", method)
    assert (answer.code, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_actions_are_for_post_alone(method: str) -> None:
    answer = Answer(open_monitor(actions=True), "/retry?id=1", method)
    assert (answer.code, answer.headers["Allow"]) == (405, "POST")


def test_without_actions_there_is_nothing_to_post_to() -> None:
    for path in ("/retry?id=1", "/discard?id=1"):
        assert Answer(open_monitor(), path, "POST").code == 404


def test_without_its_slash_the_page_leads_to_itself_by_a_relative_location() -> None:
    monitor = open_monitor()
    for mounted_at, location in (
        ("/tasks", "./tasks/"),
        ("/a/b", "./b/"),
        ("/javascript:x", "./javascript%3Ax/"),
        ("/a\xc3\xa4", "./a%C3%A4/"),
    ):
        answer = Answer(monitor, "", SCRIPT_NAME=mounted_at)
        assert (answer.code, answer.headers["Location"]) == (308, location)


def test_at_the_root_an_empty_path_is_the_page() -> None:
    # wsgiref's validator wants one of both to be there.
    from tests.support import Server, make_environ

    server = Server()
    body = server.run(open_monitor(), make_environ(PATH_INFO="", SCRIPT_NAME=""))
    assert server.status == "200 OK"
    assert b"Background tasks" in body


def test_a_status_that_cannot_be_read_is_an_answer_and_logged_once(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("wsgi_bg.monitor.application.snapshot", broken)
    monitor = open_monitor()
    answers = [Answer(monitor, path) for path in ("/overview.json", "/error.json?key=1")]
    assert [answer.code for answer in answers] == [500, 500]
    assert answers[0].json == {"error": "The status cannot be read (OSError): see the log."}
    assert log.errors == ["the monitor could not read the status"]


def test_a_monitor_shows_its_options_and_not_its_function() -> None:
    text = "Monitor(actions=True, show_arguments=False, show_errors=True, path='x')"
    assert repr(open_monitor(actions=True, path="x")) == text
