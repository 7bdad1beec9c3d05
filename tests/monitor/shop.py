"""A shop that the tests of the page run in processes of their own, with waitress.

``python -m tests.monitor.shop STATUS_PATH [DURABLE_PATH]``
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from flask import Flask, request
from waitress.server import create_server

from wsgi_bg import DurableRunner, PoolRunner, background_tasks, registered_task
from wsgi_bg.flask import Background
from wsgi_bg.monitor import Monitor

gate = threading.Event()


def wait_at_gate() -> None:
    gate.wait()


def succeed() -> None:
    pass


def fail() -> None:
    raise LookupError("secret 4711")


@registered_task(name="monitor_shop.charge")
def charge(card: str) -> None:
    if not gate.is_set():
        raise ValueError(card)


def named(name: str) -> Any:
    """Return a new function that has the name."""

    def function() -> None:
        pass

    function.__module__, function.__qualname__ = "shop", name
    return function


def make_app(status_path: str, durable_path: str = "") -> Flask:
    app = Flask("shop")

    @app.post("/add/<name>")
    def add(name: str) -> str:
        background_tasks.add_task(globals()[name])
        return "ok"

    @app.post("/charge")
    def add_charge() -> str:
        background_tasks.add_task(charge, "card 4711")
        return "ok"

    @app.post("/named")
    def add_named() -> str:
        for number in range(int(request.args["count"])):
            background_tasks.add_task(named(request.args["name"] + str(number)))
        return "ok"

    @app.post("/open")
    def open_gate() -> str:
        gate.set()
        return "ok"

    runner = DurableRunner(durable_path) if durable_path else PoolRunner(threads=4)
    monitor = Monitor(
        allowed=lambda environ: True, actions=True, show_arguments=True, path=status_path
    )
    Background(app, runner, monitor=monitor, monitor_at="/admin/tasks")
    return app


if __name__ == "__main__":
    server = create_server(make_app(*sys.argv[1:]), host="127.0.0.1", port=0)
    print(f"Serving on http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
