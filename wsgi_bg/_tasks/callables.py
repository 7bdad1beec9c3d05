"""Checks of the function of a new task, and the function's name in logs."""

from __future__ import annotations

import functools
import inspect
import reprlib
import sys
from inspect import CO_COROUTINE
from types import FunctionType, NoneType
from typing import Any

from wsgi_bg._process.interrupts import is_from_signal_handler, type_name
from wsgi_bg.exceptions import TaskTypeError

# These flags suffice for the usual cases, a function or a bound method, plain or async. A
# test of the flags takes 20 ns, inspect.iscoroutinefunction 240 ns (1.2 us on 3.13).
NOT_PLAIN = (
    inspect.CO_GENERATOR
    | CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)

# Since Python 3.14 an annotation is evaluated when it is read. Its names may be imported under
# TYPE_CHECKING only: such an annotation is read as a ForwardRef, and raises no NameError.
_FORMAT: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    _FORMAT = {"annotation_format": Format.FORWARDREF}


def signature_of(func: Any, *, follow_wrapped: bool = True) -> inspect.Signature:
    """Return the signature of ``func``, also if an annotation cannot be resolved.

    :raises TypeError: or a ``ValueError``, if ``func`` has no signature, as functions in C.
    """
    return inspect.signature(func, follow_wrapped=follow_wrapped, **_FORMAT)


def is_async_callable(func: Any) -> bool:
    """True if ``func`` is async, also as a partial or as an object with async ``__call__``.

    :raises TypeError: if ``func`` cannot run as a task; a coroutine is closed first.
    """
    if not callable(func):
        raise TaskTypeError(_why_not_callable(func), func)
    is_async = is_coroutine_callable(func)
    if not (is_async or is_plain(func)):
        raise TaskTypeError(
            f"{name_of(func)} is a generator function: calling it runs nothing. "
            "Add a function that does the work, with a loop over the generator in it.",
            func,
        )
    return is_async


def is_plain(func: Any) -> bool:
    """True if calling ``func`` runs the function, and does not only make an object to run."""
    return not _flags_of(func) & NOT_PLAIN


def is_coroutine_callable(func: Any) -> bool:
    """True if calling ``func`` returns a coroutine, as far as is known without the call."""
    return bool(_flags_of(func) & (CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE))


def name_of(func: Any) -> str:
    """Return ``module.qualname`` of the innermost callable; for an object, of its class.

    Never raises: if reading the name of the callable raises, the name of its class is used.
    """
    module: Any
    # In half of the time; a subclass of str may raise as it is formatted.
    if type(func) is FunctionType:
        module, qualname = func.__module__, func.__qualname__
        if type(module) is str is type(qualname):
            return f"{module}.{qualname}"
    try:
        while isinstance(func, functools.partial):
            func = func.func
        named = func if hasattr(func, "__qualname__") else type(func)
        qualname = named.__qualname__
        # ``__module__`` is None for a method of a builtin type, such as [].append, and
        # missing for "x".__mul__.
        module = getattr(named, "__module__", None)
        if isinstance(qualname, str) and isinstance(module, (str, NoneType)):
            return f"{module}.{qualname}" if module else str(qualname)
    except BaseException as exc:
        if is_from_signal_handler(exc):
            raise
    return type_name(func)


def _flags_of(func: Any) -> int:
    """The flags of the code that a call of ``func`` runs; 0 if they cannot be read."""
    while issubclass(type(func), functools.partial):  # reads no __class__, which may raise
        func = _read(func, "func")
    # A function or a bound method has flags; so has unittest.mock's AsyncMock.
    flags = _read(_read(func, "__code__"), "co_flags")
    if not isinstance(flags, int) and not issubclass(type(func), type):
        flags = _read(_read(_read(type(func), "__call__"), "__code__"), "co_flags")
    return flags if isinstance(flags, int) else 0


def _read(given: Any, name: str) -> Any:
    """Read an attribute; None if there is none, or if the object's own code raises."""
    try:
        return getattr(given, name, None)
    except BaseException as exc:
        if is_from_signal_handler(exc):
            raise
        return None


def _why_not_callable(given: Any) -> str:
    if inspect.iscoroutine(given):
        name = given.__qualname__
        given.close()  # or Python warns that it was never awaited
        return (
            f"got a coroutine object, {name}(...) has been called already: "
            f"write add_task({name}, ...) and not add_task({name}(...))"
        )
    if inspect.isawaitable(given) or inspect.isgenerator(given) or inspect.isasyncgen(given):
        return (
            f"got a {type_name(given)} object, and not the function that makes it: "
            "write add_task(function, ...) and not add_task(function(...))"
        )
    if isinstance(given, str):
        return f"got the string {reprlib.repr(given)}: give the function itself, not its name"
    return (
        f"got {reprlib.repr(given)} of type {type_name(given)}, which cannot be called: "
        "write add_task(function, *args, **kwargs), without calling the function"
    )
