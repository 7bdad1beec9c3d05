"""Runners decide on which thread and when the tasks of a request run."""

from __future__ import annotations

from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.runners.base import Runner, Statistics
from wsgi_bg.runners.inline import InlineRunner
from wsgi_bg.runners.pool import PoolRunner, shared_pool
from wsgi_bg.runners.shutdown import register

__all__ = ["InlineRunner", "PoolRunner", "Runner", "Statistics", "resolve", "set_default"]

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
    :raises TypeError: if the object is not a runner.
    """
    if runner is None or isinstance(runner, str):
        if runner not in _shared:
            raise OptionValueError(option, runner, "'inline', 'pool' or a runner object")
        runner = _shared[runner]
    if isinstance(runner, type) or not isinstance(runner, Runner):
        wanted = "'inline', 'pool' or a runner, an object with submit, drain and statistics"
        raise OptionTypeError(option, runner, wanted)
    register(runner)
    return runner
