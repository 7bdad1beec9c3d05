"""The options of a middleware layer, merged with those of the layer outside of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from wsgi_bg._request.calls import Around, Calls
from wsgi_bg._status.recorder import recorder
from wsgi_bg._tasks.background_tasks import BackgroundTasks, View
from wsgi_bg._tasks.callables import is_plain
from wsgi_bg._tasks.options import OnError, Options
from wsgi_bg._tasks.task import DIRECT, Caller, RunOn
from wsgi_bg.exceptions import OptionError, OptionTypeError, OptionValueError
from wsgi_bg.hooks.base import HOOKS, Hooks, OptionHooks
from wsgi_bg.runners.keeping import KeepingCaller, keeps_tasks

if TYPE_CHECKING:
    from wsgi_bg.runners import Runner

M = TypeVar("M")

_DURABLE = "WSGI_BG_DURABLE"


class LayerView(View):
    """The tasks of a request as an inner layer of middleware sees them.

    :ivar outer: the tasks as the layer outside sees them.
    :ivar has_returned: True if the application of this layer has returned; its response may
        still stream.
    """

    __slots__ = ("has_returned", "outer")

    def __init__(self, outer: BackgroundTasks, options: Options) -> None:
        super().__init__(outer, options)
        self.outer: BackgroundTasks = outer
        self.has_returned: bool = False


def innermost_running(tasks: BackgroundTasks) -> BackgroundTasks:
    """Return ``tasks``, or the view of the next outer layer that has not returned."""
    while isinstance(tasks, LayerView) and tasks.has_returned:
        tasks = tasks.outer
    return tasks


class OptionOverrides(TypedDict, total=False):
    """The options that a layer sets; None for an option that the layer leaves alone."""

    run_on: RunOn | None
    failed_from: int | None
    on_error: OnError | None
    stop_on_error: bool | None


def merge_options(
    outer: Options,
    overrides: OptionOverrides | None = None,
    hooks: Hooks | Sequence[Hooks] | None = None,
    around: Around | None = None,
    runner: Runner | None = None,
    option_hooks: Sequence[OptionHooks] = (),
) -> Options:
    """Return the options of the outer layer, in which each option that is not None is set.

    Returns ``outer`` itself if there is none.

    :param option_hooks: hooks for options of this layer; each replaces one of its class.
    :raises ValueError: if ``run_on`` or ``failed_from`` is out of range.
    :raises TypeError: if an option is of the wrong type.
    """
    options = outer
    if overrides and any(value is not None for value in overrides.values()):
        options = replace(outer.override(**overrides), layer=None)
    if hooks is None and around is None and runner is None and not option_hooks:
        return options
    calls = outer.calls
    if isinstance(calls, KeepingCaller):
        calls = calls.inner
    all_hooks: tuple[Hooks, ...] = ()
    if isinstance(calls, Calls):
        all_hooks = calls.hooks
        around = calls.around if around is None else around
    of_options = {type(each): each for each in all_hooks if isinstance(each, OptionHooks)}
    of_options |= {type(each): each for each in (*everywhere, *option_hooks)}
    own = [each for each in all_hooks if not isinstance(each, OptionHooks)]
    all_hooks = (*of_options.values(), *(own if hooks is None else _as_tuple(hooks)))
    is_default = outer.runner_is_default and runner is None
    runner = outer.runner if runner is None else runner
    if recorder in all_hooks:
        recorder.note_runner(runner)
    send = getattr(runner, "send", None)
    may_send = getattr(runner, "may_send", None)
    waits = bool(getattr(runner, "sends_delayed", False))
    queues = bool(getattr(runner, "queues", False))
    is_called_directly = not (all_hooks or around or send)
    caller: Caller = DIRECT
    if not is_called_directly:
        caller = Calls(all_hooks, around, send, may_send, waits=waits, queues=queues)
    if keeps_tasks(runner):
        caller = KeepingCaller(runner, caller)
    return replace(
        options,
        runner=runner,
        runner_is_default=is_default,
        calls=caller,
        check=getattr(runner, "check", None),
        added=getattr(around, "added", None),
    )


everywhere: list[OptionHooks] = []
"""Hooks of all layers of this process, for the command line."""


def check_status(status: bool | None, path: str | os.PathLike[str] | None) -> bool:
    """Turn the recorder on if the options of a middleware ask for that; return if they do.

    :raises TypeError: if an option is of the wrong type.
    :raises ValueError: if the folder cannot be used, or is given with ``status=False``.
    """
    if status is not None and not isinstance(status, bool):
        raise OptionTypeError("status", status, "True or False")
    if path is not None and status is False:
        raise OptionValueError("status", status, "True, since status_path is given")
    if path is not None or status:
        recorder.turn_on(path)
        return True
    return False


def _as_tuple(hooks: Hooks | Sequence[Hooks]) -> tuple[Hooks, ...]:
    several = tuple(hooks) if isinstance(hooks, (list, tuple)) else (hooks,)
    if not all(isinstance(each, Hooks) for each in several):
        raise OptionTypeError("hooks", hooks, "a wsgi_bg.hooks.Hooks object, or a list of them")
    for each in several:
        methods = [getattr(each, name) for name in HOOKS]
        if not all(callable(method) and is_plain(method) for method in methods):
            wanted = "of plain functions; one is an async def, a generator or no function"
            raise OptionTypeError("hooks", each, wanted)
    return several


def make_configured(
    make: Callable[..., M], options: Mapping[str, Any], read: Callable[[str], Any]
) -> M:
    """Return ``make(**options)``; values of the configuration override ``options``.

    :param make: makes the middleware.
    :param read: returns the configuration's value of a key, such as ``WSGI_BG_RUNNER`` for
        the option ``runner``; None if the configuration has no such key. The key
        ``WSGI_BG_DURABLE`` has the path of a ``DurableRunner``, in place of a runner.
    :raises TypeError: if an option has the wrong type. The message names the option, or the
        key that has set the option.
    :raises ValueError: if an option is an unknown word, or a number out of range.
    """
    keys = {option: f"WSGI_BG_{option.upper()}" for option in options}
    configured = {
        option: value for option, key in keys.items() if (value := read(key)) is not None
    }
    durable = read(_DURABLE)
    if durable is not None:
        if {**options, **configured}.get("runner") is not None:
            raise OptionValueError(_DURABLE, durable, "a path, or a runner, and not both")
        from wsgi_bg._durable.runner import DurableRunner

        try:
            options = {**options, "runner": DurableRunner(durable)}
        except OptionError as exc:
            raise type(exc)(_DURABLE, exc.given, exc.wanted) from None
    try:
        return make(**{**options, **configured})
    except OptionError as exc:
        if exc.option not in configured:
            raise
        raise type(exc)(keys[exc.option], exc.given, exc.wanted) from None
