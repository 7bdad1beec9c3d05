"""``@registered_task``: gives functions stable names, by which another process finds them."""

from __future__ import annotations

import functools
import inspect
import reprlib
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from wsgi_bg._process.interrupts import type_name
from wsgi_bg._tasks import successors
from wsgi_bg._tasks.callables import is_async_callable, name_of, signature_of
from wsgi_bg._tasks.checks import WhenUnsent, check_when_unsent
from wsgi_bg.exceptions import (
    NameTakenError,
    OptionTypeError,
    OptionValueError,
    RegistrationError,
)

if TYPE_CHECKING:
    from wsgi_bg._tasks.retry import Retry

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
"""The kinds of parameters that take one positional argument."""

F = TypeVar("F", bound=Callable[..., Any])

_NOT_GIVEN: Any = object()


@dataclass(frozen=True, eq=False)
class Registration:
    """A registered function and its name.

    :ivar name: the name of the function in messages.
    :ivar func: the function.
    :ivar signature: the signature of ``func`` itself, not of a function that it wraps.
    :ivar celery: options for Celery, opaque to all but Celery's runner; None if not given.
    :ivar retry: when the function is called again after an error; None for never.
    :ivar when_unsent: for tasks that cannot be sent; None for what the runner says.
    :ivar engine: options for the engine of the runner, which checks them; None if not given.
    """

    name: str
    func: Callable[..., Any]
    signature: inspect.Signature
    celery: Any
    retry: Retry | None = None
    when_unsent: WhenUnsent | None = None
    engine: Mapping[str, Any] | None = None

    @functools.cached_property
    def positional(self) -> range:
        """The numbers of arguments that the function accepts if all of them are positional."""
        parameters = self.signature.parameters.values()
        needed = [each.kind for each in parameters if each.default is Parameter.empty]
        if Parameter.KEYWORD_ONLY in needed:
            return range(0)
        fewest = sum(kind in POSITIONAL for kind in needed)
        if Parameter.VAR_POSITIONAL in needed:
            return range(fewest, sys.maxsize)
        return range(fewest, sum(each.kind in POSITIONAL for each in parameters) + 1)


# Guards the three collections below. Reentrant, because a listener may import a module that
# registers functions.
_lock = threading.RLock()
_by_name: dict[str, Registration] = {}
_by_function: dict[Callable[..., Any], Registration] = {}
_listeners: list[Callable[[Registration], object]] = []

has_retries: list[None] = []
"""Not empty once a function was registered with a ``Retry``."""


@overload
def registered_task(func: F, /) -> F: ...


@overload
def registered_task(
    *,
    name: str | None = None,
    celery: Mapping[str, Any] | None = None,
    retry: Retry | None = None,
    when_unsent: WhenUnsent | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Callable[[F], F]: ...


def registered_task(
    func: Any = _NOT_GIVEN,
    /,
    *,
    name: str | None = None,
    celery: Mapping[str, Any] | None = None,
    retry: Retry | None = None,
    when_unsent: WhenUnsent | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Any:
    """Register a plain or async function of a module, so that other processes can run it.

    Returns the function unchanged: a direct call works as before, and runners that run tasks
    in this process treat the function like any function. Put ``registered_task`` above all
    further decorators, since a function is found by its identity.

    A module that is reloaded registers its functions again, in place of the old functions.

    :param name: the name in messages; default ``module.qualname``. The name must not change
        as long as messages are under way. With a name of its own the function can be moved.
    :param celery: options of Celery for this function, see
        :class:`~wsgi_bg.celery.CeleryRunner`.
    :param retry: when a task of this function is called again after an error, on every
        runner, unless ``using(retry=...)`` says otherwise.
    :param when_unsent: for a task of this function that cannot be sent to another process, in
        place of the runner's option of that name.
    :param engine: options for the engine of the runner, such as RQ or Dramatiq. Each
        ``add_task`` lets the runner check them; runners without an engine ignore them.
    :raises TypeError: if another process could not find the function: a lambda, a local
        function, a method, a partial, any object that is not a function, or a function of
        ``__main__`` without a name; for a generator function; for an option that Celery
        would refuse.
    :raises ValueError: if another function has the name; if the name is empty, or has half of
        a surrogate pair, a line break or another character that cannot be printed; for an
        unknown option; for ``retry`` beside Celery's own ``autoretry_for``.
    """
    if name is not None and not isinstance(name, str):
        raise OptionTypeError("name", name, "a str")
    if name is not None and not (name and name.isprintable()):  # a file or a broker has it
        raise OptionValueError("name", name, "a str of printable characters that is not empty")
    options = None if celery is None else options_of("celery").for_function(celery)
    if retry is not None:
        from wsgi_bg._tasks.retry import check_retry

        check_retry(retry)
    if retry is not None and celery is not None and "autoretry_for" in celery:
        wanted = "options without autoretry_for, since retry is given"
        raise OptionValueError("celery", celery, wanted)
    if when_unsent is not None:
        check_when_unsent(when_unsent)
    if engine is not None:
        engine = copy_engine_options(engine)
    if func is not _NOT_GIVEN:
        return _register(func, name, options, retry, when_unsent, engine)
    return lambda func: _register(func, name, options, retry, when_unsent, engine)


def copy_engine_options(given: object) -> dict[str, Any]:
    """Return a copy of the options for an engine; the runner checks them in ``add_task``.

    :raises TypeError: if ``given`` is no mapping.
    """
    if not isinstance(given, Mapping):
        raise OptionTypeError("engine", given, "a dict of options for the runner's engine")
    return dict(given)


def find(func: Callable[..., Any]) -> Registration | None:
    """Return the registration of ``func``, compared by identity; None if not registered."""
    return _by_function.get(func) if type(func) is FunctionType else None


def retry_of(func: Callable[..., Any]) -> Retry | None:
    """Return the ``Retry`` that ``func`` was registered with, or None."""
    if not has_retries:
        return None
    registration = find(func)
    return None if registration is None else registration.retry


def get(name: str) -> Registration | None:
    """Return the registration with this name, or None; never imports anything."""
    return _by_name.get(name)


def options_of(engine: str) -> Any:
    """Import the module that checks the options of an engine, such as Celery.

    Imported with the first option, so that the core imports no engine, and a wrong option
    raises in the call that gives the option, even if the runner ignores the engine's options.

    :return: a module with ``for_function(given)`` for options of :func:`registered_task` and
        ``for_one_call(given)`` for those of ``using``. Both raise ``TypeError`` for a value of
        a wrong type, and ``ValueError`` for an unknown option.
    """
    return import_module(f"wsgi_bg.{engine}.options")


def subscribe(listener: Callable[[Registration], object]) -> None:
    """Call ``listener`` with each registration, present and future, possibly on any thread."""
    with _lock:
        _listeners.append(listener)
        for registration in list(_by_name.values()):
            listener(registration)


def _register(
    func: Any,
    name: str | None,
    options: Any,
    retry: Retry | None,
    when_unsent: WhenUnsent | None,
    engine: Mapping[str, Any] | None,
) -> Any:
    reason = _why_not(func, name)
    if reason:
        raise RegistrationError(f"{_shown(func)} cannot be registered: {reason}", func)
    is_async_callable(func)  # raises for a generator function
    name = name or name_of(func)
    signature = signature_of(func, follow_wrapped=False)
    new = Registration(name, func, signature, options, retry, when_unsent, engine)
    with _lock:
        old = _by_name.get(name)
        if old is not None and name_of(old.func) != name_of(func):
            raise NameTakenError(name, name_of(old.func))
        known = _by_function.get(func)
        if known is not None and known.name != name:
            raise RegistrationError(
                f"{_shown(func)} is registered already, as {known.name!r}", func
            )
        _by_name[name] = new
        _by_function[func] = new
        if retry is not None and not has_retries:
            has_retries.append(None)
            successors.watched.append(None)  # every add_task has to look for the function
        for listener in _listeners:
            listener(new)
    return func


def _why_not(func: Any, name: str | None) -> str:
    # isinstance() would read __class__, which may raise.
    if issubclass(type(func), functools.partial):
        return "a partial has no name; register a function that makes the call"
    if type(func) is MethodType:
        return "a bound method needs its object, which other processes do not have"
    if type(func) is not FunctionType:
        return f"only functions written in Python can, and it is a {type_name(func)}"
    if func.__name__ == "<lambda>":
        return "all lambdas have the same name; write a def"
    if "<locals>" in func.__qualname__:
        return "it is local to a function, where other processes do not find it"
    if "." in func.__qualname__:
        return "it belongs to a class; register a function of the module"
    if func.__module__ == "__main__" and name is None:
        return (
            "it is in __main__, which is another module in a worker; give it a name: "
            '@registered_task(name="...")'
        )
    return ""


def _shown(func: Any) -> str:
    return name_of(func) if callable(func) else reprlib.repr(func)
