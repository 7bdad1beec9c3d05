"""Options of the tasks of a middleware layer: when tasks run, and the effect of an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from wsgi_bg._tasks import successors
from wsgi_bg._tasks.callables import is_plain
from wsgi_bg._tasks.checks import WhenUnsent, check_when_unsent, whole_number
from wsgi_bg._tasks.registry import (
    copy_engine_options,
    has_retries,
    options_of,
    retry_of,
)
from wsgi_bg._tasks.retry import Plan, Retry, check_retry, wait
from wsgi_bg._tasks.task import DIRECT, BackgroundTask, Caller, Layer, RunOn
from wsgi_bg.exceptions import OptionTypeError, OptionValueError

OnError = Callable[[BackgroundTask, BaseException], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Options(Layer):
    """Options that a task keeps from the layer in which the task was added.

    :ivar celery: options for Celery, ignored by every runner but ``CeleryRunner``.
    :ivar engine: options for the engine of the runner, which checks them in ``check``.
    :ivar when_unsent: for a task that cannot be sent; None for the function's or the runner's.
    :ivar request_label: makes the label of a request from its environ; None for the default.
    :ivar runner: runs the tasks; None in a ``BackgroundTasks`` that was made by hand.
    :ivar runner_is_default: True if the runner is a default, which an inner layer may replace.
    :ivar calls: calls the tasks.
    :ivar check: the runner's method, called with each added task; may return a message.
    :ivar added: called with each added task, to record the place of the call.
    :ivar layer: the options of the layer, if ``using`` has made these options; else None.
    :ivar is_watched: True if :meth:`admit` must be called for each added task.
    """

    run_on: RunOn = "success"
    failed_from: int = 500
    on_error: OnError | None = None
    stop_on_error: bool = False
    celery: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    retry: Retry | None = None
    delay: float = 0.0
    when_unsent: WhenUnsent | None = None
    request_label: Callable[[Any], str] | None = None
    runner: Any = None
    runner_is_default: bool = False
    calls: Caller = DIRECT
    check: Callable[[BackgroundTask], Any] | None = None
    added: Callable[[BackgroundTask], object] | None = None
    layer: Options | None = None
    is_watched: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        is_watched = bool(self.check or self.added or self.on_error or self.calls is not DIRECT)
        is_watched = is_watched or bool(self.retry or self.delay)
        object.__setattr__(self, "is_watched", is_watched)  # the class is frozen

    def of_layer(self, default: Layer) -> Options:
        """See :class:`Layer`."""
        return self.layer or self

    def admit(self, task: BackgroundTask, batch: Any) -> None:
        """Let the runner check a task that is about to join ``batch``, and call the hooks.

        :raises TypeError: if the runner refuses the task.
        :raises RuntimeError: if the task belongs to an endless row of tasks, or too many
            tasks wait for their time already.
        """
        if self.added is not None:
            self.added(task)
        successors.admit(task, batch)
        if has_retries or self.retry is not None or self.delay:
            self._plan(task, batch)
        if self.check is not None:
            task.message = self.check(task)
        self.calls.added(task, batch)

    def _plan(self, task: BackgroundTask, batch: Any) -> None:
        retry = self.retry or retry_of(task.func)
        if retry is None and not self.delay:
            return
        task.plan = Plan(retry)
        batch.admit_wait(task)
        if retry is not None:
            task.keep_context()

    def override(
        self,
        *,
        run_on: RunOn | None = None,
        failed_from: int | None = None,
        on_error: OnError | None = None,
        stop_on_error: bool | None = None,
        celery: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
        delay: float | None = None,
        when_unsent: WhenUnsent | None = None,
    ) -> Options:
        """Return a copy of these options, in which each argument that is not None is set.

        :raises ValueError: if ``run_on`` is none of the three words, ``failed_from`` is not
            from 100 to 600, ``delay`` is not a bounded number from 0 on, ``celery`` has an
            unknown option, both set the time, or ``when_unsent`` is an unknown word.
        :raises TypeError: if ``failed_from`` is not a whole number, ``on_error`` is not a
            plain callable, ``stop_on_error`` is not a bool, ``retry`` is not a ``Retry``,
            ``delay`` is not a number, ``engine`` is not a dict, or an option in ``celery`` is
            of the wrong type.
        """
        if run_on is not None and run_on not in get_args(RunOn):
            raise OptionValueError("run_on", run_on, "'success', 'error' or 'always'")
        if failed_from is not None:
            whole_number("failed_from", failed_from, least=100, most=600)
        if on_error is not None and (not callable(on_error) or not is_plain(on_error)):
            raise OptionTypeError(
                "on_error", on_error, "a plain function that takes the task and its error"
            )
        if stop_on_error is not None and not isinstance(stop_on_error, bool):
            raise OptionTypeError("stop_on_error", stop_on_error, "True or False")
        if celery is not None:
            celery = options_of("celery").for_one_call(celery)
        if engine is not None:
            engine = copy_engine_options(engine)
        check_retry(retry)
        if when_unsent is not None:
            check_when_unsent(when_unsent)
        if delay is not None:
            wait("delay", delay)
        given = {
            "run_on": run_on,
            "failed_from": failed_from,
            "on_error": on_error,
            "stop_on_error": stop_on_error,
            "celery": celery,
            "engine": engine,
            "retry": retry,
            "delay": delay,
            "when_unsent": when_unsent,
        }
        set_here: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        options = replace(self, layer=self.of_layer(self), **set_here)
        if options.delay and options.celery:
            options_of("celery").refuse_time(options.celery, options.delay)
        return options


DEFAULTS = Options()
