"""The page for users of FastAPI: both programs, and their differences."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks as FastAPITasks
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from flask import Flask, abort
from werkzeug.test import Client

from tests.conftest import Log
from tests.support.pages import Page, run
from wsgi_bg import BackgroundTasks
from wsgi_bg.flask import Background

FASTAPI, OURS, ON_THE_LOOP = Page("docs/how-to/coming-from-fastapi.md").blocks("python")


def post(app: Any, path: str) -> int:
    """Make a request; return the status after the tasks have ended.

    :raises Exception: the error that reaches the server.
    """
    if isinstance(app, Flask):
        return Client(app).post(path, buffered=True).status_code
    return asyncio.run(post_asgi(app, *path.partition("?")[::2]))


async def post_asgi(app: FastAPI, path: str, query: str) -> int:
    statuses: list[int] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": query.encode(),
        "headers": [],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize("program", [FASTAPI, OURS], ids=["FastAPI", "wsgi_bg"])
def test_the_two_programs_do_the_same(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "program"}
    exec(program, names)
    assert post(names["app"], "/send-notification/ada@example.com?q=news") == 200
    log = tmp_path / "log.txt"
    assert log.read_text() == "found query: news\nmessage to ada@example.com\n"


def fail() -> None:
    raise ValueError("a bug in a task")


def fastapi_app(done: list[str]) -> FastAPI:
    app = FastAPI()

    @app.post("/refused")
    def refused(tasks: FastAPITasks) -> None:
        tasks.add_task(done.append, "refused")
        raise HTTPException(400)

    @app.post("/broken")
    def broken(tasks: FastAPITasks) -> PlainTextResponse:
        tasks.add_task(done.append, "broken")
        return PlainTextResponse("", 500, background=tasks)

    @app.post("/failing")
    def failing(tasks: FastAPITasks) -> None:
        tasks.add_task(fail)
        tasks.add_task(done.append, "after the failing one")

    return app


def flask_app(done: list[str]) -> Flask:
    app = Flask("app")
    Background(app)

    @app.post("/refused")
    def refused(tasks: BackgroundTasks) -> str:
        tasks.add_task(done.append, "refused")
        abort(400)

    @app.post("/broken")
    def broken(tasks: BackgroundTasks) -> tuple[str, int]:
        tasks.add_task(done.append, "broken")
        return "", 500

    @app.post("/failing")
    def failing(tasks: BackgroundTasks) -> str:
        tasks.add_task(fail)
        tasks.add_task(done.append, "after the failing one")
        return ""

    return app


def test_the_page_states_the_behaviour_of_fastapi() -> None:
    done: list[str] = []
    app = fastapi_app(done)
    assert post(app, "/refused") == 400
    assert done == []
    assert post(app, "/broken") == 500
    assert done == ["broken"]
    with pytest.raises(ValueError, match="a bug in a task"):
        post(app, "/failing")
    assert done == ["broken"]


def test_the_page_states_our_behaviour(log: Log) -> None:
    done: list[str] = []
    app = flask_app(done)
    assert post(app, "/refused") == 400
    assert done == ["refused"]
    assert post(app, "/broken") == 500
    assert done == ["refused"]
    assert len(log.warnings) == 1
    assert post(app, "/failing") == 200
    assert done == ["refused", "after the failing one"]
    assert len(log.errors) == 1


def test_synchronous_code_calls_async_code_as_the_page_shows() -> None:
    run(ON_THE_LOOP, "docs/how-to/coming-from-fastapi.md")
