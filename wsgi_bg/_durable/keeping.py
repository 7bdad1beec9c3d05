"""Requests whose tasks a runner stores before the server can answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from wsgi_bg._process.repeated import RepeatedError
from wsgi_bg._tasks.current import ENVIRON_KEY
from wsgi_bg.exceptions import StoreError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners.keeping import KeepingRunner


class _Tasks(Protocol):
    """The tasks of a request: see ``wsgi_bg._request.request_tasks``."""

    is_answered: bool

    def note_early(self, environ: WSGIEnvironment) -> None: ...

    def expected(self, status: str, *, runs: bool = True) -> list[BackgroundTask]: ...


class KeepingApp:
    """Calls the application, then lets the runner store the tasks of the request.

    The tasks are stored when the application returns. If the application has not called
    ``start_response`` by then, they are stored in that call, before the first chunk; and
    ``write()`` stores them before it passes its first bytes.

    :param app: the application.
    :param runner: stores the tasks, unless an outer layer has another runner.
    """

    def __init__(self, app: WSGIApplication, runner: KeepingRunner) -> None:
        self._app = app
        self._runner = runner
        self._not_started = RepeatedError("%s cannot run the tasks of other processes")

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request.

        :raises RuntimeError: if the tasks cannot be stored.
        """
        tasks: Any = environ[ENVIRON_KEY].root
        observer = tasks.observer
        is_recorded = observer is not None and not observer.waits  # such a test touches no file
        if is_recorded or tasks.options.runner is not self._runner:
            return self._app(environ, start_response)
        try:
            self._runner.start()
        except StoreError as exc:  # raised again for a request that has tasks to store
            self._not_started.log(exc, self._runner)
        request = _KeptRequest(tasks, self._runner, start_response, environ)
        app_iter = self._app(environ, request.start_response)
        try:
            request.app_has_returned()
        except BaseException:
            close = getattr(app_iter, "close", None)
            if close is not None:
                close()
            raise
        return app_iter


class _KeptRequest:
    """The ``start_response`` and ``write`` of a request whose tasks are stored in time.

    The status is the application's own: middleware between this layer and an outer layer may
    hold it back until it has the whole response.
    """

    def __init__(
        self,
        tasks: _Tasks,
        runner: KeepingRunner,
        start_response: Callable[..., Any],
        environ: WSGIEnvironment,
    ) -> None:
        self._tasks = tasks
        self._runner = runner
        self._start_response = start_response
        self._environ = environ
        self._has_returned = False
        self._status = ""  # of the last call of start_response
        self._kept_for = ""  # the status for which the tasks were stored

    def app_has_returned(self) -> None:
        self._has_returned = True
        if self._status:
            self._keep()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self._status = status
        given = (status, headers) if exc_info is None else (status, headers, exc_info)
        write = self._start_response(*given)
        if self._has_returned:
            self._keep()
        return partial(self._write, write)

    def _write(self, write: Callable[[bytes], object], data: bytes) -> None:
        self._keep()
        write(data)

    def _keep(self) -> None:
        tasks = self._tasks
        if tasks.is_answered and self._status == self._kept_for:
            return
        # First, so that each task is in the list now or is stored by add_task.
        tasks.is_answered = True
        try:
            expected = tasks.expected(self._status)
            if expected:
                tasks.note_early(self._environ)
            self._runner.keep(expected)
        except BaseException:
            tasks.is_answered = False
            raise
        if self._kept_for:  # an error has replaced the status before it was sent
            for task in tasks.expected(self._status, runs=False):
                self._runner.forget(task)
        self._kept_for = self._status
