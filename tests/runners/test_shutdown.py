"""The end of the process, in real processes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest

from tests.conftest import Log
from tests.support import TIMEOUT, run_python
from tests.support.marks import needs_threads_at_exit
from wsgi_bg import BackgroundTask, InlineRunner, wait
from wsgi_bg.runners import shutdown
from wsgi_bg.runners.waiting import Notice

SETUP = """
import asyncio, atexit, logging, sys, threading, time
from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, InlineRunner, PoolRunner, background_tasks

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")

def print(*values, flush=False):
    # In one step: the built-in print() writes the end of the line by itself, and a log record
    # of another thread could come between.
    sys.stdout.write(" ".join(map(str, values)) + "\\n")
    if flush:
        sys.stdout.flush()

def request(runner, *functions, complete=False):
    def add(environ):
        for func in functions:
            background_tasks.add_task(func)
    headers = [("Content-Length", "2")] if complete else []
    Server().run(BackgroundTasksMiddleware(app_that(add, headers=headers), runner=runner),
                 make_server_environ())

leaving = threading.Event()  # set as the main thread ends, before the tasks are drained

def main_thread_ends():
    # Called after the first task: the callbacks run last registered first.
    threading._register_atexit(leaving.set)
"""


def run(code: str) -> tuple[int, list[str]]:
    import textwrap

    done = run_python(SETUP + textwrap.dedent(code))
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("runner", ["'inline'", "'pool'", "PoolRunner()", "InlineRunner()"])
def test_the_process_ends_after_the_submitted_tasks(runner: str) -> None:
    assert run(
        f"""
        def slow():
            leaving.wait(10)
            print("plain")

        async def slow_async():
            await asyncio.sleep(0.01)
            print("async")

        request({runner}, slow, slow_async)
        main_thread_ends()
        """
    ) == (0, ["plain", "async"])


def test_functions_that_the_application_registered_on_import_run_after_the_tasks() -> None:
    assert run(
        """
        atexit.register(print, "pool of connections closed")
        request("inline", lambda: print("task"))
        """
    ) == (0, ["task", "pool of connections closed"])


STUCK = {
    "plain": "def stuck(): begun.set(); threading.Event().wait()",
    "async": "async def stuck(): begun.set(); await asyncio.sleep(3600)",
    "async that catches its cancellation": """
async def stuck():
    begun.set()
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
""",
    "async that blocks the loop": "async def stuck(): begun.set(); threading.Event().wait()",
}


@pytest.mark.parametrize("kind", STUCK)
def test_a_stuck_task_is_named_and_the_process_ends(kind: str) -> None:
    code = SETUP + (
        "begun = threading.Event()\n"
        + STUCK[kind]
        + """
async def never(): print("never")
request(PoolRunner(drain_timeout=0.2), stuck, never)
assert begun.wait(10)
"""
    )
    done = run_python(code, timeout=20)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"ERROR background task __main__.{name} was not finished within the drain time of "
        "0.2 seconds: the process ends without it"
        for name in ("stuck", "never")
    ]
    assert done.stderr == ""


def test_an_async_task_that_never_ends_is_cancelled_after_the_drain_time() -> None:
    code, lines = run(
        """
        begun = threading.Event()

        async def stuck():
            begun.set()
            try:
                await asyncio.sleep(3600)
            finally:
                print("cleaned up")

        request(PoolRunner(drain_timeout=0.2), stuck)
        assert begun.wait(10)
        """
    )
    assert code == 0
    assert "was not finished within the drain time" in lines[0]
    assert lines[1:] == ["cleaned up"]


def test_a_stuck_inline_task_of_a_daemon_thread_is_named(tmp_path: object) -> None:
    assert run(
        """
        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        runner = InlineRunner()
        runner.drain_timeout = 0.2
        serve = lambda: request(runner, stuck, complete=True)
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        assert begun.wait(10)
        """
    ) == (
        0,
        [
            "ERROR background task __main__.stuck was not finished within the drain time of "
            "0.2 seconds: the process ends without it"
        ],
    )


def test_a_runner_of_the_users_own_is_drained_and_its_unfinished_tasks_are_named() -> None:
    assert run(
        """
        from wsgi_bg.runners import Statistics

        class Mine:
            drain_timeout = 5.0
            def submit(self, batch): self.batch = batch
            def drain(self, timeout): return self.batch.tasks
            def statistics(self): return Statistics(0, 0, 0, 0, 0)

        def task(): pass

        request(Mine(), task)
        """
    ) == (
        0,
        [
            "ERROR background task __main__.task was not finished when the drain of its "
            "runner had ended: the process ends without it"
        ],
    )


def test_a_second_ctrl_c_while_the_exit_waits_names_the_tasks_and_ends() -> None:
    code = (
        SETUP
        + """
import signal
begun = threading.Event()

class Pool(PoolRunner):
    def drain(self, timeout):
        leaving.set()
        return super().drain(timeout)

def stuck():
    begun.set()
    leaving.wait()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    threading.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)
request(Pool(drain_timeout=3600), stuck)
assert begun.wait(10)
"""
    )
    done = run_python(code)
    assert done.stdout.splitlines() == [
        "ERROR background task __main__.stuck was not finished before the wait for it was "
        "interrupted (KeyboardInterrupt): the process ends without it"
    ], done.stderr


def test_a_runner_that_cannot_be_drained_keeps_no_further_runner_from_draining() -> None:
    assert run(
        """
        class Broken(InlineRunner):
            def drain(self, timeout): raise OSError("no broker")

        logging.disable(logging.ERROR)
        request(Broken(), int)
        request("pool", lambda: (leaving.wait(10), print("ran")))
        main_thread_ends()
        """
    ) == (0, ["ran"])


def test_the_exit_drains_a_users_runner_again_for_a_task_that_is_called_again() -> None:
    assert run(
        """
        from wsgi_bg import Retry, registered_task

        class Own:
            def __init__(self): self.batches = []
            def submit(self, batch): self.batches.append(batch)
            def statistics(self): raise NotImplementedError
            def drain(self, timeout):
                while self.batches:
                    self.batches.pop(0).run()
                return []

        left = ["first", "second"]

        @registered_task(name="shop.again", retry=Retry(first=0.01))
        def task():
            print(left.pop(0))
            assert not left

        logging.disable(logging.WARNING)
        request(Own(), task)
        """
    ) == (0, ["first", "second"])


def test_a_runner_that_cannot_be_drained_is_complained_of_once() -> None:
    code, lines = run(
        """
        from wsgi_bg.runners import Statistics

        class Broken:
            def submit(self, batch): pass
            def drain(self, timeout): raise OSError("no broker")
            def statistics(self): return Statistics(0, 0, 0, 0, 0)
            def __repr__(self): return "Broken()"

        request(Broken(), int)
        """
    )
    assert code == 0
    assert lines[0] == "ERROR Broken() could not be drained"
    assert [line for line in lines if line.startswith("OSError")] == ["OSError: no broker"]


@pytest.mark.parametrize(
    "body",
    [
        "drain_timeout = None",
        "drain_timeout = math.nan",
        "drain_timeout = property(lambda self: 1 / 0)",
        "def drain(self, timeout): raise asyncio.CancelledError",
        "def drain(self, timeout): raise SystemExit",
        "def drain(self, timeout): return None",
        "def drain(self, timeout): return ['shop.task']",
        "def abandon(self): raise asyncio.CancelledError",
        "abandon = property(lambda self: 1 / 0)",
        "def abandon(self): return None",
    ],
)
def test_a_users_runner_with_a_mistake_keeps_no_further_runner_from_draining(body: str) -> None:
    code, lines = run(
        f"""
        import math
        from wsgi_bg.runners import Statistics

        class Mine:
            def submit(self, batch): threading.Thread(target=batch.run, daemon=True).start()
            def drain(self, timeout): return []
            def statistics(self): return Statistics(0, 0, 0, 0, 0)
            {body}

        has_run = threading.Event()
        request(Mine(), lambda: (print("ran first"), has_run.set()))
        assert has_run.wait(10)
        request(PoolRunner(), lambda: (leaving.wait(10), print("ran last")))
        main_thread_ends()
        """
    )
    assert (code, lines.count("ran first"), lines.count("ran last")) == (0, 1, 1), lines


def test_a_stop_that_comes_while_tasks_are_named_is_not_the_runners_error() -> None:
    assert run(
        """
        import wsgi_bg

        class Interrupted(InlineRunner):
            def abandon(self): raise KeyboardInterrupt

        runner = Interrupted()
        request(runner, int)
        try:
            wsgi_bg.drain()
        except KeyboardInterrupt:
            print("goes through")
        Interrupted.abandon = InlineRunner.abandon
        """
    ) == (0, ["goes through"])


def test_tasks_that_a_users_runner_does_not_return_are_waited_for() -> None:
    assert run(
        """
        from wsgi_bg.runners import Statistics

        class Mine:
            def submit(self, batch): threading.Thread(target=batch.run, daemon=True).start()
            def drain(self, timeout): return []
            def statistics(self): return Statistics(0, 0, 0, 0, 0)

        request(Mine(), lambda: (leaving.wait(10), print("ran")))
        main_thread_ends()
        """
    ) == (0, ["ran"])


def test_tasks_that_a_users_runner_does_not_return_are_named_when_time_is_up() -> None:
    assert run(
        """
        from wsgi_bg.runners import Statistics

        class Mine:
            drain_timeout = 0.1
            def submit(self, batch): pass
            def drain(self, timeout): return []
            def statistics(self): return Statistics(0, 0, 0, 0, 0)

        def forgotten(): pass

        import wsgi_bg
        request(Mine(), forgotten)
        print([task.name for task in wsgi_bg.drain(0.1)])
        """
    ) == (
        0,
        [
            "ERROR background task __main__.forgotten was not finished by the end of the "
            "process: the process ends without it",
            "['__main__.forgotten']",
        ],
    )


def test_a_child_is_drained_although_its_parent_was_drained_before_the_fork() -> None:
    assert run(
        """
        import os, warnings, wsgi_bg

        warnings.simplefilter("ignore")  # of a fork beside threads
        request("pool", int)
        assert wsgi_bg.drain() == []
        if os.fork() == 0:
            request("pool", lambda: (leaving.wait(10), print("ran", flush=True)))
            main_thread_ends()
            sys.exit()
        os.wait()
        """
    ) == (0, ["ran"])


def test_a_runner_that_cannot_name_its_tasks_keeps_no_further_runner_from_naming() -> None:
    code, lines = run(
        """
        class Broken(InlineRunner):
            def abandon(self): raise OSError("no broker")
            def __repr__(self): return "Broken()"

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        broken = Broken()
        request(broken)
        request(PoolRunner(drain_timeout=0.2), stuck)
        assert begun.wait(10)
        """
    )
    assert code == 0
    assert "ERROR Broken() could not say what it left undone" in lines
    assert "background task __main__.stuck was not finished" in "".join(lines)


def test_tasks_that_a_broken_runner_did_not_take_are_waited_for_too() -> None:
    assert run(
        """
        class Broken(InlineRunner):
            def submit(self, batch): raise OSError("no broker")

        logging.disable(logging.ERROR)
        request(Broken(), lambda: (leaving.wait(10), print("ran")))
        main_thread_ends()
        """
    ) == (0, ["ran"])


def test_a_batch_that_comes_after_the_drain_of_its_runner_is_waited_for() -> None:
    code, lines = run(
        """
        import logging

        begun, drained, waited_for = threading.Event(), threading.Event(), threading.Event()

        class First(InlineRunner):
            def drain(self, timeout):
                left = super().drain(timeout)
                drained.set()
                return left

        class Handler(logging.Handler):
            def emit(self, record):
                waited_for.set()

        logging.getLogger().addHandler(Handler())  # after the one that writes the warning
        first = First()
        request(first, int, complete=True)  # drained first

        def late():
            begun.set()
            waited_for.wait(10)
            print("ran")

        def serve():
            drained.wait(10)
            request(first, late, complete=True)

        threading.Thread(target=serve, daemon=True).start()
        request(PoolRunner(), lambda: begun.wait(10))
        """
    )
    assert (code, lines) == (0, ["ran"])


def test_a_hook_that_never_ends_does_not_keep_the_process() -> None:
    assert run(
        """
        from wsgi_bg.hooks import Hooks

        class Stuck(Hooks):
            def batch_ended(self, record):
                print("ended")
                threading.Event().wait()

        app = app_that(lambda environ: background_tasks.add_task(int))
        middleware = BackgroundTasksMiddleware(
            app, runner=PoolRunner(drain_timeout=0.2), hooks=Stuck()
        )
        Server().run(middleware, make_server_environ())
        """
    ) == (0, ["ended"])


def test_a_batch_that_comes_during_the_wait_of_the_exit_is_named() -> None:
    code, lines = run(
        """
        begun, running = threading.Event(), threading.Event()

        def slow():
            begun.set()
            threading.Event().wait(0.5)

        def late():
            running.set()
            threading.Event().wait()

        class First(InlineRunner):
            drain_timeout = 0.0

        first = First()
        request(first, int, complete=True)          # drained first
        request(PoolRunner(drain_timeout=5), slow)

        def serve():
            leaving.wait(10)
            request(first, late, complete=True)

        threading.Thread(target=serve, daemon=True).start()
        assert begun.wait(10)
        main_thread_ends()
        """
    )
    assert code == 0
    assert lines == [
        "ERROR background task __main__.late was not finished within the drain time of "
        "0 seconds: the process ends without it"
    ]


def test_no_limit_of_the_drain_is_a_limit_too_far_away() -> None:
    assert run(
        """
        runner = PoolRunner(drain_timeout=float("inf"))
        request(runner, lambda: (leaving.wait(10), print("ran")))
        main_thread_ends()
        """
    ) == (0, ["ran"])


def test_a_stuck_task_that_two_runners_know_of_is_named_once() -> None:
    code, lines = run(
        """
        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        from wsgi_bg.runners.pool import shared_pool
        inline = InlineRunner()
        inline.drain_timeout = shared_pool.drain_timeout = 0.2
        request("pool", int)
        request(inline, stuck)
        assert begun.wait(10)
        """
    )
    assert code == 0
    assert len(lines) == 1


def test_a_signal_handler_may_drain_while_a_batch_is_submitted() -> None:
    assert run(
        """
        import signal
        from wsgi_bg.runners.ledger import Ledger
        runner = InlineRunner()

        class Interrupted(dict):
            def __setitem__(self, batch, value):
                super().__setitem__(batch, value)
                signal.raise_signal(signal.SIGUSR1)

        runner._ledgers.get()._handed_over = Interrupted()
        signal.signal(signal.SIGUSR1, lambda number, frame: print(len(runner.drain(0))))
        request(runner, int)
        """
    ) == (0, ["1"])


def test_a_portal_that_was_used_does_not_hang_the_exit() -> None:
    assert run(
        """
        async def task(): print("ran")
        request("inline", task, complete=True)
        """
    ) == (0, ["ran"])


def test_a_second_drain_neither_waits_nor_names_again() -> None:
    code, lines = run(
        """
        import wsgi_bg
        from wsgi_bg.runners import Statistics

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        class Mine:
            drain_timeout = 3600.0
            def __init__(self): self.tasks = []
            def submit(self, batch): self.tasks += batch.tasks
            def drain(self, timeout):
                print("drain", timeout)
                return self.tasks
            def statistics(self): return Statistics(0, 0, 0, 0, 0)

        mine = Mine()
        request(mine, int)
        request(PoolRunner(drain_timeout=3600.0), stuck)
        assert begun.wait(10)
        print([task.name for task in wsgi_bg.drain(0)])
        request(mine, float)
        """
    )
    name = "ERROR background task {} was not finished {}: the process ends without it"
    assert code == 0
    assert lines == [
        "drain 0.0",  # the runner's time
        "drain 0.0",  # and a look at the tasks left
        name.format("builtins.int", "within the drain time of 0 seconds"),
        name.format("__main__.stuck", "within the drain time of 0 seconds"),
        "['builtins.int', '__main__.stuck']",
        "drain 0.0",  # as the main thread ends: a look at the tasks left
        name.format("builtins.float", "by the end of the process"),
        "drain 0.0",  # from atexit
    ]


def test_the_longest_limit_is_that_of_the_runner_that_wants_most() -> None:
    assert run(
        """
        from wsgi_bg.runners import shutdown
        print(shutdown.longest_limit())
        runner = PoolRunner(drain_timeout=60)
        request(runner)
        print(shutdown.longest_limit())
        """
    ) == (0, ["30.0", "60.0"])


def test_a_process_without_tasks_has_no_thread_and_nothing_to_wait_for() -> None:
    assert run(
        """
        request("pool", complete=True)
        request("inline", complete=False)
        print(threading.active_count())
        """
    ) == (0, ["1"])


def test_a_response_freed_at_the_very_end_still_has_its_tasks_run() -> None:
    code, lines = run(
        """
        def add(environ): background_tasks.add_task(print, "ran")
        app = BackgroundTasksMiddleware(app_that(add))
        body = app(make_server_environ(), Server().start_response)
        request("inline", lambda: None)
        atexit.register(globals().pop, "body")
        """
    )
    assert code == 0
    assert "ran" in lines


def test_a_task_added_while_the_interpreter_exits_runs() -> None:
    """Python 3.12 starts no thread then, neither the pool's nor the portal's."""
    assert run(
        """
        async def task(): print("async")

        @atexit.register
        def last_request():
            request("pool", task, lambda: print("plain"))

        request("inline", complete=True)
        """
    ) == (0, ["async", "plain"])


def test_tasks_are_named_without_a_wait_when_there_is_no_time(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    class Busy(InlineRunner):
        def drain(self, timeout: float) -> list[BackgroundTask]:
            raise AssertionError("this is to wait")

        def abandon(self) -> list[BackgroundTask]:
            return [BackgroundTask(int)]

    monkeypatch.setattr(
        "wsgi_bg.runners.shutdown._own_runners", WeakValueDictionary[int, object]()
    )
    busy = [Busy(), Busy()]
    for runner in busy:
        shutdown.register(runner)
    wait(TIMEOUT)  # tasks of other tests that have not quite ended would be named
    shutdown.log_all_unfinished("since time was up")
    message = "background task builtins.int was not finished since time was up: "
    assert log.errors == 2 * [f"{message}the process ends without it"]


def test_the_drain_times_of_all_runners_begin_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stuck runners cost the longest of their limits, not the sum. The clock is a mock."""
    now = 100.0
    given: list[float] = []

    class Slow(InlineRunner):
        drain_timeout = 30.0

        def drain(self, timeout: float) -> list[BackgroundTask]:
            nonlocal now
            given.append(timeout)
            now += 25.0
            return []

    monkeypatch.setattr(
        "wsgi_bg.runners.shutdown._own_runners", WeakValueDictionary[int, object]()
    )
    runners = [Slow(), Slow(), Slow()]
    for runner in runners:
        shutdown.register(runner)
    monkeypatch.setattr("wsgi_bg.runners.shutdown.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("wsgi_bg._loop.portal.stop", lambda timeout: None)
    notice = Notice()
    monkeypatch.setattr(notice, "due", math.inf)
    shutdown.finish(notice=notice)
    assert given == [30.0, 5.0, 0.0]


def test_a_process_of_multiprocessing_waits_for_its_tasks() -> None:
    """Such a process calls nothing of atexit: a worker of granian is an example."""
    code, lines = run(
        """
        import multiprocessing

        def slow():
            leaving.wait(10)
            print("plain", flush=True)

        async def slow_async():
            await asyncio.to_thread(leaving.wait, 10)
            print("async", flush=True)

        def stuck():
            threading.Event().wait()

        def child():
            request("pool", slow, slow_async)
            request(PoolRunner(drain_timeout=0.5), stuck)
            main_thread_ends()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(20)
        """
    )
    assert code == 0
    assert sorted(lines) == [
        "ERROR background task __main__.stuck was not finished within the drain time of 0.5 "
        "seconds: the process ends without it",
        "async",
        "plain",
    ]


@needs_threads_at_exit
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("first", ["", 'request("pool", int)'])
def test_a_server_that_outlives_the_main_thread_may_still_submit(
    first: str, complete: bool
) -> None:
    assert run(
        f"""
        names = []

        def task():
            names.append(threading.current_thread().name)

        async def async_task():
            names.append(threading.current_thread().name)

        def serve():
            threading.main_thread().join()
            for _ in range(2):
                request("pool", task, async_task, complete={complete})
            while len(names) < 4:
                pass
            request("pool", lambda: print(sorted({{name[:12] for name in names}})))

        {first}
        threading.Thread(target=serve).start()
        """
    ) == (0, ["['wsgi_bg-pool', 'wsgi_bg-port']"])


@needs_threads_at_exit
def test_a_task_may_use_processes_that_it_imports_while_the_exit_waits() -> None:
    """A module that is imported after the first task must not close its executors first."""
    assert run(
        """
        import multiprocessing

        def task():
            from concurrent.futures import ProcessPoolExecutor
            leaving.wait(10)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
                print(executor.submit(int, "3").result())

        request("pool", task)
        main_thread_ends()
        """
    ) == (0, ["3"])


@pytest.mark.parametrize("thread", ["an idle executor", "a server"])
def test_a_stuck_task_is_given_its_time_once(thread: str) -> None:
    """The workers of an executor keep the process alive, and end only after the drain."""
    code, lines = run(
        f"""
        from concurrent.futures import ThreadPoolExecutor

        class Pool(PoolRunner):
            def drain(self, timeout):
                try:
                    executor.submit(int).result()
                except RuntimeError:
                    print("executors are closed")
                began = time.monotonic()
                try:
                    return super().drain(timeout)
                finally:
                    print("waited" if time.monotonic() - began > 0.5 else "did not wait")

        begun = threading.Event()

        def stuck():
            begun.set()
            threading.Event().wait()

        executor = ThreadPoolExecutor(1)
        executor.submit(int).result()
        pool = Pool(drain_timeout=0.6)
        from wsgi_bg.runners.pool import shared_pool
        shared_pool.drain_timeout = 0.6
        request(pool, stuck)
        assert begun.wait(10)
        if "{thread}" == "a server":
            threading.Thread(target=threading.main_thread().join).start()
        """
    )
    assert code == 0
    error = (
        "ERROR background task __main__.stuck was not finished within the drain time of 0.6 "
        "seconds: the process ends without it"
    )
    if thread == "a server":
        assert lines == ["executors are closed", "did not wait", error]
    else:
        assert lines == ["waited", error]


@needs_threads_at_exit
@pytest.mark.parametrize("first", ["before", "after"])
def test_without_atexit_a_thread_drains_that_nobody_joins_too_early(first: str) -> None:
    """As in a forked process of multiprocessing, which stores no coverage."""
    before = 'request("pool", int)' if first == "before" else ""
    assert run(
        f"""
        from wsgi_bg._process import exit as ending

        ending.has_no_atexit = lambda: True

        def serve():
            threading.main_thread().join()
            request("pool", lambda: (time.sleep(0.2), print("late task")))
            atexit.register(print, "atexit")

        {before}
        threading.Thread(target=serve).start()
        for thread in threading.enumerate():
            assert not thread.name.startswith("wsgi_bg-exit")
        """
    ) == (0, ["late task", "atexit"])


@needs_threads_at_exit
def test_a_task_may_start_threads_while_the_exit_waits() -> None:
    assert run(
        """
        def task():
            leaving.wait(10)
            thread = threading.Thread(target=print, args=("on a thread",))
            thread.start()
            thread.join()

        request("pool", task)
        main_thread_ends()
        """
    ) == (0, ["on a thread"])
