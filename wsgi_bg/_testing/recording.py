"""``TaskRecorder``: the value of the fixture ``background_tasks``. Imports no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ParamSpec

from wsgi_bg._tasks.callables import name_of
from wsgi_bg._testing.session import TEARDOWN_TIMEOUT, RecordingSession

if TYPE_CHECKING:
    from wsgi_bg._testing import Mode

P = ParamSpec("P")

_short = Repr()
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True)
class RecordedTask:
    """A task that the code under test has added.

    :ivar func: the function.
    :ivar args: the positional arguments.
    :ivar kwargs: the keyword arguments.
    :ivar path: the path of the request that has added the task.
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
    """The background tasks of one test; the value of the fixture ``background_tasks``.

    Tasks that are skipped because of their request's outcome (``run_on``) do not count. Each
    method and attribute first closes the streams that the test client has not read to their
    end. All may be used from any thread.

    :ivar mode: ``"record"``, ``"run"`` or ``"real"``.
    """

    def __init__(self, session: RecordingSession) -> None:
        self.mode: Mode = session.mode
        self._session = session

    @property
    def tasks(self) -> list[RecordedTask]:
        """All tasks, including finished tasks, in the order in which their requests ended."""
        self._session.close_streams()
        return self._added()

    @property
    def errors(self) -> list[BaseException]:
        """The tasks' errors so far. Reading this attribute marks all these errors as read."""
        self._session.close_streams()
        return self._session.errors()

    def assert_added(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Check that ``add_task(func, *args, **kwargs)`` was called, with these arguments.

        Arguments are compared by ``==``: :data:`unittest.mock.ANY` equals any argument.

        :raises AssertionError: if no such task was added; the message lists the added tasks.
        """
        __tracebackhide__ = True
        tasks = self.tasks
        wanted = (func, args, kwargs)  # on the left, so that ANY's == is tried first
        if not any(wanted == (task.func, task.args, task.kwargs) for task in tasks):
            call = format_call(name_of(func), args, kwargs)
            raise AssertionError(f"{call} was not added; {self._describe(tasks)}")

    def assert_none(self) -> None:
        """Check that no task was added.

        :raises AssertionError: if a task was added; the message lists all added tasks.
        """
        __tracebackhide__ = True
        tasks = self.tasks
        if tasks:
            raise AssertionError(f"no task was expected; {self._describe(tasks)}")

    def run(self) -> None:
        """Run the recorded tasks that have not run, and any tasks that they add; blocks.

        The tasks run in the order of :attr:`tasks`, each in the context of its ``add_task``
        call; plain functions run on the calling thread.

        :raises BaseException: after all tasks have run, the first error that the test has
            not read. All errors are logged, and are in :attr:`errors`.
        """
        __tracebackhide__ = True
        self._session.close_streams()
        self._session.run()
        self._session.raise_first()

    def join(self, timeout: float = TEARDOWN_TIMEOUT) -> None:
        """Wait until all responses are closed and their tasks have run; blocks.

        With a real server call this method before you read the tasks: a client may have its
        response before the server closes the response. In mode ``"record"`` this method
        waits for responses only.

        :param timeout: seconds to wait at most.
        :raises TimeoutError: if a response or task is unfinished; the message names each.
        :raises BaseException: else, the first error that the test has not read.
        """
        __tracebackhide__ = True
        self._session.close_streams()
        self._session.join(timeout)
        self._session.raise_first()

    def _added(self, *, runs: bool = True) -> list[RecordedTask]:
        """Return the tasks that run, or do not run, after the outcome of their request."""
        return [
            RecordedTask(task.func, task.args, task.kwargs, request.path, task.name)
            for request in self._session.closed
            for task in request.added
            if request.batch and request.batch.lets_run(task) is runs
        ]

    def _describe(self, tasks: list[RecordedTask]) -> str:
        lines = ["added were:" if tasks else "no task was added"]
        lines += [f"  {task}" for task in tasks]
        if skipped := self._added(runs=False):
            lines.append("not to run, after the way their request ended:")
            lines += [f"  {task}" for task in skipped]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} mode={self.mode!r}>"


def format_call(name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """Format a call as in source code, with long arguments shortened."""
    given = [_short.repr(arg) for arg in args]
    given += [f"{key}={_short.repr(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(given)})"
