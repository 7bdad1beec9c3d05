"""Intercepts requests and batches while a test uses the pytest plugin's fixture.

After the test the middleware, the runner and the observer of errors are as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

from wsgi_bg._request import request_tasks as request
from wsgi_bg._request.body import Body
from wsgi_bg._request.middleware import BackgroundTasksMiddleware
from wsgi_bg._request.servers import is_test_client
from wsgi_bg._tasks import task_log
from wsgi_bg._tasks.background_tasks import BackgroundTasks
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg._testing import Mode
from wsgi_bg._testing.failures import Failures
from wsgi_bg._testing.responses import Stream, is_finite, read
from wsgi_bg._testing.visits import TaskList, Visit
from wsgi_bg.runners.pool import shared_pool

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import Runner

TEARDOWN_TIMEOUT = 10.0
"""Seconds for which the end of a test waits for unfinished tasks."""

_POLL = 0.01  # seconds; closing a response without tasks does not notify _changed


class _StandIn:
    """A runner override: passes each batch and the request's runner to the session."""

    def __init__(self, submit: Callable[[Batch, Runner], None], runner: Runner) -> None:
        self._submit = submit
        self._runner = runner

    def submit(self, batch: Batch) -> None:
        self._submit(batch, self._runner)

    def __repr__(self) -> str:
        return repr(self._runner)


class RecordingSession:
    """The requests of one test, their tasks and errors; for any thread."""

    # A class attribute, because freezegun replaces only module attributes.
    _now = staticmethod(time.monotonic)

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        # The condition's lock guards the lists below; a finished batch notifies the
        # condition. No code of the application runs while the lock is held.
        self._changed = Condition()
        self._visits: list[Visit] = []
        self._closed: list[Visit] = []  # those with tasks, in the order of closing
        self._to_run: list[Batch] = []
        self._streams: list[Stream] = []
        self.failures: Failures = Failures()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Intercept all requests and batches; on leaving, finish or drop the test's tasks.

        :raises TimeoutError: on leaving, if tasks are not done in time.
        :raises BaseException: on leaving, the error that the test has not read.
        """
        __tracebackhide__ = True
        session = self
        handle = BackgroundTasksMiddleware.__call__

        # With "self": Falcon's test client takes a callable of three arguments for ASGI.
        def call(
            self: BackgroundTasksMiddleware,
            environ: WSGIEnvironment,
            start_response: StartResponse,
        ) -> Iterable[bytes]:
            return session._handle(partial(handle, self), environ, start_response)

        def runner_override(runner: Runner) -> Runner:
            return cast("Runner", _StandIn(self._submit, runner))

        with (
            patch.object(BackgroundTasksMiddleware, "__call__", call),
            patch.object(request, "runner_override", runner_override),
            patch.object(request, "new_list", TaskList),
            patch.object(task_log, "observer", self._observe),
        ):
            yield
            self._end()

    def _handle(
        self, app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request, and close the response if a test client made the request."""
        outer = environ.get(ENVIRON_KEY)
        if isinstance(outer, BackgroundTasks) and outer._is_open:
            return app(environ, start_response)  # an inner middleware of a recorded request
        visit = Visit(environ)
        with self._changed:
            self._visits.append(visit)
        try:
            body = app(environ, start_response)
        finally:
            visit.leave()
        if not isinstance(body, Body) or not is_test_client(environ):
            return body
        if is_finite(body):
            chunks, is_whole = read(body, iter(body))
            if is_whole:  # else the client gets the application's error
                self._raise_errors_of(visit)
            return chunks
        stream = Stream(body, partial(self._raise_errors_of, visit))
        with self._changed:
            self._streams.append(stream)
        return stream

    def _raise_errors_of(self, visit: Visit) -> None:
        if self._mode == "run":
            self.failures.raise_first(visit.has)

    def _submit(self, batch: Batch, runner: Runner) -> None:
        """Record, run or submit a batch, as the mode says."""
        visit = next((v for v in self._visits[::-1] if v.tasks is batch._of), None)
        is_real = visit is None or self._mode == "real"
        batch.sends = is_real and hasattr(runner, "send")
        if visit is not None:
            self._take(batch, visit)
        if is_real:  # visit is None: the batch belongs to an earlier test
            runner.submit(batch)
        elif self._mode == "run":
            if batch.response_complete:
                batch.run()
            else:  # running here would keep the client waiting
                shared_pool.submit(batch)

    def _take(self, batch: Batch, visit: Visit) -> None:
        def note(batch: Any) -> None:
            with self._changed:
                visit.is_done = True
                self._changed.notify_all()

        batch.on_done((note,))
        with self._changed:
            visit.take(batch)
            self._closed.append(visit)
            if self._mode == "record":
                self._to_run.append(batch)

    def _observe(self, task: BackgroundTask, exc: BaseException) -> None:
        if any(visit.has(task) for visit in self._visits):  # else the task is an earlier test's
            self.failures.add(task, exc)

    def added(self) -> list[tuple[BackgroundTask, str]]:
        """Return the tasks that are not skipped, with the paths of their requests."""
        with self._changed:
            return [(task, visit.path) for visit in self._closed for task in visit.added()]

    def not_to_run(self) -> list[tuple[BackgroundTask, str]]:
        """Return the tasks that are skipped, with the paths of their requests."""
        with self._changed:
            return [(task, visit.path) for visit in self._closed for task in visit.not_to_run()]

    def run(self) -> None:
        """Run the recorded batches that have not run; blocks."""
        while True:
            with self._changed:
                if not self._to_run:
                    return
                batch = self._to_run.pop(0)
            batch.run()

    def join(self, timeout: float) -> None:
        """Wait until all responses are closed and, except in mode "record", all tasks done.

        :raises TimeoutError: after ``timeout`` seconds, naming open responses and tasks.
        """
        __tracebackhide__ = True
        recorded = self._mode == "record"
        self._wait(timeout, lambda visit: not visit.is_over(recorded=recorded))

    def _wait(self, timeout: float, is_left: Callable[[Visit], bool]) -> None:
        __tracebackhide__ = True
        deadline = self._now() + timeout
        with self._changed:
            while left := [visit for visit in self._visits if is_left(visit)]:
                remaining = deadline - self._now()
                if remaining <= 0:
                    names = "; ".join(visit.describe() for visit in left)
                    raise TimeoutError(f"not finished after {timeout:g} s: {names}")
                self._changed.wait(min(remaining, _POLL))

    def close_streams(self) -> None:
        """Close the streams that the client has not read to their end."""
        with self._changed:
            streams, self._streams = self._streams, []
        with ExitStack() as stack:  # closes all streams, even if a close() raises
            for stream in reversed(streams):
                stack.callback(stream.cut)

    def _end(self) -> None:
        """End the test: wait for its tasks or drop them; raise the errors left unread."""
        __tracebackhide__ = True
        with ExitStack() as stack:  # runs all callbacks, even if a callback raises
            if self._mode != "real":
                for visit in self._visits:
                    stack.callback(visit.drop)
            stack.callback(self.failures.raise_all)
            try:
                self.close_streams()
            finally:
                if self._mode != "record":
                    self._wait(TEARDOWN_TIMEOUT, lambda visit: visit.waits)
