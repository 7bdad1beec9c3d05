"""Types of registered functions, checked by mypy."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from celery import Celery

from wsgi_bg import BackgroundTasks, BackgroundTasksMiddleware, registered_task
from wsgi_bg.celery import CeleryRunner
from wsgi_bg.runners import Runner


@registered_task
def send(to: str, *, copies: int = 1) -> int:
    return copies


@registered_task(name="mail.send", celery={"queue": "mail"})
async def send_async(to: str) -> int:
    return len(to)


assert_type(send("a", copies=2), int)
send(1)  # type: ignore[arg-type]
checked: Callable[[str], Coroutine[Any, Any, int]] = send_async
tasks = BackgroundTasks()
tasks.add_task(send, "a", copies=2)
tasks.add_task(send, copies=2)  # type: ignore[call-arg]
tasks.using(celery={"countdown": 3}).add_task(send_async, "a")
tasks.using(celery="queue")  # type: ignore[arg-type]
registered_task(3)  # type: ignore[call-overload]
registered_task(send, name="mail")  # type: ignore[call-overload]

app = Celery()
runner: Runner = CeleryRunner(app, local="inline", publish_timeout=2)
CeleryRunner(app, on_publish_error="lose")  # type: ignore[arg-type]
BackgroundTasksMiddleware(lambda environ, start_response: [], runner=CeleryRunner(app))
