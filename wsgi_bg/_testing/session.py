"""Records the requests of one test, their tasks and errors, for the pytest fixture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsgi_bg._request.observer import RequestObserver, Response, observers
from wsgi_bg._request.servers import is_test_client
from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.task_log import notify_discarded
from wsgi_bg._testing import Mode
from wsgi_bg._testing.responses import Stream
from wsgi_bg.runners import resolve

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._tasks.background_tasks import TaskQueue
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import Runner

TEARDOWN_TIMEOUT = 10.0
"""Seconds for which the end of a test waits for unfinished tasks."""

_POLL = 0.001  # seconds

_NOTE = "A background task raised this, and the test did not look at it."


@dataclass
class _Failure:
    request: RecordedRequest
    task: BackgroundTask
    error: BaseException
    is_read: bool = False  # by the test


class RecordingSession:
    """The requests of one test, their tasks and errors; for any thread.

    :ivar closed: the requests with tasks, in the order in which their responses were closed.
    :ivar recorded: the batches that :meth:`run` has not run.
    :ivar streams: all responses of unknown length.
    :ivar failures: the errors, in the order in which tasks raised them.
    """

    # Class attributes, because freezegun replaces only module attributes.
    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.closed: list[RecordedRequest] = []
        self.recorded: deque[Batch] = deque()
        self.streams: list[Stream] = []
        self.failures: list[_Failure] = []
        self._requests: list[RecordedRequest] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Record all requests that begin; on leaving, finish or drop the test's tasks.

        :raises TimeoutError: on leaving, if tasks are not done in time.
        :raises BaseException: on leaving, the error that the test has not read.
        """
        __tracebackhide__ = True
        with observers.registered(self._observe):
            yield
            try:
                self._finish()
            finally:
                if self.mode != "real":
                    for request in self._requests:
                        request.drop()
                self._raise_all()

    def _observe(self, tasks: TaskQueue, environ: WSGIEnvironment) -> RecordedRequest:
        request = RecordedRequest(self, tasks, environ)
        self._requests.append(request)
        return request

    def _finish(self) -> None:
        __tracebackhide__ = True
        try:
            self.close_streams()
        finally:
            if self.mode != "record":
                self._wait(TEARDOWN_TIMEOUT, lambda request: bool(request.added))

    def close_streams(self) -> None:
        """Close the streams that the client has not read to their end."""
        with ExitStack() as stack:  # closes all streams, even if a close() raises
            for stream in reversed(self.streams):
                stack.callback(stream.cut)

    def run(self) -> None:
        """Run the recorded batches that have not run; blocks."""
        while True:
            try:
                batch = self.recorded.popleft()
            except IndexError:
                return
            batch.run()

    def join(self, timeout: float) -> None:
        """Wait until all responses are closed and, except in mode "record", all tasks done.

        :raises TimeoutError: after ``timeout`` seconds, naming open responses and tasks.
        """
        __tracebackhide__ = True
        self._wait(timeout, lambda request: self.mode != "record" or request.batch is None)

    def _wait(self, timeout: float, is_meant: Callable[[RecordedRequest], bool]) -> None:
        __tracebackhide__ = True
        deadline = self._now() + timeout
        while left := [each for each in self._requests if is_meant(each) and not each.is_over]:
            if self._now() >= deadline:
                names = "; ".join(request.describe() for request in left)
                raise TimeoutError(f"not finished after {timeout:g} s: {names}")
            self._sleep(_POLL)

    def errors(self) -> list[BaseException]:
        """Return the errors so far, in the order in which tasks raised them, as read."""
        failures = list(self.failures)
        for failure in failures:
            failure.is_read = True
        return [failure.error for failure in failures]

    def raise_first(self, request: RecordedRequest | None = None) -> None:
        """Raise the first error that the test has not read.

        :param request: the request whose errors are meant; None for all.
        """
        __tracebackhide__ = True
        for failure in self.failures:
            if not failure.is_read and request in (None, failure.request):
                failure.is_read = True
                raise failure.error

    def _raise_all(self) -> None:
        """Raise the errors that the test has not read; a single error is raised unchanged."""
        __tracebackhide__ = True
        unread = [failure for failure in self.failures if not failure.is_read]
        if len(unread) > 1:
            # No ExceptionGroup: the log already has each traceback.
            names = ", ".join(f"{each.task.name}: {each.error!r}" for each in unread)
            raise RuntimeError(
                f"{len(unread)} background tasks raised what the test did not look at: {names}"
            ) from unread[0].error
        for failure in unread:
            failure.error.add_note(_NOTE)
        self.raise_first()


class RecordedRequest(RequestObserver):
    """A request that began while the fixture was in use; for any thread.

    :ivar path: the path of the request's URL, including ``SCRIPT_NAME``.
    :ivar added: the added tasks, without those that the application has run by hand.
    :ivar batch: the request's batch; None before the response is closed, or without tasks.
    """

    def __init__(
        self, session: RecordingSession, tasks: TaskQueue, environ: WSGIEnvironment
    ) -> None:
        path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        # PEP 3333, "Unicode"
        self.path: str = path.encode("latin-1").decode("utf-8", "replace")
        self.added: list[BackgroundTask] = []
        self.batch: Batch | None = None
        self._session = session
        self._is_of_test_client = is_test_client(environ)
        # WebTest reads every response, and drops a TypeError meanwhile.
        self._is_of_webtest = "paste.testing" in environ
        # Shows whether the request is over, and drops its tasks; runs none.
        self._unsubmitted = Batch(tasks, response_complete=False)

    def new_list(self) -> list[BackgroundTask]:
        return _TaskList(self)

    def respond(self, response: Response) -> Iterable[bytes]:
        """Read and close the response for test clients, which do not call ``close()``."""
        if not self._is_of_test_client:
            return response
        stream = Stream(response, self._raise_errors, whole=self._is_of_webtest)
        if response.headers is not None or self._is_of_webtest:
            chunks = stream.read()
            if stream.is_over:
                return chunks
        self._session.streams.append(stream)
        return stream

    def _raise_errors(self) -> None:
        if self._session.mode == "run":
            try:
                self._session.raise_first(self)
            except StopIteration as exc:  # would end the stream
                raise RuntimeError("a background task raised StopIteration") from exc

    def submit(self, batch: Batch, runner: Runner) -> None:
        """Record, run or submit the batch, as the mode says."""
        self.batch = batch
        self._session.closed.append(self)
        if self._session.mode == "real":
            runner.submit(batch)
            return
        batch.sends = False
        if self._session.mode == "run":
            resolve("inline").submit(batch)
        else:
            self._session.recorded.append(batch)

    def task_failed(self, task: BackgroundTask, exc: BaseException) -> None:
        self._session.failures.append(_Failure(self, task, exc))

    @property
    def is_over(self) -> bool:
        """True if the response is closed and all tasks are done."""
        return self._unsubmitted.has_ended

    def describe(self) -> str:
        """Name the unclosed response or the unfinished tasks."""
        if self.batch is None:
            return f"the response of {self.path}, which was not closed"
        return ", ".join(task.name for task in self.batch.tasks) or f"tasks of {self.path}"

    def drop(self) -> None:
        """Let no further task of this request begin or be added."""
        for task in self._unsubmitted.abandon():
            notify_discarded(task, "the test is over")
        if self.added:
            self._unsubmitted.run()  # runs nothing; makes the collector forget the request


class _TaskList(list["BackgroundTask"]):
    """The list of a request's tasks, which a batch empties."""

    def __init__(self, request: RecordedRequest) -> None:
        super().__init__()
        self._request = request

    def append(self, task: BackgroundTask) -> None:
        self._request.added.append(task)
        super().append(task)

    def remove(self, task: BackgroundTask) -> None:
        super().remove(task)
        if self._request.batch is None:  # run by hand
            self._request.added.remove(task)
