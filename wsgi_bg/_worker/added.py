"""Tasks that a task on a worker adds."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from wsgi_bg._tasks.batch import Batch
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg._tasks.task_log import log_dropped, log_interrupted
from wsgi_bg.exceptions import PublishError
from wsgi_bg.runners.keeping import keeps_tasks
from wsgi_bg.runners.ledger import ledger_of
from wsgi_bg.runners.timer import Deferring


class _Tasks(Deferring):
    """No message is stored before the call has ended.

    If the process dies in the call, the engine repeats the call, and another process of the
    folder would send the message all the same.
    """

    __slots__ = ()

    is_answered = False


class AddedTasks:
    """The tasks that a call on a worker adds, which run when the call is the last one.

    :param task: the task that the worker runs.
    :param options: those of the worker's calls, with the runner.
    :param request: the label of the request that has added the task, which may be forged.
    :ivar tasks: the ``BackgroundTasks`` of the call.
    """

    def __init__(self, task: BackgroundTask, options: Options, request: object) -> None:
        self.tasks = _Tasks()
        self.tasks.restore_request(request)
        # The request is long over: its outcome was known when the message was sent.
        self.tasks.options = replace(options, run_on="always")
        self._task = task
        runner = self.tasks.runner
        if keeps_tasks(runner):
            runner.start_on_worker()

    def hand_over(self) -> None:
        """Send the registered tasks, and run the others on this thread; blocks.

        The messages are confirmed before the others run, and before this method returns, since
        some engines end the process after each call. The worker has not finished with the
        message meanwhile: the broker may deliver the message again if the process dies.

        :raises PublishError: if the broker has not confirmed in the runner's ``drain_timeout``;
            the messages are in the folder of the outbox then, if there is a folder.
        """
        if self.tasks.close():
            return
        batch = Batch(self.tasks, response_complete=True)
        batch.sends = True
        runner = self.tasks.runner
        ledger = ledger_of(runner)
        ledger.add(batch)
        unsent: dict[Any, None] = ledger.unsent
        added = set(batch.tasks)

        def are_sent() -> bool:
            # Messages of other calls of this process may wait for an hour.
            mine = [
                each for each in list(unsent) if each.root is self.tasks or each.task in added
            ]
            return ledger.wait_for(mine, deadline)

        deadline = time.monotonic() + getattr(runner, "drain_timeout", 30.0)
        batch.send()
        are_first_sent = are_sent()
        batch.run()
        if not (are_sent() and are_first_sent):
            if keeps_tasks(runner):  # else memory alone keeps them
                runner.keep_unsent()
            raise PublishError(self._task.name, "tasks that it has added wait for the broker")

    def drop(self) -> None:
        """Drop the tasks: the call is repeated, and adds them again."""
        for added in self.tasks.abandon():
            added.options.calls.forget(added)
            log_dropped(added, self._task)

    def stop(self, exc: BaseException) -> None:
        """Name the tasks, which are not run: ``exc`` stops the worker."""
        for added in self.tasks.abandon():
            added.options.calls.forget(added)
            log_interrupted(added, exc, began=False)
