"""gevent, with and without monkey-patching, in separate processes; eventlet is refused."""

from __future__ import annotations

import pytest

from tests.support import Server, app_that, make_server_environ, run_python
from wsgi_bg import BackgroundTasksMiddleware

# A server and a client in one process: greenlets of one thread. Code that blocks that thread
# keeps the client from its answer and the tasks from their gate.
SETUP = """
import asyncio, logging, sys, threading, time, warnings
import gevent, gevent.socket
from gevent.pywsgi import WSGIServer
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, background_tasks

warnings.simplefilter("ignore", ResourceWarning)  # the listening sockets stay open
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
logging.getLogger("asyncio").setLevel(logging.WARNING)
gate, passed = threading.Event(), []

def plain():
    passed.append("plain")

async def wait():
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 10
    while not gate.is_set() and loop.time() < deadline:
        await asyncio.sleep(0.001)
    passed.append(gate.is_set())

def serve(functions, runner, view=lambda: None):
    def app(environ, start_response):
        view()
        for function in functions:
            background_tasks.add_task(function)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    server = WSGIServer(
        ("127.0.0.1", 0), BackgroundTasksMiddleware(app, runner=runner), log=None
    )
    server.start()
    return server.server_port

def ask(port):
    connection = gevent.socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(b"GET / HTTP/1.1\\r\\nHost: test\\r\\nConnection: close\\r\\n\\r\\n")
    answer = b""
    while not answer.endswith(b"\\r\\n\\r\\nok"):
        chunk = connection.recv(4096)
        assert chunk, answer
        answer += chunk

def until(predicate):
    with gevent.Timeout(10):
        while not predicate():
            gevent.sleep(0.001)
"""
PATCH = "from gevent import monkey; monkey.patch_all()\n"
START = {
    "not patched": SETUP,
    "patched": PATCH + SETUP,
    "patched after the import": "import wsgi_bg\n" + PATCH + SETUP,
}

each_start = pytest.mark.parametrize("start", START)


def run(start: str, code: str) -> list[str]:
    import textwrap

    done = run_python(START[start] + textwrap.dedent(code))
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


@each_start
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_greenlets_run_while_an_async_task_waits(start: str, runner: str) -> None:
    assert run(
        start,
        f"""
        port = serve([plain, wait, plain], {runner!r})
        clients = [gevent.spawn(ask, port) for _ in range(20)]
        gevent.joinall(clients, timeout=10, raise_error=True)
        until(lambda: passed.count("plain") == 20)
        assert len(passed) == 20
        gate.set()
        until(lambda: len(passed) == 60)
        print(passed.count("plain"), passed.count(True))
        """,
    ) == ["40 20"]


@each_start
def test_the_application_may_use_asyncio_while_the_portal_does(start: str) -> None:
    assert run(
        start,
        """
        async def answer():
            await asyncio.sleep(0.001)

        port = serve([wait], "pool", view=lambda: asyncio.run(answer()))
        ask(port)
        ask(port)
        gate.set()
        until(lambda: len(passed) == 2)
        print(passed)
        """,
    ) == ["[True, True]"]


@each_start
def test_waiting_async_tasks_take_no_thread_from_plain_tasks(start: str) -> None:
    assert run(
        start,
        """
        runner = PoolRunner(threads=1)
        port = serve([wait], runner)
        for _ in range(5):
            ask(port)
        ask(serve([plain], runner))
        until(lambda: passed == ["plain"])
        gate.set()
        until(lambda: len(passed) == 6)
        print(runner.drain(10), runner.statistics().succeeded)
        """,
    ) == ["[] 6"]


@each_start
def test_the_exit_waits_for_the_tasks(start: str) -> None:
    assert run(
        start,
        """
        async def say():
            await asyncio.sleep(0.1)
            print("async")

        def say_plain():
            time.sleep(0.1)
            print("plain")

        ask(serve([say, say_plain], "pool"))
        """,
    ) == ["async", "plain"]


@each_start
def test_a_stuck_task_is_named_and_the_process_ends(start: str) -> None:
    lines = run(
        start,
        """
        async def stuck():
            await asyncio.sleep(3600)

        def stuck_plain():
            passed.append("begun")
            time.sleep(3600)

        runner = PoolRunner(drain_timeout=0.2)
        ask(serve([stuck], runner))
        ask(serve([stuck_plain], runner))
        until(lambda: passed)
        """,
    )
    assert sorted(line.split()[3] for line in lines) == [
        "__main__.stuck",
        "__main__.stuck_plain",
    ]


def test_a_task_that_a_greenlet_waits_for_is_named_at_the_exit() -> None:
    lines = run(
        "not patched",
        """
        from wsgi_bg import InlineRunner

        async def stuck():
            passed.append("begun")
            await asyncio.sleep(3600)

        runner = InlineRunner()
        runner.drain_timeout = 0.2
        client = gevent.spawn(ask, serve([stuck], runner))
        until(lambda: passed)
        """,
    )
    assert lines == [
        "ERROR background task __main__.stuck was not finished within the drain time of 0.2 "
        "seconds: the process ends without it"
    ]


@each_start
def test_an_error_of_an_async_task_is_logged(start: str) -> None:
    lines = run(
        start,
        """
        async def fail():
            raise ValueError("a bug")

        ask(serve([fail, plain], "inline"))
        until(lambda: passed)
        """,
    )
    assert lines[0] == "ERROR background task __main__.fail raised ValueError"


@each_start
def test_a_greenlets_tasks_outlive_a_loop_that_was_ended_before_they_began(start: str) -> None:
    lines = run(
        start,
        """
        async def stray():
            raise SystemExit

        async def end_the_loop():
            asyncio.get_running_loop().create_task(stray())
            while not blocked:
                time.sleep(0.001)  # the loop, and not a greenlet of the server's thread

        blocked = []
        logging.disable(logging.ERROR)
        ask(serve([end_the_loop], "pool"))
        client = gevent.spawn(ask, serve([wait, plain], "inline"))
        client.join(10)
        blocked.append(True)
        gate.set()
        until(lambda: "plain" in passed)
        print(passed)
        """,
    )
    assert lines == ["[True, 'plain']"]


@each_start
def test_a_greenlet_may_wait_for_a_task_while_all_else_is_idle(start: str) -> None:
    assert run(
        start,
        """
        from wsgi_bg import BackgroundTask

        async def say():
            await asyncio.sleep(0.01)
            print("async")

        gevent.spawn(BackgroundTask(say)).join()
        """,
    ) == ["async"]


def test_a_killed_greenlet_ends_its_task_which_is_named() -> None:
    lines = run(
        "not patched",
        """
        from tests.support import Server, app_that, make_server_environ

        async def wait_and_say():
            passed.append("begun")
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                passed.append("cancelled")
                raise

        app = BackgroundTasksMiddleware(app_that(
            lambda environ: background_tasks.add_task(wait_and_say)
        ))
        greenlet = gevent.spawn(Server().run, app, make_server_environ())
        until(lambda: passed)
        greenlet.kill()
        until(lambda: "cancelled" in passed)
        print(passed)
        """,
    )
    assert lines == [
        "WARNING background task __main__.wait_and_say was not run to its end: GreenletExit "
        "stopped its worker",
        "['begun', 'cancelled']",
    ]


def test_the_portals_thread_starts_when_the_calling_thread_has_its_hub() -> None:
    """A hub made beside the imports of that thread has ended imports, or let them hang."""
    done = run_python(
        """
        from gevent import monkey; monkey.patch_all()
        from gevent._hub_local import get_hub_if_exists
        import wsgi_bg

        start = monkey.get_original("_thread", "start_new_thread")

        def start_and_look(*args):
            print(get_hub_if_exists() is not None)
            return start(*args)

        monkey.saved["_thread"]["start_new_thread"] = start_and_look
        print(wsgi_bg.portal().call(int))
        """
    )
    assert done.stdout == "True\n0\n", done.stderr


def test_eventlets_server_is_refused_at_each_request() -> None:
    environ = make_server_environ(**{"eventlet.posthooks": []})
    app = BackgroundTasksMiddleware(app_that(lambda environ: None))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not work with eventlet; serve with gevent"):
            Server().run(app, dict(environ))


def test_a_process_that_eventlet_has_patched_is_refused() -> None:
    pytest.importorskip("eventlet")
    done = run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import eventlet
        eventlet.monkey_patch()
        from tests.support import Server, app_that, make_server_environ
        from wsgi_bg import BackgroundTasksMiddleware
        app = BackgroundTasksMiddleware(app_that(lambda environ: None))
        try:
            Server().run(app, make_server_environ())
        except RuntimeError as exc:
            print(exc)
        """
    )
    assert done.stdout == (
        "wsgi_bg does not work with eventlet; serve with gevent, waitress or gunicorn's "
        "gthread worker\n"
    ), done.stderr


@pytest.mark.parametrize("start", ["patched", "patched after the import"])
def test_the_process_ends_after_a_task_that_used_sync_to_async(start: str) -> None:
    """asgiref's own executor has a greenlet of the loop's thread, which ends earlier."""
    pytest.importorskip("asgiref")
    lines = run(
        start,
        """
        from asgiref.sync import sync_to_async

        async def use_sync_code():
            names = [await sync_to_async(threading.current_thread)() for _ in range(2)]
            passed.append(names[0] is names[1])

        ask(serve([use_sync_code], PoolRunner()))
        until(lambda: passed)
        print(passed)
        """,
    )
    assert lines == ["[True]"]


@each_start
def test_sync_code_of_async_tasks_does_not_run_on_the_loops_thread(start: str) -> None:
    """On that thread asyncio.run() fails, and Django's ORM refuses to run."""
    pytest.importorskip("asgiref")
    lines = run(
        start,
        """
        from asgiref.sync import sync_to_async

        async def use_sync_code():
            await sync_to_async(asyncio.run)(asyncio.sleep(0))
            await asyncio.to_thread(asyncio.run, asyncio.sleep(0))
            passed.append("ran")

        ask(serve([use_sync_code], "pool"))
        ask(serve([use_sync_code, plain], "pool"))
        until(lambda: len(passed) == 3)
        print(sorted(passed))
        """,
    )
    assert lines == ["['plain', 'ran', 'ran']"]


@pytest.mark.parametrize("start", ["patched", "patched after the import"])
def test_the_threads_for_sync_code_are_kept_and_do_not_leave_hubs_behind(start: str) -> None:
    lines = run(
        start,
        """
        from wsgi_bg._loop.executor import LoopExecutor
        from wsgi_bg._process import workers

        workers.IDLE_TIMEOUT = 0.0
        executor, threads = LoopExecutor(), set()
        for _ in range(5):
            future = executor.submit(threading.get_native_id)
            until(future.done)
            threads.add(future.result())
        print(len(threads), threading.get_native_id() in threads)
        """,
    )
    assert lines == ["1 False"]


@each_start
@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_tasks_wait_for_their_time_beside_greenlets(start: str, runner: str) -> None:
    lines = run(
        start,
        f"""
        from wsgi_bg import Retry, wait

        def fails_first(name):
            passed.append(name)
            if passed.count(name) == 1:
                raise ValueError

        async def fails_first_async():
            await asyncio.sleep(0)
            fails_first("async")

        def app(environ, start_response):
            tasks = background_tasks.using(retry=Retry(2, first=0.01))
            tasks.add_task(fails_first_async)
            tasks.add_task(fails_first, "plain")
            background_tasks.using(delay=0.01).add_task(passed.append, "delayed")
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]

        logging.getLogger("wsgi_bg").setLevel(logging.ERROR)
        middleware = BackgroundTasksMiddleware(app, runner={runner!r})
        server = WSGIServer(("127.0.0.1", 0), middleware, log=None)
        server.start()
        ask(server.server_port)
        until(lambda: len(passed) == 5)
        print(sorted(passed))
        """,
    )
    assert lines == ["['async', 'async', 'delayed', 'plain', 'plain']"]


def test_the_loops_thread_leaves_the_timer_to_a_greenlet() -> None:
    lines = run(
        "patched",
        """
        async def add_delayed():
            background_tasks.using(delay=0.01).add_task(passed.append, "of the loop")

        def app(environ, start_response):
            if environ["PATH_INFO"] == "/loop":
                background_tasks.add_task(add_delayed)
            else:
                background_tasks.using(delay=0.01).add_task(passed.append, "of a view")
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]

        middleware = BackgroundTasksMiddleware(app, runner="pool")
        server = WSGIServer(("127.0.0.1", 0), middleware, log=None)
        server.start()
        from urllib.request import urlopen
        for path in ("/loop", "/view"):
            urlopen(f"http://127.0.0.1:{server.server_port}{path}").read()
        until(lambda: len(passed) == 2)
        print(sorted(passed))
        """,
    )
    assert lines == ["['of a view', 'of the loop']"]
