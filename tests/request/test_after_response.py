"""Behaviour that the tests of real servers in separate processes (tests/servers) omit."""

from __future__ import annotations

import threading

from tests.support import TIMEOUT, app_that, waitress
from tests.support.client import ask
from wsgi_bg import BackgroundTasksMiddleware, background_tasks


def test_the_inline_runner_holds_the_servers_thread() -> None:
    """A limit that the pages state; the test also shows that ``close()`` runs the task."""
    names: list[str] = []
    done = threading.Event()

    def task() -> None:
        names.append(threading.current_thread().name)
        done.set()

    app = app_that(lambda environ: background_tasks.add_task(task))
    with waitress(BackgroundTasksMiddleware(app, runner="inline")) as port:
        ask(port)
        assert done.wait(TIMEOUT)
    assert names[0].startswith("waitress")
