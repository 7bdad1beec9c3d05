"""The seam for tests: observers see requests and their tasks, and may record the tasks.

The pytest plugin registers a function for the duration of a test. Without a registered
function each request pays for reading an attribute, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.background_tasks import TaskQueue
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import Runner


class Response(Protocol):
    """The response iterable of a request that has added tasks or may still add tasks.

    :ivar headers: headers of the last call of ``start_response``; None before that call.
    """

    @property
    def headers(self) -> Sequence[tuple[str, str]] | None: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Later(Protocol):
    """Tasks that wait for their time or to be sent, in no batch of the request."""

    @property
    def tasks(self) -> list[BackgroundTask]:
        """The tasks that are not done or sent."""

    @property
    def has_begun(self) -> bool:
        """True if the tasks do not wait any more."""

    @property
    def has_ended(self) -> bool:
        """True if no task is left."""

    def give_up(self) -> list[BackgroundTask]:
        """Wait no longer; claim and return the tasks."""


class RequestObserver:
    """Observes a request. The methods of this base class change nothing.

    :ivar waits: False if delays, and waits for a further attempt, are to be zero.
    :ivar holds: True if :meth:`submit` keeps the batch and runs no task: then no code may wait
        for the batch.
    """

    waits: bool = True
    holds: bool = False

    def new_list(self) -> list[BackgroundTask]:
        """Make the list of the request's tasks; called on the thread that adds the first.

        Two threads that add a task at once may both call this method, and use one list.
        """
        return []

    def respond(self, response: Response) -> Iterable[bytes]:
        """Return the response for the server; called when the middleware is about to return.

        Not called for a list or another iterable in which no code could add a task.
        """
        return response

    def submit(self, batch: Batch, runner: Runner) -> None:
        """Submit the request's batch; called once, on the thread that ends the request.

        :param runner: the application's runner, whose ``submit`` this method replaces.
        """
        runner.submit(batch)

    def put_off(self, later: Later) -> None:
        """A task is about to wait for its time, or to be sent; called before its wait."""

    def dropped(self, task: BackgroundTask) -> None:
        """A task will not run, since the attempt that has added it is repeated."""

    def skipped(self, task: BackgroundTask) -> None:
        """A task will not run, since the request or a task before has failed."""

    def task_failed(self, task: BackgroundTask, exc: BaseException) -> None:
        """A task has raised; called in the task's context, before ``on_error``."""


Observe = Callable[["TaskQueue", "WSGIEnvironment"], RequestObserver]


class Observers:
    """Registers the function that makes an observer for each request of this process.

    :ivar observe: called by the outermost middleware before the application is called; None
        outside of :meth:`registered`.
    """

    __slots__ = ("observe",)

    def __init__(self) -> None:
        self.observe: Observe | None = None

    @contextmanager
    def registered(self, observe: Observe) -> Iterator[None]:
        """Observe the requests that begin within this context, until they end."""
        before, self.observe = self.observe, observe
        try:
            yield
        finally:
            self.observe = before


observers: Observers = Observers()
