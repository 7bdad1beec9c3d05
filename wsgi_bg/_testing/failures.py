"""Collects the errors of one test's tasks, and notes which errors the test has read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask

_NOTE = "A background task raised this, and the test did not look at it."


@dataclass
class _Failure:
    task: BackgroundTask
    error: BaseException
    is_seen: bool = False


class Failures:
    """Errors in the order in which tasks raised them. For any thread; never blocks long."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._failures: list[_Failure] = []

    def add(self, task: BackgroundTask, error: BaseException) -> None:
        """Note that ``task`` has raised ``error``."""
        with self._lock:
            self._failures.append(_Failure(task, error))

    def look(self) -> list[BaseException]:
        """Return all errors so far, and mark them as read by the test."""
        with self._lock:
            for failure in self._failures:
                failure.is_seen = True
            return [failure.error for failure in self._failures]

    def raise_first(
        self, is_meant: Callable[[BackgroundTask], bool] = lambda task: True
    ) -> None:
        """Raise the first error that the test has not read.

        :param is_meant: returns True for tasks whose errors are to be raised; default: all.
        """
        __tracebackhide__ = True
        with self._lock:
            for failure in self._failures:
                if not failure.is_seen and is_meant(failure.task):
                    failure.is_seen = True
                    raise failure.error

    def raise_all(self) -> None:
        """Raise the errors that the test has not read.

        A single error is raised unchanged.

        :raises RuntimeError: if there are several errors; the message names them.
        """
        __tracebackhide__ = True
        with self._lock:
            unseen = [failure for failure in self._failures if not failure.is_seen]
        if len(unseen) > 1:
            # No ExceptionGroup: the log already has each traceback.
            names = ", ".join(f"{each.task.name}: {each.error!r}" for each in unseen)
            raise RuntimeError(
                f"{len(unseen)} background tasks raised what the test did not look at: {names}"
            ) from unseen[0].error
        for failure in unseen:
            failure.error.add_note(_NOTE)
        self.raise_first()
