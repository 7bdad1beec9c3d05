"""Tasks of requests from ``django.test.Client``, which calls no WSGI application."""

from __future__ import annotations

import contextlib
import threading
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import Context, copy_context
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.core.signals import request_finished
from django.db import close_old_connections, connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, TestCase
from django.test.utils import override_settings
from django.urls import path

from tests.conftest import Log
from tests.support import TIMEOUT, run_python
from tests.support.command import ROOT
from tests.support.django import Order, settings
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    background_tasks,
    get_background_tasks,
    inject,
)
from wsgi_bg._tasks.task import current
from wsgi_bg.django import get_wsgi_application

Enter = Callable[[Any], object]


def serve(enter: Enter) -> Client:
    """A client of views that call ``enter(request)`` and answer in different ways."""

    def plain(request: Any) -> Any:
        enter(request)
        return HttpResponse("ok")

    async def is_async(request: Any) -> Any:
        await sync_to_async(enter)(request)
        return HttpResponse("ok")

    def stream(request: Any) -> Any:
        enter(request)
        return StreamingHttpResponse(iter(["Ada,", "Grace"]))

    async def async_stream(request: Any) -> Any:
        await sync_to_async(enter)(request)

        async def rows() -> AsyncIterator[str]:
            yield "Ada,"
            yield "Grace"

        return StreamingHttpResponse(rows())

    def broken_stream(request: Any) -> Any:
        enter(request)

        def rows() -> Iterator[str]:
            yield "Ada,"
            raise ZeroDivisionError

        return StreamingHttpResponse(rows())

    def unavailable(request: Any) -> Any:
        enter(request)
        return HttpResponse("later", status=503)

    def broken(request: Any) -> Any:
        enter(request)
        raise ZeroDivisionError

    settings.ROOT_URLCONF = tuple(
        path("" if view is plain else view.__name__, view)
        for view in (plain, is_async, stream, async_stream, broken_stream, unavailable, broken)
    )
    get_wsgi_application()
    return Client(raise_request_exception=False)


class Run:
    """A task, and the threads on which the task ran."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self) -> None:
        self.threads.append(threading.get_ident())

    @property
    def count(self) -> int:
        return len(self.threads)


@pytest.fixture(autouse=True)
def no_request_left() -> Iterator[None]:
    """End the last request, which otherwise lasts until the next for ``on_commit``."""
    yield
    left: Any = current.get(None)
    if left is not None:
        left.visit.leave()
    assert current.get(None) is None


@pytest.fixture
def task() -> Run:
    return Run()


@pytest.mark.parametrize("method", ["get", "post", "head"])
@pytest.mark.parametrize("path", ["/", "/is_async"])
def test_a_task_has_run_on_the_tests_thread_when_the_client_returns(
    path: str, method: str, task: Run
) -> None:
    @inject
    def service(tasks: BackgroundTasks) -> None:
        assert tasks == background_tasks
        tasks.add_task(task)

    def enter(request: Any) -> None:
        service()
        get_background_tasks(request.environ).add_task(task)
        assert task.count == 0

    getattr(serve(enter), method)(path)
    assert task.threads == [threading.get_ident()] * 2


def test_an_async_task_has_run_when_the_client_returns() -> None:
    seen: list[str] = []

    async def async_task() -> None:
        seen.append("ran")

    serve(lambda request: background_tasks.add_task(async_task)).get("/")
    assert seen == ["ran"]


def test_the_tasks_of_streams_run_as_each_was_read(task: Run) -> None:
    names: list[str] = []
    client = serve(lambda request: background_tasks.add_task(names.append, request.GET["n"]))
    first, second = client.get("/stream?n=1"), client.get("/stream?n=2")
    assert names == []
    assert first.getvalue() == b"Ada,Grace"
    assert names == ["1"]
    assert second.getvalue() == b"Ada,Grace"
    assert names == ["1", "2"]
    first.close()
    assert names == ["1", "2"]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume async")
def test_the_tasks_of_an_async_stream_may_use_the_database(
    database: dict[str, Any], log: Log
) -> None:
    """Django's client closes the response inside of an event loop."""
    counts: list[int] = []

    def count() -> None:
        try:
            counts.append(Order.objects.count())
        finally:
            connection.close()  # of this call: its context ends with the loop of the stream

    count_async = sync_to_async(count)

    def enter(request: Any) -> None:
        background_tasks.add_task(count)
        background_tasks.add_task(async_to_sync(count_async))
        background_tasks.add_task(count_async)

    assert b"".join(serve(enter).get("/async_stream")) == b"Ada,Grace"
    assert counts == [0, 0, 0]
    assert log.errors == []


@pytest.mark.parametrize("propagates", [False, True])
@pytest.mark.parametrize("path", ["/unavailable", "/broken"])
def test_a_request_fails_as_it_does_on_a_server(
    path: str, propagates: bool, task: Run, log: Log
) -> None:
    alarm = Run()

    def enter(request: Any) -> None:
        background_tasks.add_task(task)
        background_tasks.using(run_on="error").add_task(alarm)

    client = serve(enter)
    with (
        override_settings(DEBUG_PROPAGATE_EXCEPTIONS=propagates),
        contextlib.suppress(ZeroDivisionError),
    ):
        client.get(path)
    assert (task.count, alarm.count) == (0, 1)
    [warning] = log.warnings
    assert "was not run: the request failed" in warning


def test_a_tasks_error_is_logged(task: Run, log: Log) -> None:
    def fail() -> None:
        raise ValueError

    def enter(request: Any) -> None:
        background_tasks.add_task(fail)
        background_tasks.add_task(task)

    assert serve(enter).get("/").status_code == 200
    assert task.count == 1
    assert [type(each) for each in log.tracebacks] == [ValueError]


def test_the_options_are_those_of_the_application_and_of_the_settings(task: Run) -> None:
    names: list[str] = []

    def fail() -> None:
        raise ValueError

    def enter(request: Any) -> None:
        background_tasks.add_task(fail)
        background_tasks.add_task(task)

    client = serve(enter)
    get_wsgi_application("pool", on_error=lambda task, exc: names.append(task.name))
    with override_settings(WSGI_BG_STOP_ON_ERROR=True):
        client.get("/")
    get_wsgi_application()
    assert len(names) == 1
    assert task.count == 0


def look_at_label(request: Any) -> None:
    """Set a key of the environ, and add a task that looks at the label of its request."""
    labels: list[str | None] = request.environ["labels"]
    request.environ["route"] = "the route"
    tasks: list[BackgroundTask] = []
    tasks.append(background_tasks.add_task(lambda: labels.append(tasks[0].request)))


@pytest.mark.parametrize("method", ["get", "post", "head"])
def test_the_label_of_a_request_has_its_method(method: str) -> None:
    labels: list[str | None] = []
    getattr(serve(look_at_label), method)("/", labels=labels)
    assert labels == [f"{method.upper()} /"]


def test_the_label_may_be_made_of_what_the_view_has_put_into_the_environ() -> None:
    labels: list[str | None] = []
    client = serve(look_at_label)
    with override_settings(WSGI_BG_REQUEST_LABEL=lambda environ: environ["route"]):
        client.get("/", labels=labels)
        list(client.get("/stream", labels=labels).streaming_content)
    assert labels == ["the route", "the route"]


def test_the_proxy_works_in_requests_only(task: Run) -> None:
    client = serve(lambda request: background_tasks.add_task(task))
    client.get("/")
    with pytest.raises(RuntimeError, match="while the application callable runs"):
        background_tasks.add_task(task)


def test_a_task_may_add_tasks(task: Run) -> None:
    serve(
        lambda request: background_tasks.add_task(lambda: background_tasks.add_task(task))
    ).get("/")
    assert task.count == 1


def test_a_kept_object_takes_no_task_after_the_request(task: Run) -> None:
    kept: list[BackgroundTasks] = []
    serve(lambda request: kept.append(get_background_tasks(request.environ))).get("/")
    with pytest.raises(RuntimeError, match="has ended"):
        kept[0].add_task(task)


def test_streams_that_are_closed_in_the_order_of_their_requests_leave_nothing(
    task: Run,
) -> None:
    client = serve(lambda request: background_tasks.add_task(task))
    first, second = client.get("/stream"), client.get("/stream")
    first.close()
    second.close()
    assert task.count == 2
    with pytest.raises(RuntimeError, match="while the application callable runs"):
        background_tasks.add_task(task)


def test_a_stream_that_raises_is_a_failed_request(task: Run) -> None:
    alarm = Run()

    def enter(request: Any) -> None:
        background_tasks.add_task(task)
        background_tasks.using(run_on="error").add_task(alarm)

    response = serve(enter).get("/broken_stream")
    with pytest.raises(ZeroDivisionError):
        response.getvalue()
    assert (task.count, alarm.count) == (0, 1)
    # An error that a test handles meanwhile is none of the stream's.
    with contextlib.suppress(ValueError):
        try:
            raise ValueError
        finally:
            assert serve(enter).get("/stream").getvalue() == b"Ada,Grace"
    assert (task.count, alarm.count) == (1, 1)


def test_a_response_that_is_closed_in_another_context_ends_its_request(task: Run) -> None:
    client = serve(lambda request: background_tasks.add_task(task))
    response = Context().run(client.get, "/stream")
    copy_context().run(response.close)
    assert task.count == 1


def test_a_response_that_is_closed_in_a_copied_context_ends_its_request(task: Run) -> None:
    client = serve(lambda request: background_tasks.add_task(task))

    def ask() -> None:
        response = client.get("/stream")
        copy_context().run(response.close)

    Context().run(ask)
    assert task.count == 1


def test_a_response_that_a_view_closes_itself_ends_nothing(task: Run) -> None:
    def enter(request: Any) -> None:
        background_tasks.add_task(task)
        HttpResponse("thrown away").close()
        assert task.count == 0

    assert serve(enter).get("/").status_code == 200
    assert task.count == 1


def test_signals_that_no_response_sends_are_left_alone(task: Run) -> None:
    def enter(request: Any) -> None:
        background_tasks.add_task(task)
        request_finished.disconnect(close_old_connections)
        request_finished.send(sender=None)
        request_finished.connect(close_old_connections)
        assert task.count == 0

    assert serve(enter).get("/").status_code == 200
    assert task.count == 1


# Transactions


def run_case(body: Callable[[Any], None]) -> None:
    """Run ``body(case)`` as a test of Django's ``TestCase``, in a transaction."""

    class Case(TestCase):  # type: ignore[misc]
        def test(self) -> None:
            body(self)

    result = unittest.TestResult()
    unittest.TestSuite([Case("test")]).run(result)
    assert not result.errors + result.failures, result.errors + result.failures
    assert result.testsRun == 1


def on_commit(add: Callable[[], object]) -> None:
    with transaction.atomic():
        transaction.on_commit(add)


each_way = pytest.mark.parametrize(
    "find",
    [
        lambda request: background_tasks,
        lambda request: get_background_tasks(request.environ),
        lambda request: get_background_tasks(request.environ).using(run_on="always"),
        lambda request: background_tasks.using(run_on="always").using(stop_on_error=True),
    ],
    ids=["proxy", "environ", "using", "using twice"],
)


@each_way
@pytest.mark.parametrize("path", ["/", "/is_async"])
def test_on_commit_adds_a_task_that_runs_at_once_in_a_test_case(
    path: str, find: Callable[[Any], BackgroundTasks], database: dict[str, Any], task: Run
) -> None:
    def enter(request: Any) -> None:
        tasks = find(request)
        on_commit(lambda: tasks.add_task(task))
        on_commit(lambda: tasks.add_task(task))

    def test(case: Any) -> None:
        client = serve(enter)
        with case.captureOnCommitCallbacks(execute=True):
            client.get(path)
            client.get(path)
            assert task.count == 0
        assert task.threads == [threading.get_ident()] * 4

    run_case(test)


@pytest.mark.parametrize("path", ["/", "/is_async"])
@pytest.mark.parametrize("in_test_case", [False, True])
def test_the_on_commit_of_a_task_adds_tasks(
    in_test_case: bool, path: str, database: dict[str, Any], task: Run
) -> None:
    def task_with_a_commit() -> None:
        on_commit(lambda: background_tasks.add_task(second_task))

    def second_task() -> None:
        on_commit(lambda: background_tasks.add_task(task))

    def enter(request: Any) -> None:
        background_tasks.add_task(task_with_a_commit)

    def test(case: Any) -> None:
        with case.captureOnCommitCallbacks(execute=True) if case else contextlib.nullcontext():
            serve(enter).get(path)
        assert task.count == 1

    run_case(test) if in_test_case else test(None)


@pytest.mark.parametrize("in_test_case", [False, True])
def test_a_task_of_on_commit_runs_by_the_status_of_its_request(
    in_test_case: bool, database: dict[str, Any], task: Run
) -> None:
    alarm = Run()

    def enter(request: Any) -> None:
        on_commit(lambda: background_tasks.add_task(task))
        on_commit(lambda: background_tasks.using(run_on="error").add_task(alarm))

    def test(case: Any) -> None:
        with case.captureOnCommitCallbacks(execute=True) if case else contextlib.nullcontext():
            serve(enter).get("/unavailable")

    run_case(test) if in_test_case else test(None)
    assert (task.count, alarm.count) == (0, 1)


@pytest.mark.parametrize("is_atomic", [False, True])
def test_on_commit_adds_a_task_without_a_test_case(
    is_atomic: bool, database: dict[str, Any], task: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(database, "ATOMIC_REQUESTS", is_atomic)
    serve(lambda request: on_commit(lambda: background_tasks.add_task(task))).get("/")
    assert task.count == 1


def test_a_task_sees_the_rows_of_the_test_cases_transaction(
    database: dict[str, Any], log: Log
) -> None:
    counts: list[int] = []

    def test(case: Any) -> None:
        Order.objects.create()
        serve(
            lambda request: background_tasks.add_task(
                lambda: counts.append(Order.objects.count())
            )
        ).get("/")
        Order.objects.create()

    run_case(test)
    assert counts == [1]
    assert log.errors == []
    assert Order.objects.count() == 0


def test_a_task_leaves_the_connection_of_the_test_open(database: dict[str, Any]) -> None:
    client = serve(lambda request: background_tasks.add_task(Order.objects.count))
    connection.ensure_connection()
    opened = connection.connection
    client.get("/")
    assert connection.connection is opened


def test_the_thread_of_an_async_tasks_queries_keeps_no_connection(
    database: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the database of a test run could not be dropped."""
    monkeypatch.setitem(database, "CONN_MAX_AGE", 600)
    serve(lambda request: background_tasks.add_task(Order.objects.acreate)).get("/")
    assert Order.objects.count() == 1

    def look() -> bool:
        return connection.connection is None

    assert SyncToAsync.single_thread_executor.submit(look).result(TIMEOUT)


def test_a_task_that_a_late_callback_adds_is_refused_or_logged_like_another(
    database: dict[str, Any], log: Log
) -> None:
    def fail() -> None:
        raise ValueError

    def enter(request: Any) -> None:
        tasks = get_background_tasks(request.environ)
        on_commit(lambda: tasks.add_task(fail))
        on_commit(lambda: tasks.add_task(3))  # type: ignore[arg-type]

    def test(case: Any) -> None:
        with (
            pytest.raises(TypeError, match="cannot be called"),
            case.captureOnCommitCallbacks(execute=True),
        ):
            serve(enter).get("/")

    run_case(test)
    assert [type(each) for each in log.tracebacks] == [ValueError]


def test_nothing_is_left_of_a_test_case(database: dict[str, Any], task: Run) -> None:
    client = serve(lambda request: on_commit(task))
    run_case(lambda case: client.get("/"))
    with pytest.raises(RuntimeError):
        background_tasks.add_task(task)
    client.get("/")
    with pytest.raises(RuntimeError, match="while the application callable runs"):
        background_tasks.add_task(task)


def test_an_optional_parameter_stands_for_a_request_that_awaits_its_commit(
    database: dict[str, Any], task: Run
) -> None:
    """A test that leaves callbacks of ``on_commit`` uncalled changes no later test."""

    @inject
    def notify(tasks: BackgroundTasks | None = None) -> None:
        found.append(tasks is not None)
        if tasks is not None:
            tasks.add_task(task)

    found: list[bool] = []
    client = serve(lambda request: on_commit(notify))

    def test(case: Any) -> None:
        with case.captureOnCommitCallbacks(execute=True):
            client.get("/")
        client.get("/")

    run_case(test)
    assert (found, task.count) == ([True], 1)
    notify()
    assert (found, task.count) == ([True, False], 1)


# The pytest fixture


def test_the_pytest_fixture_has_the_tasks(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)  # for this module
    pytester.makepyfile(
        """
        import pytest
        from django.core.signals import request_finished
        from django.db import close_old_connections
        from tests.django.test_client import serve
        from wsgi_bg import background_tasks as proxy

        def mail(recipient):
            raise ValueError(recipient)

        client = serve(lambda request: proxy.add_task(mail, "ada"))

        def test_recorded(background_tasks):
            client.get("/")
            client.head("/is_async")
            assert [task.args for task in background_tasks.tasks] == [("ada",), ("ada",)]

        @pytest.mark.wsgi_bg(mode="run")
        def test_run(background_tasks):
            with pytest.raises(ValueError, match="ada"):
                client.get("/")
            assert request_finished.disconnect(close_old_connections)
            request_finished.connect(close_old_connections)
        """
    )
    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=2)


def test_an_installed_app_is_enough() -> None:
    """The tests of a project need not import its wsgi.py."""
    done = run_python(
        """
        import django
        from django.conf import settings
        from django.http import HttpResponse
        from django.urls import path
        from wsgi_bg import background_tasks

        def view(request):
            background_tasks.add_task(print, "ran")
            return HttpResponse()

        settings.configure(
            ALLOWED_HOSTS=["*"],
            INSTALLED_APPS=["wsgi_bg.django"],
            ROOT_URLCONF=(path("", view),),
        )
        django.setup()
        from django.test import Client
        print(Client().get("/").status_code)
        """
    )
    assert done.stdout == "ran\n200\n", done.stderr


def test_a_request_that_only_looks_like_the_clients_has_no_tasks() -> None:
    request = RequestFactory().get("/")
    with pytest.raises(LookupError):
        get_background_tasks(request.environ)


def test_all_tasks_of_a_request_are_one_batch_to_the_hooks() -> None:
    """The views of the test client share the request's object."""
    batches: list[object] = []

    def enter(request: Any) -> None:
        tasks = get_background_tasks(request.environ)
        for view in (tasks, tasks.using(), tasks.using().using()):
            batches.append(view.root)

    serve(enter).get("/")
    assert len(batches) == 3
    assert len({id(each) for each in batches}) == 1
