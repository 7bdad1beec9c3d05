"""``ObservedCall``: a call on a worker, for the worker's hooks, log and status."""

from __future__ import annotations

import os
import time
from contextvars import Context
from typing import TYPE_CHECKING

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import is_from_signal_handler, type_name
from wsgi_bg._request.unclosed import collectors
from wsgi_bg._status.recorder import recorder
from wsgi_bg._tasks.task_log import log_attempt, log_end
from wsgi_bg.runners.ledger import calls_on_worker

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask, Caller


class ObservedCall:
    """Tells the hooks and the log how a call ends; the status has it inside of ``with``.

    :param task: the task, which this process has not added.
    :param calls: calls the hooks; the hooks have a record if ``calls.received`` was called.
    :param context: the context of the call.
    """

    def __init__(self, task: BackgroundTask, calls: Caller, context: Context) -> None:
        self._task = task
        self._calls = calls
        self._context = context
        self._began = 0.0

    def __enter__(self) -> None:
        collectors.get()  # drains at the exit, and the status is written after the drain
        recorder.start()
        # An error may keep the task alive: the status would go on showing it as waiting.
        self._task.claim()
        calls_on_worker[self._task] = os.getpid()
        self._began = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        calls_on_worker.pop(self._task, None)

    def finished(self) -> None:
        """The call has returned."""
        self._log_end(self._context)
        self._context.run(self._calls.finished, self._task)

    def failed(self, exc: BaseException) -> None:
        """The call has raised, and the engine logs the error."""
        context = self._context_after(exc)
        self._log_end(context, exc)
        context.run(self._calls.failed, self._task, exc)

    def retried(self, exc: BaseException, seconds: float, *, is_logged: bool = True) -> None:
        """The call has raised, and will be made again in ``seconds``.

        :param is_logged: False if the engine logs the attempt.
        """
        context = self._context_after(exc)
        if is_logged:
            began = self._began if log.is_debug() else None
            context.run(log_attempt, self._task, exc, seconds, began)
        context.run(self._calls.retried, self._task, exc, seconds)
        self._task.record.clear()  # the engine has the task: this process has none to lose

    def discarded(self, reason: str) -> None:
        """The call has ended in a way that is neither success nor failure."""
        self._calls.discarded(self._task, reason)

    def stopped(self, exc: BaseException) -> None:
        """``exc`` stops the worker."""
        self.discarded(f"{type_name(exc)} stopped its worker")

    def _context_after(self, exc: BaseException) -> Context:
        """The context for hooks after ``exc``, which a time limit may have raised.

        The loop then cancels the coroutine in the context of the call, on its own thread, and
        two threads cannot enter a context: the coroutine or the hooks would not run.
        """
        return self._context.copy() if is_from_signal_handler(exc) else self._context

    def _log_end(self, context: Context, error: BaseException | None = None) -> None:
        if log.is_debug():
            context.run(log_end, self._task, self._began, error)
