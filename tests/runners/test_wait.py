"""``wsgi_bg.wait`` and ``wsgi_bg.drain``, and the log of a process that waits."""

from __future__ import annotations

import gc
import math
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Gate,
    Server,
    app_that,
    make_server_environ,
    run_python,
    submit,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
)
from wsgi_bg._request.request_tasks import RequestTasks
from wsgi_bg.exceptions import InsideTaskError, OptionTypeError, OptionValueError
from wsgi_bg.runners import Runner, Statistics, shutdown
from wsgi_bg.runners.ledger import batches_under_way
from wsgi_bg.runners.waiting import Notice


class Own:
    """A runner with the methods of the protocol only."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)

    def submit(self, batch: Any) -> None:
        self._executor.submit(batch.run)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        return []

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def _nothing_is_left_of_other_tests() -> Iterator[None]:
    wsgi_bg.wait(TIMEOUT)
    yield
    wsgi_bg.wait(TIMEOUT)


def names(tasks: list[BackgroundTask]) -> list[str]:
    return [task.name.rpartition(".")[2] for task in tasks]


# wait()


@pytest.mark.parametrize("make", [PoolRunner, InlineRunner, Own])
def test_wait_returns_when_all_submitted_tasks_are_done(make: Any) -> None:
    runner: Runner = make()
    opened = threading.Event()
    seen: list[str] = []

    def added() -> None:
        seen.append("added by the task")

    def task() -> None:
        opened.wait(TIMEOUT)
        seen.append("task")
        background_tasks.add_task(added)

    def open_soon() -> None:
        assert wsgi_bg.wait(0.01) != []
        opened.set()

    with ThreadPoolExecutor() as other:
        submit(runner, task, complete=False)
        other.submit(open_soon)
        assert wsgi_bg.wait(TIMEOUT) == []
    assert seen == ["task", "added by the task"]


@pytest.mark.parametrize("make", [PoolRunner, InlineRunner, Own])
def test_wait_returns_unfinished_tasks_and_may_be_called_again(make: Any, gate: Gate) -> None:
    runner = make()
    submit(runner, gate.task, int, complete=False)
    assert names(wsgi_bg.wait(0.01)) == ["task", "int"]
    gate.open()
    assert wsgi_bg.wait() == []
    submit(runner, int, complete=False)  # accepted as before
    assert wsgi_bg.wait(TIMEOUT) == []


def test_wait_does_not_wait_for_later_batches(gate: Gate) -> None:
    first, later = Gate(), gate
    submit(PoolRunner(), first.task)
    runner = PoolRunner()

    def submit_and_open() -> None:
        submit(runner, later.task)
        first.open()

    with ThreadPoolExecutor() as other:
        task = other.submit(wsgi_bg.wait)
        assert first.begun.wait(TIMEOUT)
        while not waits():
            pass
        other.submit(submit_and_open)
        assert task.result(TIMEOUT) == []
    later.open()


def waits() -> bool:
    """True if a thread is in wait()."""
    from wsgi_bg.runners.ledger import ledgers_here

    return any(ledger._waiters for ledger in ledgers_here())


def test_wait_covers_responses_that_were_freed_without_close() -> None:
    seen: list[int] = []
    app = app_that(lambda environ: background_tasks.add_task(seen.append, 1))
    response = BackgroundTasksMiddleware(app, runner="pool")(
        make_server_environ(), Server().start_response
    )
    del response
    assert wsgi_bg.wait(TIMEOUT) == []
    assert seen == [1]


def test_a_runner_that_ends_its_batch_in_submit_is_not_waited_for() -> None:
    class Here(Own):
        def submit(self, batch: Any) -> None:
            batch.run()

    submit(Here(), int)
    assert wsgi_bg.wait(TIMEOUT) == []


def test_a_batch_that_ends_before_the_ledger_has_it_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runner's thread may run the batch before the ledger has it."""
    from wsgi_bg.runners import ledger

    add = ledger.Ledger.add

    def add_late(self: Any, batch: Any) -> Any:
        runs[0]()
        return add(self, batch)

    class Later(Own):
        def submit(self, batch: Any) -> None:
            runs.append(batch.run)

    runs: list[Any] = []
    monkeypatch.setattr(ledger.Ledger, "add", add_late)
    submit(Later(), int)
    assert not batches_under_way()


@pytest.mark.parametrize("function", [wsgi_bg.wait, wsgi_bg.drain])
@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_neither_is_for_a_running_task(kind: str, runner: Any, function: Any) -> None:
    raised: list[BaseException] = []

    def task() -> None:
        with pytest.raises(InsideTaskError, match=f"{function.__name__}.. was called") as error:
            function()
        raised.append(error.value)

    async def async_task() -> None:
        task()

    submit(runner, task if kind == "plain" else async_task)
    assert wsgi_bg.wait(TIMEOUT) == []
    assert [type(error) for error in raised] == [InsideTaskError]
    assert isinstance(raised[0], RuntimeError)


@pytest.mark.parametrize("function", [wsgi_bg.wait, wsgi_bg.drain])
def test_neither_is_for_the_portals_thread(function: Any) -> None:
    from wsgi_bg._loop import portal

    async def call() -> None:
        function()

    with pytest.raises(InsideTaskError):
        portal.portal().call(call)


@pytest.mark.parametrize("function", [wsgi_bg.wait, wsgi_bg.drain])
@pytest.mark.parametrize(
    ("timeout", "error", "message"),
    [
        ("1", OptionTypeError, "timeout must be a number of seconds or None; got '1'"),
        (True, OptionTypeError, "timeout must be a number of seconds or None; got True"),
        (-1, OptionValueError, "timeout must be 0 seconds or more, or None; got -1"),
        (math.nan, OptionValueError, "timeout must be 0 seconds or more, or None; got nan"),
    ],
)
def test_a_timeout_is_a_number_of_seconds(
    timeout: Any, error: type[Exception], message: str, function: Any
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(timeout)


@pytest.mark.parametrize("function", [wsgi_bg.wait, shutdown.drain])
def test_a_timeout_may_be_larger_than_any_float(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def finish(*, limit: float) -> list[BackgroundTask]:
        limits.append(limit)
        return []

    monkeypatch.setattr(shutdown, "finish", finish)
    assert function(10**400) == []
    assert limits in ([], [math.inf])


# drain()

SETUP = """
import logging, sys, threading
import wsgi_bg
from tests.support import submit
from wsgi_bg import PoolRunner

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
begun, gate = threading.Event(), threading.Event()

def stuck():
    begun.set()
    gate.wait()

def here():
    print("runs on", threading.current_thread().name)
"""


def run(code: str, *, with_waits: bool = False) -> list[str]:
    import textwrap

    done = run_python(SETUP + textwrap.dedent(code), with_waits=with_waits)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_drain_names_unfinished_tasks_and_takes_no_more_in() -> None:
    assert run(
        """
        runner = PoolRunner()
        submit(runner, stuck, here)
        assert begun.wait(10)
        print([task.name for task in wsgi_bg.drain(timeout=0.1)])
        submit(runner, here)
        print(wsgi_bg.drain())
        """
    ) == [
        "ERROR background task __main__.stuck was not finished within the drain time of 0.1 "
        "seconds: the process ends without it",
        "ERROR background task __main__.here was not finished within the drain time of 0.1 "
        "seconds: the process ends without it",
        "['__main__.stuck', '__main__.here']",
        "runs on MainThread",
        "[]",
    ]


def test_drain_waits_as_long_as_each_runner_wants() -> None:
    assert run(
        """
        runner = PoolRunner(drain_timeout=0.1)
        submit(runner, stuck)
        assert begun.wait(10)
        print(len(wsgi_bg.drain()))
        """
    ) == [
        "ERROR background task __main__.stuck was not finished within the drain time of 0.1 "
        "seconds: the process ends without it",
        "1",
    ]


def test_a_limit_larger_than_any_float_is_no_limit() -> None:
    assert run(
        """
        runner = PoolRunner(drain_timeout=10**400)
        submit(runner, int)
        print(wsgi_bg.drain())
        """
    ) == ["[]"]


def test_leave_still_works_and_names_its_replacement() -> None:
    assert run(
        """
        import time, warnings
        from wsgi_bg.shutdown import leave
        runner = PoolRunner()
        submit(runner, stuck)
        assert begun.wait(10)
        with warnings.catch_warnings(record=True) as caught:
            left = leave(limit=30.0, began=time.monotonic() - 29.9)
        print([task.name for task in left])
        print([(each.category.__name__, str(each.message)) for each in caught])
        """
    )[1:] == [
        "['__main__.stuck']",
        "[('DeprecationWarning', 'wsgi_bg.shutdown.leave() will go: call "
        "wsgi_bg.drain(timeout)')]",
    ]


def test_an_exit_that_is_interrupted_beside_a_server_names_the_tasks_at_once() -> None:
    """A server's thread goes on, so that the drain does not begin when the main thread ends."""
    assert run(
        """
        import os, signal

        stop = threading.Event()
        waits = wsgi_bg.runners.shutdown.wait_for

        def interrupted(*args):
            signal.signal(signal.SIGTERM, lambda *_: stop.set() or sys.exit())
            signal.raise_signal(signal.SIGTERM)
            return waits(*args)

        wsgi_bg.runners.shutdown.wait_for = interrupted
        sys.unraisablehook = lambda *_: None  # threading's "Exception ignored"
        threading.Thread(target=stop.wait).start()
        submit("pool", stuck)
        assert begun.wait(10)
        """
    ) == [
        "ERROR background task __main__.stuck was not finished before the wait for it was "
        "interrupted (SystemExit): the process ends without it"
    ]


def test_an_exit_that_is_interrupted_before_it_drains_names_the_tasks_at_once() -> None:
    """Ctrl-C may come while freed responses are submitted."""
    assert run(
        """
        import os

        def flush():
            shutdown._collectors[os.getpid()] = collector
            raise KeyboardInterrupt

        from wsgi_bg.runners import shutdown
        runner = PoolRunner(drain_timeout=3600)
        submit(runner, stuck)
        assert begun.wait(10)
        collector = shutdown._collectors[os.getpid()]
        shutdown._collectors[os.getpid()] = flush, collector[1]
        sys.unraisablehook = lambda *_: None  # threading's "Exception ignored"
        """
    ) == [
        "ERROR background task __main__.stuck was not finished before the wait for it was "
        "interrupted (KeyboardInterrupt): the process ends without it"
    ]


def test_a_forked_child_waits_for_no_task_of_its_parent() -> None:
    assert run(
        """
        import os, warnings
        warnings.simplefilter("ignore")  # that a fork with threads is dangerous
        runner = PoolRunner()
        submit(runner, stuck)
        assert begun.wait(10)
        pid = os.fork()
        if not pid:
            print(wsgi_bg.wait(), wsgi_bg.drain(), flush=True)
            sys.exit()
        os.waitpid(pid, 0)
        gate.set()
        """
    ) == ["[] []"]


def test_without_a_task_there_is_nothing_to_wait_for() -> None:
    assert run("print(wsgi_bg.wait(), wsgi_bg.drain())") == ["[] []"]


# The log.


def at(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("wsgi_bg.runners.waiting.time", clock)


def test_the_first_warning_comes_after_a_second_and_the_next_every_five(
    monkeypatch: pytest.MonkeyPatch, log: Log, gate: Gate
) -> None:
    """The clock is a mock."""
    submit(PoolRunner(), gate.task, int, int, int)
    at(monkeypatch, 100.0)
    notice = Notice()
    came = []
    for now in (100.9, 101.0, 105.9, 106.0, 110.9, 111.0):
        at(monkeypatch, now)
        notice.log_if_due(130.0)
        came.append(len(log.warnings))
    gate.open()
    assert came == [0, 1, 1, 2, 2, 3]
    assert log.warnings[0] == (
        "the process ends, and waits for 4 background tasks (3 builtins.int, 1 "
        "tests.support.Gate.task): for 29 s more at most; Ctrl-C ends the wait"
    )


def test_a_batch_that_two_runners_know_of_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, log: Log, gate: Gate
) -> None:
    submit(InlineRunner(), gate.task, complete=False)  # hands the batch to the pool
    notice = Notice(ended_by="")
    notice.due = 0.0
    notice.log_if_due(math.inf)
    gate.open()
    assert log.warnings == [
        "the process ends, and waits for 1 background task (1 tests.support.Gate.task): "
        "without a limit"
    ]


def test_the_names_in_a_warning_are_bounded(log: Log, gate: Gate) -> None:
    functions: list[Any] = [*[int] * 3000, abs, all, any, bin, bool, chr]
    submit(PoolRunner(), gate.task, *functions)
    notice = Notice(ended_by="a second signal")
    notice.due = 0.0
    notice.log_if_due(math.inf, requests=2)
    gate.open()
    assert log.warnings == [
        "the process ends, and waits for 2 requests and 3007 background tasks (999 "
        "builtins.int, 1 tests.support.Gate.task, 2007 others): without a limit; a second "
        "signal ends the wait"
    ]


def test_a_runner_is_named_if_no_task_is_known(log: Log) -> None:
    notice = Notice(ended_by="")
    notice.due = 0.0
    notice.log_if_due(math.inf, runner=InlineRunner())
    assert log.warnings == ["the process ends, and waits for InlineRunner(): without a limit"]


def test_a_wait_on_another_thread_is_not_ended_by_ctrl_c() -> None:
    with ThreadPoolExecutor() as other:
        assert other.submit(Notice).result(TIMEOUT)._ended_by == ""


def test_one_warning_names_the_tasks_of_all_runners() -> None:
    """A real wait, with a runner of the user's, whose drain gets parts of the time."""
    assert run(
        """
        from tests.runners.test_wait import Own

        class Mine(Own):
            given = []

            def drain(self, timeout):
                self.given.append(timeout)
                gate.wait(timeout)
                return [] if gate.is_set() else ["not yet"]

        class Log(logging.Handler):
            def emit(self, record):
                gate.set()

        mine = Mine()
        logging.getLogger().addHandler(Log())
        submit(mine, stuck, complete=False)
        submit(PoolRunner(), stuck, here)
        assert begun.wait(10)
        print(wsgi_bg.drain(20))
        print([0.5 < timeout < 1.1 for timeout in Mine.given[:1]])
        """,
        with_waits=True,
    ) == [
        "WARNING the process ends, and waits for 3 background tasks (2 __main__.stuck, 1 "
        "__main__.here): for 19 s more at most; Ctrl-C ends the wait",
        "runs on wsgi_bg-pool-0",
        "[]",
        "[True]",
    ]


def test_the_warning_promises_no_ctrl_c_under_uwsgi(
    monkeypatch: pytest.MonkeyPatch, log: Log, gate: Gate
) -> None:
    """uWSGI has its own handler of SIGINT, and a worker with gevent or a master waits on."""
    submit(PoolRunner(), gate.task)
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace())
    Notice(first=0).log_if_due(math.inf)
    gate.open()
    (warning,) = log.warnings
    assert warning.endswith("(1 tests.support.Gate.task): without a limit")


def test_a_warning_names_the_longest_drain_time() -> None:
    lines = run(
        """
        class EndTask(logging.Handler):
            def emit(self, record):
                gate.set()

        logging.getLogger("wsgi_bg").addHandler(EndTask())
        runners = [PoolRunner(drain_timeout=seconds) for seconds in (20, 90)]
        for runner in runners:
            submit(runner, stuck)
        """,
        with_waits=True,
    )
    assert [line.partition(": ")[2] for line in lines] == [
        "for 89 s more at most; Ctrl-C ends the wait"
    ]


def test_a_thread_that_serves_on_is_waited_beside_with_a_warning() -> None:
    assert run(
        """
        class Log(logging.Handler):
            def emit(self, record):
                gate.set()

        logging.getLogger().addHandler(Log())
        runner = PoolRunner()
        submit(runner, stuck, here)
        assert begun.wait(10)
        threading.Thread(target=lambda: threading.main_thread().join()).start()
        """,
        with_waits=True,
    ) == [
        "WARNING the process ends, and waits for 2 background tasks (1 __main__.stuck, 1 "
        "__main__.here): for 29 s more at most; Ctrl-C ends the wait",
        "runs on wsgi_bg-pool-0",
    ]


# Runners without a reference.


@pytest.mark.parametrize("make", [PoolRunner, InlineRunner])
def test_a_runner_without_a_reference_is_freed(make: Any) -> None:
    runner = make()
    submit(runner, int, complete=False)
    assert wsgi_bg.wait(TIMEOUT) == []
    freed = threading.Event()
    weakref.finalize(runner, freed.set)
    key = id(runner)
    del runner
    gc.collect()
    assert freed.wait(TIMEOUT)
    assert key not in shutdown._own_runners


def test_a_runner_with_work_is_kept_until_the_work_is_done(gate: Gate) -> None:
    runner = PoolRunner()
    submit(runner, gate.task)
    freed = threading.Event()
    weakref.finalize(runner, freed.set)
    key = id(runner)
    del runner
    gc.collect()
    assert gate.begun.wait(TIMEOUT)
    assert not freed.is_set()
    assert key in shutdown._own_runners
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    gc.collect()
    assert freed.wait(TIMEOUT)


def test_a_users_runner_is_kept_since_it_may_have_work() -> None:
    runner = Own()
    submit(runner, int)
    key = id(runner)
    del runner
    gc.collect()
    assert isinstance(shutdown._users_runners.pop(key), Own)


def test_a_runner_at_the_address_of_a_freed_runner_is_drained_too() -> None:
    first, second = InlineRunner(), InlineRunner()
    shutdown._own_runners[id(second)] = first
    shutdown._drained_in[id(second)] = os.getpid()
    shutdown.register(second)
    del first  # its entry is removed
    gc.collect()
    assert shutdown._own_runners[id(second)] is second
    assert id(second) not in shutdown._drained_in


def test_the_tasks_of_a_request_that_submits_them_now_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server may end the main thread while a thread is in ``close()``, as granian does."""
    is_in_submit, is_looked_at = threading.Event(), threading.Event()
    pool, ran = PoolRunner(), list[str]()

    class Slow(Own):
        def submit(self, batch: Any) -> None:
            is_in_submit.set()
            assert is_looked_at.wait(TIMEOUT)
            pool.submit(batch)

    def look(tasks: RequestTasks) -> bool:
        found = is_being_submitted.__get__(tasks)
        is_looked_at.set()
        return bool(found)

    is_being_submitted: Any = RequestTasks.is_being_submitted
    monkeypatch.setattr(RequestTasks, "is_being_submitted", property(look))
    app = BackgroundTasksMiddleware(
        app_that(lambda environ: background_tasks.add_task(ran.append, "ran")), runner=Slow()
    )
    with ThreadPoolExecutor(1) as executor:
        request = executor.submit(lambda: Server().run(app, make_server_environ()))
        assert is_in_submit.wait(TIMEOUT)
        assert wsgi_bg.wait(TIMEOUT) == []
        assert ran == ["ran"]
        request.result(TIMEOUT)
