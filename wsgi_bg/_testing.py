"""Records the requests of one test, their tasks and errors; behind the pytest plugin.

Flask's and Werkzeug's test clients call a response's ``close()`` only on request, and without
``close()`` no task runs. So while a test is recorded, a test client gets a response that is
already read and closed, or a stream that closes itself at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from wsgi_bg._request.observer import Later, RequestObserver, Response, observers
from wsgi_bg._request.servers import declared_length, is_test_client
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.callables import name_of
from wsgi_bg._tasks.checks import bounded, seconds
from wsgi_bg._tasks.task import plan_of
from wsgi_bg._tasks.task_log import notify_discarded
from wsgi_bg.runners import resolve

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.background_tasks import TaskQueue
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import Runner

P = ParamSpec("P")

Mode = Literal["record", "run", "real"]

TEARDOWN_TIMEOUT = 10.0
"""Seconds for which the end of a test waits for unfinished tasks."""

_POLL = 0.001  # seconds

_OVER = "the test is over"
_NOTE = "A background task raised this, and the test did not look at it."

_short = Repr()
_short.maxstring = _short.maxother = 200


@contextmanager
def recording(mode: Mode) -> Iterator[TaskRecorder]:
    """Record all requests that begin; on leaving, finish or drop the test's tasks.

    :raises TimeoutError: on leaving, if tasks are not done in time.
    :raises BaseException: on leaving, the error that the test has not read.
    """
    __tracebackhide__ = True
    recorder = TaskRecorder(mode)
    with observers.registered(partial(_Request, recorder)):
        yield recorder
        recorder._finish()


@dataclass(frozen=True)
class RecordedTask:
    """A task that the code under test has added.

    :ivar func: the function.
    :ivar args: the positional arguments.
    :ivar kwargs: the keyword arguments.
    :ivar path: the path of the request that has added the task.
    :ivar name: ``module.qualname`` of the function.
    :ivar attempts: how often the function was called when :attr:`TaskRecorder.tasks` was read.
    :ivar delay: the seconds given to ``using(delay=...)``.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    name: str
    attempts: int = field(default=0, compare=False)
    delay: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{format_call(self.name, self.args, self.kwargs)} by {self.path}"


class TaskRecorder:
    """The background tasks of one test; the value of the fixture ``background_tasks``.

    Tasks that are skipped because of their request's outcome (``run_on``) do not count. Each
    method and attribute first closes the streams that the test client has not read to their
    end. All may be used from any thread.

    In the modes ``"record"`` and ``"run"`` delays are zero, and the next attempt of a task with
    a ``Retry`` follows at once, before the tasks added after it.

    :ivar mode: ``"record"``, ``"run"`` or ``"real"``.
    """

    # Class attributes, because freezegun replaces only module attributes.
    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self._requests: list[_Request] = []
        # The requests with tasks, in the order in which their responses were closed.
        self._closed: list[_Request] = []
        self._not_run: list[Batch] = []
        self._streams: list[_Stream] = []
        self._failures: list[_Failure] = []

    @property
    def tasks(self) -> list[RecordedTask]:
        """All tasks, including finished tasks, in the order in which their requests ended."""
        self._close_streams()
        return self._added()

    @property
    def errors(self) -> list[BaseException]:
        """The tasks' errors so far. Reading this attribute marks all these errors as read."""
        self._close_streams()
        failures = list(self._failures)
        for failure in failures:
            failure.is_read = True
        return [failure.error for failure in failures]

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
        self._close_streams()
        while True:
            try:
                batch = self._not_run.pop(0)
            except IndexError:
                break  # another thread may have popped the last batch
            batch.run()
        self._raise_first()

    def join(self, timeout: float = TEARDOWN_TIMEOUT) -> None:
        """Wait until all responses are closed and their tasks have run; blocks.

        With a real server call this method before you read the tasks: a client may have its
        response before the server closes the response. In mode ``"record"`` this method
        waits for responses only. In mode ``"real"`` a task for another process is waited for
        until its broker has confirmed the message, or the task has run here in place of that.

        :param timeout: seconds to wait at most.
        :raises TimeoutError: if a response or task is unfinished; the message names each.
        :raises BaseException: else, the first error that the test has not read.
        :raises TypeError: if ``timeout`` is not a number.
        :raises ValueError: if ``timeout`` is negative.
        """
        __tracebackhide__ = True
        seconds("timeout", timeout)
        timeout = bounded(timeout)
        self._close_streams()
        self._wait(timeout, lambda request: self.mode != "record" or request.batch is None)
        self._raise_first()

    def _finish(self) -> None:
        """Finish or drop the test's tasks, then raise the first error that is not read."""
        __tracebackhide__ = True
        try:
            try:
                self._close_streams()
            finally:
                if self.mode != "record":
                    self._wait(TEARDOWN_TIMEOUT, lambda request: bool(request.added))
        finally:
            for request in self._requests:
                if self.mode == "real":
                    request.give_up()
                else:
                    request.drop()
            self._raise_first(note=_NOTE)

    def _close_streams(self) -> None:
        with ExitStack() as stack:  # closes all streams, even if a close() raises
            for stream in reversed(self._streams):
                stack.callback(stream.cut)

    def _wait(self, timeout: float, is_meant: Callable[[_Request], bool]) -> None:
        __tracebackhide__ = True
        deadline = self._now() + timeout
        while left := [each for each in self._requests if is_meant(each) and not each.is_over]:
            if self._now() >= deadline:
                names = "; ".join(request.describe() for request in left)
                raise TimeoutError(f"not finished after {timeout:g} s: {names}")
            self._sleep(_POLL)

    def _raise_first(self, request: _Request | None = None, *, note: str = "") -> None:
        """Raise the first error, of ``request`` or of all, that the test has not read."""
        __tracebackhide__ = True
        for failure in self._failures:
            if not failure.is_read and request in (None, failure.request):
                failure.is_read = True
                if note:
                    failure.error.add_note(note)
                raise failure.error

    def _added(self, *, runs: bool = True) -> list[RecordedTask]:
        """Return the tasks that run, or do not run, after the outcome of their request."""
        return [
            RecordedTask(
                task.func,
                task.args,
                task.kwargs,
                request.path,
                task.name,
                attempts=request.attempts_of(task),
                delay=task.options.delay,
            )
            for request in self._closed
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


@dataclass
class _Failure:
    request: _Request
    error: BaseException
    is_read: bool = False  # by the test


class _Request(RequestObserver):
    """A request that began while its test was recorded; for any thread.

    :ivar path: the path of the request's URL, including ``SCRIPT_NAME``.
    :ivar added: the added tasks, without those that the application has run by hand, and
        those that a repeated attempt has added.
    :ivar batch: the request's batch; None before the response is closed, or without tasks.
    """

    def __init__(
        self, recorder: TaskRecorder, tasks: TaskQueue, environ: WSGIEnvironment
    ) -> None:
        path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        # PEP 3333, "Unicode"
        self.path: str = path.encode("latin-1").decode("utf-8", "replace")
        self.added: list[BackgroundTask] = []
        self.batch: Batch | None = None
        self.recorder = recorder
        self.waits = recorder.mode == "real"
        self.holds = recorder.mode == "record"
        self._later: list[Later] = []
        self._skipped: list[BackgroundTask] = []
        self.is_of_test_client = is_test_client(environ)
        # WebTest reads every response, and drops a TypeError meanwhile.
        self.is_of_webtest = "paste.testing" in environ
        # Shows whether the request is over, and drops its tasks; runs none.
        self._unsubmitted = Batch(tasks, response_complete=False)
        recorder._requests.append(self)

    def new_list(self) -> list[BackgroundTask]:
        return _TaskList(self)

    def respond(self, response: Response) -> Iterable[bytes]:
        """Return a stream for a test client, which does not call ``close()``."""
        if not self.is_of_test_client:
            return response
        stream = _Stream(self, response)
        if not stream.is_closed:
            self.recorder._streams.append(stream)
        return stream

    def submit(self, batch: Batch, runner: Runner) -> None:
        """Record, run or submit the batch, as the mode says."""
        self.batch = batch
        self.recorder._closed.append(self)
        if self.recorder.mode == "real":
            runner.submit(batch)
            return
        batch.sends = False
        if self.recorder.mode == "run":
            resolve("inline").submit(batch)
        else:
            self.recorder._not_run.append(batch)

    def put_off(self, later: Later) -> None:
        self._later.append(later)

    def dropped(self, task: BackgroundTask) -> None:
        self.added.remove(task)

    def skipped(self, task: BackgroundTask) -> None:
        self._skipped.append(task)

    def attempts_of(self, task: BackgroundTask) -> int:
        """How often ``task``, one of :attr:`added`, was called."""
        plan = plan_of(task)
        if plan is not None and (plan.retry is not None or not plan.is_due):
            return plan.calls
        return 0 if task.unclaimed or task in self._skipped else 1

    def task_failed(self, task: BackgroundTask, exc: BaseException) -> None:
        self.recorder._failures.append(_Failure(self, exc))

    @property
    def is_over(self) -> bool:
        """True if the response is closed and all tasks are done or sent, even after a wait."""
        return self._unsubmitted.has_ended and all(later.has_ended for later in self._later)

    def describe(self) -> str:
        """Name the unclosed response or the unfinished tasks."""
        if self.batch is None:
            return f"the response of {self.path}, which was not closed"
        tasks = [*self.batch.tasks, *(task for later in self._later for task in later.tasks)]
        return ", ".join(task.name for task in tasks) or f"tasks of {self.path}"

    def give_up(self) -> None:
        """Let no task of this request wait any longer for its time, or to be sent."""
        for later in self._later:
            if not later.has_begun:
                for task in later.give_up():
                    task.options.calls.forget(task)
                    notify_discarded(task, _OVER)

    def drop(self) -> None:
        """Let no further task of this request begin or be added."""
        for task in self._unsubmitted.abandon():
            notify_discarded(task, _OVER)
        if self.added:
            self._unsubmitted.run()  # runs nothing; makes the collector forget the request


class _TaskList(list["BackgroundTask"]):
    """The list of a request's tasks, which a batch empties."""

    def __init__(self, request: _Request) -> None:
        super().__init__()
        self._request = request

    def append(self, task: BackgroundTask) -> None:
        self._request.added.append(task)
        super().append(task)

    def remove(self, task: BackgroundTask) -> None:
        super().remove(task)
        if self._request.batch is None:  # run by hand
            self._request.added.remove(task)


class _Stream:
    """The response for a test client: read at once and closed at its end.

    If the length is unknown, only the first chunk is read at once.

    :raises BaseException: as :meth:`close` does.
    """

    def __init__(self, request: _Request, response: Response) -> None:
        self._request = request
        self._response = response
        self.is_closed = False  # by the client, or at the end
        self._is_cut = False
        self._chunks = self._read()
        # Not if the application is a generator: Django's requests begin before their views.
        if response.headers is not None or request.is_of_webtest:
            self._chunks = chain(list(islice(self._chunks, 1)), self._chunks)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def _read(self) -> Iterator[bytes]:
        response = self._response
        seen: list[bytes] = []
        try:
            for chunk in response:
                # Only now: the application may call start_response with its first chunk.
                length = declared_length(response.headers or ())
                if length or hasattr(response, "__len__") or self._request.is_of_webtest:
                    seen.append(chunk)
                    continue
                yield chunk
                if self._is_cut:
                    break
        except GeneratorExit:  # the client drops the stream
            raise
        except BaseException as exc:
            self.is_closed = True  # raise no second error to the client
            response.close()
            if isinstance(exc, Exception):
                yield from seen  # the error comes at its usual place
            raise
        if self._is_cut:
            raise RuntimeError(
                "the fixture background_tasks was used, or the test ended, before this "
                "response was read to its end, and has closed it: read it first"
            )
        self.close()
        yield from seen

    def close(self) -> None:
        """Close the response; the client calls this, or the end of the response.

        :raises BaseException: the error of the application's ``close()``, or in mode "run"
            the first error of the request's tasks.
        """
        if not self.is_closed:  # a client closes twice
            self.is_closed = True
            self._response.close()
            if self._request.recorder.mode == "run":
                self._request.recorder._raise_first(self._request)

    def cut(self) -> None:
        """Close the response if the client has not; on any thread."""
        if not self.is_closed:
            self._is_cut = True
            self._response.close()


def format_call(name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """Format a call as in source code, with long arguments shortened."""
    given = [_short.repr(arg) for arg in args]
    given += [f"{key}={_short.repr(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(given)})"
