"""The exit of real servers and processes: tasks that need an executor, programs that join."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import TIMEOUT, free_port
from tests.support.command import SHOP, Command, running, write
from tests.support.marks import needs_threads_at_exit

TASKS = (
    SHOP
    + """
import asyncio, logging, signal, sys, threading
import flask
from concurrent.futures import ThreadPoolExecutor
from asgiref.sync import async_to_sync, sync_to_async
from wsgi_bg import BackgroundTasksMiddleware

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")


def use_executors():
    say("task begins")
    wait()
    with ThreadPoolExecutor(4) as executor:
        say(executor.submit(lambda: "executor").result())
    async def in_a_thread():
        return await asyncio.to_thread(lambda: "to_thread")
    say(asyncio.run(in_a_thread()))
    say(async_to_sync(sync_to_async(lambda: "sync_to_async"))())


async def use_async():
    say(await sync_to_async(lambda: "async sync_to_async")())


def executors(environ, start_response):
    background_tasks.add_task(use_executors)
    background_tasks.add_task(use_async)
    # After the first task: the callbacks run last registered first.
    threading._register_atexit(say, "main thread ends")
    return answer(environ, start_response)


application = BackgroundTasksMiddleware(app, runner="pool")
flask_app = flask.Flask("shop")
flask_app.wsgi_app = application
"""
)

USED = ["executor", "to_thread", "sync_to_async", "async sync_to_async"]

PROGRAMS = {
    "waitress": """
print(SERVING, flush=True)
import signal, sys, waitress
from shop import application
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
waitress.serve(application, port=PORT)
""",
    "flask run": """
print(SERVING, flush=True)
import signal, sys
from flask.cli import cli
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
cli.main(["--app", "shop:flask_app", "run", "--port", str(PORT)])
""",
    "CherryPy": """
import cherrypy
from shop import application
cherrypy.config.update({"server.socket_port": PORT, "log.screen": False})
cherrypy.tree.graft(application, "/")
cherrypy.engine.signals.subscribe()
cherrypy.engine.start()
print(SERVING, flush=True)  # a signal that comes earlier breaks the start off
cherrypy.engine.block()
""",
    "gunicorn": """
print(SERVING, flush=True)
import sys
from gunicorn.app.wsgiapp import run
sys.argv[1:] = ["-b", f"127.0.0.1:{PORT}", "shop:application"]
run()
""",
    "gunicorn with threads": """
print(SERVING, flush=True)
import sys
from gunicorn.app.wsgiapp import run
threads = ["-k", "gthread", "--threads", "2"]
sys.argv[1:] = ["-b", f"127.0.0.1:{PORT}", *threads, "shop:application"]
run()
""",
    "a thread that outlives the main one": """
print(SERVING, flush=True)
import signal, threading, wsgiref.simple_server
from shop import application
server = wsgiref.simple_server.make_server("127.0.0.1", PORT, application)
threading.Thread(target=server.serve_forever).start()
stop = threading.Event()
for number in signal.SIGTERM, signal.SIGINT:
    signal.signal(number, lambda *_: stop.set())
stop.wait()
threading.Thread(target=lambda: (threading.main_thread().join(), server.shutdown())).start()
""",
}


@contextmanager
def serving_with(program: str, folder: Path) -> Iterator[Command]:
    """Start a program in ``folder`` that serves ``shop`` at PORT and prints SERVING."""
    write(folder, "shop", TASKS)
    port = free_port()
    names = f'PORT = {port}\nSERVING = "Serving on http://127.0.0.1:{port}"\n'
    write(folder, "outer", names + program)
    with running([sys.executable, "outer.py"], folder) as command:
        pause = threading.Event()
        while True:  # the timer of the command bounds this loop
            try:
                command.connect().close()
                break
            except ConnectionError:
                assert not command.ends_within(0), command.end()
                pause.wait(0.05)
        yield command


def lines(command: Command, count: int) -> list[str]:
    """The next lines of the tasks, without the logs of the server and the package."""
    found: list[str] = []
    while len(found) < count:
        line = command.line()
        assert line or not command.ends_within(0), found
        if not line.startswith(("INFO", "WARNING", " * ")):
            found.append(line)
    return found


def next_with(command: Command, text: str) -> str:
    """The next line that contains ``text``."""
    while text not in (line := command.line()):
        assert line or not command.ends_within(0), "it has ended"
    return line


@needs_threads_at_exit
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("server", PROGRAMS)
def test_a_task_may_use_executors_while_the_exit_waits_for_the_task(
    server: str, number: signal.Signals, tmp_path: Path
) -> None:
    with serving_with(PROGRAMS[server], tmp_path) as command:
        connection = command.connect()
        with connection.sock as client, client.makefile("rb") as received:
            client.sendall(b"GET /executors HTTP/1.0\r\n\r\n")
            # Until gunicorn's main thread closes the connection: SIGQUIT would break off the
            # close() of the response, and blocks a main thread that hands a request over.
            assert received.read().endswith(b"\r\n\r\nok\n")
        assert lines(command, 1) == ["task begins"]
        command.send(number)
        assert lines(command, 1) == ["main thread ends"]
        command.open_gate()
        assert lines(command, 4) == USED
        assert command.ends_within(TIMEOUT)


PROCESSES = {
    "a plain script": "request()",
    "a program that joins all its threads": """
request()
for thread in threading.enumerate():
    if not thread.daemon and thread is not threading.main_thread():
        thread.join()
""",
    "an executor whose workers are idle": """
executor = ThreadPoolExecutor(2)
executor.submit(int).result()
request()
""",
    "a process that was forked": """
process = multiprocessing.get_context("fork").Process(target=request)
process.start()
process.join()
""",
    "a process that was spawned": """
process = multiprocessing.get_context("spawn").Process(target=request)
process.start()
process.join()
""",
}


@needs_threads_at_exit
@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_of_any_kind_waits_for_a_task_that_uses_executors(
    process: str, tmp_path: Path
) -> None:
    write(tmp_path, "shop", TASKS)
    body = PROCESSES[process].strip().replace("\n", "\n    ")
    program = f"""
import multiprocessing, threading
from concurrent.futures import ThreadPoolExecutor
from shop import application, say
from tests.support import Server, make_server_environ

def request():
    Server().run(application, make_server_environ(PATH_INFO="/executors"))

if __name__ == "__main__":
    say("Serving on nothing")
    {body}
"""
    write(tmp_path, "outer", program)
    with running([sys.executable, "outer.py"], tmp_path) as command:
        assert sorted(lines(command, 2)) == ["main thread ends", "task begins"]
        command.open_gate()
        assert lines(command, 4) == USED
        assert command.end() == (0, [])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_thread_that_serves_in_a_child_process_may_submit_until_it_ends(
    method: str, tmp_path: Path
) -> None:
    """A forked child calls no atexit before Python 3.13."""
    write(tmp_path, "shop", TASKS)
    write(
        tmp_path,
        "outer",
        f"""
        import multiprocessing, threading
        from shop import application, say
        from tests.support import Server, make_server_environ

        def request(path):
            Server().run(application, make_server_environ(PATH_INFO=path))

        def serve():
            threading.main_thread().join()
            request("/quick")
            request("/plain")

        def child():
            request("/quick")
            threading.Thread(target=serve).start()

        if __name__ == "__main__":
            say("Serving on nothing")
            process = multiprocessing.get_context("{method}").Process(target=child)
            process.start()
            process.join()
        """,
    )
    with running([sys.executable, "outer.py"], tmp_path) as command:
        assert sorted(lines(command, 3)) == ["task begins", "task ran", "task ran"]
        assert not command.ends_within(0.5)
        command.open_gate()
        assert lines(command, 2) == ["task ends", "task of the task ran"]
        assert command.end() == (0, [])


RELOADING = {
    "flask": """
print(SERVING, flush=True)
import os, sys
flask = ["flask", "--app", "shop:flask_app", "run", "--debug", "--port", str(PORT)]
os.execv(sys.executable, [sys.executable, "-m", *flask])
""",
    "gunicorn": """
print(SERVING, flush=True)
import sys
from gunicorn.app.wsgiapp import run
sys.argv[1:] = ["-b", f"127.0.0.1:{PORT}", "--reload", "shop:application"]
run()
""",
}


@contextmanager
def changing(folder: Path, module: str, source: str) -> Iterator[None]:
    """Rewrite a module until the block ends: gunicorn's reloader may notice the file late."""
    done = threading.Event()

    def change() -> None:
        while True:
            write(folder, module, source)
            if done.wait(0.3):
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(TIMEOUT)


@pytest.mark.parametrize("server", RELOADING)
def test_a_reload_names_the_tasks_under_way(server: str, tmp_path: Path) -> None:
    with serving_with(RELOADING[server], tmp_path) as command:
        assert command.ask("/plain").read() == b"ok\n"
        next_with(command, "task begins")
        with changing(tmp_path, "shop", TASKS + 'say("imported again")\n'):
            assert next_with(command, "waits for").startswith(
                "WARNING the process ends, and waits for 1 background task (1 shop.slow): for "
                "29 s more at most"
            )
        command.open_gate()
        next_with(command, "task ends")
        next_with(command, "imported again")
