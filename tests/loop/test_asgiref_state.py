"""Tasks that use asgiref: Flask's and Django's ``async def`` views run on asgiref."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context, ContextVar, copy_context
from queue import SimpleQueue
from typing import ClassVar

import pytest
from asgiref.local import Local
from asgiref.sync import (
    AsyncToSync,
    SyncToAsync,
    ThreadSensitiveContext,
    async_to_sync,
    sync_to_async,
)
from flask import Flask

from tests.support import TIMEOUT, client, run_python, waitress
from wsgi_bg import BackgroundTask, BackgroundTasks, background_tasks
from wsgi_bg._loop import asgiref_state
from wsgi_bg.flask import Background

local = Local()
variable: ContextVar[str] = ContextVar("variable", default="")


class Site:
    """A Flask application whose views call ``add``, and the results of its tasks."""

    def __init__(self, runner: str) -> None:
        self.seen: SimpleQueue[object] = SimpleQueue()
        self.add: Callable[[], object] = lambda: None
        self.app = Flask("site")
        Background(self.app, runner=runner)  # type: ignore[arg-type]

        @self.app.get("/async")
        async def async_view() -> str:
            added = self.add()
            if isinstance(added, Awaitable):
                await added
            return "ok"

        @self.app.get("/async-stream")
        async def async_stream() -> Iterator[str]:
            return iter([await async_view()])

        @self.app.get("/plain")
        def plain_view() -> str:
            self.add()
            return "ok"

    def ask(self, path: str) -> object:
        """Make a request to a real server; return the next result of a task."""
        with waitress(self.app) as port:
            client.ask(port, path=path)
            return self.seen.get(timeout=TIMEOUT)

    async def twice(self) -> None:
        """A task that calls plain functions, as the ORM's async methods do."""
        try:
            first = await sync_to_async(threading.get_ident)()
            second = await sync_to_async(getattr)(local, "value", None)
            assert first != threading.get_ident()
            self.seen.put((second, getattr(local, "value", None)))
        except Exception as exc:
            self.seen.put(exc)

    def waits_for_twice(self) -> None:
        async_to_sync(self.twice)()

    def returns_twice(self) -> Awaitable[None]:
        return self.twice()


@pytest.fixture(params=["inline", "pool"])
def site(request: pytest.FixtureRequest) -> Site:
    return Site(request.param)


PATHS = pytest.mark.parametrize("path", ["/async", "/async-stream", "/plain"])
TASKS = pytest.mark.parametrize(
    "task",
    [Site.twice, Site.waits_for_twice, Site.returns_twice],
    ids=["async", "async_to_sync", "returns an awaitable"],
)


@PATHS
@TASKS
def test_a_task_may_use_sync_to_async_twice(
    site: Site, path: str, task: Callable[[Site], object]
) -> None:
    site.add = lambda: background_tasks.add_task(task, site)
    assert site.ask(path) == (None, None)


@PATHS
@TASKS
def test_a_task_sees_the_local_state_of_the_view(
    site: Site, path: str, task: Callable[[Site], object]
) -> None:
    def add() -> None:
        local.value = "the view's"
        background_tasks.add_task(task, site)
        local.value = "changed later"

    site.add = add
    assert site.ask(path) == ("the view's", "the view's")


def test_a_task_that_sync_to_async_has_added_may_use_sync_to_async_too(site: Site) -> None:
    async def add_next() -> None:
        await sync_to_async(background_tasks.add_task)(site.twice)

    site.add = lambda: background_tasks.add_task(add_next)
    assert site.ask("/plain") == (None, None)


def test_a_task_is_not_in_the_views_thread_sensitive_context(site: Site) -> None:
    """In the view's context asgiref would give each task a thread that never ends."""

    async def look() -> None:
        own = await sync_to_async(threading.get_ident)()
        async with ThreadSensitiveContext():
            site.seen.put(await sync_to_async(threading.get_ident)() != own)

    async def add() -> None:
        async with ThreadSensitiveContext():
            background_tasks.add_task(look)

    site.add = add
    assert site.ask("/async") is True


def test_a_tasks_value_of_a_local_stays_in_the_task(site: Site) -> None:
    def change() -> None:
        local.value = "the task's"

    def look() -> None:
        site.seen.put(getattr(local, "value", None))

    def add() -> None:
        look()
        background_tasks.add_task(change)
        background_tasks.add_task(look)

    site.add = add
    with waitress(site.app, threads=1) as port:
        client.ask(port, path="/plain")
        client.ask(port, path="/plain")
        assert [site.seen.get(timeout=TIMEOUT) for _ in range(4)] == [None] * 4


def test_a_tasks_context_variables_beside_asgirefs_are_kept(site: Site) -> None:
    def add() -> None:
        variable.set("the view's")
        background_tasks.add_task(lambda: site.seen.put(variable.get()))

    site.add = add
    assert site.ask("/async") == "the view's"


@pytest.mark.parametrize("kind", [BackgroundTask, lambda task: BackgroundTasks([task])])
def test_a_call_by_hand_uses_no_thread_that_waits_for_the_call(
    kind: Callable[[BackgroundTask], Callable[[], object]],
) -> None:
    """The thread of the view waits in the call, and asgiref would wait for that thread."""
    site = Site("inline")

    def call() -> None:
        local.value = "the caller's"
        task = BackgroundTask(site.twice)
        (task if kind is BackgroundTask else kind(task))()

    site.add = lambda: sync_to_async(call)()
    assert site.ask("/async") == ("the caller's", "the caller's")


def test_the_event_loop_of_a_call_by_hand_sees_local_state() -> None:
    async def look() -> object:
        return getattr(local, "value", None)

    def call() -> object:
        local.value = "the caller's"
        return BackgroundTask(look)()

    assert copy_context().run(call) == "the caller's"


@pytest.fixture
def other_version() -> Iterator[None]:
    """Simulate another version of asgiref."""
    asgiref_state._asgiref.cache_clear()
    yield
    asgiref_state._asgiref.cache_clear()


@pytest.mark.usefixtures("other_version")
def test_the_executors_of_asgiref_3_9_0_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 3.9.0 a ``Local`` has a context variable for each of its attributes."""
    executor: ContextVar[str] = ContextVar("current")

    class Executors:
        class _storage:  # noqa: N801
            _data: ClassVar = {"current": executor}

    def view() -> Context:
        executor.set("the view's")
        variable.set("the view's")
        return copy_context()

    monkeypatch.setattr(AsyncToSync, "executors", Executors)
    context = asgiref_state.detached(copy_context().run(view))
    assert executor not in context
    assert context[variable] == "the view's"


@pytest.mark.usefixtures("other_version")
def test_a_version_without_a_name_that_is_private_to_asgiref_stops_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(AsyncToSync, "executors")
    monkeypatch.delattr(SyncToAsync, "deadlock_context")
    monkeypatch.delattr(SyncToAsync, "thread_sensitive_context")
    seen: list[str] = []
    tasks = BackgroundTasks()
    tasks.add_task(seen.append, "ran")
    tasks()
    assert seen == ["ran"]


def test_asgiref_is_not_imported_for_tasks() -> None:
    done = run_python(
        """
        import sys
        from tests.support import submit
        from wsgi_bg import BackgroundTask, PoolRunner

        async def task():
            pass

        pool = PoolRunner()
        submit(pool, task, print)
        BackgroundTask(task)()
        print("asgiref" in sys.modules, pool.drain(10))
        """
    )
    assert done.stdout == "\nFalse []\n", done.stderr
