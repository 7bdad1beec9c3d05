"""``using(delay=...)``: a task waits for its time, and no thread waits; ``wait`` and exit."""

from __future__ import annotations

import math
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import TIMEOUT, Clock, Gate, no_threads, run_python
from tests.support.retry import (
    RUNNERS,
    SOON,
    Calls,
    Own,
    each_kind,
    each_runner,
    request,
    settle,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
)
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.workers import Workers
from wsgi_bg._tasks.background_tasks import TaskQueue
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.task import DIRECT
from wsgi_bg.exceptions import WaitingLimitError
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners import Statistics, shutdown
from wsgi_bg.runners import timer as timer_module
from wsgi_bg.runners.ledger import MAX_WAITING, ledgers_here
from wsgi_bg.runners.timer import Timer
from wsgi_bg.runners.waiting import Notice


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (-1, ValueError, "delay must be 0 seconds or more; got -1"),
        (math.nan, ValueError, "delay must be 0 seconds or more; got nan"),
        (math.inf, ValueError, "delay must be a bounded time; got inf"),
        (10**400, ValueError, "delay must be a bounded time"),
        (True, TypeError, "delay must be a number of seconds; got True"),
        ("60", TypeError, "delay must be a number of seconds"),
        (timedelta(minutes=1), TypeError, "write delay=....total_seconds()"),
    ],
)
def test_a_wrong_delay_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        BackgroundTasks().using(delay=given)
    assert words in str(caught.value)


@pytest.mark.parametrize("celery", [{"countdown": 5}, {"eta": datetime.now(UTC)}])
def test_a_delay_beside_a_time_of_celery_is_refused(celery: Any) -> None:
    tasks = BackgroundTasks()
    words = f"delay must be None beside celery=.*{next(iter(celery))}"
    with pytest.raises(ValueError, match=words):
        tasks.using(delay=5, celery=celery)
    with pytest.raises(ValueError, match=words):
        tasks.using(delay=5).using(celery=celery)
    with pytest.raises(ValueError, match=words):
        tasks.using(celery=celery).using(delay=5)
    tasks.using(delay=0, celery=celery)


@each_runner
@each_kind
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "incomplete"])
def test_a_task_waits_for_its_time_and_holds_up_no_other(
    clock: Clock, runner: str, is_async: bool, complete: bool
) -> None:
    calls, beside = Calls(0), Calls(0)
    own = RUNNERS[runner]()

    def add() -> None:
        background_tasks.using(delay=60).add_task(calls.make(is_async))
        background_tasks.add_task(beside.make(is_async))

    request(add, runner=own, complete=complete)
    beside.wait()
    assert wsgi_bg.wait(TIMEOUT) == []
    clock.advance(59.9)
    assert calls.count == 0
    clock.advance(0.1)
    calls.wait()
    settle(lambda: wsgi_bg.wait(TIMEOUT) == [])
    if isinstance(own, Own):
        assert own.submitted == [(complete, True), (True, False)]
    else:
        settle(lambda: own.statistics() == Statistics(0, 0, 2, 0, 0))


@pytest.mark.parametrize("make", [InlineRunner, PoolRunner])
@each_kind
def test_the_drain_of_a_runner_waits_for_tasks_whose_time_comes_by_then(
    make: Any, is_async: bool
) -> None:
    runner, calls, late = make(), Calls(1), Calls(0)

    def add() -> None:
        soon = background_tasks.using(delay=0.01, retry=Retry(2, first=0.01))
        soon.add_task(calls.make(is_async))
        background_tasks.using(delay=3600).add_task(late.make(is_async))

    request(add, runner=runner)
    assert runner.drain(TIMEOUT) == []
    assert (calls.count, late.count) == (2, 0)
    assert runner.statistics() == Statistics(0, 0, 1, 0, 0, waiting=1)
    runner.ledger.abandon_waiting()


def test_waiting_tasks_hold_no_thread_and_no_place_in_the_pool(clock: Clock) -> None:
    pool = PoolRunner(threads=1, max_pending=1)
    request(lambda: background_tasks.add_task(int))  # starts a thread of the process
    before = set(threading.enumerate())
    calls = Calls(0)

    def add() -> None:
        for _ in range(100):
            background_tasks.using(delay=60).add_task(calls.task)

    request(add, runner=pool)
    settle(lambda: pool.statistics() == Statistics(0, 0, 0, 0, 0, waiting=100))
    started = [thread.name for thread in set(threading.enumerate()) - before]
    of_others = ("wsgi_bg-unclosed", "wsgi_bg-status")  # for what other tests have left
    assert len([each for each in started if not each.startswith(of_others)]) <= 2, started
    clock.advance(60)
    for _ in range(100):
        calls.wait()
    settle(lambda: pool.statistics() == Statistics(0, 0, 100, 0, 0))


def test_tasks_run_in_the_order_of_their_times(clock: Clock) -> None:
    order: list[int] = []
    pool = PoolRunner(threads=1)

    def add() -> None:
        for seconds in (3, 1, 2):
            background_tasks.using(delay=seconds).add_task(order.append, seconds)

    request(add, runner=pool)
    settle(lambda: pool.statistics().waiting == 3)
    for count in (1, 2, 3):
        clock.advance(1)
        settle(partial(has_length, order, count))
    assert order == [1, 2, 3]


def test_a_delay_counts_from_the_end_of_the_request(clock: Clock) -> None:
    calls = Calls(0)

    def add() -> None:
        background_tasks.add_task(clock.advance, 50)  # a slow task before
        background_tasks.using(delay=60).add_task(calls.task)
        clock.advance(50)  # a slow view

    request(add)
    clock.advance(9.9)
    assert calls.count == 0
    clock.advance(0.1)
    calls.wait()


def test_a_delay_in_a_running_task_counts_from_add_task(clock: Clock) -> None:
    calls = Calls(0)

    def add_later() -> None:
        background_tasks.using(delay=60).add_task(calls.task)
        clock.advance(50)

    request(lambda: background_tasks.add_task(add_later))
    clock.advance(9.9)
    assert calls.count == 0
    clock.advance(0.1)
    calls.wait()


def test_a_task_that_waited_may_add_tasks(clock: Clock) -> None:
    order: list[str] = []
    last = threading.Event()

    def first() -> None:
        order.append("first")
        background_tasks.add_task(second)
        background_tasks.using(delay=60).add_task(last.set)

    def second() -> None:
        order.append("second")
        with pytest.raises(RuntimeError):
            wsgi_bg.wait(0)

    inline = InlineRunner()
    request(lambda: background_tasks.using(delay=60).add_task(first), runner=inline)
    clock.advance(60)
    settle(lambda: inline.statistics() == Statistics(0, 0, 2, 0, 0, waiting=1))
    assert order == ["first", "second"]
    clock.advance(60)
    assert last.wait(TIMEOUT)


@pytest.mark.parametrize("uses_view", [False, True])
def test_a_task_that_waited_may_use_the_object_of_its_view(
    clock: Clock, uses_view: bool
) -> None:
    calls = Calls(0)
    inline = InlineRunner()

    def add() -> None:
        tasks: Any = get_background_tasks_of_request()
        other = tasks.using(run_on="always") if uses_view else tasks

        def first() -> None:
            other.add_task(second)

        def second() -> None:
            other.using(delay=60).add_task(other.add_task, calls.task)

        tasks.using(delay=60).add_task(first)

    request(add, runner=inline)
    clock.advance(60)
    settle(lambda: inline.statistics() == Statistics(0, 0, 2, 0, 0, waiting=1))
    clock.advance(60)
    calls.wait()


def test_a_task_of_another_request_may_not_use_an_object_that_has_ended(
    clock: Clock, log: Log
) -> None:
    kept: list[Any] = []

    def add() -> None:
        kept.append(get_background_tasks_of_request())
        background_tasks.add_task(int)

    request(add)
    request(lambda: background_tasks.using(delay=60).add_task(kept[0].add_task, int))
    clock.advance(60)
    settle(lambda: log.errors)
    assert log.errors[0].endswith("add_task raised BatchEndedError")


def test_the_outcome_of_the_request_counts(clock: Clock, log: Log) -> None:
    calls = Calls(0)
    inline = InlineRunner()

    def add() -> None:
        background_tasks.using(delay=60, run_on="error").add_task(calls.task)

    request(add, runner=inline)
    assert inline.statistics() == Statistics(0, 0, 0, 0, 1)
    assert "run_on is 'error'" in log.warnings[0]


def test_the_outcome_counts_for_tasks_that_a_delayed_task_adds(clock: Clock) -> None:
    calls = Calls(0)

    def add_two() -> None:
        background_tasks.using(run_on="error").add_task(calls.task)
        background_tasks.using(run_on="success").add_task(other.task)

    other = Calls(0)
    request(lambda: background_tasks.using(delay=60).add_task(add_two))
    clock.advance(60)
    other.wait()
    assert calls.count == 0


def test_stop_on_error_skips_a_task_with_a_delay(clock: Clock, log: Log) -> None:
    calls = Calls(failures=1)
    inline = InlineRunner()

    def add() -> None:
        background_tasks.add_task(calls.task)
        background_tasks.using(delay=60).add_task(calls.task)

    request(add, runner=inline, stop_on_error=True)
    assert inline.statistics() == Statistics(0, 0, 0, 1, 1)


def test_a_delayed_task_may_be_called_again(clock: Clock, log: Log) -> None:
    calls = Calls(failures=1)
    inline = InlineRunner()
    view = {"retry": SOON, "delay": 60}
    request(lambda: background_tasks.using(**view).add_task(calls.task), runner=inline)  # type: ignore[arg-type]
    clock.advance(60)
    calls.wait()
    settle(lambda: log.warnings)
    assert "in attempt 1 of 3" in log.warnings[0]
    clock.advance(60)
    calls.wait()
    settle(lambda: inline.statistics() == Statistics(0, 0, 1, 0, 0))


def get_background_tasks_of_request() -> Any:
    return background_tasks._get_current_object()  # type: ignore[attr-defined]


def has_length(given: list[int], length: int) -> bool:
    return len(given) == length


def test_a_runner_that_sends_gets_a_delayed_task_when_its_time_has_come(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str] = []

    class Sending(Own):
        def submit(self, batch: Any) -> None:
            batch.send()
            super().submit(batch)

        def send(self, task: Any) -> bool:
            if task.func is print:
                return False
            sent.append(task.name)
            return True

    def add() -> None:
        background_tasks.using(delay=60, retry=SOON).add_task(int)
        background_tasks.add_task(str)
        background_tasks.using(delay=60).add_task(print)

    request(add, runner=Sending(at_once=True))
    assert sent == ["builtins.str"]
    clock.advance(60)
    settle(lambda: capsys.readouterr().out == "\n")
    assert sent == ["builtins.str", "builtins.int"]


class Batches(Hooks):
    def __init__(self) -> None:
        self.added: list[int] = []
        self.done = threading.Event()

    def task_finished(self, record: TaskRecord) -> None:
        self.added.append(record.attempt)
        if len(self.added) == 1:
            record.batch.add_task(self.done.set)


def test_a_hook_may_add_a_task_to_the_batch_of_a_delayed_task(clock: Clock) -> None:
    hooks = Batches()
    request(lambda: background_tasks.using(delay=60).add_task(int), hooks=hooks)
    clock.advance(60)
    assert hooks.done.wait(TIMEOUT)
    assert hooks.added[0] == 1


def test_a_batch_without_a_runner_neither_waits_nor_repeats(log: Log) -> None:
    calls = Calls(failures=1)
    queue = TaskQueue()
    queue.using(delay=60, retry=SOON).add_task(calls.task)
    batch = Batch(queue, response_complete=True)
    batch.run()
    assert (calls.count, batch.failed) == (1, 1)


# Limits.


def test_beyond_max_waiting_a_delay_is_refused() -> None:
    assert PoolRunner().max_waiting == MAX_WAITING == 100_000
    assert PoolRunner(max_waiting=None).max_waiting == math.inf
    pool = PoolRunner(max_waiting=2)
    refused: list[WaitingLimitError] = []

    def add() -> None:
        background_tasks.using(delay=60).add_task(int)

    def add_too_many() -> None:
        try:
            add()
        except WaitingLimitError as exc:
            refused.append(exc)

    request(add, runner=pool)
    request(add, runner=pool)
    settle(lambda: pool.statistics().waiting == 2)
    request(add_too_many, runner=pool)
    request(add, runner=InlineRunner())  # each runner has its own limit
    assert str(refused[0]).startswith(
        "builtins.int was not added: 2 tasks of this runner wait for their time already, which "
        "is max_waiting"
    )
    assert (refused[0].name, refused[0].limit) == ("builtins.int", 2)
    for ledger in ledgers_here():
        ledger.abandon_waiting()


def test_the_timer_survives_an_error(
    clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(0)
    has_raised = threading.Event()

    def make_batch(later: object) -> Any:
        has_raised.set()
        raise MemoryError

    request(lambda: background_tasks.using(delay=60).add_task(calls.task))
    with monkeypatch.context() as patch:
        patch.setattr(timer_module.LaterTasks, "make_batch", make_batch)
        clock.advance(60)
        assert has_raised.wait(TIMEOUT)
        settle(lambda: log.errors)
    clock.advance(0)
    calls.wait()
    assert log.errors[0] == "the timer raised"


def test_a_batch_that_gets_no_thread_runs_on_the_timers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    calls = Calls(0)
    calls.during = lambda: names.append(threading.current_thread().name)
    pool = PoolRunner()
    request(lambda: background_tasks.using(delay=60).add_task(calls.task), runner=pool)
    settle(lambda: pool.statistics().waiting == 1)
    monkeypatch.setattr(clock.timer._submitters, "submit", lambda submission: False)
    monkeypatch.setattr(Workers, "submit", lambda workers, job: False)
    clock.advance(60)
    calls.wait()
    assert names == ["wsgi_bg-timer-0"]


def test_a_wait_that_gets_no_thread_begins_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = Timer()
    monkeypatch.setattr(timer_module, "timers", PerProcess(lambda: timer))
    calls = Calls(0)

    def add() -> None:
        background_tasks.using(delay=0.001).add_task(calls.task)

    inline = InlineRunner()
    with no_threads():
        request(add, runner=inline)
    assert inline.statistics().waiting == 1
    request(add, runner=inline)
    calls.wait()
    calls.wait()


# wait, drain and the exit.


def test_wait_waits_for_what_is_due(gate: Gate) -> None:
    pool = PoolRunner()

    def add() -> None:
        background_tasks.using(delay=0.001).add_task(gate.task)
        background_tasks.using(delay=600).add_task(gate.task)

    request(add, runner=pool)
    assert gate.begun.wait(TIMEOUT)
    assert [task.func for task in wsgi_bg.wait(0.01)] == [gate.task]
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    assert pool.statistics() == Statistics(0, 0, 1, 0, 0, waiting=1)
    pool.ledger.abandon_waiting()


def test_a_task_that_is_put_off_after_the_last_drain_is_named(
    clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timer_module, "is_exiting", lambda: True)
    calls = Calls(failures=1)
    inline = InlineRunner()

    def add() -> None:
        background_tasks.using(delay=60).add_task(int)
        background_tasks.using(retry=SOON).add_task(calls.task)

    request(add, runner=inline)
    assert inline.statistics() == Statistics(0, 0, 0, 1, 1)
    assert log.errors == [
        "background task builtins.int was not finished since it was waiting for its time: the "
        "process ends without it",
        "background task tests.support.retry.Calls.task raised ValueError in attempt 1 of 3",
    ]


def test_tasks_that_are_given_up_while_their_batch_is_made_are_named(
    clock: Clock, log: Log
) -> None:
    calls = Calls(failures=1)
    inline = InlineRunner()

    def add() -> None:
        background_tasks.using(retry=SOON).add_task(calls.task)
        background_tasks.add_task(int)

    request(add, runner=inline, stop_on_error=True)
    later: Any
    (later,) = inline.ledger.waiting
    rest: Any = later._rest

    class Rest:
        """Another thread gives up, right before the timer claims the rest."""

        def abandon(self) -> Any:
            assert [task.func for task in later.give_up()] == [calls.task]
            return rest.abandon()

    later._rest = Rest()
    batch = later.make_batch()
    assert batch.tasks == []
    assert log.errors[0].startswith("background task builtins.int was not finished since")


def test_a_single_batch_runs_the_tasks(clock: Clock) -> None:
    inline = InlineRunner()
    request(lambda: background_tasks.using(delay=60).add_task(int), runner=inline)
    later: Any
    (later,) = inline.ledger.waiting
    assert later.may_start()
    assert not later.may_start()


@pytest.fixture
def undrained() -> Any:
    """Let the runners of the test be drained, whatever runners were drained before."""
    yield
    shutdown._drained_in.clear()
    for ledger in ledgers_here():
        ledger.is_draining = False


def test_a_drain_runs_what_is_due_in_its_time_and_names_the_rest(
    log: Log, undrained: None
) -> None:
    pool = PoolRunner(drain_timeout=5)
    calls, never = Calls(failures=1), Calls(0)
    retry = Retry(first=0.01)

    def add() -> None:
        background_tasks.using(delay=0.02, retry=retry).add_task(calls.task)
        background_tasks.using(delay=600).add_task(never.task)

    request(add, runner=pool)
    began = time.monotonic()
    left = wsgi_bg.drain()
    assert time.monotonic() - began < 4  # not for tasks whose time comes later
    assert calls.count == 2
    assert [task.func for task in left] == [never.task]
    assert log.errors == [
        "background task tests.support.retry.Calls.task was not finished since it was waiting "
        "for its time: the process ends without it"
    ]
    assert pool.statistics() == Statistics(0, 0, 1, 0, 0)


def test_a_runner_gets_what_is_due_before_it_is_drained(undrained: None) -> None:
    order: list[str] = []

    class Closing(Own):
        def submit(self, batch: Any) -> None:
            order.append("submit")
            super().submit(batch)

        def drain(self, timeout: float) -> Any:
            order.append("drain")
            return super().drain(timeout)

    closing = Closing(at_once=True)
    request(lambda: background_tasks.using(delay=0.05).add_task(int), runner=closing)
    assert wsgi_bg.drain(timeout=TIMEOUT) == []
    assert order[:3] == ["submit", "submit", "drain"]


EXIT = """
import logging, sys, threading
from tests.support import Server, app_that, make_server_environ
from wsgi_bg import BackgroundTasksMiddleware, PoolRunner, Retry, background_tasks

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")

class Own:
    def submit(self, batch):
        batch.run() if batch.response_complete else threading.Thread(target=batch.run).start()
    def drain(self, timeout): return []
    def statistics(self): ...

def soon(): print("soon", flush=True)
def late(): print("late", flush=True)
def failing():
    print("failing", flush=True)
    raise ValueError

def add(environ):
    background_tasks.using(delay=0.1).add_task(soon)
    background_tasks.using(delay=600).add_task(late)
    background_tasks.using(retry=Retry(2, first=600)).add_task(failing)

app = app_that(add, headers=[("Content-Length", "2")])
runner = {"pool": PoolRunner(), "inline": "inline", "own": Own()}[RUNNER]
Server().run(BackgroundTasksMiddleware(app, runner=runner), make_server_environ())
"""


@pytest.mark.parametrize("runner", ["inline", "pool", "own"])
def test_the_exit_names_what_only_memory_holds(runner: str) -> None:
    done = run_python(EXIT.replace("RUNNER]", f"{runner!r}]"))
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith(("soon", "late", "failing"))) == [
        "failing",
        "soon",
    ]
    named = [line for line in lines if line.startswith("ERROR")]
    assert len(named) == 2
    for name, line in zip(("__main__.failing", "__main__.late"), sorted(named), strict=True):
        assert line == (
            f"ERROR background task {name} was not finished since it was waiting for its "
            "time: the process ends without it"
        )


def test_a_wait_that_begins_while_the_process_ends_is_not_lost() -> None:
    """Python 3.12 starts no thread then."""
    done = run_python(
        """
        import threading, time
        from tests.support import Server, app_that, make_server_environ
        from wsgi_bg import BackgroundTasksMiddleware, Retry, background_tasks

        def fail_as_the_process_ends():
            while not threading._SHUTTING_DOWN:
                time.sleep(0.001)
            calls.append(None)
            if len(calls) == 1:
                raise ValueError
            print("called again", flush=True)

        def add(environ):
            again = background_tasks.using(retry=Retry(2, first=0.01))
            again.add_task(fail_as_the_process_ends)

        calls = []
        app = BackgroundTasksMiddleware(app_that(add), runner="pool")
        Server().run(app, make_server_environ())
        """
    )
    assert done.stdout == "called again\n", done.stderr


def test_a_child_of_a_fork_runs_no_wait_of_its_parent() -> None:
    done = run_python(
        """
        import os, sys, threading, warnings
        from tests.support import Server, app_that, make_server_environ
        from wsgi_bg import BackgroundTasksMiddleware, background_tasks, wait

        warnings.simplefilter("ignore")
        ran = threading.Event()

        def task(word):
            who = "parent" if os.getpid() == parent else "child"
            os.write(1, f"{word} in {who}\\n".encode())
            ran.set()

        def ask(word, delay):
            def add(environ):
                background_tasks.using(delay=delay).add_task(task, word)
            app = BackgroundTasksMiddleware(app_that(add))
            Server().run(app, make_server_environ())

        parent = os.getpid()
        ask("first", 0.3)
        pid = os.fork()
        if pid == 0:
            ask("second", 0.01)  # the child has a timer of its own
            assert ran.wait(10)
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0
        assert ran.wait(10)
        """
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["first in parent", "second in child"]


def test_no_timer_runs_without_a_wait() -> None:
    done = run_python(
        """
        import threading
        from tests.support import submit
        from wsgi_bg import PoolRunner, registered_task, Retry, wait

        ran = threading.Event()
        submit(PoolRunner(), ran.set)
        assert ran.wait(10)
        assert "wsgi_bg-timer" not in str(threading.enumerate())
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_celery_options_without_a_time_go_with_a_delay() -> None:
    tasks = BackgroundTasks().using(delay=60, celery={"queue": "slow"})
    assert not DIRECT.sends_delayed(BackgroundTask(int))
    tasks.add_task(int)


def test_a_drain_names_what_its_runner_has_not_taken_in_time(undrained: None, log: Log) -> None:
    entered, release = threading.Event(), threading.Event()

    class Stuck(Own):
        def submit(self, batch: Any) -> None:
            if batch.has_waited:
                entered.set()
                release.wait(TIMEOUT)
            super().submit(batch)

    stuck = Stuck(at_once=True)
    request(lambda: background_tasks.using(delay=0.01).add_task(int), runner=stuck)
    assert entered.wait(TIMEOUT)
    try:
        [left] = shutdown.finish(limit=0.05, notice=Notice(first=0.0))
    finally:
        release.set()
    assert left.func is int
    assert log.errors[0].startswith("background task builtins.int was not finished")
    assert any("the process ends, and waits for" in message for message in log.warnings)
