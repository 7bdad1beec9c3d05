"""``wsgi-bg --log-tasks``: a line on standard error for each task that has ended."""

from __future__ import annotations

import logging

from wsgi_bg._process.interrupts import type_name
from wsgi_bg._process.printable import printable
from wsgi_bg.hooks.base import OptionHooks, TaskRecord

logger: logging.Logger = logging.getLogger("wsgi_bg.tasks")
"""Not the logger of the package: these lines are at INFO, and are no records of it."""


class TaskLog(OptionHooks):
    """Logs a line for each task that has ended.

    Lines go to the logger ``wsgi_bg.tasks`` at INFO. If the application does not configure
    logging at INFO, they go to standard error.
    """

    def __init__(self) -> None:
        _configure()

    def task_finished(self, record: TaskRecord) -> None:
        """Log a task that has succeeded."""
        _log(record, "succeeded")

    def task_failed(self, record: TaskRecord) -> None:
        """Log a task that has failed."""
        error = record.error
        _log(record, "failed" if error is None else f"failed with {type_name(error)}")

    def task_discarded(self, record: TaskRecord) -> None:
        """Log a task that will not run."""
        _log(record, "discarded")

    def task_sent(self, record: TaskRecord) -> None:
        """Log a task that was sent to another process."""
        _log(record, "sent")


def _configure() -> None:
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _log(record: TaskRecord, outcome: str) -> None:
    # dictConfig() may have disabled the logger, or reset it, if it names the logger wsgi_bg.
    logger.disabled = False
    was_reset = logger.level == logging.NOTSET and not logger.handlers
    if was_reset and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
        _configure()
    logger.info(
        "task %s %s wait %s run %s %s",
        printable(record.name),  # a line of its own, and nothing that a terminal obeys
        record.id,
        _seconds(record.wait),
        _seconds(record.duration),
        printable(outcome),
    )


def _seconds(length: float | None) -> str:
    return "-" if length is None else f"{length:.6f}s"
