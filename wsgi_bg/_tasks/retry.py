"""``Retry``: when a task that raised is called again; and the plan of a task with attempts."""

from __future__ import annotations

import random
from contextvars import Context, ContextVar
from dataclasses import KW_ONLY, dataclass
from inspect import isclass
from threading import TIMEOUT_MAX

from wsgi_bg._tasks.checks import seconds, whole_number
from wsgi_bg.exceptions import OptionTypeError, OptionValueError

_CLASSES = "an exception class, or a tuple of exception classes"


@dataclass(frozen=True, slots=True)
class Retry:
    """When a task that raised is called again.

    Before the second call the task waits for ``first`` seconds, before each later call
    ``factor`` times as long as before, but never longer than ``longest`` seconds. The wait
    holds no thread and no other task. With ``jitter`` each wait is a random time from half of
    that to the whole, so that tasks that failed together do not come back together.

    A ``Retry`` holds for a function, ``@registered_task(retry=...)``, or for single tasks,
    ``tasks.using(retry=...)``, which overrides the function's. ``Retry(attempts=1)`` turns
    the retries of a function off. The object cannot change, and may be shared by threads.

    :param attempts: the most calls in all, with the first.
    :param on: the exceptions after which the task is called again; after all others the task
        has failed at once.
    :param first: the wait before the second call, in seconds.
    :param factor: by how much each further wait is longer than the wait before.
    :param longest: the longest wait, in seconds.
    :param jitter: False for waits of exactly these lengths.
    :raises TypeError: if an argument has the wrong type; a bool is not a number.
    :raises ValueError: if a number is out of range, or ``on`` is empty.
    """

    attempts: int = 3
    _: KW_ONLY
    on: type[BaseException] | tuple[type[BaseException], ...] = (Exception,)
    first: float = 1.0
    factor: float = 2.0
    longest: float = 600.0
    jitter: bool = True

    def __post_init__(self) -> None:
        whole_number("attempts", self.attempts, least=1)
        classes = self.on if isinstance(self.on, tuple) else (self.on,)
        if not all(isclass(each) and issubclass(each, BaseException) for each in classes):
            raise OptionTypeError("on", self.on, _CLASSES)
        if not classes:
            raise OptionValueError("on", self.on, _CLASSES)
        wait("first", self.first)
        wait("longest", self.longest)
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
            raise OptionTypeError("factor", self.factor, "a number")
        if not 1 <= self.factor <= TIMEOUT_MAX:
            raise OptionValueError("factor", self.factor, "a finite number, 1 or more")
        if not isinstance(self.jitter, bool):
            raise OptionTypeError("jitter", self.jitter, "True or False")

    def wait_before(self, attempt: int) -> float:
        """The seconds to wait before call number ``attempt``: 0 before the first.

        With ``jitter`` each call of this method returns another random time.
        """
        if attempt <= 1:
            return 0.0
        try:
            time = float(min(self.longest, self.first * self.factor ** (attempt - 2)))
        except OverflowError:
            time = float(self.longest) if self.first else 0.0
        # Not the shared generator: a test or an application may have seeded it.
        return time * _random.uniform(0.5, 1.0) if self.jitter else time

    def allows(self, attempt: int, exc: BaseException) -> bool:
        """True if a task whose call number ``attempt`` raised ``exc`` is called again."""
        classes = self.on if isinstance(self.on, tuple) else (self.on,)
        # As "except" compares: isinstance() calls code of a metaclass, which may raise.
        return attempt < self.attempts and any(
            type.__subclasscheck__(each, type(exc)) for each in classes
        )


def check_retry(given: object) -> None:
    """Raise unless ``given`` is a :class:`~wsgi_bg.Retry` or None.

    :raises TypeError: if ``given`` is of another type.
    """
    if given is not None and not isinstance(given, Retry):
        raise OptionTypeError("retry", given, "a wsgi_bg.Retry, such as Retry(attempts=3)")


_random = random.SystemRandom()


def wait(option: str, given: object) -> None:
    """Raise unless ``given`` is a finite number of seconds, 0 or more.

    :raises TypeError: if ``given`` is no number.
    :raises ValueError: if ``given`` is out of range.
    """
    seconds(option, given, most=TIMEOUT_MAX)


_attempt: ContextVar[object] = ContextVar("wsgi_bg.attempt")
"""Marks the context of an attempt, and so the tasks that the attempt has added."""


class Plan:
    """The attempts of a task that has a delay or a :class:`Retry`; other tasks have no plan.

    The copies of a task, one for each wait, share the plan.

    :ivar retry: None for a task that is not called again.
    :ivar context: the context variables that each attempt begins with; None if the task has
        no ``retry``.
    :ivar attempt: the number of the last call that has begun, or of the call to come.
    :ivar calls: the calls so far, if the task has a ``retry``.
    :ivar due: when the delay is over, by the clock of the timer; None before the delay begins.
    :ivar is_due: True once the task waits for no time any more.
    :ivar on_worker: True if an engine makes the further attempts, on any of its workers.
    """

    __slots__ = ("_mark", "attempt", "calls", "context", "due", "is_due", "on_worker", "retry")

    def __init__(
        self, retry: Retry | None, attempt: int = 1, *, on_worker: bool = False
    ) -> None:
        self.retry: Retry | None = retry
        self.context: Context | None = None
        self.attempt: int = attempt
        self.calls: int = 0
        self.due: float | None = None
        self.is_due: bool = False
        self.on_worker: bool = on_worker
        self._mark: object = None

    def begin(self) -> Context:
        """Return a new context for the next attempt."""
        assert self.context is not None
        context = self.context.copy()
        self._mark = object()
        context.run(_attempt.set, self._mark)
        return context

    def has_added(self, context: Context | None) -> bool:
        """True if the last attempt has added the task with this context."""
        return context is not None and context.get(_attempt) is self._mark is not None


class NotSent(Exception):  # noqa: N818
    """A task with a delay could not be sent before its time, and has to wait here."""
