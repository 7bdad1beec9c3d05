"""``@registered_task``: allowed functions, and their names."""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support import lazy_module, registry_samples, run_python
from tests.support.registry_samples import Sample, generator, plain, taken
from wsgi_bg import BackgroundTasks, registered_task
from wsgi_bg._tasks import registry
from wsgi_bg.exceptions import NameTakenError, OptionError, RegistrationError, WsgiBgError

MODULE = registry_samples.__name__


def test_a_function_is_registered_under_its_module_and_name() -> None:
    found = registry.find(registry_samples.plain)
    assert found is not None
    assert found is registry.get(f"{MODULE}.plain")
    assert found.func is registry_samples.plain


def test_a_function_may_be_registered_under_another_name() -> None:
    found = registry.get("samples.async")
    assert found is not None
    assert found.func is registry_samples.coroutine
    assert registry.get(f"{MODULE}.coroutine") is None


def test_a_decorated_function_takes_the_arguments_of_its_decorator() -> None:
    found = registry.find(registry_samples.decorated)
    assert found is not None
    assert list(found.signature.parameters) == ["x"]


def test_an_annotation_may_have_a_name_that_only_type_checkers_know() -> None:
    func = lazy_module("def func(order: Order, copies: int = 1) -> Order: ...")["func"]
    registered_task(name="samples.lazy")(func)
    try:
        found = registry.find(func)
        assert found is not None
        assert found.positional == range(1, 3)
    finally:
        del registry._by_name["samples.lazy"]
        del registry._by_function[func]


def test_calling_a_registered_function_is_a_plain_call() -> None:
    assert plain(1) == 2
    assert asyncio.run(registry_samples.coroutine(1)) == 2


def test_a_registered_function_can_be_added_under_any_runner() -> None:
    tasks = BackgroundTasks()
    tasks.add_task(plain, 1)
    assert tasks.tasks[0].func is plain
    tasks()


def local_function() -> Callable[[], None]:
    def local() -> None:
        pass

    return local


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda: None, "all lambdas have the same name; write a def"),
        (local_function(), "it is local to a function, where other processes do not find it"),
        (Sample().method, "a bound method needs its object"),
        (Sample.method, "it belongs to a class; register a function of the module"),
        (functools.partial(plain, 1), "a partial has no name"),
        (print, "only functions written in Python can, and it is a builtin_function_or_method"),
        (Sample, "and it is a type"),
        (Sample(), "and it is a Sample"),
        (3, "3 cannot be registered: only functions"),
        (None, "None cannot be registered: only functions"),
    ],
)
def test_functions_that_another_process_could_not_find_are_refused(
    given: Any, reason: str
) -> None:
    with pytest.raises(RegistrationError) as caught:
        registered_task(given)
    assert reason in str(caught.value)
    assert caught.value.given is given
    assert isinstance(caught.value, TypeError)


def test_a_generator_function_is_refused() -> None:
    with pytest.raises(TypeError, match="generator is a generator function"):
        registered_task(generator)
    assert registry.find(generator) is None


def test_a_function_of_main_is_refused_without_a_name() -> None:
    done = run_python(
        """
        from wsgi_bg import registered_task
        def send(): pass
        try: registered_task(send)
        except TypeError as exc: print(exc)
        print(registered_task(name="mail.send")(send) is send)
        """
    )
    assert done.stdout.splitlines() == [
        "__main__.send cannot be registered: it is in __main__, which is another module in a "
        'worker; give it a name: @registered_task(name="...")',
        "True",
    ]


@pytest.mark.parametrize("name", ["", 3, b"mail.send", "mail.\ud800", "mail\nsend"])
def test_a_name_is_a_str_of_printable_characters(name: Any) -> None:
    with pytest.raises(OptionError, match="name must be a str"):
        registered_task(name=name)


def test_a_name_that_another_function_has_is_refused() -> None:
    with pytest.raises(NameTakenError, match=f"'{MODULE}.plain' is taken by {MODULE}.plain:"):
        registered_task(name=f"{MODULE}.plain")(taken)
    assert issubclass(NameTakenError, (WsgiBgError, ValueError))
    assert registry.find(taken) is None


def test_a_second_name_for_the_same_function_is_refused() -> None:
    with pytest.raises(RegistrationError, match=f"is registered already, as '{MODULE}.plain'"):
        registered_task(name="samples.plain")(plain)


def test_a_reloaded_module_registers_its_functions_again() -> None:
    old = registry_samples.plain
    importlib.reload(registry_samples)
    new = registry.get(f"{MODULE}.plain")
    assert new is not None
    assert new.func is registry_samples.plain
    assert new.func is not old
    still = registry.find(old)  # a view may have imported the old function by name
    assert still is not None
    assert still.name == new.name


def test_a_listener_gets_functions_registered_before_and_later() -> None:
    names: list[str] = []
    listener: Callable[[registry.Registration], None] = lambda new: names.append(new.name)  # noqa: E731
    registry.subscribe(listener)
    try:
        assert f"{MODULE}.plain" in names
        names.clear()
        importlib.reload(registry_samples)
        assert names == [f"{MODULE}.plain", "samples.async", f"{MODULE}.decorated"]
    finally:
        registry._listeners.remove(listener)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quene": "slow"}, "celery must be a dict with keys of acks_late, .*; got 'quene'"),
        ({"bind": True}, "got 'bind'"),
        ({"countdown": "soon"}, r"celery\['countdown'\] must be a number of seconds; got"),
        (
            {"countdown": float("inf")},
            r"celery\['countdown'\] must be a finite number, 1e15 at most; got inf",
        ),
        ({"rate_limit": float("nan")}, r"celery\['rate_limit'\] must be a finite number, 1e"),
        ({"priority": -(10**30)}, r"celery\['priority'\] must be a finite number, 1e15 at"),
        ({"priority": -1}, "must be a whole number from 0 to 255; got -1"),
        ({"priority": 256}, "from 0 to 255"),
        ({"delivery_mode": "durable"}, "one of .1, 2, 'transient', 'persistent'.; got"),
        ({"countdown": True}, r"celery\['countdown'\] must be a number of seconds; got True"),
        ({"priority": False}, r"\['priority'\] must be a whole number from 0 .*; got False"),
        ({"max_retries": True}, "must be a whole number, or None"),
        ({"acks_late": 1}, r"celery\['acks_late'\] must be True or False; got 1"),
        ("queue", "celery must be a dict of Celery's options; got 'queue'"),
    ],
)
def test_options_that_celery_would_refuse_are_refused_at_once(
    options: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        registered_task(celery=options)


def test_options_are_sorted_by_their_destination() -> None:
    given = {
        "acks_late": True,
        "retry_backoff": True,
        "max_retries": None,
        "queue": "slow",
        "countdown": 1.5,
        "eta": datetime(2030, 1, 1, tzinfo=UTC),
    }
    try:
        registered_task(name="samples.sorted", celery=given)(sorted_options)
        found = registry.find(sorted_options)
        assert found is not None
        assert set(found.celery.task) == {"acks_late", "retry_backoff", "max_retries"}
        assert set(found.celery.message) == {"queue", "countdown", "eta"}
    finally:
        del registry._by_name["samples.sorted"]
        del registry._by_function[sorted_options]


def sorted_options() -> None:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acks_late": True}, r"goes to registered_task\(celery=\.\.\.\); got 'acks_late'"),
        ({"quene": "x"}, "with keys of compression, .*, time_limit; got 'quene'"),
        ({"queue": b"x"}, r"celery\['queue'\] must be a str; got b'x'"),
        ([("queue", "x")], "celery must be a dict of Celery's options"),
    ],
)
def test_using_refuses_options_of_no_message_at_once(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BackgroundTasks().using(celery=options)


def test_a_runner_without_celery_ignores_its_options() -> None:
    tasks = BackgroundTasks()
    ran: list[int] = []
    options: dict[str, Any] = {"queue": "slow"}
    view = tasks.using(celery=options)
    options.clear()
    view.add_task(ran.append, 1)
    (task,) = tasks.tasks
    tasks()
    assert ran == [1]
    assert task.options.celery == {"queue": "slow"}
    assert view.using(run_on="always").options.celery == {"queue": "slow"}
