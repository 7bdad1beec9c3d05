"""Runners decide on which thread and when the tasks of a request run."""

from __future__ import annotations

from wsgi_bg._tasks.callables import is_plain
from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.runners.base import Runner, Statistics
from wsgi_bg.runners.inline import InlineRunner
from wsgi_bg.runners.pool import PoolRunner, shared_pool
from wsgi_bg.runners.shutdown import register

__all__ = ["InlineRunner", "PoolRunner", "Runner", "Statistics", "resolve", "set_default"]

# The methods of a runner that handle tasks; None in place of an optional method is no method.
# Errors of abandon() are logged at exit, where each runner has to be drained.
_METHODS = ("submit", "drain", "statistics", "check", "send", "may_send")

_shared: dict[str | None, Runner] = {"inline": InlineRunner(), "pool": shared_pool}
_shared[None] = _shared["inline"]


def set_default(runner: Runner | str) -> None:
    """Let ``runner=None`` mean ``runner``, or the shared runner of that name, from now on.

    ``wsgi-bg`` calls this before it imports the application.
    """
    _shared[None] = _shared[runner] if isinstance(runner, str) else runner


def resolve(runner: Runner | str | None, option: str = "runner") -> Runner:
    """Return the runner for the value of a ``runner`` option, and let exit drain that runner.

    None means ``"inline"``, or the name that :func:`set_default` was called with.

    :param option: the name of the option, for an error.
    :raises ValueError: if the name is unknown.
    :raises TypeError: if the object is not a runner, or a method is no plain function.
    """
    if runner is None or isinstance(runner, str):
        if runner not in _shared:
            raise OptionValueError(option, runner, "'inline', 'pool' or a runner object")
        runner = _shared[runner]
    if isinstance(runner, type) or not isinstance(runner, Runner):
        wanted = "'inline', 'pool' or a runner, an object with submit, drain and statistics"
        raise OptionTypeError(option, runner, wanted)
    for name in _METHODS:
        method = getattr(runner, name, None)
        if method is not None and not (callable(method) and is_plain(method)):
            wanted = f"a runner whose {name} is a plain method: no async def, no generator"
            raise OptionTypeError(option, runner, wanted)
    register(runner)
    return runner
