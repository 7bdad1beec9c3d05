"""``BackgroundTask``: a call to make later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from inspect import CO_COROUTINE
from types import FunctionType, MethodType
from typing import Any, Literal, ParamSpec, Protocol

from wsgi_bg._loop import portal
from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._process.interrupts import is_raised_here, stops_worker
from wsgi_bg._tasks.callables import NOT_PLAIN, is_async_callable, name_of

P = ParamSpec("P")


RunOn = Literal["success", "error", "always"]

CRASHED = 1000
"""In place of a status code if the application raised; counts as failed for each option."""


class Caller(Protocol):
    """Calls tasks, and observes their calls: see :class:`wsgi_bg._request.calls.Calls`."""

    def added(self, task: BackgroundTask, batch: Any) -> None: ...
    def send(self, task: BackgroundTask) -> bool: ...
    def send_or_make(self, task: BackgroundTask, done: Any) -> Any: ...
    def make(self, task: BackgroundTask, done: Any) -> Any: ...
    def finished(self, task: BackgroundTask) -> None: ...
    def failed(self, task: BackgroundTask, exc: BaseException) -> None: ...
    def discarded(self, task: BackgroundTask, reason: str) -> None: ...


class Layer:
    """The layer of middleware in which a task was added.

    This class itself is the layer of a task that was made by hand, and of a task that joined
    the list of a request without ``add_task``.

    :ivar run_on: after which requests the tasks run.
    :ivar failed_from: the lowest status that counts as a failure.
    :ivar calls: calls the tasks; None if their functions are called directly.
    :ivar on_error: called with a task and its error.
    :ivar stop_on_error: True if a task's error skips the rest of the batch.
    :ivar celery: options for Celery, ignored by every runner but ``CeleryRunner``.
    """

    __slots__ = ()

    run_on: RunOn = "success"
    failed_from: int = 500
    calls: Caller | None = None
    on_error: Callable[[BackgroundTask, BaseException], Any] | None = None
    stop_on_error: bool = False
    celery: Mapping[str, Any] | None = None

    def lets_run(self, status: int) -> bool:
        """True if a task runs after a request of this outcome.

        :param status: the status code of the response; 0 if there was none, CRASHED if the
            application raised.
        """
        return self.run_on == "always" or (self.run_on == "error") == (
            status >= self.failed_from
        )

    def why_not_run(self, status: int) -> str:
        """Return the reason why :meth:`lets_run` is False, for logs and hooks."""
        outcome = "failed" if status >= self.failed_from else "succeeded"
        if status and status != CRASHED:
            outcome += f" with {status}"
        return f"the request {outcome}, and run_on is {self.run_on!r}"


_NO_LAYER = Layer()

CLAIMED: list[None] = []
"""``_unclaimed`` of all claimed tasks; always empty."""


class BackgroundTask:
    """A call to make later.

    :param func: a plain or ``async def`` function, or anything callable. Positional
        only, so that ``kwargs`` may have any name.
    :raises TypeError: if ``func`` cannot run as a task, because ``func`` is not callable, a
        generator function, or a coroutine object.

    :ivar func: the function to call.
    :ivar args: positional arguments of the call.
    :ivar kwargs: keyword arguments of the call.
    :ivar is_async: True if ``func`` is known to return an awaitable: an ``async def``
        function, a :func:`functools.partial` of an async function, an object with an async
        ``__call__``. An awaitable that any other function returns is awaited too.
    """

    __slots__ = (
        "__weakref__",
        "_context",
        "_generation",
        "_message",
        "_options",
        "_record",
        "_unclaimed",
        "_unowned",
        "args",
        "func",
        "is_async",
        "kwargs",
    )

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_async: bool
    _generation: int  # only if added by a hook, an on_error or a teardown: see successors
    _message: Any  # only if the runner has check(): its result, until send() gets it
    _record: list[Any]  # only if hooks observe the task: the record that the hooks get
    _unclaimed: list[None]
    _unowned: list[None]  # only if the task was made by hand

    def __init__(self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        self._fill(func, args, kwargs, None, _NO_LAYER)
        self._unowned = [None]

    def _fill(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Context | None,
        options: Layer,
    ) -> None:
        flags = NOT_PLAIN
        if type(func) is FunctionType or (
            type(func) is MethodType and type(func.__func__) is FunctionType
        ):
            flags = func.__code__.co_flags & NOT_PLAIN
        if flags == 0:
            self.is_async = False
        elif flags == CO_COROUTINE:
            self.is_async = True
        else:
            self.is_async = is_async_callable(func)
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self._context = context
        self._options = options
        self._unclaimed = [None]

    @property
    def name(self) -> str:
        """``module.qualname`` of the function, for logs."""
        return name_of(self.func)

    @property
    def options(self) -> Layer:
        """The options of the layer or view in which the task was added, for runners."""
        return self._options

    @property
    def has_message(self) -> bool:
        """True if the runner's ``check`` has returned a message that was not sent yet."""
        return getattr(self, "_message", None) is not None

    def __call__(self) -> Any:
        """Make the call now and return its result; blocks until the call is done.

        A plain function runs on the calling thread, an awaitable on the portal's thread. If
        the task was added to a batch, the call runs in the context of that moment.

        :raises BaseException: the error of the call.
        :raises RuntimeError: for an async call from the portal's own thread.
        """
        context = copy_context() if self._context is None else self._context
        return self._call_in(detached(context))

    def _call_in(self, context: Context) -> Any:
        calls = self._options.calls
        if calls is None:
            return self._finish(context, context.run(self.func, *self.args, **self.kwargs))
        try:
            result = self._finish(context, context.run(calls.make, self, None))
        except BaseException as exc:
            if stops_worker(exc):  # the loop may still run in this context
                calls.discarded(self, f"{type(exc).__name__} stopped its worker")
            else:
                context.run(calls.failed, self, exc)
            raise
        context.run(calls.finished, self)
        return result

    def _finish(self, context: Context, result: Any) -> Any:
        """Return ``result``; if ``result`` is awaitable, await it and return its result."""
        if result is not None and inspect.isawaitable(result):
            result, error = portal.wait_for(context, result)
            if error is not None:
                raise error
        return result

    def _claim(self) -> bool:
        """Claim the right to run or log this task; True for a single caller only.

        ``list.pop`` is an atomic operation on every Python, also on free-threaded builds
        (deleting a slot is not atomic before 3.14.5). Unlike a lock, an interrupted pop
        leaves nothing locked for a signal handler or a fork.
        """
        try:
            self._unclaimed.pop()
        except IndexError as exc:
            if not is_raised_here(exc):
                raise
            return False
        self._unclaimed = CLAIMED  # frees the list
        return True

    def _owned(self, options: Layer) -> BackgroundTask:
        """Return this task for a new batch, or a copy if another batch owns this task."""
        try:
            self._unowned.pop()
        except (AttributeError, IndexError):
            task = BackgroundTask.__new__(BackgroundTask)
            task._fill(self.func, self.args, self.kwargs, copy_context(), options)
            return task
        self._context = copy_context()
        self._options = options
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
