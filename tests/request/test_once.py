"""Each batch runs once, whatever the server does with ``close()`` (rule 7)."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from asgiref.wsgi import WsgiToAsgi

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
    run_python,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._request import middleware
from wsgi_bg._request.request_tasks import RequestTasks
from wsgi_bg._request.unclosed import EXHAUSTED, Collector, Unclosed, collectors
from wsgi_bg._tasks.background_tasks import ENDED, OPEN, TaskQueue
from wsgi_bg._tasks.batch import Batch

with warnings.catch_warnings():  # "deprecated: use a2wsgi", which does call close()
    warnings.simplefilter("ignore")
    from starlette.middleware.wsgi import WSGIMiddleware as StarletteAdapter

OK = [("Content-Length", "2")]


@pytest.fixture
def warns_again() -> Iterator[None]:
    """Let the warning of once a process be logged again."""
    gc.collect()
    collectors.get().flush()
    collectors.get().has_warned = False
    yield
    collectors.get().has_warned = False


def test_close_called_twice_runs_nothing_twice() -> None:
    seen: list[int] = []
    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(seen.append, 1))
    )
    body: Any = app(make_environ(), Server().start_response)
    body.close()
    body.close()
    assert seen == [1]


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_close_called_from_eight_threads_at_once_runs_nothing_twice(
    runner: str, request: pytest.FixtureRequest
) -> None:
    seen: list[int] = []
    closed: list[int] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter((b"ok",))

        def close(self) -> None:
            closed.append(1)

    def add(environ: Environ) -> None:
        for x in range(100):
            background_tasks.add_task(seen.append, x)

    own = InlineRunner() if runner == "inline" else PoolRunner()
    app = BackgroundTasksMiddleware(app_that(add, body=Body), runner=own)
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    for _ in range(50):
        seen.clear()
        closed.clear()
        body: Any = app(make_environ(), Server().start_response)
        barrier = threading.Barrier(8)

        def close(body: Any = body, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(TIMEOUT)
            body.close()

        threads = [threading.Thread(target=close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        deadline = threading.Event()
        while own.statistics().pending or own.statistics().running:
            assert not deadline.wait(0.001)
        assert seen == list(range(100))
        assert closed == [1]


def test_a_batch_that_is_run_twice_runs_each_task_once() -> None:
    seen: list[int] = []

    class Twice(InlineRunner):
        def submit(self, batch: Any) -> None:
            batch.run()
            batch.run()

    app = app_that(lambda e: background_tasks.add_task(seen.append, 1))
    Server().run(BackgroundTasksMiddleware(app, runner=Twice()), make_environ())
    assert seen == [1]


def asgi_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
        "server": ("test", 80),
    }


def ask_through(adapter: Any) -> bytes:
    """Make a request through an ASGI adapter, until the end of the response."""

    async def main() -> bytes:
        body = b""

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal body
            body += message.get("body", b"")

        await adapter(asgi_scope(), receive, send)
        return body

    return asyncio.run(main())


def stream(environ: Environ, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b"o"
    yield b"k"


BODIES: dict[str, Callable[[], Iterable[bytes]]] = {
    "list": lambda: [b"o", b"k"],
    "generator": lambda: (chunk for chunk in (b"o", b"k")),
    "iterator": lambda: iter((b"o", b"k")),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("adapter", [StarletteAdapter, WsgiToAsgi])
def test_an_adapter_that_never_calls_close_has_its_tasks_run(
    log: Log, warns_again: None, adapter: Any, body: str
) -> None:
    """The adapters keep only the iterator; the tasks wait until the body was iterated."""
    gate = Gate()
    order: list[str] = []

    def make() -> Iterable[bytes]:
        order.append("body")
        return BODIES[body]()

    def add(environ: Environ) -> None:
        background_tasks.add_task(gate.task)

    app = BackgroundTasksMiddleware(app_that(add, headers=OK, body=make))
    for _ in range(2):
        assert ask_through(adapter(app)) == b"ok"
        gate.open()
        gate.wait()
    assert gate.passed[0]
    assert len(log.warnings) == 1
    assert "freed a response without calling its close()" in log.warnings[0]


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_still_iterated_is_not_handed_over(body: str) -> None:
    runner = PoolRunner()
    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(print), body=BODIES[body]), runner=runner
    )
    iterator = iter(app(make_environ(), Server().start_response))  # all that an adapter keeps
    gc.collect()
    assert next(iterator) == b"o"
    collectors.get().flush()
    assert runner.statistics().pending == runner.statistics().succeeded == 0
    del iterator
    wait_for_success(runner)


def wait_for_success(runner: Any) -> None:
    pause, waited = threading.Event(), 0
    while runner.statistics().succeeded != 1:
        waited += 1
        assert waited < 2000
        pause.wait(0.005)


@pytest.mark.parametrize("raises", [False, True])
def test_a_response_that_is_freed_midway_is_judged_like_a_closed_response(
    log: Log, raises: bool
) -> None:
    seen: list[str] = []
    done = threading.Event()

    def body() -> Iterator[bytes]:
        yield b"o"
        if raises:
            raise ValueError("midway")
        yield b"k"

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        for word in ("success", "error"):
            tasks.using(run_on=word).add_task(seen.append, word)
        tasks.using(run_on="always").add_task(done.set)

    app = BackgroundTasksMiddleware(app_that(add, body=body))
    iterator = iter(app(make_environ(), Server().start_response))
    next(iterator)
    if raises:
        with pytest.raises(ValueError, match="midway"):
            next(iterator)
    del iterator
    assert done.wait(TIMEOUT)
    assert seen == ["error" if raises else "success"]


def test_a_response_that_is_freed_within_a_garbage_collection_is_handed_over() -> None:
    done = threading.Event()
    names: list[str] = []

    def task() -> None:
        names.append(threading.current_thread().name)
        done.set()

    class Cycle:
        me: Any
        body: Any

    app = BackgroundTasksMiddleware(app_that(lambda e: background_tasks.add_task(task)))
    gc.collect()
    gc.disable()
    try:
        cycle = Cycle()
        cycle.me, cycle.body = cycle, app(make_environ(), Server().start_response)
        del cycle
        assert names == []
    finally:
        gc.enable()
    gc.collect()
    assert done.wait(TIMEOUT)
    assert names[0].startswith("wsgi_bg-pool")


def test_a_closed_response_leaves_no_cycle_behind() -> None:
    """Contexts of tasks hold the tasks; the arguments must not wait for the collector."""
    freed = threading.Event()

    class Payload:
        def __del__(self) -> None:
            freed.set()

    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(id, Payload()))
    )
    gc.collect()
    gc.disable()
    try:
        Server().run(app, make_environ())
        assert freed.is_set()
    finally:
        gc.enable()


def garbage_of_idle_requests() -> int:
    """Number of objects that only the garbage collector can free; nothing else may run."""
    server_apps = [
        app_that(lambda e: None, body=body) for body in (*BODIES.values(), lambda: [b"ok"])
    ]
    gc.collect()
    gc.disable()
    try:
        for app in server_apps:
            environ = make_server_environ()

            def start_response(*args: Any, environ: Environ = environ) -> Any:
                """A server's function usually holds the environ, which holds the tasks."""

            body: Any = BackgroundTasksMiddleware(app)(environ, start_response)
            list(body)
            if hasattr(body, "close"):
                body.close()
        del app, body, environ, start_response
        return gc.collect()
    finally:
        gc.enable()


def test_idle_requests_leave_no_cycle_behind() -> None:
    # In a new interpreter: threads of other tests' libraries leave cycles too.
    result = run_python("""
        from tests.request.test_once import garbage_of_idle_requests

        garbage_of_idle_requests()  # what is made on first use
        print(garbage_of_idle_requests())
    """)
    assert result.stdout == "0\n", result.stderr


def test_an_idle_response_that_is_freed_is_no_matter(log: Log) -> None:
    app = BackgroundTasksMiddleware(app_that(lambda e: None, body=lambda: iter((b"ok",))))
    for _ in app(make_environ(), Server().start_response):
        pass
    assert log.warnings == []


def test_a_forked_child_forgets_the_parents_tasks() -> None:
    """The process forks in the middle of a request, and both processes close the response."""
    done = run_python(
        """
        import logging, os, sys
        from tests.support import Server, app_that, make_environ
        from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks

        logging.basicConfig(stream=sys.stdout)
        runner = PoolRunner()

        def task(name):
            print(name, "ran in the", who, flush=True)

        who = "parent"
        app = BackgroundTasksMiddleware(
            app_that(lambda e: background_tasks.add_task(task, "parent's")), runner=runner
        )
        Server().run(app, make_environ())        # starts the pool's thread
        assert runner.drain(10) == []
        held = app(make_environ(), Server().start_response)
        freed = app(make_environ(), Server().start_response)
        pid = os.fork()
        if pid == 0:
            who = "child"
            held.close()
            del freed
            app = BackgroundTasksMiddleware(
                app_that(lambda e: background_tasks.add_task(task, "child's")), runner="pool"
            )
            Server().run(app, make_environ())
            sys.exit()                           # drains what is the child's
        assert os.waitpid(pid, 0)[1] == 0
        held.close()
        del freed
        """
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines[:2] == [
        "WARNING:" + lines[0].removeprefix("WARNING:"),
        "child's ran in the child",
    ]
    assert "freed a response" in lines[0]
    assert lines[2:] == ["parent's ran in the parent"] * 3


def test_a_response_freed_while_no_thread_can_start_is_submitted_by_flush(
    log: Log, own_collector: Collector
) -> None:
    seen: list[str] = []
    own = own_collector  # its thread is not started
    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(seen.append, "ran")), runner=PoolRunner()
    )
    environ = make_environ()
    body: Any = app(environ, Server().start_response)
    tasks: Any = get_background_tasks(environ)
    own.queue.put(Unclosed(tasks.end, environ, EXHAUSTED))
    own.flush()
    assert any("freed a response" in message for message in log.warnings)
    assert get_background_tasks(environ).phase != OPEN
    body.close()


@pytest.mark.parametrize("iterated", [False, True])
def test_a_generator_in_a_cycle_that_the_collector_frees_has_not_failed(iterated: bool) -> None:
    """The collector closes the generator first, as if the generator had raised."""
    done = threading.Event()

    class Cycle:
        me: Any
        body: Any
        iterator: Any

    app = BackgroundTasksMiddleware(
        app_that(lambda e: background_tasks.add_task(done.set), body=BODIES["generator"])
    )
    cycle = Cycle()
    cycle.me, cycle.body = cycle, app(make_environ(), Server().start_response)
    cycle.iterator = iter(cycle.body)
    if iterated:
        assert next(cycle.iterator) == b"o"
    del cycle
    gc.collect()
    assert done.wait(TIMEOUT)


@pytest.mark.parametrize("body", [*BODIES.values(), lambda: [b"ok"]])
def test_a_task_that_arrives_as_an_idle_request_ends_is_run(
    monkeypatch: pytest.MonkeyPatch, body: Callable[[], Iterable[bytes]]
) -> None:
    seen: list[str] = []

    class Late(RequestTasks):
        """Another thread adds a task after the end is marked, and before the last look."""

        __slots__ = ("_phase",)

        @property
        def phase(self) -> int:
            return self._phase

        @phase.setter
        def phase(self, phase: int) -> None:
            self._phase = phase
            if phase == ENDED and not seen and not self._list:
                self._begin().append(BackgroundTask(seen.append, "late"))

    monkeypatch.setattr(middleware, "RequestTasks", Late)
    Server().run(BackgroundTasksMiddleware(app_that(lambda e: None, body=body)), make_environ())
    assert seen == ["late"]


def test_a_task_that_ran_during_add_task_is_not_refused() -> None:
    class Taken(list[BackgroundTask]):
        def append(self, task: BackgroundTask) -> None:
            super().append(task)
            tasks()  # another thread runs the task, and then the batch ends
            tasks.phase = ENDED

    seen: list[str] = []
    tasks = BackgroundTasks()
    tasks._list = Taken()
    tasks.add_task(seen.append, "ran")
    assert seen == ["ran"]


def test_two_threads_that_add_the_first_task_at_once_add_to_the_same_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both threads are held while they make the list, if both come there: only one may."""
    seen: list[int] = []
    both = threading.Barrier(2)

    def begin_request() -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)

    def add(environ: Environ) -> None:
        tasks = get_background_tasks(environ)
        threads = [
            threading.Thread(target=tasks.add_task, args=(seen.append, x)) for x in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)

    monkeypatch.setattr("wsgi_bg._tasks.successors.begin_request", begin_request)
    Server().run(BackgroundTasksMiddleware(app_that(add)), make_environ())
    assert sorted(seen) == [0, 1]


def test_a_task_that_arrives_as_the_batch_ends_is_run_or_refused() -> None:
    """The agreement between add_task and the end of a batch, step by step."""
    seen: list[str] = []

    class Late(list[BackgroundTask]):
        """A list to which another thread appends between two looks of the runner's."""

        looks = 0

        def __len__(self) -> int:
            if super().__len__() == 0:
                self.looks += 1
                if self.looks == 2:  # first() looks at the end, and once more after the mark
                    self.append(BackgroundTask(seen.append, "late"))
            return super().__len__()

    tasks = TaskQueue([BackgroundTask(seen.append, "first")])
    tasks._list = Late(tasks.tasks)
    Batch(tasks, response_complete=True).run()
    assert seen == ["first", "late"]
    with pytest.raises(RuntimeError, match="has ended"):
        tasks.add_task(print)


def test_a_request_whose_view_runs_its_tasks_by_hand_is_forgotten() -> None:
    def run_by_hand(environ: Environ) -> None:
        background_tasks.add_task(int)
        background_tasks()

    before = dict(collectors.get().unfinished)
    respond(BackgroundTasksMiddleware(app_that(run_by_hand)))
    assert collectors.get().unfinished == before
