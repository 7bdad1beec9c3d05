"""``BackgroundTask`` and ``BackgroundTasks``: accepted functions, and calls by hand."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import AsyncMock, MagicMock
from weakref import WeakSet, proxy

import pytest
from werkzeug.local import Local, LocalProxy

from tests.conftest import Log
from tests.support import app_that, respond, wait_until
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
)
from wsgi_bg._tasks.background_tasks import _LONG, TaskQueue
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.exceptions import BatchEndedError, TaskTypeError, WsgiBgError

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def plain(x: int, *, y: int = 0) -> int:
    return x + y


async def later(x: int, *, y: int = 0) -> int:
    await asyncio.sleep(0)
    return x + y


def generator(x: int) -> Iterator[int]:
    yield x


async def async_generator(x: int) -> AsyncIterator[int]:
    yield x


class Callable:
    def __call__(self, x: int) -> int:
        return x

    async def method(self, x: int) -> int:
        return x

    def lazy(self) -> Iterator[int]:
        yield 1


class AsyncCallable:
    async def __call__(self, x: int) -> int:
        return x


def decorated(func: Any) -> Any:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return wrapper


def test_the_repr_of_a_task_shows_its_call() -> None:
    task = BackgroundTask(plain, 1, y=2)
    assert (task.func, task.args, task.kwargs, task.is_async) == (plain, (1,), {"y": 2}, False)
    assert task.name == "tests.tasks.test_tasks.plain"
    assert repr(task) == "<BackgroundTask tests.tasks.test_tasks.plain>"


def test_a_task_may_have_arguments_named_func_and_self() -> None:
    seen: dict[str, Any] = {}
    BackgroundTask(lambda **kwargs: seen.update(kwargs), func=1, self=2)()
    tasks = BackgroundTasks()
    tasks.add_task(lambda **kwargs: seen.update(kwargs), func=3, task=4)
    tasks()
    assert seen == {"func": 3, "self": 2, "task": 4}


def test_calling_a_plain_task_runs_the_function_here_and_returns_the_result() -> None:
    assert BackgroundTask(plain, 1, y=2)() == 3
    assert BackgroundTask(threading.get_ident)() == threading.get_ident()


def test_calling_an_async_task_waits_for_it_on_the_portal() -> None:
    assert BackgroundTask(later, 1, y=2)() == 3


@pytest.mark.parametrize("func", [lambda: 1 / 0, lambda: _divide()], ids=["plain", "async"])
def test_calling_a_task_raises_the_error_of_the_function(func: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        BackgroundTask(func)()


async def _divide() -> float:
    return 1 / 0


def test_calling_a_task_that_cancels_itself_and_returns_gives_the_result() -> None:
    async def cancel_itself() -> int:
        task: Any = asyncio.current_task()
        task.cancel()
        return 3

    assert BackgroundTask(cancel_itself)() == 3


def test_calling_a_task_lets_a_system_exit_out_and_leaves_the_portal_alive() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        BackgroundTask(leave)()
    assert BackgroundTask(later, 1)() == 1


@pytest.mark.parametrize(
    ("func", "is_async"),
    [
        (plain, False),
        (later, True),
        (functools.partial(plain, 1), False),
        (functools.partial(functools.partial(later, 1), y=1), True),
        (Callable(), False),
        (Callable().method, True),
        (AsyncCallable(), True),
        (functools.partial(AsyncCallable(), 1), True),
        (AsyncMock(), True),
        (MagicMock(), False),
        (Callable, False),
        (print, False),
        ([].append, False),
        (decorated(later), False),
    ],
)
def test_is_async_tells_whether_a_call_returns_a_coroutine(func: Any, is_async: bool) -> None:
    assert BackgroundTask(func).is_async is is_async


@pytest.mark.parametrize(
    "func",
    [
        lambda x: later(x),
        decorated(later),
        functools.partial(lambda x: later(x)),
        AsyncCallable(),
    ],
)
def test_an_awaitable_result_is_awaited(func: Any) -> None:
    assert BackgroundTask(func, 5)() == 5


def test_a_generator_based_coroutine_function_is_async() -> None:
    seen: list[str] = []

    @types.coroutine
    def old_style() -> Iterator[None]:
        yield
        seen.append("ran")

    tasks = TaskQueue()
    tasks.add_task(old_style)
    assert tasks.tasks[0].is_async
    Batch(tasks, response_complete=True).run()
    assert seen == ["ran"]


def test_an_awaitable_that_is_no_coroutine_is_awaited_too() -> None:
    class Soon:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return "done"

    assert BackgroundTask(Soon)() == "done"


class Closed:
    """An object that does not say of which class it is."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ValueError("no class")


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(LocalProxy(lambda: 5), id="a proxy of an object that cannot be awaited"),
        pytest.param(Local()("nothing"), id="a proxy of nothing"),
        pytest.param(Closed(), id="an object without a class"),
        pytest.param(proxy(Closed.__new__(Closed)), id="a proxy of a freed object"),
    ],
)
def test_a_task_has_succeeded_whatever_object_it_returns(result: Any, log: Log) -> None:
    tasks = TaskQueue()
    tasks.add_task(lambda: result)
    batch = Batch(tasks, response_complete=True)
    batch.run()
    assert (batch.succeeded, log.errors) == (1, [])
    assert BackgroundTask(lambda: result)() is result


def test_a_stop_while_a_result_is_looked_at_goes_through() -> None:
    class Stops:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BackgroundTask(Stops)()


def test_a_result_is_freed_before_the_next_task_begins() -> None:
    class Result:
        pass

    alive: WeakSet[Result] = WeakSet()
    seen: list[int] = []

    def make() -> Result:
        seen.append(len(alive))
        result = Result()
        alive.add(result)
        return result

    tasks = TaskQueue()
    for _ in range(3):
        tasks.add_task(make)
    Batch(tasks, response_complete=True).run()
    assert seen == [0, 0, 0]


class Subject:
    """An argument of a task."""


def fails(subject: Subject) -> None:
    raise ValueError


async def fails_later(subject: Subject) -> None:
    await asyncio.sleep(0)
    fails(subject)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("func", [fails, fails_later])
@pytest.mark.parametrize("is_single", [True, False])
def test_a_call_by_hand_that_raised_is_freed_without_a_collection(
    func: Any, is_single: bool
) -> None:
    alive: WeakSet[Subject] = WeakSet()

    def make() -> Any:
        subject = Subject()
        alive.add(subject)
        task = BackgroundTask(func, subject)
        return task if is_single else BackgroundTasks([task])

    with suppress(ValueError):
        make()()
    assert wait_until(lambda: not alive)  # the loop's thread may still have the task


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (functools.partial(plain, 1), "tests.tasks.test_tasks.plain"),
        (Callable(), "tests.tasks.test_tasks.Callable"),
        (Callable().method, "tests.tasks.test_tasks.Callable.method"),
        (print, "builtins.print"),
        ([].append, "list.append"),
    ],
)
def test_a_task_is_named_after_the_innermost_function(func: Any, name: str) -> None:
    assert BackgroundTask(func).name == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "got None of type NoneType, which cannot be called"),
        (42, "got 42 of type int, which cannot be called: write add_task(function, *args"),
        ("plain", "got the string 'plain': give the function itself, not its name"),
        (
            generator,
            "tests.tasks.test_tasks.generator is a generator function: calling it runs nothing",
        ),
        (async_generator, "tests.tasks.test_tasks.async_generator is a generator function"),
        (
            functools.partial(generator, 1),
            "tests.tasks.test_tasks.generator is a generator function",
        ),
        (Callable().lazy, "Callable.lazy is a generator function"),
        (generator(1), "got a generator object, and not the function that makes it"),
        (async_generator(1), "got a async_generator object, and not the function"),
    ],
)
def test_an_object_that_cannot_run_is_refused_by_add_task(given: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        BackgroundTasks().add_task(given)
    assert message in str(caught.value)
    with pytest.raises(TaskTypeError) as also:
        BackgroundTask(given)
    assert also.value.given is given
    assert isinstance(also.value, WsgiBgError)


@pytest.mark.parametrize("given", [BackgroundTask(int), int, 5, 0, False])
def test_what_is_no_list_of_tasks_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a list of BackgroundTask objects; got"):
        BackgroundTasks(given)


def test_tasks_may_come_from_an_iterator() -> None:
    seen: list[int] = []
    given: Any = (BackgroundTask(seen.append, number) for number in range(3))
    BackgroundTasks(given)()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("given", [[print], ["print"]])
def test_the_initial_tasks_have_to_be_tasks(given: Any) -> None:
    with pytest.raises(TypeError, match=r"write BackgroundTasks\(\[BackgroundTask\(function"):
        BackgroundTasks(given)


def test_a_coroutine_object_is_refused_and_closed() -> None:
    """A coroutine that nobody closes warns that nobody awaited it; here warnings are errors."""
    coroutine: Any = later(1)
    message = (
        r"later\(\.\.\.\) has been called already: write add_task\(later, \.\.\.\) and not"
    )
    with pytest.raises(TypeError, match=message):
        BackgroundTasks().add_task(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited"):
        coroutine.send(None)


def test_a_future_is_refused() -> None:
    async def main() -> None:
        future: Any = asyncio.get_running_loop().create_future()
        with pytest.raises(TypeError, match="not the function that makes it"):
            BackgroundTasks().add_task(future)

    asyncio.run(main())


def test_tasks_called_by_hand_run_in_order_each_once() -> None:
    seen: list[int] = []

    async def append(x: int) -> None:
        seen.append(x)

    tasks = BackgroundTasks([BackgroundTask(seen.append, 1), BackgroundTask(append, 2)])
    tasks.add_task(seen.append, 3)
    tasks()
    tasks()
    assert seen == [1, 2, 3]
    tasks.add_task(seen.append, 4)
    tasks()
    assert seen == [1, 2, 3, 4]
    assert tasks.tasks == []


def test_tasks_called_by_hand_run_the_tasks_that_they_add() -> None:
    seen: list[str] = []
    tasks = BackgroundTasks()
    tasks.add_task(lambda: tasks.add_task(seen.append, "second"))
    tasks.add_task(seen.append, "first")
    tasks()
    assert seen == ["first", "second"]


def test_tasks_called_by_hand_raise_the_first_error_and_log_all_further_errors(
    log: Log,
) -> None:
    seen: list[str] = []

    def fail(error: BaseException) -> None:
        raise error

    tasks = BackgroundTasks()
    tasks.add_task(fail, ValueError("first"))
    tasks.add_task(fail, KeyError("second"))
    tasks.add_task(seen.append, "third")
    with pytest.raises(ValueError, match="first"):
        tasks()
    assert seen == ["third"]
    assert [str(error) for error in log.tracebacks] == ["'second'"]


def test_tasks_called_from_eight_threads_run_once() -> None:
    seen: list[int] = []
    tasks = BackgroundTasks([BackgroundTask(seen.append, x) for x in range(1000)])
    barrier = threading.Barrier(8)

    def call() -> None:
        barrier.wait(10)
        tasks()

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(seen) == list(range(1000))


def test_the_same_task_may_be_in_two_batches() -> None:
    seen: list[int] = []
    shared = BackgroundTask(seen.append, 1)
    first, second = BackgroundTasks([shared]), BackgroundTasks([shared])
    assert first.tasks == [shared]
    first()
    second()
    assert seen == [1, 1]


def test_a_task_that_joined_the_list_by_itself_runs_too() -> None:
    seen: list[int] = []
    tasks = BackgroundTasks()
    tasks.tasks.append(BackgroundTask(seen.append, 1))
    tasks()
    assert seen == [1]


def test_a_task_runs_in_a_copy_of_the_context_of_its_add_task() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(variable.get())
        variable.set("by the first task")

    async def look_async() -> None:
        seen.append(variable.get())

    tasks = BackgroundTasks()
    token = variable.set("when added")
    tasks.add_task(look)
    tasks.add_task(look)
    tasks.add_task(look_async)
    variable.reset(token)
    tasks()
    assert seen == ["when added"] * 3
    assert variable.get() == "unset"


def test_a_single_call_of_a_batchs_task_runs_in_the_tasks_context() -> None:
    tasks = BackgroundTasks()
    token = variable.set("when added")
    tasks.add_task(variable.get)
    variable.reset(token)
    assert tasks.tasks[0]() == "when added"


def test_a_view_shares_the_list() -> None:
    seen: list[str] = []
    tasks = BackgroundTasks()
    view = tasks.using(run_on="always")
    tasks.add_task(seen.append, "a")
    view.add_task(seen.append, "b")
    view.using(stop_on_error=True).add_task(seen.append, "c")
    assert len(tasks.tasks) == 3
    assert view.tasks is tasks.tasks
    assert repr(view) == "<view of <BackgroundTasks [list.append, list.append, list.append]>>"
    view()
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"run_on": "never"},
            ValueError,
            "run_on must be 'success', 'error' or 'always'; got 'never'",
        ),
        ({"on_error": 1}, TypeError, "on_error must be a plain function that takes the task"),
        (
            {"on_error": later},
            TypeError,
            "on_error must be a plain function that takes the task",
        ),
        ({"stop_on_error": "yes"}, TypeError, "stop_on_error must be True or False; got 'yes'"),
    ],
)
def test_a_view_refuses_bad_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        BackgroundTasks().using(**options)
    assert message in str(caught.value)


def test_adding_to_an_ended_batch_names_the_function() -> None:
    from tests.support import app_that, respond
    from wsgi_bg import BackgroundTasksMiddleware, get_background_tasks

    kept: list[BackgroundTasks] = []
    respond(
        BackgroundTasksMiddleware(
            app_that(lambda environ: kept.append(get_background_tasks(environ)))
        )
    )
    with pytest.raises(
        RuntimeError, match=r"test_tasks\.plain was not added.*the batch has ended"
    ) as caught:
        kept[0].add_task(plain, 1)
    assert isinstance(caught.value, BatchEndedError)
    assert caught.value.name == "tests.tasks.test_tasks.plain"
    assert repr(kept[0]).endswith(" ended>")


def test_the_first_task_stays_first_until_it_is_dropped() -> None:
    tasks = TaskQueue()
    for _ in range(2 * _LONG):
        tasks.add_task(int)
    first = tasks.first()
    assert first is not None
    assert first is tasks.first()
    tasks.drop(first)
    second = tasks.first()
    assert second is not None
    assert second is not first


def test_a_task_of_a_long_batch_sees_the_tasks_that_are_not_done() -> None:
    left: list[int] = []

    def look() -> None:
        left.append(len(background_tasks.tasks))

    def add(environ: object) -> None:
        for _ in range(2 * _LONG):
            background_tasks.add_task(look)

    respond(BackgroundTasksMiddleware(app_that(add)))
    assert left == list(range(2 * _LONG, 0, -1))
