"""Prometheus's multiprocess mode under gunicorn: two workers, scraped over HTTP."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.servers.control import Control
from tests.servers.fleet import start
from tests.servers.process import PATIENT, Process
from tests.servers.setups import HERE, Setup
from tests.support import wait_until
from tests.support.client import ask

SETUPS = [
    s for s in HERE if s.name in ("gunicorn-gthread", "gunicorn-preload", "gunicorn-gevent")
]

CONFIGURATION = """
workers = 2
from wsgi_bg.gunicorn import child_exit, post_fork, worker_exit
"""

SITE = """
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from tests.servers.app import about
from tests.servers.gate import visit
from wsgi_bg import BackgroundTasksMiddleware, background_tasks
from wsgi_bg.prometheus import PrometheusHooks

def tasks(environ, start_response):
    background_tasks.add_task(visit, environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

def metrics(environ, start_response):
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return make_wsgi_app(registry)(environ, start_response)

tasks = BackgroundTasksMiddleware(tasks, runner="pool", hooks=PrometheusHooks())
application = DispatcherMiddleware(tasks, {"/metrics": metrics, "/about": about})
"""


RUNNING = ("wsgi_bg_running_tasks",)
SUCCEEDED = ("wsgi_bg_tasks_total", "tests.servers.gate.visit", "succeeded")


def scrape(server: Process) -> dict[tuple[str, ...], float]:
    """The values of a scrape, by name and labels."""
    text = ask(server.port, path="/metrics").body.decode()
    return {
        (each.name, *each.labels.values()): each.value
        for family in parse(text)
        for each in family.samples
    }


def hold(server: Process, control: Control) -> tuple[int, str]:
    """Let a task wait at the gate; return the process and the token."""
    token = control.token()
    assert ask(server.port, path=f"/?{token}").body == b"ok"
    return control.run(token).pid, token


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_gauges_of_a_killed_worker_go_and_its_counts_stay(
    setup: Setup, control: Control, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = start(
            stack,
            setup,
            control,
            files={"configuration.py": CONFIGURATION, "site_with_metrics.py": SITE},
            module="site_with_metrics",
            options=["-c", "python:configuration"],
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), **PATIENT},
        )
        server.wait_until_up()
        done = control.token()
        control.go(done)
        ask(server.port, path=f"/?{done}")
        assert control.run(done).passed
        assert wait_until(lambda: scrape(server).get(SUCCEEDED) == 1)

        killed, _ = hold(server, control)
        os.kill(killed, signal.SIGSTOP)  # so that the other worker gets the next request
        state = Path(f"/proc/{killed}/stat")
        assert wait_until(lambda: state.read_text().rpartition(") ")[2].startswith("T"))
        survivor, second = hold(server, control)
        os.kill(killed, signal.SIGCONT)
        assert survivor != killed
        assert wait_until(lambda: scrape(server)[RUNNING] == 2), scrape(server)

        os.kill(killed, signal.SIGKILL)
        assert wait_until(lambda: scrape(server)[RUNNING] == 1), scrape(server)
        assert not list(tmp_path.glob(f"gauge_live*_{killed}.db"))
        assert scrape(server)[SUCCEEDED] == 1
        assert control.let_through(second)
