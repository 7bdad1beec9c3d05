"""``TaskRecorder``: what the pytest fixture ``background_tasks`` is. Imports no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ParamSpec

from wsgi_bg.callables import name_of

from . import Mode
from .watching import TEARDOWN_TIMEOUT, Watch

if TYPE_CHECKING:
    from wsgi_bg.task import BackgroundTask

P = ParamSpec("P")

_short = Repr()
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True)
class RecordedTask:
    """A task that the code under test has added.

    :ivar func: what it calls.
    :ivar args: its positional arguments.
    :ivar kwargs: its keyword arguments.
    :ivar path: the path of the request that has added it.
    :ivar name: ``module.qualname`` of the function.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    name: str

    def __str__(self) -> str:
        return f"{format_call(self.name, self.args, self.kwargs)} by {self.path}"


class TaskRecorder:
    """The background tasks of one test: what the fixture ``background_tasks`` is.

    Tasks that the outcome of their request keeps from running (``run_on``) are not among
    them. Each method and attribute first closes the streams that the test client has not
    read to their end. All may be used from any thread.

    :ivar mode: ``"record"``, ``"run"`` or ``"real"``.
    """

    def __init__(self, mode: Mode = "record") -> None:
        self.mode: Mode = mode
        self._watch = Watch(mode)

    @property
    def tasks(self) -> list[RecordedTask]:
        """The tasks, those that have run included; requests in the order of their end."""
        self._watch.close_streams()
        return [_recorded(task, path) for task, path in self._watch.added()]

    @property
    def errors(self) -> list[BaseException]:
        """What the tasks have raised so far. To read it is to have looked at all of them."""
        self._watch.close_streams()
        return self._watch.failures.look()

    def assert_added(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Check that ``add_task(func, *args, **kwargs)`` was called, with these arguments.

        They are compared by ``==``: :data:`unittest.mock.ANY` stands for any one.

        :raises AssertionError: if it was not; the message has what was.
        """
        __tracebackhide__ = True
        tasks = self.tasks
        wanted = (func, args, kwargs)  # on the left, for an ANY in it to be asked first
        if not any(wanted == (task.func, task.args, task.kwargs) for task in tasks):
            call = format_call(name_of(func), args, kwargs)
            raise AssertionError(f"{call} was not added; {self._describe(tasks)}")

    def assert_none(self) -> None:
        """Check that no task was added.

        :raises AssertionError: if one was; the message has them all.
        """
        __tracebackhide__ = True
        tasks = self.tasks
        if tasks:
            raise AssertionError(f"no task was expected; {self._describe(tasks)}")

    def run(self) -> None:
        """Run the recorded tasks that have not run, now, with what they add; blocks.

        In the order of :attr:`tasks`, each in the context variables of where it was added,
        plain functions on the calling thread.

        :raises BaseException: the first error that no one has looked at, after all have
            run. The others are logged, and are in :attr:`errors`.
        """
        __tracebackhide__ = True
        self._watch.close_streams()
        self._watch.run()
        self._watch.failures.raise_first()

    def join(self, timeout: float = TEARDOWN_TIMEOUT) -> None:
        """Wait until each response was closed and its tasks have run; blocks.

        On a server call it before you look at the tasks: a client may have its response
        before the server closes that. In mode ``"record"`` it waits for no task.

        :param timeout: seconds to wait at most.
        :raises TimeoutError: if something was not finished by then; it is named.
        :raises BaseException: else, the first error that no one has looked at.
        """
        __tracebackhide__ = True
        self._watch.close_streams()
        self._watch.join(timeout)
        self._watch.failures.raise_first()

    def _describe(self, tasks: list[RecordedTask]) -> str:
        text = "added were:" if tasks else "no task was added"
        text += _lines(tasks)
        lost = [_recorded(task, path) for task, path in self._watch.not_to_run()]
        if lost:
            text += "\nnot to run, after the way their request ended:" + _lines(lost)
        return text

    def __repr__(self) -> str:
        return f"<{type(self).__name__} mode={self.mode!r}>"


def _recorded(task: BackgroundTask, path: str) -> RecordedTask:
    return RecordedTask(task.func, task.args, task.kwargs, path, task.name)


def _lines(tasks: list[RecordedTask]) -> str:
    return "".join(f"\n  {task}" for task in tasks)


def format_call(name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as it is written, with long arguments shortened."""
    given = [_short.repr(arg) for arg in args]
    given += [f"{key}={_short.repr(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(given)})"
