"""Options of the tasks of a middleware layer: when tasks run, and the effect of an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from wsgi_bg._tasks import successors
from wsgi_bg._tasks.callables import is_coroutine_callable
from wsgi_bg._tasks.calls import Around, Calls
from wsgi_bg._tasks.checks import whole_number
from wsgi_bg._tasks.hooks import HOOKS, Hooks
from wsgi_bg._tasks.registry import options_of
from wsgi_bg.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners.base import Runner

RunOn = Literal["success", "error", "always"]

CRASHED = 1000
"""In place of a status code if the application raised; counts as failed for each option."""

OnError = Callable[["BackgroundTask", BaseException], Any]


class OptionOverrides(TypedDict, total=False):
    """The options that a layer sets; an unset option is None or left out."""

    run_on: RunOn | None
    failed_from: int | None
    on_error: OnError | None
    stop_on_error: bool | None
    hooks: Hooks | Sequence[Hooks] | None
    around: Around | None


class Options:
    """Options that a task keeps from the layer in which the task was added. Immutable.

    :ivar is_watched: True if :meth:`admit` must be called for each added task.
    :ivar calls: calls the tasks; None if their functions are called directly.
    :ivar runner_is_default: True if the runner is a default, which an inner layer may replace.
    :ivar celery: options for Celery, ignored by every runner but ``CeleryRunner``.
    """

    __slots__ = (
        "_added",
        "_around",
        "_check",
        "_hooks",
        "_runs_after",
        "calls",
        "celery",
        "failed_from",
        "is_watched",
        "on_error",
        "run_on",
        "runner",
        "runner_is_default",
        "stop_on_error",
    )

    def __init__(
        self,
        run_on: RunOn = "success",
        on_error: OnError | None = None,
        stop_on_error: bool = False,
        runner: Runner | None = None,
        hooks: tuple[Hooks, ...] = (),
        around: Around | None = None,
        celery: Mapping[str, Any] | None = None,
        runner_is_default: bool = False,
        failed_from: int = 500,
    ) -> None:
        self.run_on = run_on
        self.failed_from: int = failed_from
        self.on_error: OnError | None = on_error
        self.stop_on_error: bool = stop_on_error
        self.runner: Runner | None = runner
        self.celery: Mapping[str, Any] | None = celery
        self.runner_is_default: bool = runner_is_default
        # True if a task runs: [False] after a request that succeeded, [True] after a failed
        # request.
        self._runs_after = (run_on != "error", run_on != "success")
        self._hooks = hooks
        self._around = around
        send = getattr(runner, "send", None)
        may_send = getattr(runner, "may_send", None)
        self.calls: Calls | None = None
        if hooks or around or send:
            self.calls = Calls(hooks, around, send, may_send)
        self._check: Callable[[BackgroundTask], Any] | None = getattr(runner, "check", None)
        # ``around`` may define ``added(task)``, to record where each task was added.
        self._added: Callable[[BackgroundTask], None] | None = getattr(around, "added", None)
        self.is_watched: bool = bool(hooks or self._check or around or on_error)

    def admit(self, task: BackgroundTask, batch: BackgroundTasks) -> None:
        """Let the runner check a task that is about to join ``batch``, and call the hooks.

        :raises TypeError: if the runner refuses the task.
        :raises RuntimeError: if the task belongs to an endless row of tasks.
        """
        successors.admit(task, batch)
        if self._check is not None:
            task._message = self._check(task)
        if self._added is not None:
            self._added(task)
        if self.calls is not None:
            self.calls.added(task, batch)

    def lets_run(self, status: int) -> bool:
        """True if a task runs after a request of this outcome.

        :param status: the status code of the response; 0 if there was none, CRASHED if the
            application raised.
        """
        return self._runs_after[status >= self.failed_from]

    def why_not_run(self, status: int) -> str:
        """Return the reason why :meth:`lets_run` is False, for logs and hooks."""
        outcome = "failed" if status >= self.failed_from else "succeeded"
        if status and status != CRASHED:
            outcome += f" with {status}"
        return f"the request {outcome}, and run_on is {self.run_on!r}"

    def override(
        self,
        run_on: RunOn | None = None,
        on_error: OnError | None = None,
        stop_on_error: bool | None = None,
        hooks: Hooks | Sequence[Hooks] | None = None,
        around: Around | None = None,
        celery: Mapping[str, Any] | None = None,
        runner: Runner | None = None,
        failed_from: int | None = None,
    ) -> Options:
        """Return a copy of these options, in which each argument that is not None is set.

        :raises ValueError: if ``run_on`` is none of the three words, ``failed_from`` is not
            from 100 to 600, or ``celery`` has an unknown option.
        :raises TypeError: if ``failed_from`` is not a whole number, ``on_error`` is not a
            plain callable, ``stop_on_error`` is not a bool, ``hooks`` is not a
            :class:`~wsgi_bg.hooks.Hooks` object or a list of them, or an option in
            ``celery`` is of the wrong type.
        """
        if run_on is not None and run_on not in get_args(RunOn):
            raise OptionValueError("run_on", run_on, "'success', 'error' or 'always'")
        if failed_from is not None:
            whole_number("failed_from", failed_from, least=100, most=600)
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
            self.runner if runner is None else runner,
            self._hooks if hooks is None else _as_tuple(hooks),
            self._around if around is None else around,
            self.celery if celery is None else options_of("celery").for_one_call(celery),
            self.runner_is_default and runner is None,
            self.failed_from if failed_from is None else failed_from,
        )


def _as_tuple(hooks: Hooks | Sequence[Hooks]) -> tuple[Hooks, ...]:
    several = tuple(hooks) if isinstance(hooks, (list, tuple)) else (hooks,)
    if not all(isinstance(each, Hooks) for each in several):
        raise OptionTypeError("hooks", hooks, "a wsgi_bg.hooks.Hooks object, or a list of them")
    for each in several:
        if any(is_coroutine_callable(getattr(each, name)) for name in HOOKS):
            raise OptionTypeError("hooks", each, "of plain functions; one is an async def")
    return several


DEFAULTS = Options()
