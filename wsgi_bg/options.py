"""How the tasks of one middleware layer run: when, and what an error does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from .callables import is_coroutine_callable
from .exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from .runners.base import Runner
    from .task import BackgroundTask

RunOn = Literal["success", "error", "always"]
OnError = Callable[["BackgroundTask", BaseException], Any]
Check = Callable[["BackgroundTask"], None]


class Given(TypedDict):
    """The options of one layer; None for one that it does not set."""

    run_on: RunOn | None
    on_error: OnError | None
    stop_on_error: bool | None


class Options:
    """What a task keeps of the layer that it was added in. Never changed once made."""

    __slots__ = ("check", "on_error", "run_on", "runner", "runs_after", "stop_on_error")

    def __init__(
        self,
        run_on: RunOn = "success",
        on_error: OnError | None = None,
        stop_on_error: bool = False,
        runner: Runner | None = None,
    ) -> None:
        self.run_on = run_on
        self.on_error = on_error
        self.stop_on_error = stop_on_error
        self.runner = runner
        # Whether a task runs: [False] after a request that succeeded, [True] that failed.
        self.runs_after = (run_on != "error", run_on != "success")
        self.check: Check | None = getattr(runner, "check", None)

    def override(
        self, run_on: RunOn | None, on_error: OnError | None, stop_on_error: bool | None
    ) -> Options:
        """These options, but for those that are given and not None.

        :raises ValueError: if ``run_on`` is none of the three words.
        :raises TypeError: if ``on_error`` is no plain callable, ``stop_on_error`` no bool.
        """
        if run_on is not None and run_on not in get_args(RunOn):
            raise OptionValueError("run_on", run_on, "'success', 'error' or 'always'")
        if on_error is not None and (not callable(on_error) or is_coroutine_callable(on_error)):
            raise OptionTypeError(
                "on_error", on_error, "a plain function that takes the task and its error"
            )
        if stop_on_error is not None and not isinstance(stop_on_error, bool):
            raise OptionTypeError("stop_on_error", stop_on_error, "True or False")
        return Options(
            self.run_on if run_on is None else run_on,
            self.on_error if on_error is None else on_error,
            self.stop_on_error if stop_on_error is None else stop_on_error,
            self.runner,
        )


DEFAULTS = Options()
