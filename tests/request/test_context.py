"""The proxy, ``get_background_tasks`` and ``inject``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from typing import Annotated, Any, Optional, TypeVar

import pytest
from flask import Flask

from tests.support import TIMEOUT, Environ, app_that, lazy_module, make_environ, respond
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
    get_background_tasks,
    inject,
)
from wsgi_bg.exceptions import MiddlewareMissingError, OptionTypeError, OutsideRequestError

T = TypeVar("T")


def in_request(call: Any) -> None:
    """Call ``call(tasks)`` within a request."""
    respond(BackgroundTasksMiddleware(app_that(lambda e: call(get_background_tasks(e)))))


def test_the_proxy_outside_of_a_request_names_the_alternative() -> None:
    with pytest.raises(RuntimeError, match=r"use get_background_tasks\(environ\)") as caught:
        background_tasks.add_task(print)
    assert isinstance(caught.value, OutsideRequestError)
    assert "unbound" in repr(background_tasks)


def test_the_proxy_in_a_streamed_body_names_the_alternative() -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        with pytest.raises(RuntimeError, match="In a streamed body"):
            background_tasks.add_task(print)
        yield b"ok"

    assert respond(BackgroundTasksMiddleware(app)) == b"ok"


def test_the_proxy_works_inside_tasks_added_by_any_way() -> None:
    seen: list[bool] = []

    def look(tasks: BackgroundTasks) -> None:
        seen.append(background_tasks == tasks)

    async def look_async(tasks: BackgroundTasks) -> None:
        await asyncio.sleep(0)
        seen.append(background_tasks == tasks)

    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        tasks = get_background_tasks(environ)
        tasks.add_task(look, tasks)
        tasks.add_task(look_async, tasks)
        thread = threading.Thread(target=tasks.add_task, args=(look, tasks))
        thread.start()
        thread.join(TIMEOUT)
        yield b"ok"

    respond(BackgroundTasksMiddleware(app))
    assert seen == [True] * 3


def test_in_a_task_added_within_an_inner_request_the_proxy_is_that_of_the_tasks_batch() -> None:
    """The application calls an inner application, whose view adds a task to the outer batch."""
    seen: list[bool] = []
    outer: list[BackgroundTasks] = []

    def look() -> None:
        seen.append(background_tasks == outer[0])
        background_tasks.add_task(seen.append, True)

    def add_to_outer(environ: Environ) -> None:
        assert get_background_tasks(environ) is not outer[0]
        outer[0].add_task(look)
        outer[0].using(run_on="always").add_task(look)

    inner = BackgroundTasksMiddleware(app_that(add_to_outer))

    def call_inner(environ: Environ) -> None:
        outer.append(get_background_tasks(environ))
        respond(inner)  # the inner request and its batch end before the outer batch runs

    respond(BackgroundTasksMiddleware(app_that(call_inner)))
    assert seen == [True] * 4


def test_the_proxy_is_gone_when_the_application_has_returned_or_raised() -> None:
    def fail(environ: Environ) -> None:
        raise ValueError("a bug")

    respond(BackgroundTasksMiddleware(app_that(lambda e: None)))
    with pytest.raises(ValueError, match="a bug"):
        respond(BackgroundTasksMiddleware(app_that(fail)))
    with pytest.raises(RuntimeError):
        background_tasks.add_task(print)


def test_the_proxy_works_in_an_async_flask_view() -> None:
    """Flask runs the view on another thread, in a copy of the context."""
    seen: list[str] = []
    app = Flask(__name__)

    @app.get("/")
    async def view() -> str:
        await asyncio.sleep(0)
        background_tasks.add_task(seen.append, "ran")
        return "ok"

    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    assert app.test_client().get("/", buffered=True).text == "ok"
    assert seen == ["ran"]


def test_a_missing_middleware_is_named() -> None:
    with pytest.raises(
        LookupError, match=r"wsgi_bg\.BackgroundTasksMiddleware\(app\)"
    ) as caught:
        get_background_tasks(make_environ())
    assert isinstance(caught.value, MiddlewareMissingError)
    assert caught.value.key == "wsgi_bg.background_tasks"


def test_an_object_in_place_of_the_environ_is_refused() -> None:
    with pytest.raises(TypeError, match="environ must be the WSGI environ that") as caught:
        get_background_tasks(object())  # type: ignore[arg-type]
    assert isinstance(caught.value, OptionTypeError)


# inject


@inject
def string(x: int, tasks: BackgroundTasks) -> tuple[int, BackgroundTasks]:
    return x, tasks


@inject
def annotated(
    x: int, *, bg: Annotated[BackgroundTasks, "any name"]
) -> tuple[int, BackgroundTasks]:
    return x, bg


@inject
def optional(x: int, tasks: BackgroundTasks | None = None) -> tuple[int, Any]:
    return x, tasks


@inject
def old_optional(x: int, tasks: Optional[BackgroundTasks] = None) -> tuple[int, Any]:  # noqa: UP045
    return x, tasks


@inject
def implicitly_optional(x: int, tasks: BackgroundTasks = None) -> tuple[int, Any]:  # type: ignore[assignment]
    return x, tasks


@inject
def annotated_optional(
    x: int,
    tasks: Annotated[Optional[BackgroundTasks], "doc"] = None,  # noqa: UP045
) -> tuple[int, Any]:
    return x, tasks


@inject
def needs_one(x: int, tasks: BackgroundTasks | None) -> tuple[int, Any]:
    return x, tasks


class Service:
    @inject
    def method(self, x: int, tasks: BackgroundTasks) -> tuple[int, BackgroundTasks]:
        return x, tasks


OPTIONAL: list[Any] = [optional, old_optional, implicitly_optional, annotated_optional]
REQUIRED: list[Any] = [string, annotated, needs_one, Service().method]


@pytest.mark.parametrize("func", OPTIONAL + REQUIRED)
def test_inject_fills_the_annotated_parameter(func: Any) -> None:
    def look(tasks: BackgroundTasks) -> None:
        assert func(5) == (5, tasks)
        assert func(x=5) == (5, tasks)

    in_request(look)


@pytest.mark.parametrize("func", OPTIONAL + REQUIRED)
def test_an_argument_given_explicitly_wins(func: Any) -> None:
    mine = BackgroundTasks()
    name = "bg" if func is annotated else "tasks"

    def look(tasks: BackgroundTasks) -> None:
        assert func(5, **{name: mine}) == (5, mine)
        assert func(5, **{name: None}) == (5, None)
        if func is not annotated:
            assert func(5, mine) == (5, mine)

    in_request(look)
    assert func(5, **{name: mine}) == (5, mine)


@pytest.mark.parametrize("func", OPTIONAL)
def test_an_optional_parameter_is_none_outside_of_a_request(func: Any) -> None:
    assert func(5) == (5, None)


@pytest.mark.parametrize("func", OPTIONAL)
def test_an_optional_parameter_is_none_after_the_last_task(func: Any) -> None:
    """A thread that a view has started may live longer than the request."""
    contexts: list[Context] = []

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(int)
        contexts.append(copy_context())

    in_request(add)
    assert contexts[0].run(func, 5) == (5, None)


@pytest.mark.parametrize("func", REQUIRED)
def test_inject_outside_of_a_request_names_the_function(func: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        func(5)
    assert f"{func.__qualname__} wants the request's BackgroundTasks" in str(caught.value)
    assert "make the parameter optional with None as its default" in str(caught.value)


def test_inject_fills_async_functions_and_generators() -> None:
    @inject
    async def later(tasks: BackgroundTasks) -> BackgroundTasks:
        return tasks

    @inject
    def stream(tasks: BackgroundTasks) -> Iterable[BackgroundTasks]:
        yield tasks

    def look(tasks: BackgroundTasks) -> None:
        assert inspect.iscoroutinefunction(later)
        assert asyncio.run(later()) is tasks
        assert list(stream()) == [tasks]

    in_request(look)


def test_inject_works_in_a_task() -> None:
    seen: list[object] = []

    @inject
    def task(tasks: BackgroundTasks) -> None:
        seen.append(tasks)

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(task)
        seen.append(tasks)

    in_request(add)
    assert seen[0] is seen[1]


def test_inject_keeps_name_and_docstring() -> None:
    @inject
    def documented(tasks: BackgroundTasks) -> None:
        """What it does."""

    assert (documented.__name__, documented.__doc__) == ("documented", "What it does.")


def test_inject_refuses_a_function_without_a_parameter_to_fill() -> None:
    @inject
    def plain(x: int) -> int:
        return x

    with pytest.raises(
        TypeError, match="a function with a parameter annotated BackgroundTasks"
    ):
        plain(1)


def test_inject_names_an_annotation_that_cannot_be_resolved() -> None:
    @inject
    def unknown(x: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Never called."""

    with pytest.raises(TypeError, match=r"annotations can be resolved \(x: name 'Missing'"):
        unknown(1)


def test_inject_refuses_objects_that_are_no_functions() -> None:
    with pytest.raises(OptionTypeError, match="@inject above a def"):
        inject("view")  # type: ignore[arg-type]


def add_now(request: object, tasks: BackgroundTasks) -> None:
    tasks.add_task(int)


async def add_later(request: object, tasks: BackgroundTasks) -> None:
    tasks.add_task(int)


@pytest.mark.parametrize(
    "call",
    [lambda: inject(add_now)(1, object()), lambda: asyncio.run(inject(add_later)(1, object()))],
    ids=["plain", "async"],
)
def test_an_error_tells_that_the_caller_has_passed_another_object(call: Any) -> None:
    """Pyramid calls a decorated view with its context and its request."""
    with pytest.raises(AttributeError, match="'object' object has no attribute") as caught:
        call()
    [note] = caught.value.__notes__  # type: ignore[attr-defined, unused-ignore]
    assert re.fullmatch(
        r"The caller of tests\.request\.test_context\.[\w.]+ has passed this object as "
        "argument 2, which is the parameter 'tasks' that @inject fills. "
        "Put all parameters that the caller passes before it.",
        note,
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: inject(lacks)(1, None),
        lambda: inject(lacks)(1, tasks=None),
        lambda: inject(lacks_by_name)(1, tasks=None),
    ],
    ids=["by position", "by name", "keyword-only"],
)
def test_other_attribute_errors_have_no_note(call: Any) -> None:
    with pytest.raises(AttributeError) as caught:
        call()
    assert not hasattr(caught.value, "__notes__")


def lacks(x: Any, tasks: BackgroundTasks | None = None) -> None:
    raise AttributeError("without an object")


def lacks_by_name(x: Any, *, tasks: BackgroundTasks | None = None) -> None:
    x.missing()


def test_a_class_with_a_partial_of_an_injected_function_is_filled() -> None:
    in_request(lambda tasks: functools.partial(string, 5)())


@inject
def positional(x: int, tasks: BackgroundTasks, /) -> tuple[int, BackgroundTasks]:
    return x, tasks


@inject
def optional_positional(
    x: int = 5, tasks: BackgroundTasks | None = None, /, **names: Any
) -> tuple[int, Any, dict[str, Any]]:
    return x, tasks, names


def test_inject_fills_a_positional_only_parameter() -> None:
    mine = BackgroundTasks()

    def look(tasks: BackgroundTasks) -> None:
        assert positional(5) == (5, tasks)
        assert positional(5, mine) == (5, mine)
        assert optional_positional(5, tasks=3) == (5, tasks, {"tasks": 3})
        assert optional_positional(tasks=3) == (5, None, {"tasks": 3})
        with pytest.raises(TypeError, match="missing 2 required positional arguments"):
            positional()

    in_request(look)
    assert optional_positional(5) == (5, None, {})


def test_inject_fills_the_parameter_of_a_class_and_of_a_callable_object() -> None:
    class Order:
        def __init__(self, tasks: BackgroundTasks) -> None:
            self.tasks = tasks

    class Call:
        def __call__(self, x: int, tasks: BackgroundTasks) -> tuple[int, BackgroundTasks]:
            return x, tasks

    def look(tasks: BackgroundTasks) -> None:
        assert inject(Order)().tasks is tasks
        assert inject(Call())(5) == (5, tasks)

    in_request(look)


def test_inject_fills_static_methods_and_class_methods() -> None:
    class Service:
        @staticmethod
        @inject
        def static(tasks: BackgroundTasks) -> BackgroundTasks:
            return tasks

        @classmethod
        @inject
        def of_class(cls, tasks: BackgroundTasks) -> tuple[type, BackgroundTasks]:
            return cls, tasks

        @inject
        @staticmethod
        def above(tasks: BackgroundTasks) -> BackgroundTasks:
            return tasks

    def look(tasks: BackgroundTasks) -> None:
        assert Service.static() is tasks
        assert Service().of_class() == (Service, tasks)
        assert Service().above() is Service.above() is tasks

    in_request(look)


def test_an_annotation_of_another_parameter_need_not_be_resolved() -> None:
    @inject
    def unknown(x: Missing, tasks: BackgroundTasks) -> object:  # type: ignore[name-defined]  # noqa: F821
        return tasks

    def look(tasks: BackgroundTasks) -> None:
        assert unknown(1) is tasks

    in_request(look)


def test_inject_refuses_a_function_without_a_signature() -> None:
    with pytest.raises(TypeError, match="with a parameter annotated BackgroundTasks"):
        inject(max)(1, 2)


def other_module(source: str, **names: Any) -> dict[str, Any]:
    """The namespace of another module, which has none of this module's names."""
    module: dict[str, Any] = {"functools": functools, "__name__": "other", **names}
    exec(source, module)
    return module


WRAP = """
def wrap(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        return func(*args, **kwargs)
    return wrapper
"""


def test_strings_are_resolved_in_the_module_of_the_innermost_function() -> None:
    wrap: Callable[[T], T] = other_module(WRAP)["wrap"]

    @wrap
    def function(x: int, tasks: BackgroundTasks) -> object:
        return tasks

    class Call:
        @wrap
        def __call__(self, tasks: BackgroundTasks) -> object:
            return tasks

    def look(tasks: BackgroundTasks) -> None:
        assert inject(functools.partial(function, 5))() is tasks
        assert inject(Call())() is tasks

    in_request(look)


def test_inject_leaves_variadic_parameters_alone() -> None:
    @inject
    def rest(*more: BackgroundTasks, tasks: BackgroundTasks, **other: BackgroundTasks) -> Any:
        return more, tasks, other

    def look(tasks: BackgroundTasks) -> None:
        assert rest(1, 2, 3) == ((1, 2, 3), tasks, {})
        assert rest() == ((), tasks, {})

    in_request(look)


def test_a_default_that_is_kept_outside_of_a_request() -> None:
    mine = BackgroundTasks()

    @inject
    def keeps(tasks: BackgroundTasks | None = mine) -> object:
        return tasks

    @inject
    def needs(tasks: BackgroundTasks = mine) -> object:
        return tasks

    assert keeps() is mine
    with pytest.raises(RuntimeError, match="needs wants"):
        needs()


def test_inject_looks_once() -> None:
    looks: list[type] = []

    def look() -> type:
        looks.append(BackgroundTasks)
        return BackgroundTasks

    func = inject(other_module("def func(tasks: 'look()'): return tasks", look=look)["func"])
    in_request(lambda tasks: [func(), func()])
    assert len(looks) == 1


def test_an_annotation_may_have_a_name_that_only_type_checkers_know() -> None:
    source = "def func(tasks: BackgroundTasks, order: Order = 1) -> Order: return tasks"
    func = inject(lazy_module(source, BackgroundTasks=BackgroundTasks)["func"])
    found: list[bool] = []
    in_request(lambda tasks: found.append(func() is tasks))
    assert found == [True]
    with pytest.raises(TypeError, match="annotations can be resolved") as caught:
        inject(lazy_module(source)["func"])()
    assert isinstance(caught.value.__cause__, NameError)


def test_inject_has_the_cause() -> None:
    @inject
    def unknown(x: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Never called."""

    with pytest.raises(TypeError) as caught:
        unknown(1)
    assert isinstance(caught.value.__cause__, NameError)
