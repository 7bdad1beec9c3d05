"""The checks of Starlette's and FastAPI's tests of background tasks, for our classes.

Starlette: tests/test_background.py; FastAPI: the tests of its tutorial on background tasks,
with a dependency that adds a task beside the handler's.
"""

from __future__ import annotations

from pathlib import Path

from flask import Flask, request
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Request, Response

from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
    get_background_tasks,
    inject,
)


def get(*tasks: BackgroundTask, stop_on_error: bool = False) -> TestResponse:
    """Handle a request whose handler adds ``tasks``."""

    @Request.application
    def app(request: Request) -> Response:
        for task in tasks:
            get_background_tasks(request.environ).add_task(task.func, *task.args, **task.kwargs)
        return Response("task initiated")

    client = Client(BackgroundTasksMiddleware(app, stop_on_error=stop_on_error))
    return client.get("/", buffered=True)


def test_an_async_task_runs() -> None:
    complete: list[bool] = []

    async def async_task() -> None:
        complete.append(True)

    assert get(BackgroundTask(async_task)).text == "task initiated"
    assert complete == [True]


def test_a_sync_task_runs() -> None:
    complete: list[bool] = []

    def sync_task() -> None:
        complete.append(True)

    assert get(BackgroundTask(sync_task)).text == "task initiated"
    assert complete == [True]


def test_multiple_tasks_run_with_their_arguments() -> None:
    counter = 0

    def increment(amount: int) -> None:
        nonlocal counter
        counter += amount

    response = get(*(BackgroundTask(increment, amount=amount) for amount in (1, 2, 3)))
    assert response.text == "task initiated"
    assert counter == 1 + 2 + 3


def test_a_failure_avoids_the_next_execution_with_stop_on_error() -> None:
    """Starlette's rule. Here the error is logged and does not leave the application."""
    counter = 0

    def increment() -> None:
        nonlocal counter
        counter += 1
        raise ValueError("task failed")

    tasks = BackgroundTask(increment), BackgroundTask(increment)
    assert get(*tasks, stop_on_error=True).text == "task initiated"
    assert counter == 1
    assert get(*tasks).text == "task initiated"
    assert counter == 3


def test_a_handlers_task_writes_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    app = Flask(__name__)

    def write_notification(email: str, message: str = "") -> None:
        log.write_text(f"notification for {email}: {message}")

    @app.post("/send-notification/<email>")
    def send_notification(email: str) -> dict[str, str]:
        background_tasks.add_task(write_notification, email, message="some notification")
        return {"message": "Notification sent in the background"}

    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    with app.test_client().post("/send-notification/foo@example.com") as response:
        assert response.json == {"message": "Notification sent in the background"}
        assert not log.exists()
    assert log.read_text() == "notification for foo@example.com: some notification"


def test_a_dependency_and_the_handler_add_to_the_same_object(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    app = Flask(__name__)

    def write_log(message: str) -> None:
        with log.open("a") as file:
            file.write(message)

    @inject
    def get_query(q: str | None, tasks: BackgroundTasks) -> str | None:
        if q:
            tasks.add_task(write_log, f"found query: {q}\n")
        return q

    @app.post("/send-notification/<email>")
    def send_notification(email: str) -> dict[str, str]:
        get_query(request.args.get("q"))
        background_tasks.add_task(write_log, f"message to {email}\n")
        return {"message": "Message sent"}

    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    with app.test_client().post("/send-notification/foo@example.com?q=some-query") as response:
        assert response.json == {"message": "Message sent"}
    assert log.read_text() == "found query: some-query\nmessage to foo@example.com\n"
