"""``Retry``: a task that raised is called again, on every runner, and no thread waits."""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Clock,
    Environ,
    Server,
    Subject,
    app_that,
    make_server_environ,
)
from tests.support.retry import (
    RUNNERS,
    SOON,
    Calls,
    Own,
    each_kind,
    each_runner,
    logged,
    request,
    settle,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    get_background_tasks,
    registered_task,
)
from wsgi_bg._tasks import registry
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners import Statistics

# The object.


def test_each_wait_is_longer_up_to_the_longest() -> None:
    retry = Retry(first=1, factor=3, longest=10, jitter=False)
    assert [retry.wait_before(attempt) for attempt in range(1, 6)] == [0, 1, 3, 9, 10]
    assert Retry(first=0).wait_before(10**6) == 0
    assert Retry(longest=7, jitter=False).wait_before(10**6) == 7


def test_jitter_takes_up_to_half_of_a_wait() -> None:
    waits = {Retry(first=8).wait_before(2) for _ in range(100)}
    assert len(waits) > 1
    assert min(waits) >= 4
    assert max(waits) <= 8


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert Retry() == Retry(
        3, on=(Exception,), first=1.0, factor=2.0, longest=600.0, jitter=True
    )
    with pytest.raises(AttributeError):
        Retry().attempts = 4  # type: ignore[misc]
    assert len({Retry(), Retry(attempts=3), Retry(4)}) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attempts": 0}, ValueError, "attempts must be 1 or more; got 0"),
        ({"attempts": True}, TypeError, "attempts must be a whole number"),
        ({"attempts": 2.0}, TypeError, "attempts must be a whole number"),
        ({"first": -1}, ValueError, "first must be 0 seconds or more"),
        ({"first": math.nan}, ValueError, "first must be 0 seconds or more"),
        ({"first": math.inf}, ValueError, "first must be a bounded time"),
        ({"first": True}, TypeError, "first must be a number of seconds"),
        ({"first": timedelta(seconds=1)}, TypeError, "total_seconds()"),
        ({"longest": "5"}, TypeError, "longest must be a number of seconds"),
        ({"longest": 10**400}, ValueError, "longest must be a bounded time"),
        ({"factor": 0.5}, ValueError, "factor must be a finite number, 1 or more"),
        ({"factor": math.nan}, ValueError, "factor must be"),
        ({"factor": math.inf}, ValueError, "factor must be"),
        ({"factor": False}, TypeError, "factor must be a number"),
        ({"on": ()}, ValueError, "on must be an exception class"),
        ({"on": (ValueError, int)}, TypeError, "on must be an exception class"),
        ({"on": ValueError()}, TypeError, "on must be an exception class"),
        ({"on": [ValueError]}, TypeError, "on must be an exception class"),
        ({"jitter": 1}, TypeError, "jitter must be True or False"),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        Retry(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("given", [3, Retry, True, "3"])
def test_only_a_retry_is_a_retry(given: Any) -> None:
    with pytest.raises(TypeError, match=r"retry must be a wsgi_bg\.Retry, such as"):
        BackgroundTasks().using(retry=given)
    with pytest.raises(TypeError, match=r"retry must be a wsgi_bg\.Retry, such as"):
        registered_task(retry=given)


# In a request.


@each_runner
@each_kind
def test_a_task_is_called_until_a_call_returns(
    clock: Clock, log: Log, runner: str, is_async: bool
) -> None:
    calls = Calls(failures=2)
    own = RUNNERS[runner]()
    request(
        lambda: background_tasks.using(retry=SOON).add_task(calls.make(is_async)), runner=own
    )
    for attempt, seconds in enumerate((60, 120), start=1):
        calls.wait()
        settle(partial(logged, log, f"in attempt {attempt} of 3"))
        clock.advance(seconds - 0.001)
        clock.advance(0.001)
    calls.wait()
    settle(lambda: wsgi_bg.wait(TIMEOUT) == [])
    assert calls.count == 3
    assert not log.errors
    if isinstance(own, Own):
        # Each attempt came to the runner, complete, on a thread that the timer had.
        assert own.submitted == [(True, True), (True, False), (True, False)]
    else:
        counted = own.statistics()
        assert (counted.succeeded, counted.failed, counted.waiting) == (1, 0, 0)


def test_a_task_is_not_called_before_its_time(clock: Clock, log: Log) -> None:
    calls = Calls(failures=1)
    pool = PoolRunner()
    request(lambda: background_tasks.using(retry=SOON).add_task(calls.task), runner=pool)
    calls.wait()
    only_waits = Statistics(pending=0, running=0, succeeded=0, failed=0, discarded=0, waiting=1)
    settle(lambda: pool.statistics() == only_waits)
    assert wsgi_bg.wait(TIMEOUT) == []  # for nothing that has to wait for its time
    clock.advance(59)
    sentinel = Calls(failures=0)
    request(lambda: background_tasks.using(delay=0.5).add_task(sentinel.task), runner=pool)
    clock.advance(0.5)
    sentinel.wait()  # the timer has looked at the clock
    assert calls.count == 1
    clock.advance(0.5)
    calls.wait()


def test_the_last_failure_is_the_error_of_the_task(clock: Clock, log: Log) -> None:
    calls = Calls(failures=9)
    failed: list[tuple[int, BaseException]] = []
    done = threading.Event()

    def on_error(task: BackgroundTask, exc: BaseException) -> None:
        failed.append((task.attempt, exc))
        done.set()

    pool = PoolRunner()

    def add() -> None:
        retry = Retry(2, first=60, jitter=False)
        background_tasks.using(retry=retry).add_task(calls.task)

    request(add, runner=pool, on_error=on_error)
    calls.wait()
    settle(lambda: pool.statistics().waiting == 1)
    assert not failed
    clock.advance(60)
    assert done.wait(TIMEOUT)
    assert [attempt for attempt, _ in failed] == [2]
    name = "tests.support.retry.Calls.task"
    assert log.warnings == [
        f"background task {name} raised ValueError in attempt 1 of 2, and is called again in "
        "60 seconds"
    ]
    assert log.errors == [f"background task {name} raised ValueError in attempt 2 of 2"]
    settle(lambda: pool.statistics().failed == 1)
    assert calls.count == 2


@pytest.mark.parametrize("error", [KeyError("x"), OSError("x")])
def test_only_the_errors_of_on_are_repeated(clock: Clock, log: Log, error: Exception) -> None:
    calls = Calls(failures=9, error=error)
    retry = Retry(on=LookupError, first=60)
    inline = InlineRunner()
    request(lambda: background_tasks.using(retry=retry).add_task(calls.task), runner=inline)
    assert inline.statistics().waiting == isinstance(error, LookupError)
    assert inline.statistics().failed == isinstance(error, OSError)


class Meta(type):
    """Of classes that cannot be asked for their instances."""

    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("asked")

    __subclasscheck__ = __instancecheck__


class OddError(Exception, metaclass=Meta):
    pass


@pytest.mark.parametrize("error", [KeyError("x"), OSError("x")])
def test_the_code_of_a_metaclass_decides_about_no_retry(
    clock: Clock, log: Log, error: Exception
) -> None:
    calls, following = Calls(failures=9, error=error), Calls(failures=0)
    inline = InlineRunner()

    def add() -> None:
        retry = Retry(on=(OddError, LookupError), first=60)
        background_tasks.using(retry=retry).add_task(calls.task)
        background_tasks.add_task(following.task)

    request(add, runner=inline)
    assert inline.statistics().waiting == isinstance(error, LookupError)
    assert following.count == 1


def test_without_a_retry_a_task_that_raises_has_failed(clock: Clock, log: Log) -> None:
    calls = Calls(failures=9)
    inline = InlineRunner()
    request(lambda: background_tasks.add_task(calls.task), runner=inline)
    assert inline.statistics() == Statistics(0, 0, 0, 1, 0)
    assert log.errors == ["background task tests.support.retry.Calls.task raised ValueError"]


registered = Calls(failures=1)


@registered_task(retry=Retry(first=60, jitter=False))
def of_registration() -> None:
    registered.task()


def test_a_function_is_registered_with_its_retry(clock: Clock, log: Log) -> None:
    registered.count = 0
    inline = InlineRunner()
    request(lambda: background_tasks.add_task(of_registration), runner=inline)
    assert inline.statistics().waiting == 1
    clock.advance(60)
    registered.wait()
    registered.wait()
    assert registered.count == 2


def test_the_retry_of_a_task_overrides_the_one_of_its_function(clock: Clock, log: Log) -> None:
    registered.count = 0
    inline = InlineRunner()
    once = Retry(attempts=1)
    request(lambda: background_tasks.using(retry=once).add_task(of_registration), runner=inline)
    registered.wait()
    assert inline.statistics().failed == 1
    assert inline.statistics().waiting == 0


def test_later_views_override_and_none_keeps() -> None:
    tasks = BackgroundTasks()
    first = tasks.using(retry=SOON, delay=5)
    assert first.using(run_on="always").options.retry is SOON
    assert first.using(run_on="always").options.delay == 5
    assert first.using(retry=Retry(9)).options.retry == Retry(9)
    assert first.using(delay=0).options.delay == 0
    assert tasks.options.retry is None


def test_called_by_hand_a_task_is_called_once_and_at_once(clock: Clock, log: Log) -> None:
    calls = Calls(failures=1)
    tasks = BackgroundTasks()
    view = tasks.using(retry=SOON, delay=60)
    view.add_task(calls.task)
    with pytest.raises(ValueError, match="not yet"):
        tasks()
    view.add_task(calls.task)
    tasks.tasks[0]()
    assert calls.count == 2

    def by_hand() -> None:
        background_tasks.using(retry=SOON, delay=60).add_task(calls.task)
        background_tasks()

    request(by_hand)
    assert calls.count == 3


# Order, and the tasks beside.


def test_a_wait_holds_up_no_other_task(clock: Clock, log: Log) -> None:
    calls = Calls(failures=1)
    order: list[str] = []

    def add() -> None:
        background_tasks.using(retry=SOON).add_task(calls.task)
        background_tasks.add_task(order.append, "next")

    request(add)
    assert order == ["next"]
    assert calls.count == 1


@each_kind
@pytest.mark.parametrize("tasks", [3, 60])  # a long list is moved as a whole
def test_under_stop_on_error_the_rest_waits_for_the_task(
    clock: Clock, log: Log, is_async: bool, tasks: int
) -> None:
    calls = Calls(failures=1)
    order: list[Any] = []
    last = threading.Event()
    inline = InlineRunner()

    def add() -> None:
        background_tasks.add_task(order.append, "before")
        background_tasks.using(retry=SOON).add_task(calls.make(is_async))
        for number in range(tasks):
            background_tasks.add_task(order.append, number)
        background_tasks.add_task(last.set)

    request(add, runner=inline, stop_on_error=True)
    assert order == ["before"]
    assert inline.statistics() == Statistics(0, 0, 1, 0, 0, waiting=tasks + 2)
    assert wsgi_bg.wait(TIMEOUT) == []
    clock.advance(60)
    assert last.wait(TIMEOUT)
    assert order == ["before", *range(tasks)]
    assert calls.count == 2


def test_under_stop_on_error_the_last_failure_skips_the_rest(clock: Clock, log: Log) -> None:
    calls = Calls(failures=9)
    order: list[str] = []
    inline = InlineRunner()

    def add() -> None:
        background_tasks.using(retry=Retry(2, first=60, jitter=False)).add_task(calls.task)
        background_tasks.add_task(order.append, "rest")

    request(add, runner=inline, stop_on_error=True)
    clock.advance(60)
    settle(lambda: len(log.warnings) == 2)
    assert inline.statistics().discarded == 1
    assert inline.statistics().failed == 1
    assert not order
    assert log.warnings[-1].endswith("a task before it failed, with stop_on_error set")


def test_the_attempts_begin_with_the_same_context(clock: Clock, log: Log) -> None:
    variable = contextvars.ContextVar[str]("variable", default="unset")
    seen: list[str] = []
    calls = Calls(failures=1)

    def during() -> None:
        seen.append(variable.get())
        variable.set("changed by an attempt")

    calls.during = during

    def add() -> None:
        variable.set("request 7")
        background_tasks.using(retry=SOON).add_task(calls.task)

    request(add)
    clock.advance(60)
    calls.wait()
    calls.wait()
    assert seen == ["request 7", "request 7"]


@each_kind
def test_what_a_repeated_attempt_has_added_is_dropped(
    clock: Clock, log: Log, is_async: bool
) -> None:
    calls = Calls(failures=1)
    order: list[str] = []
    ended = threading.Event()
    inline = InlineRunner()

    def during() -> None:
        background_tasks.add_task(order.append, f"child of call {calls.count}")
        background_tasks.using(retry=SOON).add_task(ended.set)

    calls.during = during

    def add() -> None:
        background_tasks.using(retry=SOON).add_task(calls.make(is_async))
        background_tasks.add_task(order.append, "beside")

    request(add, runner=inline)
    assert order == ["beside"]
    dropped = [each for each in log.at(logging.DEBUG) if "was dropped" in each]
    assert len(dropped) == 2
    assert dropped[1].startswith("background task threading.Event.set was dropped")
    assert inline.statistics().discarded == 2
    clock.advance(60)
    assert ended.wait(TIMEOUT)
    assert order == ["beside", "child of call 2"]


def test_a_child_that_the_attempt_has_run_by_hand_is_not_dropped(
    clock: Clock, log: Log
) -> None:
    calls = Calls(failures=1)
    order: list[str] = []
    inline = InlineRunner()

    def during() -> None:
        background_tasks.add_task(order.append, "by hand")
        background_tasks.tasks[-1].claim()  # as another thread does that runs tasks()

    calls.during = during
    request(lambda: background_tasks.using(retry=SOON).add_task(calls.task), runner=inline)
    assert inline.statistics() == Statistics(0, 0, 0, 0, 0, waiting=1)
    assert not [each for each in log.at(logging.DEBUG) if "was dropped" in each]


@pytest.mark.parametrize("in_stream", [False, True])
def test_a_repeated_task_may_add_tasks_with_the_options_of_its_layer(
    in_stream: bool, clock: Clock, log: Log
) -> None:
    calls = Calls(failures=1)
    seen: list[bool] = []
    done = threading.Event()

    def see() -> None:
        seen.append(background_tasks.options.stop_on_error)
        done.set()

    def during() -> None:
        if calls.count == 2:
            background_tasks.add_task(see)

    def stream(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b""
        add(environ)

    def add(environ: Environ) -> None:
        get_background_tasks(environ).using(retry=SOON).add_task(calls.task)

    calls.during = during
    app = stream if in_stream else app_that(add)
    inner = BackgroundTasksMiddleware(app, stop_on_error=True)
    Server().run(BackgroundTasksMiddleware(inner), make_server_environ())
    assert wsgi_bg.wait(TIMEOUT) == []  # a stream's tasks run on the pool
    clock.advance(60)
    assert done.wait(TIMEOUT)
    assert seen == [True]


# What can be seen.


class Diary(Hooks):
    def __init__(self) -> None:
        self.moments: list[tuple[str, int, str]] = []
        self.records: list[TaskRecord] = []
        self.ended = threading.Event()

    def _note(self, moment: str, record: TaskRecord) -> None:
        self.moments.append((moment, record.attempt, type(record.error).__name__))
        self.records.append(record)

    def task_added(self, record: TaskRecord) -> None:
        self._note("added", record)

    def task_started(self, record: TaskRecord) -> None:
        self._note("started", record)

    def task_retried(self, record: TaskRecord) -> None:
        assert record.ended_at is not None
        self._note("retried", record)

    def task_failed(self, record: TaskRecord) -> None:
        self._note("failed", record)
        self.ended.set()

    def task_finished(self, record: TaskRecord) -> None:
        self._note("finished", record)
        self.ended.set()

    def task_discarded(self, record: TaskRecord) -> None:
        self._note("discarded", record)
        self.ended.set()


@each_kind
@pytest.mark.parametrize(
    ("failures", "end"),
    [(1, ("finished", 2, "NoneType")), (9, ("failed", 2, "ValueError"))],
)
def test_hooks_see_each_attempt(
    clock: Clock, log: Log, is_async: bool, failures: int, end: Any
) -> None:
    diary, calls = Diary(), Calls(failures)

    def add() -> None:
        retry = Retry(2, first=60, jitter=False)
        background_tasks.using(retry=retry).add_task(calls.make(is_async))

    request(add, hooks=diary)
    clock.advance(60)
    assert diary.ended.wait(TIMEOUT)
    assert diary.moments == [
        ("added", 1, "NoneType"),
        ("started", 1, "NoneType"),
        ("retried", 1, "ValueError"),
        ("started", 2, "NoneType"),
        end,
    ]
    first = diary.records[0]
    assert all(record is first for record in diary.records)
    assert first.task.attempt == 2


def test_a_task_that_is_done_frees_its_arguments(clock: Clock, no_collection: None) -> None:
    failures = [None]

    def touch(given: Subject) -> None:
        del given
        if failures:
            failures.pop()
            raise ValueError

    logger = logging.getLogger("wsgi_bg")
    logger.setLevel(logging.CRITICAL)  # pytest keeps the record, and so the frames
    try:
        subjects = [Subject()]
        freed = subjects[0].freed
        request(lambda: background_tasks.using(retry=SOON).add_task(touch, subjects.pop()))
        assert not freed.is_set()
        clock.advance(60)
        assert freed.wait(TIMEOUT)
    finally:
        logger.setLevel(logging.NOTSET)


def test_beyond_max_waiting_a_task_that_raised_is_not_called_again(
    clock: Clock, log: Log
) -> None:
    calls = Calls(failures=1)
    pool = PoolRunner(max_waiting=0)
    request(lambda: background_tasks.using(retry=SOON).add_task(calls.task), runner=pool)
    settle(lambda: log.errors)
    assert log.errors == [
        "background task tests.support.retry.Calls.task raised ValueError in attempt 1 of 3"
    ]
    assert pool.statistics().failed == 1
    assert log.warnings == [
        "1 tasks have failed and are not called again, since the last record of this kind: 0 "
        "tasks wait for their time already"
    ]


def test_a_runner_that_refuses_the_batch_of_an_attempt_loses_no_task(
    clock: Clock, log: Log
) -> None:
    class Refusing(Own):
        def submit(self, batch: Any) -> None:
            if self.submitted:
                raise OSError("away")
            super().submit(batch)

    calls = Calls(failures=1)
    own = Refusing(at_once=True)
    request(lambda: background_tasks.using(retry=SOON).add_task(calls.task), runner=own)
    clock.advance(60)
    calls.wait()
    calls.wait()
    assert logged(log, "did not take tests.support.retry.Calls.task, which run in this process")


def test_an_error_of_submit_after_the_attempt_is_logged(clock: Clock, log: Log) -> None:
    class Raising(Own):
        def submit(self, batch: Any) -> None:
            super().submit(batch)
            if len(self.submitted) > 1:
                raise OSError("away")

    calls = Calls(failures=1)
    own = Raising(at_once=True)
    request(lambda: background_tasks.using(retry=SOON).add_task(calls.task), runner=own)
    clock.advance(60)
    settle(lambda: logged(log, "raised in submit()"))
    assert calls.count == 2


# With the clock of the machine.


@each_runner
@each_kind
def test_a_real_wait_is_as_long_as_asked_for(log: Log, runner: str, is_async: bool) -> None:
    times: list[float] = []
    calls = Calls(failures=1)
    calls.during = lambda: times.append(time.monotonic())
    retry = Retry(first=0.05, jitter=False)
    own = RUNNERS[runner]()
    request(
        lambda: background_tasks.using(retry=retry).add_task(calls.make(is_async)),
        runner=own,
        complete=False,
    )
    calls.wait()
    calls.wait()
    assert times[1] - times[0] >= 0.05


def test_registrations_know_their_retry() -> None:
    registration = registry.find(of_registration)
    assert registration is not None
    assert registration.retry == Retry(first=60, jitter=False)
    with pytest.raises(ValueError, match="without autoretry_for"):
        registered_task(retry=Retry(), celery={"autoretry_for": (OSError,)})


def test_a_batch_whose_rest_waits_has_no_tasks(clock: Clock) -> None:
    batches: list[Any] = []

    class Keeping(Own):
        def submit(self, batch: Any) -> None:
            batches.append(batch)
            super().submit(batch)

    calls = Calls(failures=1)

    def add() -> None:
        background_tasks.using(retry=SOON).add_task(calls.task)
        background_tasks.add_task(int)

    request(add, runner=Keeping(at_once=True), stop_on_error=True)
    assert batches[0].tasks == []
