"""Durable tasks of processes that die, stop, or only import the application."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.support import TIMEOUT, wait_until
from tests.support.durable import ROOT, Shop, kill, said
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.rows import Settings
from wsgi_bg._store.store import Store


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_task_that_ran_when_its_process_was_killed_runs_again(shop: Shop) -> None:
    with shop.process("handle(runner, (hang, 1), (write, 2), (write, 3)); input()") as process:
        said(process, "hangs")
        kill(process)
    assert shop.calls == ["1"]
    with shop.process("runner.start(); input()", "max_crashes=9") as process:
        said(process, "hangs")
        kill(process)
    assert shop.calls == ["1", "1"]
    assert len(shop.states) == 3


def test_the_order_of_a_request_holds_in_the_next_process(shop: Shop) -> None:
    code = """
        handle(runner, *[(write, number) for number in range(50)])
        os.kill(os.getpid(), 9)
        """
    with shop.process(code, "local=PoolRunner(threads=1)") as process:
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    before = len(shop.calls)
    shop.run_all(50)
    again = shop.calls[before:]
    assert again == [str(number) for number in range(50 - len(again), 50)]
    assert before + len(again) in (50, 51)


def test_a_task_that_kills_its_process_is_put_aside_and_condemns_no_neighbour(
    shop: Shop,
) -> None:
    code = "handle(runner, (hang_once, 1)); input(); handle(runner, (die,)); input()"
    with shop.process(code) as process:
        said(process, "hangs")
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    for _ in range(2):
        with shop.process("runner.start(); input()") as process:
            assert process.wait(TIMEOUT) == -signal.SIGKILL
    with shop.process("runner.start(); input()"):
        assert wait_until(lambda: shop.states == ["aside"]), shop.states
    assert shop.calls == ["1", "1"]


def test_a_process_that_only_makes_the_application_runs_nothing(shop: Shop) -> None:
    with shop.process("handle(runner, (hang, 1)); input()") as process:
        said(process, "hangs")
        kill(process)
    before = sorted(os.listdir(shop.folder))
    code = """
        BackgroundTasksMiddleware(app_that(print), runner=runner)
        print(sorted(thread.name for thread in threading.enumerate()))
        """
    with shop.process(code) as process:
        said(process, "['MainThread']")
        assert process.wait(TIMEOUT) == 0
    assert shop.calls == ["1"]
    assert sorted(os.listdir(shop.folder)) == before


def test_a_stopped_process_keeps_its_tasks_and_stops_no_other(shop: Shop) -> None:
    stopped = shop.process(
        "gate('gate'); handle(runner, (wait_at, 'gate')); begun['gate'].wait()\n"
        "print('waits', flush=True); input(); gate('gate').set(); input()"
    )
    with stopped as process:
        assert process.stdout is not None
        said(process, "waits")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        folder = check_folder(shop.folder)
        (of_stopped,) = folder.numbers()
        with shop.process("handle(runner, (write, 1)); input()"):
            assert wait_until(lambda: shop.calls == ["1"])
        # The other process may have been killed before the end of its task was noted.
        while (adopted := Store.adopt(folder, Settings())) is not None:
            assert adopted.number != of_stopped
        assert "running" in shop.states
        process.send_signal(signal.SIGCONT)


def test_another_process_takes_the_tasks_of_a_dead_one_over(shop: Shop) -> None:
    with shop.process("runner.start(); print('started', flush=True); input()") as living:
        said(living, "started")
        with shop.process("handle(runner, (hang, 1)); input()", "max_crashes=9") as process:
            said(process, "hangs")
            kill(process)
        assert wait_until(lambda: shop.calls == ["1", "1"])


def test_a_rerun_does_not_double_the_tasks_that_a_task_has_added(shop: Shop) -> None:
    code = "handle(runner, (add_two, 'a'), (die,))"
    with shop.process(f"{code}; input()") as process:
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    with shop.process("runner.start(); input()", "max_crashes=1"):
        assert wait_until(lambda: shop.states == ["aside"]), shop.states
        assert wait_until(lambda: len(shop.calls) == 2)
    assert sorted(shop.calls) == ["a.1", "a.2"]


def test_wsgi_bg_serves_with_a_folder_and_runs_what_a_kill_has_left(
    shop: Shop, tmp_path: Path
) -> None:
    site = """
        from tests.support.durable_shop import *

        def app(environ, start_response):
            background_tasks.add_task(hang, environ["PATH_INFO"])
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]
        """
    (tmp_path / "site_of_test.py").write_text(textwrap.dedent(site))
    command = [sys.executable, "-m", "wsgi_bg", "site_of_test:app", "--port", "0"]
    environ = {
        **os.environ,
        "DURABLE_LOG": str(tmp_path / "calls"),
        "PYTHONPATH": str(ROOT),
    }
    for calls in (["/1"], ["/1", "/1"]):
        with subprocess.Popen(
            [*command, "--durable", str(shop.folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environ,
        ) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline().rpartition(":")[2])
                if calls == ["/1"]:
                    with urlopen(f"http://127.0.0.1:{port}/1", timeout=TIMEOUT) as response:
                        assert response.read() == b"ok"
                assert wait_until(lambda wanted=calls: shop.calls == wanted)  # type: ignore[misc]
            finally:
                process.kill()
    refused = subprocess.run(
        [*command, "--durable", "x", "--runner", "pool"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environ,
    )
    assert refused.returncode == 2
    assert "--durable and --runner" in refused.stderr


@contextmanager
def gunicorn(tmp_path: Path, site: str, *options: str) -> Iterator[str]:
    """Serve the application of ``site``, and yield the address."""
    pytest.importorskip("gunicorn")
    (tmp_path / "site_of_test.py").write_text(
        "from tests.support.durable_shop import *\n" + textwrap.dedent(site)
    )
    hooks = "from wsgi_bg.gunicorn import post_fork, worker_exit\n"
    ready = "def when_ready(server): print(server.LISTENERS[0].getsockname()[1], flush=True)\n"
    (tmp_path / "gunicorn.conf.py").write_text(hooks + ready)
    command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", *options]
    with subprocess.Popen(
        # A worker that is just being started does not see the signal of the end.
        [*command, "--graceful-timeout=2", "site_of_test:app"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "DURABLE_LOG": str(tmp_path / "calls"), "PYTHONPATH": str(ROOT)},
    ) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def ask(url: str) -> str:
    with urlopen(url, timeout=TIMEOUT) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_another_worker_of_gunicorn_takes_over_without_a_request(
    shop: Shop, tmp_path: Path, worker: str
) -> None:
    pytest.importorskip(worker.replace("gthread", "gunicorn"))
    site = f"""
        def answer(environ, start_response):
            background_tasks.add_task(hang_once, 1)
            start_response("200 OK", [])
            return [str(os.getpid()).encode()]

        app = BackgroundTasksMiddleware(answer, runner=DurableRunner({str(shop.folder)!r}))
        """
    with gunicorn(tmp_path, site, "-w", "2", "-k", worker) as url:
        pid = int(ask(url))
        assert wait_until(lambda: shop.calls == ["1"])
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: shop.calls == ["1", "1"]), shop.states
        assert wait_until(lambda: shop.states == [])


def test_a_writer_that_waits_does_not_stop_the_hub_of_gevent(
    shop: Shop, tmp_path: Path
) -> None:
    pytest.importorskip("gevent")
    site = f"""
        runner = DurableRunner({str(shop.folder)!r})
        free, released = threading.Event(), threading.Event()
        free.set()

        def view(environ):
            writer = runner._states.get().store._writer
            path = environ["PATH_INFO"]
            if path == "/hold":
                with writer.hold():
                    free.clear()
                    assert released.wait(10)
            elif path == "/release":
                released.set()
            elif path == "/add":
                background_tasks.add_task(write, 1)
                background_tasks.add_task(log_async, 2)
                background_tasks.add_task(write, 3)
            return b"%d %d" % (free.is_set(), len(writer.turns.waiting))

        @registered_task(name="durable.log_async")
        async def log_async(value):
            write(value)

        def answer(environ, start_response):
            body = view(environ)
            start_response("200 OK", [])
            return [body]

        app = BackgroundTasksMiddleware(answer, runner=runner)
        """
    with gunicorn(tmp_path, site, "-k", "gevent") as url, ThreadPoolExecutor(2) as clients:
        ask(url)  # starts the thread that looks around
        clients.submit(ask, f"{url}/hold")
        assert wait_until(lambda: ask(url) == "0 0")
        answer = clients.submit(ask, f"{url}/add")
        assert wait_until(lambda: ask(url) == "0 1")  # one worker, and its only thread
        assert not answer.done()
        assert shop.states == []
        ask(f"{url}/release")
        assert answer.result(TIMEOUT) == "0 0"
        assert wait_until(lambda: shop.calls == ["1", "2", "3"]), shop.states
        assert wait_until(lambda: shop.states == [])


def test_a_wait_for_the_next_attempt_survives_the_process(shop: Shop) -> None:
    code = "handle(runner, (fail_for_long, 1)); runner.start(); input()"
    with shop.process(code) as process:
        assert wait_until(lambda: shop.calls == ["1"])
        assert wait_until(lambda: shop.dues == [True])
        kill(process)
    with shop.process("handle(runner, (write, 2)); input()"):
        assert wait_until(lambda: shop.calls == ["1", "2"])
        assert wait_until(lambda: shop.dues == [True])
    assert shop.calls == ["1", "2"]


def test_a_delay_is_not_shortened_by_a_crash(shop: Shop) -> None:
    code = """
        def add(environ):
            background_tasks.using(delay=3600).add_task(write, 1)
            background_tasks.add_task(hang, 2)

        app = BackgroundTasksMiddleware(app_that(add), runner=runner)
        Server().run(app, make_server_environ())
        input()
        """
    with shop.process(code) as process:
        said(process, "hangs")
        kill(process)
    with shop.process("runner.start(); input()", "max_crashes=1"):
        assert wait_until(lambda: sorted(shop.states) == ["aside", "waiting"]), shop.states
    assert shop.calls == ["2"]
