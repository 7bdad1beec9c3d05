"""``BackgroundTasksMiddleware``: one object for each request, order, transparency."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from werkzeug.local import LocalProxy
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.test import Client
from werkzeug.wrappers import Request, Response

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    App,
    Environ,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
)
from wsgi_bg import (
    ENVIRON_KEY,
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    DurableRunner,
    InlineRunner,
    Retry,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._request.unclosed import collectors


def fail(error: BaseException) -> None:
    raise error


def test_the_object_in_the_environ_is_the_object_behind_the_proxy() -> None:
    seen: list[object] = []

    def look(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        assert environ[ENVIRON_KEY] is tasks
        assert background_tasks == tasks
        background_tasks.add_task(seen.append, "by the proxy")
        tasks.add_task(seen.append, "by the environ")

    assert respond(BackgroundTasksMiddleware(app_that(look))) == b"ok"
    assert seen == ["by the proxy", "by the environ"]


def test_each_request_has_a_new_object() -> None:
    seen: list[Any] = []
    app = BackgroundTasksMiddleware(app_that(lambda e: seen.append(get_background_tasks(e))))
    respond(app)
    respond(app)
    assert seen[0] is not seen[1]


def test_tasks_run_in_order_after_the_body_and_in_the_thread_of_close() -> None:
    seen: list[object] = []

    async def async_task(x: int) -> None:
        seen.append(x)

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        tasks.add_task(seen.append, 1)
        tasks.add_task(async_task, 2)
        tasks.add_task(async_task, x=3)
        tasks.add_task(lambda: seen.append(threading.get_ident()))

    body = BackgroundTasksMiddleware(app_that(add))(make_environ(), Server().start_response)
    assert (list(body), seen) == ([b"ok"], [])
    body.close()  # type: ignore[attr-defined]
    assert seen == [1, 2, 3, threading.get_ident()]


def test_tasks_of_a_thread_of_the_request_belong_to_the_request() -> None:
    seen: list[int] = []

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        barrier = threading.Barrier(8)

        def add_many(first: int) -> None:
            barrier.wait(TIMEOUT)
            for x in range(first, first + 100):
                tasks.add_task(seen.append, x)

        threads = [threading.Thread(target=add_many, args=(n * 100,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)

    respond(BackgroundTasksMiddleware(app_that(add)))
    assert sorted(seen) == list(range(800))
    assert [x for x in seen if x < 100] == list(range(100))


def test_the_applications_iterable_is_closed_first_and_once() -> None:
    seen: list[str] = []

    class Body:
        def __init__(self, environ: Environ) -> None:
            self.tasks = get_background_tasks(environ)
            self.tasks.add_task(seen.append, "task")

        def __iter__(self) -> Iterator[bytes]:
            return iter((b"ok",))

        def close(self) -> None:
            seen.append("closed")
            self.tasks.add_task(seen.append, "added on close")

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Body(environ)

    body: Any = BackgroundTasksMiddleware(app)(make_environ(), Server().start_response)
    list(body)
    body.close()
    body.close()
    assert seen == ["closed", "task", "added on close"]


def test_tasks_added_by_call_on_close_belong_to_the_batch() -> None:
    seen: list[str] = []

    @Request.application
    def app(request: Request) -> Response:
        response = Response("ok")
        tasks = get_background_tasks(request.environ)
        response.call_on_close(lambda: tasks.add_task(seen.append, "on close"))
        return response

    respond(BackgroundTasksMiddleware(app))
    assert seen == ["on close"]


def test_an_error_of_the_applications_close_reaches_the_server_after_the_tasks() -> None:
    seen: list[str] = []

    class Body(list[bytes]):
        def close(self) -> None:
            raise OSError("the file is gone")

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        get_background_tasks(environ).add_task(seen.append, "ran")
        start_response("200 OK", [])
        return Body([b"ok"])

    with pytest.raises(OSError, match="the file is gone"):
        respond(BackgroundTasksMiddleware(app))
    assert seen == ["ran"]


def test_a_task_that_a_task_adds_runs_after_it_in_the_same_batch() -> None:
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        background_tasks.add_task(third)

    async def second() -> None:
        seen.append("second")

    async def third() -> None:
        seen.append("third")
        background_tasks.add_task(seen.append, "fourth")

    def add(environ: Environ) -> None:
        background_tasks.add_task(first)
        background_tasks.add_task(second)

    respond(BackgroundTasksMiddleware(app_that(add)))
    assert seen == ["first", "second", "third", "fourth"]


def test_a_stream_adds_tasks_between_its_chunks() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one "
        get_background_tasks(environ).add_task(seen.append, "midway")
        yield b"two"

    assert respond(BackgroundTasksMiddleware(app)) == b"one two"
    assert seen == ["midway"]


def test_an_inner_middleware_shares_the_object_of_the_outer_middleware() -> None:
    seen: list[str] = []
    objects: list[BackgroundTasks] = []
    outside, inside = InlineRunner(), InlineRunner()

    def add(environ: Environ) -> None:
        objects.append(get_background_tasks(environ))
        background_tasks.add_task(seen.append, "inner")

    inner = BackgroundTasksMiddleware(app_that(add), runner=inside)

    def between(environ: Environ, start_response: Any) -> Iterable[bytes]:
        objects.append(get_background_tasks(environ))
        objects[0].add_task(seen.append, "between")
        body = inner(environ.copy(), start_response)
        assert seen == []
        return body

    respond(BackgroundTasksMiddleware(between, runner=outside))
    assert objects[0] is objects[1]
    assert seen == ["between", "inner"]
    assert outside.statistics().succeeded == 2
    assert inside.statistics().succeeded == 0


def test_options_of_the_innermost_layer_that_sets_them_hold() -> None:
    seen: list[str] = []
    told: list[str] = []

    def add(environ: Environ) -> None:
        background_tasks.add_task(seen.append, "inner")
        background_tasks.add_task(fail, ValueError())

    inner = BackgroundTasksMiddleware(
        app_that(add, status="500 OOPS"),
        run_on="always",
        on_error=lambda t, e: told.append("in"),
    )

    def between(environ: Environ, start_response: Any) -> Iterable[bytes]:
        background_tasks.add_task(seen.append, "before")
        body = inner(environ, start_response)
        background_tasks.add_task(seen.append, "after")
        return body

    outer = BackgroundTasksMiddleware(between, on_error=lambda t, e: told.append("out"))
    respond(outer)
    assert seen == ["inner"]
    assert told == ["in"]


def test_a_runner_of_an_inner_layer_that_would_keep_the_tasks_is_named_once(
    tmp_path: Path, log: Log
) -> None:
    app = app_that(lambda environ: None)
    inner = BackgroundTasksMiddleware(app, runner=DurableRunner(tmp_path))
    respond(BackgroundTasksMiddleware(inner))
    respond(BackgroundTasksMiddleware(inner))  # another layer around it: said already
    [message] = log.warnings
    assert str(tmp_path) in message
    assert "InlineRunner() of an outer middleware" in message


def test_other_runners_of_inner_layers_are_replaced_in_silence(
    tmp_path: Path, log: Log
) -> None:
    app = app_that(lambda environ: None)
    runner = DurableRunner(tmp_path)
    inner = BackgroundTasksMiddleware(app, runner=runner)
    respond(BackgroundTasksMiddleware(inner, runner=runner))
    respond(BackgroundTasksMiddleware(BackgroundTasksMiddleware(app, runner="pool")))
    assert not log.warnings


def test_options_of_an_inner_layer_do_not_hold_for_the_next() -> None:
    """A cascade: the first application answers 404, then the second application is asked."""
    seen: list[str] = []

    @Request.application
    def not_found(request: Request) -> Response:
        return Response("no", status=404)

    @Request.application
    def found(request: Request) -> Response:
        get_background_tasks(request.environ).add_task(seen.append, "found")
        return Response("yes")

    layers = [
        BackgroundTasksMiddleware(not_found, run_on="error"),
        BackgroundTasksMiddleware(found),
        BackgroundTasksMiddleware(not_found, run_on="error"),
        BackgroundTasksMiddleware(found, stop_on_error=True),
    ]

    def cascade(environ: Environ, start_response: Any) -> Iterable[bytes]:
        for layer in layers:
            body: Any = layer(environ, start_response)
            background_tasks.add_task(seen.append, "between")
        return body  # type: ignore[no-any-return]

    respond(BackgroundTasksMiddleware(cascade))
    assert seen == ["between", "found", "between", "between", "found", "between"]


def test_a_task_of_an_inner_layer_adds_tasks_under_its_options() -> None:
    seen: list[str] = []

    def first() -> None:
        background_tasks.add_task(seen.append, "second")

    inner = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(first), status="500 OOPS"), run_on="error"
    )
    respond(BackgroundTasksMiddleware(lambda e, s: inner(e, s)))
    assert seen == ["second"]


def test_an_inner_layer_inherits_the_options_that_it_does_not_set() -> None:
    seen: list[str] = []

    def add(environ: Environ) -> None:
        background_tasks.add_task(seen.append, "ran")

    inner = BackgroundTasksMiddleware(app_that(add, status="500 OOPS"))
    respond(BackgroundTasksMiddleware(inner, run_on="always"))
    assert seen == ["ran"]


def test_options_of_an_inner_layer_hold_while_its_stream_goes_on() -> None:
    seen: list[str] = []

    def stream(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("500 OOPS", [])
        yield b""
        get_background_tasks(environ).add_task(seen.append, "ran")

    inner = BackgroundTasksMiddleware(stream, run_on="error")
    respond(BackgroundTasksMiddleware(inner))
    assert seen == ["ran"]


@pytest.mark.parametrize("options", [{}, {"run_on": "always", "retry": Retry()}])
def test_a_task_that_an_inner_layer_adds_in_a_stream_adds_tasks_under_its_options(
    options: dict[str, Any],
) -> None:
    seen: list[Any] = []

    def first() -> None:
        background_tasks.add_task(second)

    def second() -> None:
        seen.append(background_tasks.options)

    def stream(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("500 OOPS", [])
        yield b""
        get_background_tasks(environ).using(**options).add_task(first)
        options_of_layer.append(get_background_tasks(environ).options)

    options_of_layer: list[Any] = []
    inner = BackgroundTasksMiddleware(stream, run_on="error")
    respond(BackgroundTasksMiddleware(inner))
    assert seen == options_of_layer


def test_an_inner_application_that_raises_leaves_the_outer_options(log: Log) -> None:
    seen: list[str] = []
    inner = BackgroundTasksMiddleware(app_that(lambda e: fail(KeyError())), run_on="error")

    def outer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        with pytest.raises(KeyError):
            inner(environ, start_response)
        background_tasks.add_task(seen.append, "of the page instead")
        start_response("200 OK", [])
        return [b"sorry"]

    assert respond(BackgroundTasksMiddleware(outer)) == b"sorry"
    assert seen == ["of the page instead"]


def test_an_environ_may_be_used_again() -> None:
    seen: list[str] = []
    app = BackgroundTasksMiddleware(
        app_that(lambda e: get_background_tasks(e).add_task(seen.append, "ran"))
    )
    idle = BackgroundTasksMiddleware(app_that(lambda e: None))
    environ = make_environ()
    for handler in (app, app, idle, app):
        Server().run(handler, environ)
    assert seen == ["ran"] * 3


def test_a_foreign_object_in_the_environ_is_shared_and_not_run() -> None:
    seen: list[str] = []
    mine = BackgroundTasks()
    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(seen.append, "x"))
    )
    Server().run(app, make_environ(**{ENVIRON_KEY: mine}))
    assert seen == []
    mine()
    assert seen == ["x"]


def test_a_view_in_the_environ_is_shared_as_its_list_is() -> None:
    seen: list[str] = []
    inner = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(seen.append, "x"), status="500 OOPS")
    )

    def between(environ: Environ, start_response: Any) -> Iterable[bytes]:
        environ[ENVIRON_KEY] = get_background_tasks(environ).using(run_on="error")
        return inner(environ, start_response)

    respond(BackgroundTasksMiddleware(between))
    assert seen == ["x"]


def test_a_request_within_a_request_has_a_new_object() -> None:
    seen: list[str] = []
    inner = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(seen.append, "in"))
    )

    def outer(environ: Environ) -> None:
        background_tasks.add_task(seen.append, "out")
        respond(inner)
        assert seen == ["in"]
        background_tasks.add_task(seen.append, "out")

    respond(BackgroundTasksMiddleware(app_that(outer)))
    assert seen == ["in", "out", "out"]


# Transparency (rule 9).


def test_a_list_without_tasks_goes_back_untouched_and_ends_the_batch() -> None:
    body = [b"a", b"b"]
    kept: list[BackgroundTasks] = []
    app = BackgroundTasksMiddleware(
        app_that(lambda e: kept.append(get_background_tasks(e)), body=lambda: body)
    )
    assert app(make_environ(), Server().start_response) is body
    with pytest.raises(RuntimeError, match="batch has ended"):
        kept[0].add_task(print)


@pytest.mark.parametrize("make", [list, tuple, type("Rows", (list,), {})])
def test_a_list_or_tuple_keeps_its_length_and_can_be_iterated_twice(make: Any) -> None:
    seen: list[str] = []
    app = BackgroundTasksMiddleware(
        app_that(
            lambda e: background_tasks.add_task(seen.append, "x"),
            body=lambda: make([b"a", b"b"]),
        )
    )
    body: Any = app(make_environ(), Server().start_response)
    assert len(body) == 2
    assert list(body) == list(body) == [b"a", b"b"]
    body.close()
    assert seen == ["x"]


@pytest.mark.parametrize(
    "make", [lambda: (c for c in (b"a",)), lambda: iter([b"a"]), lambda: {b"a"}]
)
def test_nothing_else_has_a_length(make: Any) -> None:
    app = BackgroundTasksMiddleware(app_that(lambda e: None, body=make))
    body: Any = app(make_environ(), Server().start_response)
    assert not hasattr(body, "__len__")
    assert list(body) == [b"a"]
    body.close()


def test_chunks_pass_untouched() -> None:
    chunks = [b"", b"a", bytes(100_000)]
    app = BackgroundTasksMiddleware(app_that(lambda e: None, body=lambda: (c for c in chunks)))
    body = app(make_environ(), Server().start_response)
    assert all(ours is theirs for ours, theirs in zip(body, chunks, strict=True))
    body.close()  # type: ignore[attr-defined]


def test_a_generator_can_be_iterated_in_two_parts() -> None:
    app = BackgroundTasksMiddleware(
        app_that(lambda e: None, body=lambda: (c for c in (b"a", b"b")))
    )
    body: Any = app(make_environ(), Server().start_response)
    assert next(iter(body)) == b"a"
    assert list(body) == [b"b"]
    body.close()


def test_start_response_gets_the_arguments_of_the_application() -> None:
    error = (ValueError, ValueError(), None)
    returned: list[object] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("A", "1")])
        returned.append(start_response("500 OOPS", [("B", "2")], error))
        start_response("500 OOPS", [("B", "2")], exc_info=error)
        return []

    server = Server()
    server.run(BackgroundTasksMiddleware(app), make_environ())
    assert server.calls == [
        ("200 OK", [("A", "1")]),
        ("500 OOPS", [("B", "2")], error),
        ("500 OOPS", [("B", "2")], error),
    ]
    assert returned == [server.written.append]


def test_write_reaches_the_server() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        background_tasks.add_task(seen.append, "x")
        write = start_response("200 OK", [("Content-Length", "4")])
        write(b"by ")
        return [b"x"]

    server = Server()
    assert server.run(BackgroundTasksMiddleware(app), make_server_environ()) == b"by x"
    assert seen == ["x"]


def test_start_response_may_be_called_with_the_first_chunk() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        get_background_tasks(environ).add_task(seen.append, "x")
        start_response("500 OOPS", [])
        yield b"lazy"

    server = Server()
    assert server.run(BackgroundTasksMiddleware(app, run_on="error"), make_environ()) == b"lazy"
    assert server.status == "500 OOPS"
    assert seen == ["x"]


class FileWrapper:
    def __init__(self, *chunks: bytes) -> None:
        self.chunks = iter(chunks)

    def __iter__(self) -> Iterator[bytes]:
        return self.chunks


@pytest.mark.parametrize("adds", [False, True])
def test_the_servers_file_wrapper_passes_through_if_no_task_was_added(adds: bool) -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        if adds:
            background_tasks.add_task(seen.append, "x")
        start_response("200 OK", [])
        made: Iterable[bytes] = environ["wsgi.file_wrapper"](b"file")
        return made

    environ = make_environ(**{"wsgi.file_wrapper": FileWrapper})
    body: Any = BackgroundTasksMiddleware(app)(environ, Server().start_response)
    assert isinstance(body, FileWrapper) is not adds
    assert list(body) == [b"file"]
    if adds:
        body.close()
        assert seen == ["x"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [b"ok"],
        lambda: (b"ok",),
        lambda: (c for c in (b"o", b"k")),
        lambda: Response("ok").iter_encoded(),
    ],
)
def test_wsgirefs_validator_is_content_inside_and_outside(make: Any) -> None:
    seen: list[str] = []
    inside = app_that(
        lambda e: get_background_tasks(e).add_task(seen.append, "x"),
        headers=[("Content-Type", "text/plain"), ("Content-Length", "2")],
        body=make,
    )
    app: Any = validator(BackgroundTasksMiddleware(validator(inside)))
    environ = make_environ(QUERY_STRING="")
    environ.pop("HTTP_HOST")
    assert Server().run(app, environ) == b"ok"
    assert seen == ["x"]


def test_werkzeugs_lint_middleware_is_content_inside_and_outside() -> None:
    seen: list[str] = []

    @Request.application
    def inside(request: Request) -> Response:
        background_tasks.add_task(seen.append, "x")
        return Response("ok")

    app = LintMiddleware(BackgroundTasksMiddleware(LintMiddleware(inside)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Client(app).get("/", buffered=True).text == "ok"
    assert seen == ["x"]


def test_an_applications_error_reaches_the_server_unchanged() -> None:
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug") as caught:
        respond(BackgroundTasksMiddleware(app_that(lambda e: fail(error))))
    assert caught.value is error


def test_the_repr_of_a_middleware_shows_the_application() -> None:
    app = BackgroundTasksMiddleware(respond, runner="inline")  # type: ignore[arg-type]
    assert repr(app).startswith("<BackgroundTasksMiddleware of <function respond")
    assert repr(app).endswith("InlineRunner()>")


# Bad input.


class HalfARunner:
    def submit(self, batch: object) -> None: ...


def runner_with(name: str, method: object) -> object:
    return type("OwnRunner", (InlineRunner,), {name: method})()


class AsgiApp:
    async def __call__(self, scope: object, receive: object, send: object) -> None: ...


async def method_that_nobody_awaits(self: object, given: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"app": sys}, TypeError, "app must be a WSGI application"),
        ({"app": None}, TypeError, "got None"),
        ({"app": AsgiApp()}, TypeError, "app must be a WSGI application: app(environ, sta"),
        (
            {"run_on": "failure"},
            ValueError,
            "run_on must be 'success', 'error' or 'always'; got 'failure'",
        ),
        (
            {"runner": "threads"},
            ValueError,
            "runner must be 'inline', 'pool' or a runner object; got 'threads'",
        ),
        ({"runner": HalfARunner()}, TypeError, "an object with submit, drain and statistics"),
        ({"runner": InlineRunner}, TypeError, "an object with submit, drain and statistics"),
        (
            {"runner": runner_with("submit", method_that_nobody_awaits)},
            TypeError,
            "runner must be a runner whose submit is a plain method",
        ),
        (
            {"runner": runner_with("send", method_that_nobody_awaits)},
            TypeError,
            "runner must be a runner whose send is a plain method",
        ),
        ({"runner": runner_with("check", 5)}, TypeError, "a runner whose check is a plain"),
        ({"on_error": "log"}, TypeError, "on_error must be a plain function"),
        ({"stop_on_error": 1}, TypeError, "stop_on_error must be True or False; got 1"),
    ],
)
def test_bad_options_are_refused_at_once(
    options: Any, error: type[Exception], message: str
) -> None:
    app = options.pop("app", app_that(lambda e: None))
    with pytest.raises(error) as caught:
        BackgroundTasksMiddleware(app, **options)
    assert message in str(caught.value)


def test_a_runner_may_refuse_a_task_in_add_task() -> None:
    class Choosy(InlineRunner):
        def check(self, task: BackgroundTask) -> None:
            if task.args:
                raise TypeError(f"{task.name}: no arguments here")

    seen: list[str] = []

    def add(environ: Environ) -> None:
        with pytest.raises(TypeError, match=r"list\.append: no arguments here"):
            background_tasks.add_task(seen.append, "x")
        background_tasks.using(run_on="always").add_task(seen.clear)
        assert len(background_tasks.tasks) == 1

    respond(BackgroundTasksMiddleware(app_that(add), runner=Choosy()))


def test_with_runner_pool_a_test_client_is_served_by_the_pool() -> None:
    names: list[str] = []
    done = threading.Event()

    def task() -> None:
        names.append(threading.current_thread().name)
        done.set()

    app: App = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(task)), runner="pool"
    )
    respond(app)
    assert done.wait(TIMEOUT)
    assert names[0].startswith("wsgi_bg-pool")


class Meta(type):
    """Classes that compare and have no hash."""

    def __eq__(cls, other: object) -> bool:
        return cls is other


class OfUnhashableType(metaclass=Meta):
    def __iter__(self) -> Iterator[bytes]:
        yield b"ok"


def test_an_iterable_of_any_type_is_passed_on_and_a_proxy_of_a_list_keeps_its_length() -> None:
    seen: list[str] = []

    def has_length(body: Any) -> bool:
        app = BackgroundTasksMiddleware(
            app_that(lambda e: background_tasks.add_task(seen.append, "ran"), body=lambda: body)
        )
        response: Any = app(make_environ(), Server().start_response)
        assert b"".join(response) == b"ok"
        response.close()
        return hasattr(response, "__len__")

    assert not has_length(OfUnhashableType())
    assert has_length(LocalProxy(lambda: [b"ok"]))
    assert seen == ["ran", "ran"]


def test_a_length_declared_with_an_error_before_the_return_counts() -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        background_tasks.add_task(int)
        start_response("200 OK", [("Content-Length", "2")])
        start_response("404 Not Found", [("Content-Length", "2")], (None, None, None))
        return [b"ok"]

    class Completeness(InlineRunner):
        def submit(self, batch: Any) -> None:
            seen.append(batch.response_complete)
            super().submit(batch)

    seen: list[bool] = []
    Server().run(BackgroundTasksMiddleware(app, runner=Completeness()), make_server_environ())
    assert seen == [True]


def test_a_task_that_comes_too_late_keeps_nothing_alive() -> None:
    environ = make_environ()
    respond(BackgroundTasksMiddleware(app_that(lambda e: None)), environ)
    tasks = get_background_tasks(environ)
    before = len(collectors.get().unfinished)
    assert tasks.tasks == []
    with pytest.raises(RuntimeError, match="has ended"):
        tasks.add_task(int)
    assert len(collectors.get().unfinished) == before
