"""``Reruns``: makes tasks of stored rows."""

from __future__ import annotations

import json
import time
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wsgi_bg._durable.kept import Kept
from wsgi_bg._messages import headers, retries
from wsgi_bg._messages.codec import decode
from wsgi_bg._process import log
from wsgi_bg._process.interrupts import type_name
from wsgi_bg._store.rows import Outcome, Row
from wsgi_bg._store.store import Store
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.retry import Plan, Retry
from wsgi_bg._tasks.task import BackgroundTask, fill
from wsgi_bg._tasks.task_log import fields_of
from wsgi_bg.runners.attached import Attached

if TYPE_CHECKING:
    from wsgi_bg.runners.ledger import Ledger


class Reruns(Attached):
    """Makes tasks of stored rows."""

    def __init__(self, path: str, max_crashes: int, options: Options) -> None:
        super().__init__(options)
        self._path = path
        self._max_crashes = max_crashes
        # Keys of rows, by the name of a function that is not registered yet, or no more.
        self._unknown: dict[str, dict[Store, list[int]]] = {}

    def attach(self, options: Options) -> None:
        """See :class:`Attached`; the outcome of the request of a stored task was known then."""
        super().attach(replace(options, run_on="always"))

    def task(
        self,
        store: Store,
        row: Row,
        added_under: Options | None,
        ledger: Ledger,
        delay: float,
    ) -> BackgroundTask | None:
        """Return the task of a row; None if the row has to wait, or was put aside.

        :param added_under: the options of the layer that has added the task in this process.
        :param ledger: counts a task that was put aside.
        :param delay: above 0.0 to put the task off at its turn.
        """
        registration = registry.get(row.name)
        if registration is None:
            if row.name not in self._unknown:
                log.error(
                    "durable tasks of %s wait in %s: no function is registered by that name",
                    row.name,
                    self._path,
                )
            self._unknown.setdefault(row.name, {}).setdefault(store, []).append(row.key)
            return None
        if row.crashes >= self._max_crashes:
            log.error(
                "durable task %s was put aside: the process has died %d times while it ran",
                row.name,
                row.crashes,
                extra=fields_of(row.name, row.id, "aside"),
            )
            store.end(Outcome(row, "aside", ended=time.time()))
            ledger.count_aside()
            return None
        try:
            args, kwargs = decode(row.arguments)
            given: dict[str, Any] = json.loads(row.options or "{}")
            stops = given.get("stop_on_error") is True
            retry = retries.find(given.get("retry"), registration.retry)
            if retry is None and row.attempts:  # the function has lost its Retry meanwhile
                retry = Retry(row.attempts + 1)
            options = added_under or self.options
            layer = options.of_layer(options)  # of the tasks that the task adds
            options = replace(
                options, run_on="always", stop_on_error=stops, delay=delay, layer=layer
            )
            context = copy_context()
            headers.restore(context, json.loads(row.context or "{}"))
        except Exception as exc:  # a forged row
            extra = fields_of(row.name, row.id, "aside", "it cannot be read")
            message = "durable task %s was put aside: it cannot be read"
            log.error(message, row.name, extra=extra)
            store.end(Outcome(row, "aside", ended=time.time(), error=type_name(exc)))
            ledger.count_aside()
            return None
        task = BackgroundTask.__new__(BackgroundTask)
        fill(task, registration.func, tuple(args), kwargs, context, options)
        task.message = Kept(row, store)
        task.keep_id(row.id)
        if retry is not None or delay:
            task.plan = Plan(retry, row.attempts + 1)
        if retry is not None:
            task.keep_context()
        return task

    def leave_known(self) -> None:
        """Let rows be read again whose functions were registered meanwhile."""
        for name in [name for name in self._unknown if registry.get(name) is not None]:
            for store, keys in self._unknown.pop(name).items():
                store.leave_keys(keys)
