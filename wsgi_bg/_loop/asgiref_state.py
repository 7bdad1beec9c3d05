"""Detaches a task's context from the state that asgiref keeps in context variables.

A task runs in a copy of its request's context. asgiref's part of the copy belongs to the
request and to its thread: an executor that has ended with an ``async def`` view, marks of
calls that have returned, and the storage of each ``asgiref.local.Local``. Django's language
and time zone are such ``Local`` objects. Up to asgiref 3.8 a copy shares their storage with
the server's thread; since 3.12 a ``Local`` is empty on any other thread.
"""

from __future__ import annotations

import copy
import functools
import sys
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, NamedTuple

# The name of the context variable of every Local, in all versions but 3.9.0.
_LOCAL = "asgiref.local"

# Django's connections to caches, and the backends of its own tasks, are Locals too.
_CONNECTIONS = (("django.core.cache", "caches"), ("django.tasks", "task_backends"))

_Variable = ContextVar[Any] | None


class _Asgiref(NamedTuple):
    """The parts of the installed asgiref that this module needs."""

    of_a_call: frozenset[_Variable]
    """The variables that describe calls and blocks in progress."""
    executors: Any
    """The ``Local`` that describes calls in progress, for the same purpose."""
    rehome: Any
    """Moves a ``Local``'s storage to the current thread; copies it up to asgiref 3.11."""


@functools.cache
def _asgiref() -> _Asgiref:
    # Not imported at the top, since most applications have no asgiref. An import statement,
    # not sys.modules, since another thread may be in the middle of the first import.
    from asgiref import local, sync

    # Each of these names may be missing in a version of asgiref.
    return _Asgiref(
        frozenset(
            {
                getattr(sync.AsyncToSync, "async_single_thread_context", None),  # 3.10 on
                getattr(sync.SyncToAsync, "deadlock_context", None),
                getattr(sync.SyncToAsync, "thread_sensitive_context", None),
            }
        ),
        getattr(sync.AsyncToSync, "executors", None),
        getattr(local, "_rehome", copy.copy),
    )


def use_for_sync_code(executor: Any) -> None:
    """Let ``sync_to_async`` use ``executor`` on the running loop, if asgiref is installed.

    By default asgiref has a single executor for the process. Under gevent the threads of this
    executor are greenlets of the thread that first needs the executor, and Python's exit
    would wait for these greenlets on another thread for ever.
    """
    import asyncio  # already loaded: this code runs on a loop

    with suppress(ImportError):
        from asgiref.sync import AsyncToSync

        AsyncToSync.loop_thread_executors[asyncio.get_running_loop()] = executor


def _variables_of(local: Any) -> tuple[_Variable, ...]:
    """Return the context variables of a ``Local``; asgiref has no public name for them."""
    data = getattr(getattr(local, "_storage", None), "_data", None)
    # asgiref 3.9.0 makes a variable for each attribute.
    return tuple(data.values()) if isinstance(data, dict) else (data,)


def detached(context: Context) -> Context:
    """Return the context to run a task in: ``context`` without its request's asgiref state.

    Executors, marks and Django's connections to caches are left out. ``Local`` objects keep
    their values, and changes that the task makes stay in the task. Must be called on the
    thread that will run the task; does not block.

    :param context: a copied context that no thread has entered; is not changed.
    :return: a new context, or ``context`` itself while asgiref is not imported.
    """
    if "asgiref.sync" not in sys.modules:
        return context
    own = Context()
    own.run(_fill_from, context)
    return own


def _fill_from(context: Context) -> None:
    asgiref = _asgiref()
    # Looked up each time, since Django's tests replace these handlers.
    handlers = [getattr(sys.modules.get(module), name, None) for module, name in _CONNECTIONS]
    locals_left_out = [getattr(each, "_connections", None) for each in handlers]
    left_out = asgiref.of_a_call.union(
        *map(_variables_of, (asgiref.executors, *locals_left_out))
    )
    for variable, value in context.items():
        if variable not in left_out:
            variable.set(asgiref.rehome(value) if variable.name == _LOCAL else value)


def move_here(context: Context) -> None:
    """Move the values of the ``Local`` objects in a task's context to this thread.

    Needed for a call that a thread has begun and the event loop's thread continues.

    :param context: the task's own context, which no thread has entered.
    """
    if "asgiref.sync" in sys.modules:
        context.run(_move_here)


def _move_here() -> None:
    rehome = _asgiref().rehome
    for variable, value in copy_context().items():
        if variable.name == _LOCAL:
            variable.set(rehome(value))
