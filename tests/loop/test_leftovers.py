"""Leftovers of an async task or a library do not cancel the next task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, app_that, respond, run_python, submit
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg._loop import portal

kept: list[Any] = []
"""Scopes that tasks have left open: a freed scope might be closed."""


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    kept.clear()


async def leave_a_scope_cancelled() -> None:
    scope = anyio.CancelScope()
    kept.append(scope)
    scope.__enter__()
    scope.cancel()


async def leave_a_scope_that_ends_soon() -> None:
    scope = anyio.CancelScope(deadline=anyio.current_time() + 0.01)
    kept.append(scope)
    scope.__enter__()


async def leave_a_scope_cancelled_by_the_next_turn() -> None:
    scope = anyio.CancelScope()
    kept.append(scope)
    scope.__enter__()
    asyncio.get_running_loop().call_soon(scope.cancel)


async def leave_anyios_group_open() -> None:
    async def fail() -> None:
        raise ValueError("in the group")

    group = anyio.create_task_group()
    kept.append(group)
    await group.__aenter__()
    group.start_soon(fail)


async def leave_asyncios_group_open() -> None:
    async def fail() -> None:
        raise ValueError("in the group")

    group = asyncio.TaskGroup()
    kept.append(group)
    await group.__aenter__()
    kept.append(group.create_task(fail()))


async def leave_a_timeout() -> None:
    timeout = asyncio.timeout(0.01)
    kept.append(timeout)
    await timeout.__aenter__()


async def leave_a_timeout_that_is_over() -> None:
    timeout = asyncio.timeout(0)
    kept.append(timeout)
    await timeout.__aenter__()


async def keep_the_task_and_cancel_it_soon() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)


async def keep_the_task_and_cancel_it_later() -> None:
    task = asyncio.current_task()
    assert task is not None
    kept.append(task)
    asyncio.get_running_loop().call_later(0.01, task.cancel)


async def fail_within_a_scope() -> None:
    scope = anyio.CancelScope()
    kept.append(scope)
    scope.__enter__()
    scope.cancel()
    raise ValueError("after the scope")


async def wait_and_leave_a_scope() -> None:
    await asyncio.sleep(0)
    await leave_a_scope_cancelled()


SEEN = [
    leave_a_scope_cancelled,
    leave_a_scope_that_ends_soon,
    leave_a_scope_cancelled_by_the_next_turn,
    leave_anyios_group_open,
    leave_asyncios_group_open,
    leave_a_timeout,
    leave_a_timeout_that_is_over,
    keep_the_task_and_cancel_it_soon,
    keep_the_task_and_cancel_it_later,
    fail_within_a_scope,
    wait_and_leave_a_scope,
]


class Following:
    """An async task that waits in several ways and records its end."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def first(self) -> None:
        await self._wait("first")

    async def second(self) -> None:
        await self._wait("second")

    async def _wait(self, name: str) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.03)  # longer than the leftovers take to come
        await anyio.lowlevel.checkpoint()
        with anyio.fail_after(TIMEOUT):
            await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
        self.ran.append(name)


def run(*functions: Callable[[], Any], runner: Any = None) -> None:
    def add(environ: object) -> None:
        for function in functions:
            background_tasks.add_task(function)

    respond(BackgroundTasksMiddleware(app_that(add), runner=runner))


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("leave", SEEN, ids=lambda leave: leave.__name__)
def test_the_next_async_task_is_not_cancelled(
    log: Log, leave: Callable[[], Awaitable[None]], runner: str
) -> None:
    following = Following()
    own = PoolRunner() if runner == "pool" else None
    run(leave, following.first, following.second, runner=own)
    if own is not None:
        assert own.drain(TIMEOUT) == []
    assert following.ran == ["first", "second"]
    assert not [message for message in log.errors if "Following" in message]


@pytest.mark.parametrize("leave", SEEN, ids=lambda leave: leave.__name__)
def test_an_async_task_behind_a_plain_task_is_not_cancelled(
    log: Log, leave: Callable[[], Awaitable[None]]
) -> None:
    following = Following()
    run(leave, lambda: None, following.first, lambda: following.second())
    assert following.ran == ["first", "second"]


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch, loop: None) -> list[object]:
    """The calls that wake the portal's loop."""
    running = portal.portal().call(asyncio.get_running_loop)
    wakes: list[object] = []
    call: Any = running.call_soon_threadsafe

    def count(*args: Any, **options: Any) -> Any:
        wakes.append(args)
        return call(*args, **options)

    monkeypatch.setattr(running, "call_soon_threadsafe", count)
    return wakes


def test_async_tasks_that_leave_nothing_are_a_single_portal_call(wakes: list[object]) -> None:
    """Seen from the server's thread: the loop is woken once."""
    following = Following()
    run(following.first, following.second, following.first, following.second)
    assert following.ran == ["first", "second"] * 2
    assert len(wakes) == 1


def test_async_tasks_behind_leftovers_are_a_single_portal_call(wakes: list[object]) -> None:
    following = Following()
    run(
        leave_a_scope_cancelled, following.first, leave_a_timeout_that_is_over, following.second
    )
    assert following.ran == ["first", "second"]
    assert len(wakes) == 1


# Libraries that replace parts of asyncio.

SETUP = """
import asyncio, logging, sys
from tests.support import Server, app_that, make_environ, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks
from wsgi_bg._loop import portal

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")

def first(): print("first")

async def second():
    await asyncio.sleep(0)
    print("second")

async def fails():
    await asyncio.sleep(0)
    raise ValueError

async def third():
    assert asyncio.current_task() is not None
    async with asyncio.timeout(10):
        await asyncio.sleep(0.001)
    print("third")

async def at_once(): print("at once")

def last(): print("last")

def request(*functions, runner="inline", complete=True):
    def add(environ):
        for func in functions:
            background_tasks.add_task(func)
    app = app_that(add, headers=[("Content-Length", "2")] if complete else [])
    own = PoolRunner() if runner == "pool" else runner
    Server().run(BackgroundTasksMiddleware(app, runner=own), make_server_environ())
    if runner == "pool":
        assert own.drain(20) == []

def everything(runner):
    request(first, second, fails, third, at_once, lambda: third(), last, runner=runner)
"""

ALL = [
    "first",
    "second",
    "ERROR background task __main__.fails raised ValueError",
    "third",
    "at once",
    "third",
    "last",
]

REPLACED: dict[str, str] = {
    "task class in Python": """
asyncio.Task = asyncio.tasks.Task = asyncio.tasks._PyTask
asyncio.current_task = asyncio.tasks.current_task = getattr(
    asyncio.tasks, "_py_current_task", asyncio.current_task)
""",
    "all of nest_asyncio's": """
asyncio.Task = asyncio.tasks._CTask = asyncio.tasks.Task = asyncio.tasks._PyTask
asyncio.Future = asyncio.futures._CFuture = asyncio.futures.Future = asyncio.futures._PyFuture
for name in ("_enter_task", "_leave_task", "_register_task", "_unregister_task"):
    setattr(asyncio.tasks, name, getattr(asyncio.tasks, "_py" + name))
asyncio.current_task = asyncio.tasks.current_task = getattr(
    asyncio.tasks, "_py_current_task", asyncio.current_task)
""",
    "eager tasks": """
if hasattr(asyncio, "eager_task_factory"):
    async def replace():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    portal.portal().call(replace)
""",
    "a subclass of the task class": """
class Own(asyncio.Task):
    pass

async def replace():
    asyncio.get_running_loop().set_task_factory(
        lambda loop, coro, **options: Own(coro, loop=loop, **options))
portal.portal().call(replace)
""",
    "the policy, by uvloop": """
import warnings
warnings.simplefilter("ignore")
try:
    import uvloop
except ImportError:
    pass
else:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
""",
}


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("moment", ["before the loop is made", "after it was made"])
@pytest.mark.parametrize("what", REPLACED)
def test_no_task_is_skipped_nor_blamed_if_a_library_replaces(
    what: str, moment: str, runner: str
) -> None:
    made = "portal.portal()\n" if moment.startswith("after") else ""
    done = run_python(
        SETUP + made + REPLACED[what] + f"everything({runner!r})\neverything({runner!r})\n"
    )
    lines = [
        line for line in done.stdout.splitlines() if line in ALL or line.startswith("ERROR")
    ]
    assert lines == ALL * 2, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_task_factory_that_raises_keeps_no_task_from_running(
    runner: str,
) -> None:
    """The factory is for users' asyncio tasks; the package does not use the factory."""
    done = run_python(
        SETUP
        + f"""
async def replace():
    def factory(loop, coro, **options):
        coro.close()
        raise OSError("no task to be had")
    asyncio.get_running_loop().set_task_factory(factory)

async def put_back():
    asyncio.get_running_loop().set_task_factory(None)

loop = portal.portal().call(asyncio.get_running_loop)
portal.portal().call(replace)
request(first, second, third, last, runner={runner!r})
loop.call_soon_threadsafe(loop.set_task_factory, None)
request(first, second, last, runner={runner!r})
""",
        timeout=40,
    )
    lines = done.stdout.splitlines()
    assert lines[-3:] == ["first", "second", "last"], done.stdout + done.stderr
    assert lines[:-3] == ["first", "second", "third", "last"]
    assert done.returncode == 0


def test_a_function_of_asyncio_that_a_library_breaks_stops_no_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def broken() -> None:
        raise KeyError

    async def task() -> None:
        seen.append("ran")

    monkeypatch.setattr(asyncio, "current_task", broken)
    runner = PoolRunner()
    submit(runner, task, task)
    assert runner.drain(TIMEOUT) == []
    assert seen == ["ran", "ran"]
