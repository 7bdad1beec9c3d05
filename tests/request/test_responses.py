"""Responses that test clients leave open are closed for them, and are otherwise unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.validate import validator

import pytest
from flask import Flask
from webtest import TestApp
from werkzeug.test import Client
from werkzeug.wsgi import ClosingIterator, FileWrapper

from tests.support import Environ, Server, app_that, make_environ, make_server_environ
from tests.support.recording import (
    LENGTH,
    TYPE,
    add,
    body_of,
    by_flask,
    by_werkzeug,
    clients,
    done,
    fail,
    late,
    late_whole,
    recording,
    send,
    stream,
    whole,
)
from wsgi_bg import BackgroundTasksMiddleware, get_background_tasks
from wsgi_bg._request.body import Body
from wsgi_bg.pytest_plugin import TaskRecorder

recorder = pytest.fixture(lambda background_tasks: background_tasks, name="recorder")
run = pytest.mark.wsgi_bg(mode="run")


@pytest.fixture(autouse=True)
def _clear() -> None:
    done.clear()


def closing(*chunks: bytes) -> Callable[[], Any]:
    """A body that records its closing."""
    return lambda: ClosingIterator(iter(chunks), lambda: done.append("closed"))


def call(app: Any, **environ: Any) -> Any:
    """The iterable that a test client gets."""
    return app(make_environ(**environ), Server().start_response)


@pytest.mark.parametrize(
    ("method", "status", "headers", "body"),
    [
        ("GET", "200 OK", LENGTH, [b"o", b"k"]),
        ("GET", "200 OK", [("CONTENT-length", "0")], []),
        ("GET", "204 NO CONTENT", [], []),
        ("GET", "304 NOT MODIFIED", [], []),
        ("GET", "103 EARLY HINTS", [], []),
        ("HEAD", "200 OK", TYPE, []),
    ],
)
def test_a_response_that_will_end_is_read_and_closed_at_once(
    recorder: TaskRecorder, method: str, status: str, headers: Any, body: list[bytes]
) -> None:
    app = app_that(add((send, "ada")), status=status, headers=headers, body=closing(*body))
    chunks = call(BackgroundTasksMiddleware(app), REQUEST_METHOD=method)
    assert (list(chunks), done) == (body, ["closed"])
    recorder.assert_added(send, "ada")


def test_a_list_is_read_and_closed_at_once(recorder: TaskRecorder) -> None:
    class Chunks(list[bytes]):
        def close(self) -> None:
            done.append("closed")

    app = app_that(add((send, "ada")), headers=[], body=lambda: Chunks([b"a", b"b"]))
    body = call(BackgroundTasksMiddleware(app))
    assert done == ["closed"]
    assert list(body) == [b"a", b"b"]


def test_webtest_gets_read_streams_since_webtest_reads_them_anyway(
    recorder: TaskRecorder,
) -> None:
    app = app_that(print, headers=TYPE, body=closing(b"o", b"k"))
    body = call(BackgroundTasksMiddleware(app), **{"paste.testing": True})
    assert done == ["closed"]
    assert list(body) == [b"o", b"k"]


@pytest.mark.parametrize("client", [by_flask, by_werkzeug])
def test_a_stream_is_not_read_ahead_and_is_closed_at_the_end(
    recorder: TaskRecorder, client: Any
) -> None:
    def chunks() -> Iterator[bytes]:
        for chunk in (b"o", b"k"):
            done.append(chunk)
            yield chunk

    app = app_that(
        print,
        headers=TYPE,
        body=lambda: ClosingIterator(chunks(), lambda: done.append("closed")),
    )
    response = client(BackgroundTasksMiddleware(app))
    assert done == [b"o"]
    assert response.data == b"ok"
    assert done == [b"o", b"k", "closed"]
    response.close()
    assert len(done) == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda recorder: recorder.tasks,
        lambda recorder: recorder.errors,
        lambda recorder: recorder.run(),
        lambda recorder: recorder.join(),
        lambda recorder: recorder.assert_added(send, "ada"),
    ],
)
def test_any_use_of_the_fixture_closes_the_streams_that_were_not_read(
    recorder: TaskRecorder, use: Callable[[TaskRecorder], object]
) -> None:
    app = app_that(add((send, "ada")), headers=TYPE, body=closing(b"o", b"k"))
    response = by_werkzeug(BackgroundTasksMiddleware(app))
    assert done == []
    use(recorder)
    assert done[0] == "closed"
    with pytest.raises(RuntimeError, match="read it first"):
        _ = response.data


def test_a_generator_that_was_closed_before_it_began_is_no_empty_response(
    recorder: TaskRecorder,
) -> None:
    body = call(late((send, "ada")))
    recorder.assert_none()
    with pytest.raises(RuntimeError, match="read it first"):
        list(body)


def test_chunks_read_for_the_client_are_still_there_after_a_use_of_the_fixture(
    recorder: TaskRecorder,
) -> None:
    for app in (whole((send, "ada")), late_whole((send, "ada"))):
        response = by_werkzeug(app)
        recorder.assert_added(send, "ada")
        assert response.data == b"ok"


def test_assert_none_closes_a_stream_and_sees_its_tasks(recorder: TaskRecorder) -> None:
    response = by_werkzeug(stream((send, "ada")))
    with pytest.raises(AssertionError, match="no task was expected"):
        recorder.assert_none()
    assert response.status_code == 200


def test_all_streams_are_closed_in_order_even_if_a_close_raises(recorder: TaskRecorder) -> None:
    def close(number: int) -> None:
        done.append(number)
        if number == 1:
            raise OSError("the file is gone")

    def app(environ: Environ, start_response: Any) -> Any:
        start_response("200 OK", TYPE)
        number = int(environ["QUERY_STRING"])
        get_background_tasks(environ).add_task(send, str(number))
        return ClosingIterator(iter([b"o", b"k"]), lambda: close(number))

    client = Client(BackgroundTasksMiddleware(app))
    responses = [client.get(f"/?{number}") for number in range(3)]
    with pytest.raises(OSError, match="the file is gone"):
        _ = recorder.tasks
    assert done == [0, 1, 2]
    assert [task.args for task in recorder.tasks] == [("0",), ("1",), ("2",)]
    assert len(responses) == 3


def test_a_stream_that_the_client_closes_ends_there(recorder: TaskRecorder) -> None:
    response = by_werkzeug(stream((send, "ada")))
    response.close()
    assert recorder._requests[0].batch is not None
    recorder.assert_added(send, "ada")
    assert list(response.response) == [b"o", b"k"]  # as without the fixture


def test_an_unread_stream_is_closed_at_the_end_of_the_test() -> None:
    with recording("run"):
        response = by_werkzeug(stream((send, "ada")))
        assert done == []
    assert done == ["ada"]
    assert response.status_code == 200


@run
def test_an_error_after_a_stream_is_raised_to_the_client_that_closes(
    recorder: TaskRecorder,
) -> None:
    response = by_werkzeug(stream(fail))
    with pytest.raises(ValueError, match="boom"):
        response.close()
    response = by_werkzeug(late(fail))
    with pytest.raises(ValueError, match="boom"):
        _ = response.data


@run
@pytest.mark.parametrize("buffered", [True, False])
def test_closing_again_is_harmless(recorder: TaskRecorder, buffered: bool) -> None:
    for app in (whole((send, "ada")), stream((send, "ada"))):
        done.clear()
        with Client(app).get("/", buffered=buffered) as response:
            assert response.data == b"ok"
        assert done == ["ada"]


def test_redirects_are_followed(recorder: TaskRecorder) -> None:
    app = Flask(__name__)
    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app)  # type: ignore[method-assign]

    @app.get("/")
    def leave() -> Any:
        get_background_tasks(app_environ()).add_task(send, "ada")
        return app.redirect("/there")

    @app.get("/there")
    def there() -> Any:
        get_background_tasks(app_environ()).add_task(send, "grace")
        return "there"

    def app_environ() -> Environ:
        from flask import request

        return request.environ

    with app.test_client() as client:
        assert client.get("/", follow_redirects=True).text == "there"
    assert [task.path for task in recorder.tasks] == ["/", "/there"]


# As without the fixture


@clients
def test_written_data_comes_first(recorder: TaskRecorder, client: Any) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", LENGTH)
        add((send, "ada"))(environ)
        write(b"o")
        return [b"k"]

    assert body_of(client(BackgroundTasksMiddleware(app))) == b"ok"
    recorder.assert_added(send, "ada")


@pytest.mark.parametrize("calls", [[], [(send, "ada")]])
def test_a_file_wrapper_is_read_if_there_are_tasks(
    recorder: TaskRecorder, tmp_path: Any, calls: Any
) -> None:
    (tmp_path / "file").write_bytes(b"ok")
    file = (tmp_path / "file").open("rb")
    app = app_that(add(*calls), headers=LENGTH, body=lambda: FileWrapper(file))
    body = call(BackgroundTasksMiddleware(app), **{"wsgi.file_wrapper": FileWrapper})
    assert b"".join(body) == b"ok"
    assert isinstance(body, FileWrapper) is not bool(calls)
    assert len(recorder.tasks) == len(calls)
    assert file.closed == bool(calls)
    file.close()


@pytest.mark.parametrize("headers", [TYPE, LENGTH])
@pytest.mark.parametrize("is_late", [True, False])
def test_an_error_in_the_body_comes_at_its_usual_place(
    recorder: TaskRecorder, headers: Any, is_late: bool
) -> None:
    def app(environ: Environ, start_response: Any) -> Any:
        def body() -> Iterator[bytes]:
            if is_late:
                start_response("200 OK", headers)
            yield b"o"
            raise KeyError("a bug")

        if not is_late:
            start_response("200 OK", headers)
        add((send, "ada"), (send, "admin"), run_on="error")(environ)
        return body()

    body = iter(call(BackgroundTasksMiddleware(app)))
    assert next(body) == b"o"
    with pytest.raises(KeyError, match="a bug"):
        next(body)
    with pytest.raises(StopIteration):
        next(body)
    recorder.assert_added(send, "admin")


@clients
def test_an_error_in_the_first_chunk_comes_from_the_clients_call(
    recorder: TaskRecorder, client: Any
) -> None:
    def body() -> Iterator[bytes]:
        yield from dict[str, list[bytes]]()["a bug"]

    with pytest.raises(KeyError, match="a bug"):
        client(BackgroundTasksMiddleware(app_that(print, headers=LENGTH, body=body)))


def fails_late(environ: Environ, start_response: Any) -> Iterator[bytes]:
    add(fail, run_on="error")(environ)
    start_response("200 OK", LENGTH)
    yield b"o"
    raise KeyError("a bug")


@run
def test_an_error_in_the_body_is_not_hidden_by_a_task(recorder: TaskRecorder) -> None:
    def body() -> Iterator[bytes]:
        yield from dict[str, list[bytes]]()["a bug"]

    for headers in (LENGTH, TYPE):
        app = app_that(add(fail, run_on="error"), headers=headers, body=body)
        with pytest.raises(KeyError, match="a bug"):
            by_werkzeug(BackgroundTasksMiddleware(app))
    response = by_werkzeug(BackgroundTasksMiddleware(fails_late))
    with pytest.raises(KeyError, match="a bug"):
        _ = response.data
    assert [str(error) for error in recorder.errors] == ["boom"] * 3


def test_a_base_exception_is_not_postponed(recorder: TaskRecorder) -> None:
    def body() -> Iterator[bytes]:
        yield b"o"
        pytest.fail("in the body")

    app = app_that(print, headers=LENGTH, body=body)
    with pytest.raises(pytest.fail.Exception, match="in the body"):
        call(BackgroundTasksMiddleware(app))


def test_an_error_of_the_bodys_close_goes_to_the_client(recorder: TaskRecorder) -> None:
    def close() -> None:
        raise OSError("the file is gone")

    for headers in (LENGTH, TYPE):
        app = app_that(
            add((send, "ada")), headers=headers, body=lambda: ClosingIterator([b"ok"], close)
        )
        with pytest.raises(OSError, match="the file is gone"):
            list(call(BackgroundTasksMiddleware(app)))
    assert len(recorder.tasks) == 2


def test_an_inner_layer_of_the_middleware_closes_nothing(recorder: TaskRecorder) -> None:
    types: list[Any] = []
    inner = BackgroundTasksMiddleware(
        app_that(print, headers=TYPE, body=closing(b"o", b"k")), run_on="always"
    )

    def outer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        body = inner(environ, start_response)
        types.append(type(body))
        return body

    response = by_werkzeug(BackgroundTasksMiddleware(outer))
    assert types == [ClosingIterator]
    assert response.data == b"ok"
    assert done == ["closed"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("app", [whole, stream, late])
def test_validators_are_content_on_both_sides(recorder: TaskRecorder, app: Any) -> None:
    inside = app((send, "ada"))
    checked = validator(BackgroundTasksMiddleware(validator(inside._wrapped)))
    environ = make_environ(QUERY_STRING="")
    assert Server().run(checked, environ) == b"ok"
    assert TestApp(app((send, "ada"))).get("/").body == b"ok"
    assert len(recorder.tasks) == 2


def test_a_servers_response_is_left_alone(recorder: TaskRecorder) -> None:
    body: Any = stream((send, "ada"))(make_server_environ(), Server().start_response)
    assert isinstance(body, Body)
    body.close()
    recorder.assert_added(send, "ada")


def failing_twice() -> Any:
    return stream((fail, "first"), (fail, "second"))


@run
def test_a_client_that_closes_a_stream_again_gets_the_first_error(
    recorder: TaskRecorder,
) -> None:
    with pytest.raises(ValueError, match="first"):
        Client(failing_twice()).get("/", buffered=True)
    with pytest.raises(ValueError, match="first"), Client(failing_twice()).get("/") as response:
        body_of(response)
    assert [str(error) for error in recorder.errors] == ["first", "second"] * 2


@run
@pytest.mark.parametrize("headers", [TYPE, LENGTH])
def test_an_error_in_the_body_is_not_hidden_by_the_error_of_a_task(
    recorder: TaskRecorder, headers: Any
) -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        add((fail, "task"), run_on="error")(environ)
        start_response("200 OK", headers)
        yield b"o"
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        Client(BackgroundTasksMiddleware(app)).get("/", buffered=True)
    assert [str(error) for error in recorder.errors] == ["task"]


@run
@pytest.mark.parametrize("app", [stream, late, late_whole])
def test_a_tasks_stop_iteration_is_no_end_of_the_body(app: Any) -> None:
    client = Client(app((next, iter(()))))
    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        body_of(client.get("/"))
