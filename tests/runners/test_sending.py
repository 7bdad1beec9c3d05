"""A runner's ``check`` and ``send``: the seam for tasks that another process runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Clock,
    Gate,
    Server,
    app_that,
    events,
    make_server_environ,
    respond,
    wait_until,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
)
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners import Statistics


class Sender:
    """Sends the tasks named ``take``: early, or in their order if ``late``."""

    def __init__(self, *take: str, local: Any = None, late: bool = False) -> None:
        self.take = take
        self.local = local or InlineRunner()
        self.late = late
        self.checked: list[str] = []
        self.sent: list[tuple[Any, ...]] = []
        self.threads: list[str] = []

    def check(self, task: BackgroundTask) -> None:
        self.checked.append(task.func.__name__)
        if task.func is refused:
            raise TypeError("refused")

    def send(self, task: BackgroundTask) -> bool:
        self.threads.append(threading.current_thread().name)
        if task.func is lost:
            raise ConnectionError("gone")
        if task.func is stopped:
            raise KeyboardInterrupt
        if task.func.__name__ not in self.take:
            return False
        self.sent.append(task.args)
        return True

    def submit(self, batch: Batch) -> None:
        if not self.late:
            batch.send()
        self.local.submit(batch)

    def drain(self, timeout: float) -> list[BackgroundTask]:
        return list(self.local.drain(timeout))

    def statistics(self) -> Statistics:
        statistics: Statistics = self.local.statistics()
        return statistics


ran: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    ran.clear()


def here(value: Any = "here") -> None:
    ran.append(value)


async def here_async(value: Any = "here") -> None:
    ran.append(value)


def away(*args: Any) -> None:
    ran.append("away")


async def away_async(*args: Any) -> None:
    ran.append("away")


def refused() -> None:
    pass


def lost() -> None:
    pass


def stopped() -> None:
    pass


def request(runner: Any, do: Callable[[], object], **options: Any) -> None:
    app = app_that(lambda environ: do())
    Server().run(
        BackgroundTasksMiddleware(app, runner=runner, **options), make_server_environ()
    )


def add(*functions: Callable[..., Any]) -> Callable[[], None]:
    def do() -> None:
        for number, function in enumerate(functions):
            background_tasks.add_task(function, number)

    return do


@pytest.mark.parametrize("late", [False, True])
def test_a_sent_task_does_not_run_here(late: bool) -> None:
    runner = Sender("away", "away_async", late=late)
    request(runner, add(away, here, away_async, here_async))
    assert runner.sent == [(0,), (2,)]
    assert ran == [1, 3]
    assert runner.checked == ["away", "here", "away_async", "here_async"]
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.sent) == (2, 2)


def test_tasks_sent_early_are_sent_before_any_task_runs() -> None:
    runner = Sender("away")

    def look(number: int) -> None:
        ran.append(len(runner.sent))

    request(runner, add(away, look, away))
    assert ran == [2]


@pytest.mark.parametrize("late", [False, True])
def test_a_task_that_a_running_task_adds_is_sent_too(late: bool) -> None:
    runner = Sender("away", "away_async", late=late)

    def again(number: int) -> None:
        background_tasks.add_task(away, "plain")
        background_tasks.add_task(away_async, "async")
        background_tasks.add_task(here_async, "last")

    request(runner, add(again))
    assert runner.sent == [("plain",), ("async",)]
    assert ran == ["last"]


def test_an_async_task_is_not_sent_on_the_loop() -> None:
    runner = Sender("away_async", late=True)
    request(runner, add(away_async))
    assert runner.threads
    assert not any("portal" in name for name in runner.threads)


@pytest.mark.parametrize("late", [False, True])
def test_a_task_that_cannot_be_sent_is_given_up_and_the_next_runs(log: Log, late: bool) -> None:
    failed: list[tuple[str, str]] = []

    def do() -> None:
        background_tasks.add_task(lost)
        background_tasks.add_task(here)

    request(
        Sender(late=late),
        do,
        on_error=lambda task, exc: failed.append((task.name, str(exc))),
    )
    assert failed == [(f"{__name__}.lost", "gone")]
    assert ran == ["here"]
    assert log.errors == [f"background task {__name__}.lost raised ConnectionError"]


def test_under_stop_on_error_nothing_is_sent_after_a_task_that_was_given_up(log: Log) -> None:
    runner = Sender("away")

    def do() -> None:
        background_tasks.add_task(lost)
        background_tasks.add_task(away)

    request(runner, do, stop_on_error=True)
    assert runner.sent == []
    assert len(log.warnings) == 1
    assert "away was not run: a task before it failed" in log.warnings[0]


def test_a_task_that_the_runner_refuses_is_refused_by_add_task() -> None:
    def do() -> None:
        with pytest.raises(TypeError, match="refused"):
            background_tasks.add_task(refused)

    request(Sender(), do)


class Encoder(Sender):
    """Sends what ``check`` returned; the broker is away if ``is_away``."""

    def __init__(self, *, is_away: bool = False, late: bool = False) -> None:
        super().__init__(late=late)
        self.is_away = is_away

    def check(self, task: BackgroundTask) -> str | None:  # type: ignore[override]
        return f"text of {task.args[0]}" if "away" in task.func.__name__ else None

    def may_send(self, task: BackgroundTask) -> bool:
        self.checked.append(task.func.__name__)
        return False

    def send(self, task: BackgroundTask, message: str | None = None) -> bool:
        self.sent.append((task.args[0], message))
        return message is not None and not self.is_away


@pytest.mark.parametrize("late", [False, True])
def test_send_receives_the_message_that_check_returned(late: bool) -> None:
    runner = Encoder(late=late)
    request(runner, add(away, here, away_async, here_async))
    sent = [each for each in runner.sent if each[1] is not None]
    assert sent == [(0, "text of 0"), (2, "text of 2")]
    assert ran == [1, 3]


def test_may_send_is_asked_for_tasks_without_a_message_only() -> None:
    runner = Encoder(late=True)
    request(runner, add(away, here, away_async, here_async))
    assert runner.checked == ["here", "here_async"]
    assert [number for number, message in runner.sent] == [0, 2]


def test_a_message_is_passed_once() -> None:
    runner = Encoder(is_away=True)
    request(runner, add(away, away_async))
    assert runner.sent == [(0, "text of 0"), (1, "text of 1")]
    assert ran == ["away", "away"]


def test_a_runner_sees_which_batch_has_messages() -> None:
    seen: list[bool] = []

    class Looks(Encoder):
        def submit(self, batch: Batch) -> None:
            seen.append(batch.has_messages)
            super().submit(batch)
            seen.append(batch.has_messages)

    request(Looks(), add(here, away))
    request(Looks(), add(here))
    assert seen == [True, False, False, False]


def test_a_runner_reads_the_options_of_a_task() -> None:
    seen: list[str] = []

    class Looks(Sender):
        def check(self, task: BackgroundTask) -> None:
            seen.append(task.options.run_on)

    request(Looks(), lambda: background_tasks.using(run_on="always").add_task(here))
    assert seen == ["always"]


@pytest.mark.parametrize("late", [False, True])
def test_a_task_of_an_outer_layer_is_not_sent_by_the_runner_of_an_inner_one(late: bool) -> None:
    runner = Sender("away", late=late)
    inner = BackgroundTasksMiddleware(app_that(lambda environ: None), runner=runner)

    def outer(environ: Any, start_response: Any) -> Any:
        background_tasks.add_task(away)
        return inner(environ, start_response)

    class DefaultRunner(BackgroundTasksMiddleware):  # as wsgi_bg.serve() has
        _runner_is_default = True

    respond(DefaultRunner(outer, hooks=Hooks()))
    assert (runner.sent, runner.threads) == ([], [])
    assert ran == ["away"]
    assert runner.statistics().succeeded == 1


def test_a_task_whose_request_failed_is_not_sent(log: Log) -> None:
    runner = Sender("away")
    app = app_that(lambda environ: add(away)(), status="500 Oh")
    respond(BackgroundTasksMiddleware(app, runner=runner))
    assert runner.sent == []
    assert len(log.warnings) == 1


def test_a_stop_while_a_task_is_sent_goes_through_and_names_the_rest(log: Log) -> None:
    runner = Sender("away")

    def do() -> None:
        background_tasks.add_task(stopped)
        background_tasks.add_task(away)

    with pytest.raises(KeyboardInterrupt):
        request(runner, do)
    assert [line.rsplit(".", 1)[1] for line in log.warnings] == [
        "stopped was not run to its end: KeyboardInterrupt stopped its worker",
        "away was not run: KeyboardInterrupt stopped its worker",
    ]
    assert runner.sent == ran == []


def test_a_task_is_sent_in_the_context_of_its_add_task() -> None:
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="of the server")
    seen: list[str] = []

    class Looks(Sender):
        def send(self, task: BackgroundTask) -> bool:
            seen.append(variable.get())
            return True

    def do() -> None:
        token = variable.set("of the request")
        background_tasks.add_task(away)
        variable.reset(token)

    request(Looks(), do)
    assert seen == ["of the request"]


@pytest.mark.parametrize("late", [False, True])
def test_hooks_see_sent_tasks(late: bool) -> None:
    told: list[tuple[str, str]] = []

    class Watch(Hooks):
        def task_sent(self, record: TaskRecord) -> None:
            told.append(("sent", record.task.func.__name__))

        def task_finished(self, record: TaskRecord) -> None:
            told.append(("finished", record.task.func.__name__))

    request(Sender("away", late=late), add(away, here), hooks=Watch())
    assert told == [("sent", "away"), ("finished", "here")]


def test_a_batch_that_was_sent_whole_has_ended_for_the_pool() -> None:
    pool = PoolRunner()
    request(Sender("away", local=pool), add(away))
    assert pool.drain(TIMEOUT) == []


def test_a_second_sending_finds_nothing_to_do(gate: Gate) -> None:
    batches: list[Batch] = []
    done = events(1)[0]

    class Twice(Sender):
        def submit(self, batch: Batch) -> None:
            batches.append(batch)
            batch.send()
            batch.send()
            batch.on_done((lambda batch: done.set(),))
            batch.run()

    runner = Twice("away")
    request(runner, add(away, here))
    assert runner.sent == [(0,)]
    assert ran == [1]
    assert done.is_set()
    batches[0].send()
    assert runner.sent == [(0,)]


def test_a_task_that_was_called_by_hand_meanwhile_is_not_sent() -> None:
    class RunsTheRest(Sender):
        def send(self, task: BackgroundTask) -> bool:
            if not self.sent:
                background_tasks()  # another thread could do the same
            return super().send(task)

    called: list[str] = []

    def first() -> None:
        called.append("first")

    def second() -> None:
        called.append("second")

    runner = RunsTheRest("first", "second")

    def add(environ: Any) -> None:
        background_tasks.add_task(first)
        background_tasks.add_task(second)

    respond(BackgroundTasksMiddleware(app_that(add), runner=runner))
    assert called == ["second"]
    assert runner.sent == [()]


@pytest.mark.parametrize("late", [False, True])
def test_a_task_that_joined_the_list_without_add_task_is_called_here(late: bool) -> None:
    def do() -> None:
        background_tasks.add_task(away)
        background_tasks.tasks.append(BackgroundTask(here))
        background_tasks.tasks.append(BackgroundTask(away))

    request(Sender("away", late=late), do)
    assert ran == ["here", "away"]


def test_a_task_that_is_not_sent_and_has_a_delay_waits_in_this_process(clock: Clock) -> None:
    class Delaying(Sender):
        sends_delayed = True

        def check(self, task: BackgroundTask) -> Any:
            return "message"

        def send(self, task: BackgroundTask, message: Any = None) -> bool:
            if task.func is lost:
                raise ConnectionError("gone")
            return False

    runner = Delaying(late=True)

    def do() -> None:
        background_tasks.using(delay=60).add_task(here)
        background_tasks.using(delay=60, retry=Retry()).add_task(lost)

    request(runner, do)
    assert ran == []
    clock.advance(60)
    assert wait_until(lambda: ran == ["here"])
