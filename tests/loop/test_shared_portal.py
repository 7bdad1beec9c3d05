"""``wsgi_bg.portal()``: synchronous code calls async code on the loop of the async tasks."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures.thread import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

import wsgi_bg
from tests.support import TIMEOUT, Server, app_that, make_server_environ, run_python
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg._loop.portal import PortalThread

number: ContextVar[int] = ContextVar("number", default=0)


async def loop_of_call() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_view_and_its_tasks_call_code_on_one_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    done = threading.Event()

    def plain_task() -> None:
        loops.append(wsgi_bg.portal().call(loop_of_call))

    async def async_task() -> None:
        loops.append(asyncio.get_running_loop())
        done.set()

    def view(environ: object) -> None:
        loops.append(wsgi_bg.portal().call(loop_of_call))
        background_tasks.add_task(plain_task)
        background_tasks.add_task(async_task)

    for name in ("inline", "pool"):
        done.clear()
        app = BackgroundTasksMiddleware(app_that(view), runner=name)
        Server().run(app, make_server_environ())
        assert done.wait(TIMEOUT)
    assert len(loops) == 6
    assert len(set(loops)) == 1


def test_a_thread_of_the_users_gets_the_result_and_the_error() -> None:
    async def divide(by: int) -> float:
        await asyncio.sleep(0)
        return 1 / by

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(wsgi_bg.portal().call, divide, 2).result(TIMEOUT) == 0.5
        with pytest.raises(ZeroDivisionError):
            executor.submit(wsgi_bg.portal().call, divide, 0).result(TIMEOUT)


def test_a_call_runs_in_a_copy_of_the_callers_context() -> None:
    async def add_one() -> int:
        number.set(number.get() + 1)
        return number.get()

    number.set(7)
    assert wsgi_bg.portal().call(add_one) == 8
    assert number.get() == 7


def test_a_call_has_the_name_that_start_task_soon_and_start_task_were_given() -> None:
    async def name_of_task(*, task_status: Any = None) -> str:
        if task_status is not None:
            task_status.started()
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    portal = wsgi_bg.portal()
    assert portal.start_task_soon(name_of_task, name="rates").result(TIMEOUT) == "rates"
    future, _ = portal.start_task(name_of_task, name="feed")
    assert future.result(TIMEOUT) == "feed"
    assert portal.call(name_of_task) == "wsgi_bg"


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, pytest.fail.Exception]
)
@pytest.mark.parametrize("is_async", [True, False])
def test_an_error_that_is_no_exception_is_raised_in_the_caller_and_the_loop_goes_on(
    error: type[BaseException], is_async: bool
) -> None:
    def leave() -> None:
        raise error

    async def leave_async() -> None:
        leave()

    before = wsgi_bg.portal()
    with pytest.raises(error):
        before.call(leave_async if is_async else leave)
    assert wsgi_bg.portal() is before
    assert before.call(int) == 0


def test_a_call_that_cancels_itself_ends_alone() -> None:
    async def cancel_itself() -> None:
        task: Any = asyncio.current_task()
        task.cancel()

    async def wait() -> str:
        await released.wait()
        return "waited"

    portal = wsgi_bg.portal()
    released: asyncio.Event = portal.call(asyncio.Event)
    waiting = portal.start_task_soon(wait)
    with pytest.raises(CancelledError):
        portal.call(cancel_itself)
    portal.call(released.set)
    assert waiting.result(TIMEOUT) == "waited"
    assert wsgi_bg.portal() is portal


def test_a_call_that_leaves_its_scope_open_ends_alone() -> None:
    import anyio

    async def leave_open() -> None:
        scope = anyio.CancelScope()
        scope.__enter__()
        scope.cancel()

    portal = wsgi_bg.portal()
    portal.start_task_soon(leave_open).exception(TIMEOUT)
    assert portal.call(int) == 0
    assert wsgi_bg.portal() is portal


def test_another_loop_calls_and_the_portal_goes_on() -> None:
    async def divide(by: int) -> float:
        return 1 / by

    portal: Any = wsgi_bg.portal()
    if not hasattr(portal, "call_async"):
        pytest.skip("anyio has call_async() since 4.16")
    assert asyncio.run(portal.call_async(divide, 2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(portal.call_async(divide, 0))
    assert wsgi_bg.portal() is portal


def test_a_future_that_is_cancelled_cancels_its_call() -> None:
    seen: list[str] = []
    begun, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            ended.set()

    future = wsgi_bg.portal().start_task_soon(wait)
    assert begun.wait(TIMEOUT)
    assert future.cancel()
    assert ended.wait(TIMEOUT)
    assert seen == ["cancelled"]


def test_the_portal_cannot_be_stopped_or_entered() -> None:
    portal = wsgi_bg.portal()

    async def enter() -> None:
        async with portal:
            pass

    for refused in (portal.stop, enter):
        with pytest.raises(RuntimeError, match=r"is shared by all requests and ends with"):
            portal.call(refused)
    assert portal.call(int) == 0


def test_a_call_on_the_loops_own_thread_raises_and_does_not_wait_for_itself() -> None:
    async def call_again() -> None:
        wsgi_bg.portal().call(int)

    with pytest.raises(RuntimeError, match="event loop thread"):
        wsgi_bg.portal().call(call_again)


def test_a_call_that_the_ending_loop_does_not_begin_is_cancelled() -> None:
    """The thread lives on after its loop, so that the test can look at its last step."""
    thread = PortalThread()
    loop: Any = thread.portal._loop
    loop.call_soon_threadsafe = lambda *args: None
    future = thread.portal.start_task_soon(int)
    del loop.call_soon_threadsafe
    thread.stop(TIMEOUT)
    assert future.cancelled()


def test_a_call_that_arrives_in_the_last_step_of_the_loop_leaves_no_coroutine() -> None:
    def stray() -> None:
        raise SystemExit

    async def end_the_loop() -> None:
        thread.portal._spawn_task_from_thread(int, (), {}, None, future)
        running.call_soon(stray)

    thread, future = PortalThread(), Future[int]()
    running = thread.portal._loop
    thread.portal.start_task_soon(end_the_loop)
    assert thread._thread_has_ended.wait(TIMEOUT)
    gc.collect()  # Python warns of a coroutine that is freed and was never awaited
    assert future.cancelled()


def test_a_call_that_arrives_while_the_ending_portal_waits_for_others_does_not_begin() -> None:
    thread, late, seen = PortalThread(), Future[None](), list[str]()
    begun = threading.Event()

    async def begin() -> None:
        seen.append("begun")

    async def clean_up() -> None:
        begun.set()
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            thread.portal._spawn_task_from_thread(begin, (), {}, None, late)
            await asyncio.sleep(0.01)
            seen.append("cleaned up")

    thread.portal.start_task_soon(clean_up)
    assert begun.wait(TIMEOUT)
    thread.stop(TIMEOUT)
    assert late.cancelled()
    assert seen == ["cleaned up"]


def test_a_cancelled_call_that_arrives_as_the_portal_ends_stays_cancelled() -> None:
    thread, future = PortalThread(), Future[int]()

    async def call_and_end() -> None:
        thread.portal._spawn_task_from_thread(int, (), {}, None, future)
        future.cancel()
        thread.portal.end.cancel()

    thread.portal.start_task_soon(call_and_end)
    assert wait([future], TIMEOUT).done == {future}
    assert future.cancelled()


def test_a_forked_process_has_a_portal_of_its_own() -> None:
    done = run_python(
        """
        import os, threading, wsgi_bg
        parents = wsgi_bg.portal()
        assert parents.call(os.getpid) == os.getpid()
        child = os.fork()
        if child == 0:
            same = wsgi_bg.portal() is parents
            os._exit(1 if same or wsgi_bg.portal().call(os.getpid) != os.getpid() else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert done.stdout == "7\n", done.stderr


def test_a_parents_portal_raises_in_a_forked_process_and_does_not_hang() -> None:
    done = run_python(
        """
        import os, signal, wsgi_bg
        async def call(): return "called"
        portal = wsgi_bg.portal()
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends a child that hangs
            for method in portal.call, portal.start_task_soon:
                try:
                    method(call)
                except RuntimeError as exc:
                    print("wsgi_bg.portal() at each use" in str(exc), flush=True)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), portal.call(call))
        """
    )
    assert done.stdout == "True\nTrue\n0 called\n", done.stderr


def test_a_call_of_a_finalizer_raises_and_does_not_keep_the_process() -> None:
    done = run_python(
        """
        import os, wsgi_bg
        class Client:
            def __del__(self):
                try:
                    wsgi_bg.portal().call(int)
                except RuntimeError:
                    os.write(1, b"refused")
        client = Client()
        wsgi_bg.portal().call(int)
        """
    )
    assert done.stdout == "refused", done.stderr


@pytest.mark.parametrize("start", ["", "from gevent import monkey; monkey.patch_all()"])
def test_greenlets_run_while_another_one_waits_for_its_call(start: str) -> None:
    pytest.importorskip("gevent")
    done = run_python(
        f"""
        {start}
        import asyncio, gevent, threading, wsgi_bg

        released = wsgi_bg.portal().call(asyncio.Event)
        order = []

        def wait():
            wsgi_bg.portal().call(released.wait)
            order.append("waited")

        def release():
            order.append("ran meanwhile")
            wsgi_bg.portal().call(released.set)

        with gevent.Timeout(10):
            gevent.joinall([gevent.spawn(wait), gevent.spawn(release)], raise_error=True)
        print(order)
        """
    )
    assert done.stdout == "['ran meanwhile', 'waited']\n", done.stderr
