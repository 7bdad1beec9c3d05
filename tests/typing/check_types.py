"""Types of the public names, checked by mypy, which reports each ignore without an error."""

from __future__ import annotations

from typing import Any, Literal, assert_type
from unittest.mock import ANY

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import wsgi_bg
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    Retry,
    background_tasks,
    get_background_tasks,
    inject,
    monitor,
    registered_task,
)
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.pytest_plugin import RecordedTask, TaskRecorder
from wsgi_bg.runners import Runner


def send(to: str, *, copies: int = 1) -> None: ...


async def send_async(to: str) -> int:
    return len(to)


def keywords(func: int, self: int) -> None: ...


tasks = BackgroundTasks()
tasks.add_task(send, "a")
tasks.add_task(send, to="a", copies=2)
tasks.add_task(send_async, "a")
tasks.add_task(keywords, func=1, self=2)
tasks.add_task(send)  # type: ignore[call-arg]
tasks.add_task(send, 1)  # type: ignore[arg-type]
tasks.add_task(send, "a", copies="2")  # type: ignore[arg-type]
tasks.add_task(send, "a", blind=True)  # type: ignore[call-arg]
tasks.add_task(send_async)  # type: ignore[call-arg]
tasks.add_task(send("a"))  # type: ignore[func-returns-value, arg-type]
tasks.add_task("send")  # type: ignore[arg-type]
assert_type(tasks.add_task(send, "a"), BackgroundTask)
assert_type(tasks.add_task(send, "a").id, str)
assert_type(tasks.tasks, list[BackgroundTask])
assert_type(wsgi_bg.status.snapshot(), wsgi_bg.status.Snapshot)
assert_type(wsgi_bg.exceptions.WsgiBgError(), wsgi_bg.exceptions.WsgiBgError)
assert_type(tasks.using(run_on="always"), BackgroundTasks)
assert_type(tasks.using(failed_from=400), BackgroundTasks)
tasks.using(failed_from="404")  # type: ignore[arg-type]
tasks.using(run_on="never")  # type: ignore[arg-type]
tasks.using(run_on="error").add_task(send, 1)  # type: ignore[arg-type]

task = BackgroundTask(send, "a")
BackgroundTask(send)  # type: ignore[call-arg]
assert_type(task.name, str)
assert_type(task.is_async, bool)
assert_type(task.args, tuple[Any, ...])
assert_type(BackgroundTasks([task]), BackgroundTasks)

assert_type(background_tasks, BackgroundTasks)
assert_type(get_background_tasks({}), BackgroundTasks)
background_tasks.add_task(send, 1)  # type: ignore[arg-type]


@inject
def dependency(q: str, tasks: BackgroundTasks) -> int:
    return len(q)


assert_type(dependency("q"), int)

runners: list[Runner] = [InlineRunner(), PoolRunner(threads=2, max_pending=None)]


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    return []


BackgroundTasksMiddleware(application, runner="pool", run_on="always", stop_on_error=True)
BackgroundTasksMiddleware(application, runner=runners[0], on_error=lambda task, exc: task.name)
BackgroundTasksMiddleware(application, run_on="sometimes")  # type: ignore[arg-type]
BackgroundTasksMiddleware(application, failed_from=400)
BackgroundTasksMiddleware(application, failed_from="404")  # type: ignore[arg-type]
BackgroundTasksMiddleware(application, runner=1)  # type: ignore[arg-type]
BackgroundTasksMiddleware(lambda: None)  # type: ignore[arg-type, misc]


# inject: the result is known; the parameters are not, since a caller may omit the injected one.


class Service:
    @inject
    async def charge(self, amount: int, tasks: BackgroundTasks) -> str:
        return str(amount)


async def charge() -> None:
    assert_type(await Service().charge(5), str)


assert_type(dependency("q", tasks=BackgroundTasks()), int)


# Flask

flask_app = Flask(__name__)
background = Background(flask_app, runner="pool", run_on="always", stop_on_error=True)
assert_type(background, Background)
assert_type(background.init_app(flask_app), None)
Background(runner=runners[0], on_error=lambda task, exc: task.name, hooks=[Hooks()])
Background(flask_app, failed_from=404)
Background(flask_app, failed_from=4.5)  # type: ignore[arg-type]
Background("shop")  # type: ignore[arg-type]
Background(flask_app, runner="threads")  # type: ignore[arg-type]
Background(flask_app, run_on="sometimes")  # type: ignore[arg-type]


def is_admin(environ: dict[str, Any]) -> bool:
    return True


page = monitor.Monitor(allowed=is_admin, actions=True, path="status")
assert_type(page.path, str | None)
Background(flask_app, monitor=page, monitor_at="/tasks")
Background(flask_app, monitor=is_admin)  # type: ignore[arg-type]
monitor.Monitor()  # type: ignore[call-arg]
monitor.Monitor(allowed=True)  # type: ignore[arg-type]
DispatcherMiddleware(flask_app, {"/tasks": page})


@flask_app.get("/")
def view(tasks: BackgroundTasks) -> str:
    tasks.add_task(send, 1)  # type: ignore[arg-type]
    return ""


assert_type(view(tasks), str)


class Monitor(Hooks):
    def task_finished(self, record: TaskRecord) -> None:
        assert_type(record.task, BackgroundTask)
        assert_type(record.batch, BackgroundTasks)
        assert_type(record.ended_at, float | None)
        assert_type(record.error, BaseException | None)


BackgroundTasksMiddleware(application, hooks=Monitor())
BackgroundTasksMiddleware(application, hooks=Monitor)  # type: ignore[arg-type]


def test_of_an_application(background_tasks: TaskRecorder) -> None:
    """A test annotates the pytest fixture in this way."""
    assert_type(background_tasks.tasks, list[RecordedTask])
    assert_type(background_tasks.tasks[0].args, tuple[Any, ...])
    assert_type(background_tasks.tasks[0].kwargs, dict[str, Any])
    assert_type(background_tasks.tasks[0].path, str)
    assert_type(background_tasks.errors, list[BaseException])
    assert_type(background_tasks.mode, Literal["record", "run", "real"])
    background_tasks.assert_added(send, ANY, copies=2)
    background_tasks.assert_added(send, 1)  # type: ignore[arg-type]
    background_tasks.assert_added(send_async)  # type: ignore[call-arg]
    background_tasks.assert_none()
    background_tasks.run()
    background_tasks.join()
    background_tasks.join(timeout=0.5)
    background_tasks.join("1")  # type: ignore[arg-type]


@registered_task(retry=Retry(5, on=(OSError, TimeoutError), first=0.5, jitter=False))
def retried(number: int) -> str:
    return str(number)


assert_type(retried(1), str)
assert_type(Retry(on=OSError).wait_before(2), float)
tasks.using(retry=Retry(), delay=1.5).add_task(retried, 1)
tasks.using(delay=1).add_task(retried, "1")  # type: ignore[arg-type]
Retry(3, OSError)  # type: ignore[call-arg]
Retry(on=int)  # type: ignore[arg-type]
assert_type(BackgroundTask(retried, 1).attempt, int)
