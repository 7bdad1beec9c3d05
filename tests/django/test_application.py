"""``wsgi_bg.django``: language, database connections and caches of tasks; options."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.wsgi import get_wsgi_application as django_application
from django.db import DatabaseError, connection
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.http import HttpResponse, StreamingHttpResponse
from django.test.utils import override_settings
from django.urls import path
from django.utils import timezone, translation

from tests.conftest import Log
from tests.support import TIMEOUT, client, run_python, waitress
from tests.support.django import Order, settings
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg.django import get_wsgi_application
from wsgi_bg.hooks import Hooks

Add = Callable[[], object]


def serve_views(add: Add) -> None:
    """Make Django serve views that call ``add``: a process has only one Django."""

    def plain(request: Any) -> Any:
        add()
        return HttpResponse("ok")

    def stream(request: Any) -> Any:
        add()
        return StreamingHttpResponse(iter(["Ada,", "Grace"]))

    async def is_async(request: Any) -> Any:
        add()
        return HttpResponse("ok")

    async def async_stream(request: Any) -> Any:
        add()
        return StreamingHttpResponse(iter(["Ada,", "Grace"]))

    settings.ROOT_URLCONF = (
        path("", plain),
        path("stream", stream),
        path("async", is_async),
        path("async-stream", async_stream),
    )


@contextmanager
def serving(add: Add, runner: Any = "pool", **options: Any) -> Iterator[int]:
    serve_views(add)
    with waitress(get_wsgi_application(runner, **options), threads=1) as port:
        yield port


def ask(add: Add, runner: Any = "pool", path: str = "/") -> None:
    """Make a request to a real server."""
    with serving(add, runner) as port:
        client.ask(port, path=path)


each_runner = pytest.mark.parametrize("runner", ["inline", "pool"])


# Language and time zone


def state() -> tuple[str | None, str]:
    return translation.get_language(), timezone.get_current_timezone_name()


class Look:
    """Tasks that record the language and the time zone."""

    def __init__(self) -> None:
        self.seen: SimpleQueue[object] = SimpleQueue()

    def plain(self) -> None:
        self.seen.put(state())

    async def on_the_loop(self) -> None:
        self.seen.put(state())

    async def in_a_thread(self) -> None:
        await sync_to_async(int)()
        self.seen.put(await sync_to_async(state)())

    def returns_an_awaitable(self) -> Awaitable[None]:
        return self.on_the_loop()


def german(task: Callable[[], object]) -> None:
    """Add a task in German, and go on in the language of the settings."""
    with translation.override("de"), timezone.override("Europe/Berlin"):
        background_tasks.add_task(task)


@each_runner
@pytest.mark.parametrize("path", ["/", "/stream", "/async", "/async-stream"])
@pytest.mark.parametrize(
    "task", [Look.plain, Look.on_the_loop, Look.in_a_thread, Look.returns_an_awaitable]
)
def test_a_task_has_the_language_and_the_time_zone_of_its_add_task(
    runner: str, path: str, task: Callable[[Look], object]
) -> None:
    look = Look()
    ask(lambda: german(task.__get__(look)), runner, path)
    assert look.seen.get(timeout=TIMEOUT) == ("de", "Europe/Berlin")


@each_runner
def test_the_middleware_alone_keeps_language_and_time_zone_too(runner: Any) -> None:
    look = Look()
    serve_views(lambda: german(look.plain))
    app = BackgroundTasksMiddleware(django_application(), runner=runner)
    with waitress(app) as port:
        client.ask(port)
    assert look.seen.get(timeout=TIMEOUT) == ("de", "Europe/Berlin")


@each_runner
def test_a_language_that_a_task_activates_stays_in_the_task(runner: str) -> None:
    look = Look()

    def add() -> None:
        look.plain()
        background_tasks.add_task(translation.activate, "fr")
        background_tasks.add_task(look.plain)

    with serving(add, runner) as port:
        client.ask(port)
        client.ask(port)
        states = [look.seen.get(timeout=TIMEOUT) for _ in range(4)]
    assert states == [("en-us", "America/Chicago")] * 4


# Caches


class Cache(LocMemCache):  # type: ignore[misc]
    """A connection to a cache, which records its thread and its closing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.thread = threading.get_ident()
        self.is_closed = False

    def close(self, **kwargs: object) -> None:
        self.is_closed = True


@pytest.fixture
def cache_class() -> Iterator[None]:
    with override_settings(CACHES={"default": {"BACKEND": f"{__name__}.Cache"}}):
        yield


@pytest.mark.usefixtures("cache_class")
@pytest.mark.parametrize("path", ["/", "/async"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_a_cache_is_shared_by_no_two_threads_and_closed_after_the_task(
    path: str, is_async: bool
) -> None:
    seen: SimpleQueue[Any] = SimpleQueue()

    def task() -> None:
        seen.put((caches["default"], threading.get_ident()))

    async def async_task() -> None:
        await sync_to_async(task)()

    def add() -> None:
        seen.put((caches["default"], threading.get_ident()))
        background_tasks.add_task(async_task if is_async else task)

    pool = PoolRunner()
    ask(add, pool, path)
    (of_view, _), (of_task, thread) = [seen.get(timeout=TIMEOUT) for _ in range(2)]
    assert of_task is not of_view
    assert of_task.thread == thread
    assert pool.drain(TIMEOUT) == []
    assert of_task.is_closed


# Database connections


class Opened:
    """The database connections that were opened, on all threads."""

    def __init__(self) -> None:
        self.wrappers: list[BaseDatabaseWrapper] = []

    def note(self, connection: BaseDatabaseWrapper, **_: object) -> None:
        self.wrappers.append(connection)

    @property
    def open(self) -> int:
        SyncToAsync.single_thread_executor.submit(int).result(TIMEOUT)  # behind earlier calls
        return sum(each.connection is not None for each in set(self.wrappers))


@pytest.fixture
def opened(database: dict[str, Any]) -> Iterator[Opened]:
    connection.close()
    opened = Opened()
    connection_created.connect(opened.note)
    yield opened
    connection_created.disconnect(opened.note)


def write() -> None:
    Order.objects.create()


async def write_async() -> None:
    await Order.objects.acreate()
    await Order.objects.acreate()


def write_in_a_loop() -> None:
    async def create() -> None:
        await Order.objects.acreate()

    asyncio.run(create())


def fail() -> None:
    write()
    raise ValueError


each_task = pytest.mark.parametrize("task", [write, write_async])


@each_runner
@pytest.mark.parametrize("path", ["/", "/stream", "/async"])
@pytest.mark.parametrize("task", [write, write_async, write_in_a_loop, fail])
def test_no_thread_keeps_a_connection_of_a_task(
    runner: str, path: str, task: Callable[[], object], opened: Opened
) -> None:
    done: Future[None] = Future()

    def add() -> None:
        background_tasks.add_task(task)
        background_tasks.add_task(done.set_result, None)

    ask(add, runner, path)
    done.result(TIMEOUT)
    assert len(opened.wrappers) == 1
    assert opened.open == 0


@each_task
def test_a_connection_that_is_too_old_is_closed_before_a_task(
    task: Callable[[], object],
    opened: Opened,
    database: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(database, "CONN_MAX_AGE", 600)
    seen: SimpleQueue[None] = SimpleQueue()

    def add() -> None:
        background_tasks.add_task(task)
        background_tasks.add_task(seen.put, None)

    with serving(add, PoolRunner(threads=1)) as port:
        for count in (1, 1, 2):
            if count == 2:
                opened.wrappers[0].close_at = 0
            client.ask(port)
            seen.get(timeout=TIMEOUT)
            assert (len(opened.wrappers), opened.open) == (count, 1)
    for wrapper in opened.wrappers:
        wrapper.inc_thread_sharing()
        wrapper.close()


def test_a_connection_that_cannot_be_closed_fails_no_task(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close() -> None:
        raise DatabaseError("the server is away")

    monkeypatch.setattr("wsgi_bg.django.application.close_old_connections", close)
    # asgiref's thread, if there is one, closes its connections too.
    monkeypatch.setattr(SyncToAsync, "single_thread_executor", ThreadPoolExecutor(1))
    pool, seen = PoolRunner(), SimpleQueue[str]()
    ask(lambda: background_tasks.add_task(seen.put, "ran"), pool)
    assert seen.get(timeout=TIMEOUT) == "ran"
    assert pool.drain(TIMEOUT) == []
    assert pool.statistics().succeeded == 1
    assert len(log.errors) == 2
    assert log.errors[0].endswith("close raised")


def test_under_gevent_async_tasks_use_the_orm_and_keep_no_connection(tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    done = run_python(f"""
        from gevent import monkey; monkey.patch_all()
        import gevent
        from tests.support.django import Order, settings
        from django.db import connection, connections
        from django.db.backends.signals import connection_created
        from tests.support import Server, app_that, make_server_environ
        from wsgi_bg import background_tasks, portal, wait
        from asgiref.sync import sync_to_async
        from wsgi_bg.django import application

        connections.settings["default"]["NAME"] = {str(tmp_path / "orders.sqlite3")!r}
        with connection.schema_editor() as editor:
            editor.create_model(Order)
        connection.close()
        opened = []
        note = lambda connection, **_: opened.append(connection)
        connection_created.connect(note)

        async def write():
            await Order.objects.acreate()

        def add(environ):
            background_tasks.add_task(write)
            background_tasks.add_task(Order.objects.create)

        middleware = application.configured(
            lambda **options: application._Middleware(app_that(add), **options)
        )
        for _ in range(2):
            Server().run(middleware, make_server_environ())
            assert wait(10) == []
        portal().call(sync_to_async(int))  # behind earlier calls
        is_open = [each.connection is not None for each in opened]
        print(len(is_open), any(is_open), Order.objects.count())
        """)
    assert (done.stdout, done.returncode) == ("4 False 4\n", 0), done.stderr


# Options


class Count(Hooks):
    """Counts the tasks that were added."""

    def __init__(self) -> None:
        self.added = 0

    def task_added(self, record: object) -> None:
        self.added += 1


def test_the_options_are_the_middlewares() -> None:
    pool, count, errors = PoolRunner(), Count(), list[str]()

    def on_error(task: BackgroundTask, exc: BaseException) -> None:
        errors.append(task.name)

    def add() -> None:
        background_tasks.add_task(fail_at_once)
        background_tasks.add_task(errors.append, "the rest")

    with serving(add, pool, stop_on_error=True, on_error=on_error, hooks=count) as port:
        client.ask(port)
    assert pool.drain(TIMEOUT) == []
    assert errors == [f"{__name__}.fail_at_once"]
    assert count.added == 2


def fail_at_once() -> None:
    raise ValueError


def test_a_setting_overrides_an_option() -> None:
    pool, seen = PoolRunner(), list[str]()
    with override_settings(WSGI_BG_RUNNER=pool, WSGI_BG_RUN_ON="error"):
        ask(lambda: background_tasks.add_task(seen.append, "ran"), "inline")
    assert pool.drain(TIMEOUT) == []
    assert pool.statistics().discarded == 1
    assert seen == []


@pytest.mark.parametrize("by_setting", [False, True])
def test_failed_from_is_an_option_and_a_setting(by_setting: bool, log: Log) -> None:
    pool, seen = PoolRunner(), list[str]()

    def add() -> None:
        background_tasks.add_task(seen.append, "never")
        background_tasks.using(failed_from=404).add_task(seen.append, "ran")

    serve_views(add)
    settings = {"WSGI_BG_FAILED_FROM": 200} if by_setting else {}
    option = None if by_setting else 200
    with override_settings(**settings):
        application = get_wsgi_application(pool, failed_from=option)
    with waitress(application) as port:
        client.ask(port)
    assert pool.drain(TIMEOUT) == []
    assert seen == ["ran"]
    assert "the request failed with 200" in log.warnings[0]
    get_wsgi_application()


@pytest.mark.parametrize(
    ("kwargs", "settings", "message"),
    [
        ({"run_on": "failure"}, {}, "^run_on must be"),
        ({}, {"WSGI_BG_RUN_ON": "failure"}, "^WSGI_BG_RUN_ON must be"),
        ({"failed_from": 99}, {}, "^failed_from must be"),
        ({}, {"WSGI_BG_FAILED_FROM": 601}, "^WSGI_BG_FAILED_FROM must be"),
    ],
)
def test_a_wrong_option_is_named(
    kwargs: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with override_settings(**settings), pytest.raises(ValueError, match=message):
        get_wsgi_application(**kwargs)
    get_wsgi_application()


def test_without_django_the_error_names_the_package_to_install() -> None:
    done = run_python("""
        import sys
        sys.modules["django"] = None
        try:
            import wsgi_bg.django
        except ImportError as exc:
            print(exc)
    """)
    assert done.stdout == (
        "wsgi_bg.django needs a package that is not installed: pip install 'wsgi_bg[django]'\n"
    )
