"""A child that a task has forked runs no task of its parent, and ends as without the package.

Each process prints its role and its steps. The tests start real processes, since a child of a
test would go on as pytest.
"""

from __future__ import annotations

import sys
import textwrap
from typing import NamedTuple

import pytest

from tests.support import run_python
from wsgi_bg._process import per_process

SETUP = """
import asyncio, logging, os, signal, sys, threading, warnings
from tests.support import Server, app_that, make_server_environ, waitress
from wsgi_bg import BackgroundTasksMiddleware, InlineRunner, PoolRunner, background_tasks

warnings.simplefilter("ignore")  # of a fork beside threads
logging.basicConfig(format="LOG %(message)s")
PARENT = os.getpid()
children = []
has_forked = threading.Event()

def say(*words):  # not by print(): a fork copies what is buffered
    who = "parent" if os.getpid() == PARENT else "child"
    os.write(1, f"{who} {' '.join(words)}\\n".encode())

def end_of(pid):
    for _ in range(1000):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return "status " + str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        threading.Event().wait(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "goes on for ever"

def fork():
    pid = os.fork()
    if pid == 0:
        say("was forked")
        END
    else:
        children.append(pid)
        has_forked.set()

async def fork_async():
    await asyncio.sleep(0)
    fork()

def plain(): say("plain")

async def coroutine():
    await asyncio.sleep(0)
    say("coroutine")

def app_with(runner, *functions, headers=(("Content-Length", "2"),)):
    def add(environ):
        for func in functions:
            background_tasks.add_task(func)
    return BackgroundTasksMiddleware(app_that(add, headers=headers), runner=runner)

def request(*given, **options):
    Server().run(app_with(*given, **options), make_server_environ())

def look_after_the_child():
    if os.getpid() == PARENT:
        assert has_forked.wait(10)
        say("saw", end_of(children[0]))
"""

ENDS = {
    "return": "return",
    "exit": "sys.exit(3)",
    "error": "raise ValueError",
    "_exit": "os._exit(7)",
    "pass": "pass",
}
"""How the forked child leaves the task."""


class Done(NamedTuple):
    said: list[str]
    logged: list[str]
    status: int


def run(end: str, code: str) -> Done:
    setup = SETUP.replace("END", ENDS[end])
    done = run_python(setup + textwrap.dedent(code), timeout=40)
    logged = [line for line in done.stderr.splitlines() if line.startswith("LOG")]
    return Done(sorted(done.stdout.splitlines()), logged, done.returncode)


RUNNERS = {
    "inline": "request(InlineRunner(), FORK, plain, coroutine, plain)",
    "pool": "request(PoolRunner(), FORK, plain, coroutine, plain)",
    "inline, handed over": "request('inline', FORK, plain, coroutine, plain, headers=())",
}

PARENTS = ["parent coroutine", "parent plain", "parent plain"]


def check(done: Done, *said: str) -> None:
    """Check that the parent's tasks ran once, in the parent, and none was named."""
    assert done.said == sorted([*PARENTS, "child was forked", *said])
    # On a busy machine waitress says that its queue has a request.
    logged = [line for line in done.logged if "fork" not in line and "queue depth" not in line]
    assert logged == []
    assert done.status == 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("return", ["child goes on", "parent saw status 0"]),
        ("exit", ["parent saw status 3"]),
        ("error", ["parent saw status 1"]),
        ("_exit", ["parent saw status 7"]),
    ],
)
def test_a_child_of_an_inline_task_leaves_close_as_the_task_does(
    end: str, said: list[str]
) -> None:
    """The child ends at once, without waiting for a task of the parent or naming a task."""
    done = run(
        end,
        """
        free = threading.Event()
        request(PoolRunner(), lambda: free.wait(20))
        request(InlineRunner(), fork, plain, coroutine, plain)
        say("goes on")
        look_after_the_child()
        free.set()
        """,
    )
    check(done, "parent goes on", *said)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("runner", ["pool", "inline, handed over"])
def test_a_child_of_a_workers_task_ends_as_a_threads_function_does(
    end: str, runner: str
) -> None:
    done = run(
        end,
        """
        threading.Thread(target=fork).start()
        look_after_the_child()
        """,
    )
    (as_a_thread,) = [word for word in done.said if word.startswith("parent saw")]
    done = run(
        end,
        f"""
        FORK = fork
        {RUNNERS[runner]}
        say("goes on")
        look_after_the_child()
        """,
    )
    check(done, "parent goes on", as_a_thread)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_child_of_an_async_task_ends_and_runs_nothing(end: str, runner: str) -> None:
    """The child has the loop's thread only."""
    done = run(
        end,
        f"""
        FORK = fork_async
        {RUNNERS[runner]}
        say("goes on")
        look_after_the_child()
        """,
    )
    (saw,) = [word for word in done.said if word.startswith("parent saw")]
    assert saw != "parent saw goes on for ever"
    assert end != "_exit" or saw == "parent saw status 7"
    check(done, "parent goes on", saw)


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_child_runs_no_task_of_another_request(runner: str) -> None:
    """A batch of the parent waits for a thread when the child is forked."""
    done = run(
        "return",
        f"""
        pool = PoolRunner(threads=1)
        free = threading.Event()
        if {runner!r} == "pool":
            fork_when_free = lambda: (free.wait(10), fork())
            request(pool, fork_when_free)
            request(pool, plain, coroutine, plain)
            free.set()
        else:
            request(pool, lambda: free.wait(10))
            request(pool, plain, coroutine, plain)
            request(InlineRunner(), fork)
            free.set()
        look_after_the_child()
        """,
    )
    check(done, "parent saw status 0")


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_a_child_that_serves_on_has_its_own_tasks_run(runner: str) -> None:
    """The child of a server that forks in a task, returns and goes on serving."""
    done = run(
        "return",
        f"""
        def own(): say("own")

        async def own_async(): say("own async")

        request(InlineRunner(), fork, plain, coroutine, plain)
        if os.getpid() != PARENT:
            request({runner!r}, own, own_async)
        look_after_the_child()
        """,
    )
    check(done, "child own", "child own async", "parent saw status 0")


def test_a_child_goes_on_with_the_code_of_a_real_server() -> None:
    done = run(
        "return",
        """
        from urllib.request import urlopen
        from wsgiref.simple_server import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            def log_message(self, *args): pass

        app = app_with(None, fork, plain, coroutine, plain)
        server = make_server("127.0.0.1", 0, app, handler_class=Handler)
        client = threading.Thread(target=urlopen, args=(f"http://127.0.0.1:{server.server_port}",))
        client.start()
        server.handle_request()
        say("goes on")
        look_after_the_child()
        """,
    )
    check(done, "parent goes on", "child goes on", "parent saw status 0")


@pytest.mark.parametrize("end", ["return", "exit", "error"])
def test_a_child_of_a_pools_task_is_not_seen_by_a_real_servers_clients(end: str) -> None:
    done = run(
        end,
        """
        from tests.support.client import ask

        app = app_with(PoolRunner(threads=1), fork, plain, coroutine, plain)
        with waitress(app) as port:
            say(ask(port).body.decode())
            look_after_the_child()
            has_forked.clear()
            say(ask(port).body.decode())
            assert has_forked.wait(10)
            say("saw", end_of(children[1]))
        """,
    )
    assert done.said == sorted(
        [
            *PARENTS * 2,
            *["child was forked"] * 2,
            *["parent ok"] * 2,
            *["parent saw status 0"] * 2,
        ]
    )
    # waitress warns if its two threads are busy for a moment.
    assert [line for line in done.logged if "fork" not in line and "queue" not in line] == []


WATCHERS = {
    "task_started": "hooks=Watch('task_started')",
    "task_finished": "hooks=Watch('task_finished')",
    "task_failed": "hooks=Watch('task_failed')",
    "task_discarded": "hooks=Watch('task_discarded')",
    "on_error": "on_error=lambda task, error: fork_once()",
    "entered": "around=Around('__enter__')",
    "left": "around=Around('__exit__')",
}
"""Code that is called because of a task, and forks in its first call."""

WATCHING = """
from wsgi_bg.hooks import Hooks

def fork_once():
    if not children:
        fork()

class Watch(Hooks):
    def __init__(self, name):
        setattr(self, name, lambda record: fork_once())

class Around:
    def __init__(self, name):
        self.name = name
    def __call__(self):
        return self
    def __enter__(self):
        if self.name == "__enter__":
            fork_once()
    def __exit__(self, *error):
        if self.name == "__exit__":
            fork_once()

class Middleware(BackgroundTasksMiddleware):
    def __init__(self, *args, around=None, **options):
        self._around = around
        super().__init__(*args, **options)

def watched_request(runner, *functions, **options):
    def add(environ):
        background_tasks.using(run_on="error").add_task(functions[0])
        for func in functions:
            background_tasks.add_task(func)
    app = Middleware(app_that(add), runner=runner, **options)
    Server().run(app, make_server_environ())

def fails():
    say("fails")
    raise ValueError

async def fails_async():
    await asyncio.sleep(0)
    fails()
"""

WATCHED = ["parent fails", *PARENTS]


@pytest.mark.parametrize("end", ["return", "exit"])
@pytest.mark.parametrize("task", ["fails", "fails_async"])
@pytest.mark.parametrize("runner", ["InlineRunner()", "PoolRunner()"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_child_that_a_watcher_of_a_task_forks_ends_and_runs_nothing(
    watcher: str, runner: str, task: str, end: str
) -> None:
    done = run(
        end,
        WATCHING
        + textwrap.dedent(
            f"""
            watched_request({runner}, {task}, plain, coroutine, plain, {WATCHERS[watcher]})
            say("goes on")
            look_after_the_child()
            """
        ),
    )
    (saw,) = [word for word in done.said if word.startswith("parent saw")]
    said = [word for word in done.said if word == "child goes on"]
    assert done.said == sorted(["parent goes on", "child was forked", saw, *said, *WATCHED])
    assert done.status == 0
    # A task_discarded comes from close(), and the first task to finish is a plain one.
    runs_here = runner == "InlineRunner()" and (task == "fails" or watcher == "task_finished")
    if runs_here or watcher == "task_discarded":
        raises = watcher == "left" and end == "return"  # the task's error goes on there
        assert said == (["child goes on"] if end == "return" and not raises else [])
        assert saw == f"parent saw status {1 if raises else 0 if end == 'return' else 3}"
    else:
        assert said == []
        assert saw != "parent saw goes on for ever"


BATCH_WATCHERS = {
    "batch_handed_over": "hooks=Watch('batch_handed_over')",
    "batch_begun": "hooks=Watch('batch_begun')",
    "batch_ended": "hooks=Watch('batch_ended')",
    "request_label": "request_label=lambda environ: fork_once() or 'label'",
    "submit": "",
}
"""Code that is called because of a batch, and forks in its first call."""

FORKING_RUNNER = """
class Forking:
    runner = RUNNER
    def submit(self, batch):
        fork_once()
        self.runner.submit(batch)
    def drain(self, timeout):
        return self.runner.drain(timeout)
    def statistics(self):
        return self.runner.statistics()
"""


@pytest.mark.parametrize("last", ["plain", "coroutine"])
@pytest.mark.parametrize("runner", ["InlineRunner()", "PoolRunner()"])
@pytest.mark.parametrize("watcher", BATCH_WATCHERS)
def test_a_child_that_a_watcher_of_a_batch_forks_ends_and_runs_nothing(
    watcher: str, runner: str, last: str
) -> None:
    own = "Forking()" if watcher == "submit" else runner
    done = run(
        "return",
        WATCHING
        + FORKING_RUNNER.replace("RUNNER", runner)
        + textwrap.dedent(
            f"""
            def begins(): say("begins")
            functions = begins, {last}
            app = BackgroundTasksMiddleware(
                app_that(lambda environ: [*map(background_tasks.add_task, functions)]),
                runner={own},
                {BATCH_WATCHERS[watcher]}
            )
            Server().run(app, make_server_environ())
            look_after_the_child()
            """
        ),
    )
    tasks = ["parent begins", f"parent {last}"]
    assert done.said == sorted(["child was forked", "parent saw status 0", *tasks])
    assert done.status == 0


WAITING = """
    other_waits, release = threading.Event(), asyncio.Event()

    async def other():
        other_waits.set()
        await asyncio.sleep(0.2)
        say("other")

    async def forks():
        fork()
        say("goes on")
        await asyncio.sleep(0.1)
        say("waited")
"""
"""A task of another request, and a task that waits after its fork."""


def run_beside_another_request(fork: str) -> Done:
    """Run ``fork``, a line that lets the loop run ``forks()``, while ``other()`` waits."""
    steps = f"""
    runner = PoolRunner()
    request(runner, other)
    assert other_waits.wait(10)
    {fork}
    assert runner.drain(10) == []
    look_after_the_child()
    """
    return run("pass", textwrap.dedent(WAITING) + textwrap.dedent(steps))


def test_a_child_that_waits_after_its_fork_runs_no_task_of_another_request() -> None:
    assert run_beside_another_request("request(runner, forks)").said == [
        "child goes on",
        "child was forked",
        "parent goes on",
        "parent other",
        "parent saw status 0",
        "parent waited",
    ]


def test_a_child_of_a_portal_call_runs_no_task() -> None:
    done = run_beside_another_request("import wsgi_bg; wsgi_bg.portal().call(forks)")
    assert "child other" not in done.said
    assert "parent other" in done.said


def test_a_child_that_a_handlers_view_forks_waits_for_nothing() -> None:
    done = run(
        "pass",
        """
        from wsgi_bg.serverless import finish_tasks

        def view(environ):
            background_tasks.add_task(plain)
            fork()

        app = BackgroundTasksMiddleware(app_that(view), runner=PoolRunner())

        @finish_tasks(timeout=20)
        def handle():
            Server().run(app, make_server_environ())

        handle()
        say("returned")
        if os.getpid() != PARENT:
            os._exit(0)
        look_after_the_child()
        """,
    )
    assert done.said == [
        "child returned",
        "child was forked",
        "parent plain",
        "parent returned",
        "parent saw status 0",
    ]
    assert done.logged == []


@pytest.mark.parametrize("has_mark", [True, False])
def test_a_fork_of_c_code_is_noticed(has_mark: bool) -> None:
    without_mark = "per_process._mark, per_process._MARKED = bytearray(1), 0"
    done = run_python(
        f"""
import ctypes, os
from wsgi_bg._process import per_process

{"" if has_mark else without_mark}
held = per_process.PerProcess(object)
of_parent = held.get()
assert per_process.pid() == os.getpid()
child = ctypes.PyDLL(None).fork()  # runs no hook of os.register_at_fork()
is_noticed = per_process.pid() == os.getpid() and held.get() is not of_parent
if child == 0:
    os._exit(is_noticed)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), is_noticed, held.get() is of_parent)
"""
    )
    assert (done.stdout, done.stderr) == ("1 False True\n", "")  # False: the parent is the same


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(sys, "platform", "darwin"), (per_process, "_MADV_WIPEONFORK", 10_000)],
)
def test_a_kernel_that_marks_no_process_is_asked_for_its_id(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object
) -> None:
    monkeypatch.setattr(module, name, value)
    assert per_process._make_mark() == (bytearray(1), 0)
