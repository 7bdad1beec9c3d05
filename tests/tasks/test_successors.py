"""Tasks that add tasks: endless tasks are an error, finite steps are legal and cheap."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import flask
import pytest

import wsgi_bg
from tests.conftest import Log
from tests.support import TIMEOUT, Server, Subject, app_that, make_server_environ
from tests.support.retry import settle
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
)
from wsgi_bg._tasks import successors
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks

RUNNERS: dict[str, Callable[[], Any]] = {"inline": InlineRunner, "pool": PoolRunner}

both = pytest.mark.parametrize("runner", RUNNERS)

ENOUGH = 100_000
"""More than any limit: a task that adds itself without end gives up here."""


def serve(app: Any) -> None:
    Server().run(app, make_server_environ())


def request(runner: Any, add: Callable[[], object], **options: Any) -> None:
    app = app_that(lambda environ: add())
    serve(BackgroundTasksMiddleware(app, runner=runner, **options))


class Endless:
    """A task that is added again each time after the task has run."""

    def __init__(self) -> None:
        self.count = 0
        self.others: list[str] = []

    def plain(self) -> None:
        self.count += 1

    async def coroutine(self) -> None:
        self.count += 1

    def other(self) -> None:
        self.others.append("ran")

    def add(self, function: Callable[[], Any]) -> None:
        if self.count < ENOUGH:
            background_tasks.add_task(function)


def check(log: Log, endless: Endless, name: str) -> None:
    assert 0 < endless.count < ENOUGH
    assert len(log.errors) == 1, log.errors[:5]
    assert f"Endless.{name}" in log.errors[0]
    assert endless.others == ["ran"]


def serve_with_teardown(endless: Endless, runner: str, teardown: Callable[[], object]) -> None:
    """Run the tasks of a request to a Flask application, with all that its teardown adds."""
    app = flask.Flask("shop")
    own = RUNNERS[runner]()
    Background(app, runner=own)

    @app.teardown_appcontext
    def add(error: object) -> None:
        teardown()

    @app.route("/")
    def view() -> str:
        background_tasks.add_task(endless.other)
        return "ok"

    serve(app.wsgi_app)
    assert own.drain(6 * TIMEOUT) == []


@both
@pytest.mark.parametrize("name", ["plain", "coroutine"])
def test_a_teardown_that_adds_a_task_each_time_ends_with_a_single_error(
    log: Log, name: str, runner: str
) -> None:
    """Each task has a new application context, which is torn down too."""
    endless = Endless()
    serve_with_teardown(endless, runner, lambda: endless.add(getattr(endless, name)))
    check(log, endless, name)


def add_two(endless: Endless, function: Callable[[], Any]) -> None:
    """As two extensions do: each generation has twice as many tasks."""
    endless.add(function)
    endless.add(function)


def add_through_a_task(endless: Endless, function: Callable[[], Any]) -> None:
    """The task that is added has a teardown, and adds a task which has another."""
    background_tasks.add_task(endless.add, function)


def add_on_a_thread(endless: Endless, function: Callable[[], Any]) -> None:
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(context.run, endless.add, function).result()


@both
@pytest.mark.parametrize("name", ["plain", "coroutine"])
@pytest.mark.parametrize("way", [add_two, add_through_a_task, add_on_a_thread])
def test_a_teardown_that_adds_tasks_in_another_way_ends_with_a_single_error(
    log: Log, way: Callable[[Endless, Callable[[], Any]], None], name: str, runner: str
) -> None:
    endless = Endless()

    def add() -> None:
        if endless.count < ENOUGH:
            way(endless, getattr(endless, name))

    serve_with_teardown(endless, runner, add)
    assert 0 < endless.count < ENOUGH
    assert len(log.errors) == 1, log.errors[:5]
    assert "was not added" in log.errors[0] or "EndlessTasksError" in log.errors[0]
    assert endless.others == ["ran"]


@both
def test_a_teardown_that_adds_a_task_with_a_delay_each_time_ends_with_a_single_error(
    log: Log, runner: str
) -> None:
    """Each task has a batch of its own, and the request has two rows of tasks."""
    endless = Endless()
    refused: list[RuntimeError] = []

    def add() -> None:
        try:
            if endless.count < ENOUGH:
                background_tasks.using(delay=0.001).add_task(endless.plain)
        except RuntimeError as exc:
            refused.append(exc)
            raise

    serve_with_teardown(endless, runner, add)
    settle(lambda: len(refused) == 2)
    assert wsgi_bg.wait(TIMEOUT) == []
    check(log, endless, "plain")


@both
@pytest.mark.parametrize("moment", ["enter", "exit", "exit twice"])
def test_an_async_context_that_adds_a_task_each_time_ends_with_a_single_error(
    log: Log, moment: str, runner: str
) -> None:
    endless = Endless()
    own = RUNNERS[runner]()

    class Adding(Hooks):
        @asynccontextmanager
        async def around(self, record: Any) -> AsyncIterator[None]:
            await asyncio.sleep(0)  # others' tasks run on this thread meanwhile
            if moment == "enter":
                endless.add(endless.coroutine)
            yield
            await asyncio.sleep(0)
            if moment == "exit twice":  # each task has an error then, and the first is logged
                add_two(endless, endless.coroutine)
            if moment == "exit":
                endless.add(endless.coroutine)

    request(own, lambda: background_tasks.add_task(endless.coroutine), hooks=Adding())
    assert own.drain(6 * TIMEOUT) == []
    assert 0 < endless.count < ENOUGH
    assert len(log.errors) == 1, log.errors[:5]
    assert "EndlessTasksError" in log.errors[0]


@both
def test_each_of_a_thousand_failures_may_add_tasks_that_fail_too(log: Log, runner: str) -> None:
    """Two tasks for each failure, and one more for each of these: no row is endless."""
    own = RUNNERS[runner]()
    seen: list[str] = []

    def fail(name: str) -> None:
        seen.append(name)
        raise ValueError

    def add(task: BackgroundTask, error: BaseException) -> None:
        following = {"first": ("second", "second"), "second": ("third",)}
        for name in following.get(task.args[0], ()):
            background_tasks.add_task(fail, name)

    def begin() -> None:
        for _ in range(1000):
            background_tasks.add_task(fail, "first")

    request(own, begin, on_error=add)
    assert own.drain(6 * TIMEOUT) == []
    assert Counter(seen) == {"first": 1000, "second": 2000, "third": 2000}


@both
def test_a_task_that_an_observer_has_added_may_add_its_successor_for_long(
    log: Log, runner: str
) -> None:
    """Also one that an observer of an observer's task has added."""
    own = RUNNERS[runner]()
    seen: list[str] = []

    def fail(name: str) -> None:
        raise ValueError

    def step(left: int) -> None:
        seen.append("step")
        if left:
            background_tasks.add_task(step, left - 1)

    def add(task: BackgroundTask, error: BaseException) -> None:
        if task.args[0] == "first":
            background_tasks.add_task(fail, "second")
        else:
            background_tasks.add_task(step, 1000)

    request(own, lambda: background_tasks.add_task(fail, "first"), on_error=add)
    assert own.drain(6 * TIMEOUT) == []
    assert len(seen) == 1001
    assert all("ValueError" in message for message in log.errors)


@both
def test_hooks_may_add_a_task_for_each_of_many_successors_that_on_error_has_begun(
    log: Log, runner: str
) -> None:
    own = RUNNERS[runner]()
    seen: Counter[str] = Counter()

    def fail() -> None:
        raise ValueError

    def step(left: int) -> None:
        seen["step"] += 1
        if left:
            background_tasks.add_task(step, left - 1)

    def audit() -> None:
        seen["audit"] += 1

    class Auditing(Hooks):
        def task_finished(self, record: Any) -> None:
            if record.task.func is step:
                background_tasks.add_task(audit)

    def add(task: BackgroundTask, error: BaseException) -> None:
        background_tasks.add_task(step, 300)

    request(own, lambda: background_tasks.add_task(fail), hooks=Auditing(), on_error=add)
    assert own.drain(6 * TIMEOUT) == []
    assert seen == {"step": 301, "audit": 301}
    assert len(log.errors) == 1


@both
@pytest.mark.parametrize("name", ["plain", "coroutine"])
@pytest.mark.parametrize("hook", ["task_finished", "task_started"])
def test_a_hook_that_adds_a_task_each_time_ends_with_a_single_error(
    log: Log, hook: str, name: str, runner: str
) -> None:
    endless = Endless()
    function = getattr(endless, name)
    own = RUNNERS[runner]()

    class Adding(Hooks):
        pass

    def add(self: object, record: Any) -> None:
        if record.task.func == function:
            record.batch.add_task(function) if endless.count < ENOUGH else None

    setattr(Adding, hook, add)

    def begin() -> None:
        background_tasks.add_task(function)
        background_tasks.add_task(endless.other)

    request(own, begin, hooks=Adding())
    assert own.drain(6 * TIMEOUT) == []
    check(log, endless, name)


@both
def test_an_on_error_that_adds_a_task_that_fails_each_time_ends(log: Log, runner: str) -> None:
    endless = Endless()
    own = RUNNERS[runner]()

    def fail() -> None:
        endless.plain()
        raise ValueError

    def add(task: BackgroundTask, error: BaseException) -> None:
        endless.add(fail)

    def begin() -> None:
        background_tasks.add_task(fail)
        background_tasks.add_task(endless.other)

    request(own, begin, on_error=add)
    assert own.drain(6 * TIMEOUT) == []
    assert 0 < endless.count < ENOUGH
    ends = [message for message in log.errors if "raised ValueError" not in message]
    assert len(ends) == 1
    assert "fail" in ends[0]


@both
def test_the_request_after_an_endless_batch_has_its_tasks_run(log: Log, runner: str) -> None:
    app = flask.Flask("shop")
    endless = Endless()
    own = RUNNERS[runner]()
    Background(app, runner=own)
    adds = [True]

    @app.teardown_appcontext
    def add(error: object) -> None:
        if adds[0]:
            endless.add(endless.plain)

    @app.route("/")
    def view() -> str:
        background_tasks.add_task(done.set)
        return "ok"

    done = threading.Event()
    serve(app.wsgi_app)
    assert done.wait(TIMEOUT)
    done = threading.Event()
    serve(app.wsgi_app)
    adds[0] = False
    assert done.wait(TIMEOUT)
    assert own.drain(6 * TIMEOUT) == []
    assert endless.count < ENOUGH


@both
def test_a_teardown_that_adds_a_task_once_has_that_task_run(log: Log, runner: str) -> None:
    app = flask.Flask("shop")
    seen: list[str] = []
    own = RUNNERS[runner]()
    Background(app, runner=own)

    @app.teardown_appcontext
    def add(error: object) -> None:
        if len(seen) < 3:
            background_tasks.add_task(seen.append, "ran")

    @app.route("/")
    def view() -> str:
        return "ok"

    serve(app.wsgi_app)
    assert own.drain(TIMEOUT) == []
    assert seen == ["ran"] * 3
    assert log.errors == []


# Steps.


class Steps:
    """A task that adds its successor, with a new argument for each step."""

    def __init__(self, count: int, *, fails: bool = False) -> None:
        self._count = count
        self._fails = fails
        self.taken = 0
        self.most_alive = 0
        self.most_listed = 0
        self._alive: weakref.WeakSet[Subject] = weakref.WeakSet()

    def add(self, function: Callable[..., Any]) -> None:
        subject = Subject.__new__(Subject)  # without the event, whose creation takes longer
        self._alive.add(subject)
        background_tasks.add_task(function, subject, named=subject)

    def plain(self, subject: Subject, *, named: Subject) -> None:
        self._step(self.plain)

    async def coroutine(self, subject: Subject, *, named: Subject) -> None:
        self._step(self.coroutine)

    async def waiting(self, subject: Subject, *, named: Subject) -> None:
        await asyncio.sleep(0)
        self._step(self.waiting)

    def mixed(self, subject: Subject, *, named: Subject) -> Any:
        self._step(self.mixed)
        return asyncio.sleep(0)

    def _step(self, function: Callable[..., Any]) -> None:
        self.taken += 1
        self.most_alive = max(self.most_alive, len(self._alive))
        self.most_listed = max(self.most_listed, len(background_tasks.tasks))
        if self.taken < self._count:
            self.add(function)
        if self._fails:
            raise ValueError


@both
@pytest.mark.parametrize("kind", ["plain", "coroutine", "waiting"])
def test_ten_thousand_steps_run_and_each_is_dropped_at_its_end(
    log: Log, no_collection: None, kind: str, runner: str
) -> None:
    steps = Steps(10_000)
    own = RUNNERS[runner]()
    request(own, lambda: steps.add(getattr(steps, kind)))
    assert own.drain(6 * TIMEOUT) == []
    assert steps.taken == 10_000
    assert steps.most_alive == 1
    assert steps.most_listed == 1
    assert own.statistics().succeeded == 10_000
    assert log.errors == []


class Nothing(Hooks):
    def task_finished(self, record: Any) -> None:
        pass


@both
@pytest.mark.parametrize("kind", ["plain", "coroutine", "waiting", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_dropped_after_its_hooks_and_on_error(
    no_collection: None, monkeypatch: pytest.MonkeyPatch, fails: bool, kind: str, runner: str
) -> None:
    monkeypatch.setattr("logging.Logger.isEnabledFor", lambda *args: False)  # caplog keeps
    steps = Steps(100, fails=fails)
    own = RUNNERS[runner]()
    told: list[int] = []
    request(
        own,
        lambda: steps.add(getattr(steps, kind)),
        hooks=Nothing(),
        on_error=lambda task, error: told.append(len(task.args)),
    )
    assert own.drain(TIMEOUT) == []
    assert steps.taken == 100
    assert steps.most_alive == 1
    assert told == [1] * (100 if fails else 0)


@both
def test_a_step_in_flask_is_dropped_after_the_teardown_of_its_context(
    no_collection: None, runner: str
) -> None:
    app = flask.Flask("shop")
    steps = Steps(100)
    own = RUNNERS[runner]()
    Background(app, runner=own)

    @app.route("/")
    def view() -> str:
        steps.add(steps.plain)
        return "ok"

    serve(app.wsgi_app)
    assert own.drain(TIMEOUT) == []
    assert steps.taken == 100
    assert steps.most_alive == 1


def subjects(count: int) -> tuple[list[Subject], list[threading.Event]]:
    made = [Subject() for _ in range(count)]
    return made, [subject.freed for subject in made]


@both
@pytest.mark.parametrize("is_async", [False, True])
def test_each_task_of_a_view_is_dropped_when_it_has_run(
    no_collection: None, runner: str, is_async: bool
) -> None:
    """Each running task sees which earlier tasks are freed."""
    own = RUNNERS[runner]()
    made, freed = subjects(4)
    seen: list[list[bool]] = []
    listed: list[int] = []

    def look(subject: Subject) -> None:
        seen.append([event.is_set() for event in freed])
        listed.append(len(background_tasks.tasks))

    async def look_async(subject: Subject) -> None:
        look(subject)

    def add() -> None:
        while made:
            background_tasks.add_task(look_async if is_async else look, made.pop(0))

    request(own, add)
    assert own.drain(TIMEOUT) == []
    assert seen == [[True] * done + [False] * (4 - done) for done in range(4)]
    assert listed == [4, 3, 2, 1]
    assert all(event.is_set() for event in freed)


@both
def test_a_batch_that_has_ended_lists_no_task(runner: str) -> None:
    own = RUNNERS[runner]()
    held: list[BackgroundTasks] = []

    def add() -> None:
        held.append(background_tasks._get_current_object())  # type: ignore[attr-defined]
        background_tasks.add_task(int)
        background_tasks.add_task(asyncio.sleep, 0)
        assert len(held[0].tasks) == 2

    request(own, add)
    assert own.drain(TIMEOUT) == []
    assert held[0].tasks == []


def test_tasks_called_by_hand_are_dropped_when_they_have_run(no_collection: None) -> None:
    made, freed = subjects(3)
    seen: list[list[bool]] = []
    tasks = BackgroundTasks()
    for _ in range(3):
        tasks.add_task(
            lambda subject: seen.append([event.is_set() for event in freed]), made.pop(0)
        )
    tasks()
    assert seen == [[True] * done + [False] * (3 - done) for done in range(3)]
    assert tasks.tasks == []


@pytest.fixture(params=["plain", "async", "fails"])
def function(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def plain(x: int, *, y: int) -> int:
        return x + y

    async def coroutine(x: int, *, y: int) -> int:
        return x + y

    def fails(x: int, *, y: int) -> int:
        raise ValueError(x)

    functions: dict[str, Callable[..., Any]]
    functions = {"plain": plain, "async": coroutine, "fails": fails}
    return functions[request.param]


@both
def test_a_task_that_is_held_stays_whole(function: Callable[..., Any], runner: str) -> None:
    own = RUNNERS[runner]()
    held: list[BackgroundTask] = []

    def add() -> None:
        background_tasks.add_task(function, 1, y=2)
        held.extend(background_tasks.tasks)

    request(own, add)
    assert own.drain(TIMEOUT) == []
    (task,) = held
    assert task.func is function
    assert task.args == (1,)
    assert task.kwargs == {"y": 2}
    assert task.is_async == ("coroutine" in function.__name__)
    assert task.name.endswith(function.__qualname__)
    if function.__name__ == "fails":
        with pytest.raises(ValueError, match="1"):
            task()
    else:
        assert task() == 3


@both
def test_a_log_handler_that_adds_a_task_that_fails_ends_with_a_single_error(
    log: Log, runner: str
) -> None:
    """For example a handler that sends each error by mail, while no mail can be sent."""
    endless = Endless()

    def send(text: str) -> None:
        endless.count += 1
        raise OSError(text)

    class Mail(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "was not added" not in record.getMessage() and endless.count < ENOUGH:
                background_tasks.add_task(send, "down")

    own = RUNNERS[runner]()
    mail = Mail(logging.ERROR)
    logging.getLogger("wsgi_bg").addHandler(mail)
    try:
        request(own, lambda: background_tasks.add_task(send, "down"))
        assert own.drain(6 * TIMEOUT) == []
    finally:
        logging.getLogger("wsgi_bg").removeHandler(mail)
    assert 1 < endless.count < ENOUGH


@both
def test_a_context_that_adds_a_task_as_it_is_entered_ends_with_a_single_error(
    log: Log, runner: str
) -> None:
    app = flask.Flask("shop")
    endless = Endless()
    own = RUNNERS[runner]()
    Background(app, runner=own)

    def add(sender: object, **_: object) -> None:
        if has_begun:
            endless.add(endless.plain)

    has_begun: list[bool] = []

    @app.route("/")
    def view() -> str:
        has_begun.append(True)
        background_tasks.add_task(endless.other)
        return "ok"

    with flask.appcontext_pushed.connected_to(add, app):
        serve(app.wsgi_app)
        assert own.drain(6 * TIMEOUT) == []
    check(log, endless, "plain")


@both
def test_each_step_may_add_the_next_by_a_view_of_the_view_it_was_given(
    log: Log, runner: str
) -> None:
    own, count = RUNNERS[runner](), 1500
    seen: list[int] = []

    def step(number: int, tasks: BackgroundTasks) -> None:
        seen.append(number)
        if number < count:
            view = tasks.using(stop_on_error=False)
            view.add_task(step, number + 1, view)

    def begin() -> None:
        view = background_tasks.using(run_on="always")
        view.add_task(step, 1, view)

    request(own, begin)
    assert own.drain(TIMEOUT) == []
    assert seen == [*range(1, count + 1)]
    assert log.errors == []


def test_a_request_counts_from_zero_although_a_signal_handler_has_ended_a_hook(
    log: Log,
) -> None:
    """The exception came before the count of the thread was restored, and once too often."""
    seen: list[str] = []
    own = RUNNERS["inline"]()
    token = successors._generation.set(2 * successors.MAX_GENERATIONS)
    try:
        request(own, lambda: background_tasks.add_task(seen.append, "ran"), hooks=Hooks())
    finally:
        successors._generation.reset(token)
    assert own.drain(TIMEOUT) == []
    assert seen == ["ran"]
    assert log.errors == []
