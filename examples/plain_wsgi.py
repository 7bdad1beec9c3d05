"""A WSGI service without a framework, and a task that is an ``async def`` function.

    python examples/plain_wsgi.py [PORT]
    curl http://127.0.0.1:8080/any/path

Two seconds after the answer log.txt in the current directory has the visit.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import anyio
from waitress import create_server

from wsgi_bg import BackgroundTasksMiddleware, get_background_tasks

DELAY = float(os.environ.get("DELAY", "2"))  # seconds that a slow database takes


async def record(path: str) -> None:
    await anyio.sleep(DELAY)
    async with await anyio.open_file("log.txt", "a", encoding="utf-8") as log:
        await log.write(f"Visit of {path}\n")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    get_background_tasks(environ).add_task(record, environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Your visit is noted\n"]


if __name__ == "__main__":
    app = BackgroundTasksMiddleware(application, runner="pool")
    server = create_server(app, host="127.0.0.1", port=sys.argv[1] if sys.argv[1:] else 8080)
    print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
