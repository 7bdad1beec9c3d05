"""A process like AWS Lambda's: the process is stopped when the handler has returned.

``python -m tests.support.lambda_process ADAPTER RUNNER [decorated]`` reads a line of standard
input for each invocation, writes the status of the response to standard output and stops itself
with SIGSTOP. SIGCONT continues the process with the next invocation. Tasks write to standard
output too.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, cast

from a2wsgi import WSGIMiddleware
from apig_wsgi import make_lambda_handler
from awsgi import response
from flask import Flask
from mangum import Mangum
from serverless_wsgi import handle_request

from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.serverless import finish_tasks

Handler = Callable[[dict[str, Any], object], Any]

EVENT: dict[str, Any] = {
    "version": "1.0",
    "resource": "/",
    "path": "/",
    "httpMethod": "GET",
    "headers": {"Host": "shop.example"},
    "multiValueHeaders": {"Host": ["shop.example"]},
    "queryStringParameters": None,
    "multiValueQueryStringParameters": None,
    "requestContext": {"requestId": "1", "identity": {"sourceIp": "127.0.0.1"}},
    "body": None,
    "isBase64Encoded": False,
}
"""A request as passed on by AWS's API Gateway."""

HANDLERS: dict[str, Callable[[Any], Handler]] = {
    "apig-wsgi": make_lambda_handler,
    "serverless-wsgi": lambda app: lambda event, context: handle_request(app, event, context),
    "awsgi": lambda app: lambda event, context: response(app, event, context),
    "mangum": lambda app: Mangum(WSGIMiddleware(app), lifespan="off"),
}

thawed = threading.Event()


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def plain() -> None:
    thawed.wait(0.05)  # takes longer than the way from the handler to the stop
    say("plain")


async def asynchronous() -> None:
    import asyncio

    await asyncio.sleep(0.05)
    say("async")


def make_app() -> Flask:
    app = Flask(__name__)

    @app.get("/")
    def view() -> str:
        for task in (plain, asynchronous, plain):
            background_tasks.add_task(task)
        return "ok"

    return app


def main(adapter: str, runner: str, *decorated: str) -> None:
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    named = cast(Literal["inline", "pool"], runner)
    app = BackgroundTasksMiddleware(make_app(), runner=named)
    handler = HANDLERS[adapter](app)
    if decorated:
        handler = finish_tasks(handler)
    for _ in sys.stdin:
        say(int(handler(EVENT, None)["statusCode"]))
        signal.raise_signal(signal.SIGSTOP)


if __name__ == "__main__":
    main(*sys.argv[1:])
