"""Runners: where and when the tasks of a request run."""

from __future__ import annotations

from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.shutdown import register

from .base import Runner, Statistics
from .inline import InlineRunner
from .pool import PoolRunner, shared_pool

__all__ = ["InlineRunner", "PoolRunner", "Runner", "Statistics", "resolve", "set_default"]

_shared: dict[str | None, Runner] = {"inline": InlineRunner(), "pool": shared_pool}
_shared[None] = _shared["inline"]


def set_default(name: str) -> None:
    """Have None mean the shared runner of that name, for middleware made from now on.

    For a process that ``wsgi-bg`` has started, before it imports the application.
    """
    _shared[None] = _shared[name]


def resolve(runner: Runner | str | None) -> Runner:
    """The runner that an application's ``runner`` option means.

    None is ``"inline"``, or what :func:`set_default` was given.

    :raises ValueError: for a name that is none.
    :raises TypeError: for an object that is no runner.
    """
    if runner is None or isinstance(runner, str):
        if runner not in _shared:
            raise OptionValueError("runner", runner, "'inline', 'pool' or a runner object")
        runner = _shared[runner]
    if isinstance(runner, type) or not isinstance(runner, Runner):
        raise OptionTypeError(
            "runner", runner, "'inline', 'pool' or an object with submit, drain and statistics"
        )
    register(runner)
    return runner
