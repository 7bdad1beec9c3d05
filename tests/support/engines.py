"""RQ and Dramatiq with a real Redis, and their workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from rq.job import Job
from rq.serializers import JSONSerializer

from tests.support import (
    Server,
    app_that,
    engine_shop,
    make_server_environ,
    text_of,
    wait_until,
)
from tests.support.engine_shop import make_broker, make_queue
from tests.support.worker_process import WorkerProcess
from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, background_tasks, wait
from wsgi_bg.dramatiq import DramatiqRunner
from wsgi_bg.outbox import OutboxRunner
from wsgi_bg.rq import RQRunner

TIMEOUT = 30.0


class Engine:
    """An engine with an empty Redis.

    :param options: for the broker.
    """

    name: str
    ready: str
    """The worker logs this text when it is ready."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = options

    def command(self) -> list[str]:
        """How the page about the engine starts a worker."""
        raise NotImplementedError

    def runner(self, **options: Any) -> OutboxRunner:
        raise NotImplementedError

    def ids(self) -> list[str]:
        """The ids of the messages that no worker has taken."""
        raise NotImplementedError

    def forge(self, name: str, *message: Any) -> str:
        """Send a message without a task; return its id."""
        raise NotImplementedError


class RQ(Engine):
    name = "rq"
    ready = "Listening on"

    def command(self) -> list[str]:
        rq = [sys.executable, "-m", "rq.cli", "worker", "-c", engine_shop.__name__, "shop"]
        serializer = ["--serializer", "rq.serializers.JSONSerializer"]
        return [*rq, *serializer, "--with-scheduler", "--url", self.url]

    def runner(self, **options: Any) -> RQRunner:
        return RQRunner(make_queue(self.url), **options)

    def ids(self) -> list[str]:
        return make_queue(self.url).job_ids

    def forge(self, name: str, *message: Any) -> str:
        job = make_queue(self.url).enqueue("wsgi_bg.rq.worker.run", args=(name, *message))
        return job.id

    def job(self, id: str) -> Job:
        """Wait until all tasks are sent; return a job."""
        assert wait(TIMEOUT) == []
        queue = make_queue(self.url)
        return Job.fetch(id, queue.connection, serializer=JSONSerializer)


class Dramatiq(Engine):
    name = "dramatiq"
    ready = "Worker process is ready"

    def command(self) -> list[str]:
        dramatiq = [sys.executable, "-m", "dramatiq", engine_shop.__name__]
        return [*dramatiq, "--processes", "1", "--threads", "2"]

    def runner(self, **options: Any) -> DramatiqRunner:
        return DramatiqRunner(make_broker(self.url), **options)

    def ids(self) -> list[str]:
        client: Any = make_broker(self.url).client
        found = client.hvals("dramatiq:default.msgs") + client.hvals("dramatiq:default.DQ.msgs")
        return [json.loads(each)["message_id"] for each in found]

    def forge(self, name: str, *message: Any) -> str:
        import dramatiq

        broker = make_broker(self.url)
        broker.declare_queue("default")
        forged: Any = dramatiq.Message("default", name, (), {}, {"wsgi_bg": message})
        broker.enqueue(forged)
        return str(forged.message_id)

    def dead(self) -> list[str]:
        """The ids of the messages that were given up."""
        client: Any = make_broker(self.url).client
        found = client.hvals("dramatiq:default.XQ.msgs")
        return [json.loads(each)["message_id"] for each in found]


class Worker(WorkerProcess):
    """A worker of RQ or Dramatiq."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        shop = json.dumps([engine.name, engine.url, engine.options])
        super().__init__(engine.command(), {"ENGINE_SHOP": shop}, folder, engine.ready)

    def wait_for_lines(self, path: Path, count: int) -> list[str]:
        wait_until(lambda: len(text_of(path).splitlines()) >= count, TIMEOUT)
        lines = text_of(path).splitlines()
        assert len(lines) >= count, (lines, self.log)
        return lines


@contextmanager
def worker(engine: Engine, folder: Path) -> Iterator[Worker]:
    started = Worker(engine, folder)
    try:
        yield started
    finally:
        started.stop()


def request(runner: OutboxRunner, do: Callable[[], object]) -> None:
    """Handle a request in which ``do()`` adds tasks."""
    wrapped = BackgroundTasksMiddleware(app_that(lambda environ: do()), runner=runner)
    # Like the thread of a server: no request sees the variables of an earlier request.
    copy_context().run(Server().run, wrapped, make_server_environ())


def send(
    runner: OutboxRunner,
    func: Any,
    *args: Any,
    using: dict[str, Any] | None = None,
    **kwargs: Any,
) -> BackgroundTask:
    """Add a task in a request of its own; return the task."""
    added: list[BackgroundTask] = []

    def do() -> None:
        added.append(background_tasks.using(**(using or {})).add_task(func, *args, **kwargs))

    request(runner, do)
    return added[0]
