"""The function that RQ's workers call for each job of an ``RQRunner``."""

from __future__ import annotations

import os
from math import ceil
from typing import TYPE_CHECKING

from rq import Retry, get_current_job

from wsgi_bg._worker.calls import RetryLater, run_call
from wsgi_bg.exceptions import MessageError
from wsgi_bg.runners.shutdown import finish

if TYPE_CHECKING:
    from wsgi_bg.outbox import OutboxRunner

ENTRY = f"{__name__}.run"

runners: dict[str, OutboxRunner] = {}
"""Each ``RQRunner`` of this process by the name of its queue, in the order of their making."""


def run(name: str, text: str, headers: dict[str, str]) -> Retry | None:
    """Call the registered function ``name``: see :func:`wsgi_bg.outbox.run_call`.

    :return: RQ's ``Retry`` if the job is to run again, in place of a result.
    :raises ValueError: if the arguments of the job are forged, or the worker has not imported
        the module that makes the runner.
    :raises BaseException: the error of the call.
    """
    job = get_current_job()
    if job is None or not runners:
        raise MessageError(
            "no RQRunner is in this worker: rq worker -c MODULE imports one; SpawnWorker "
            "needs a subclass in that module, too: -w MODULE.CLASS"
        )
    runner = runners.get(job.origin) or next(iter(runners.values()))
    attempt = (job.number_of_retries or 0) + 1
    try:
        try:
            run_call(runner, name, text, headers, attempt, job.id)
        finally:
            if os.environ.get("RQ_JOB_ID") == job.id:  # of a work horse, which calls os._exit()
                finish()
    except RetryLater as exc:
        return Retry(attempt, [ceil(exc.seconds)])
    except BaseException:
        job.retries_left = 0  # these are for jobs whose worker has died
        raise
    return None
