"""The page in Chromium, with numbers of an invented shop."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import make_server

from tests.monitor.browser import Browser, chromium, processes_of
from tests.monitor.samples import CHARGE, snapshot
from tests.monitor.support import open_monitor
from wsgi_bg.status import NameCounts, Snapshot

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"


class Site:
    """A monitor below ``/tasks`` of a site, whose numbers a test sets."""

    def __init__(self) -> None:
        self.snapshot = snapshot()
        self.options: dict[str, Any] = {"actions": True}
        self.is_allowed = True
        self.polled = threading.Semaphore(0)
        self.polls = 0
        self.orders: list[str] = []

    def take(self, path: object = None) -> Snapshot:
        return self.snapshot

    def app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        from wsgi_bg.monitor import Monitor

        if environ["PATH_INFO"] == "/overview.json":
            self.polls += 1
            self.polled.release()
        monitor = Monitor(allowed=lambda environ: self.is_allowed, **self.options)
        return monitor(environ, start_response)

    def wait_for_polls(self, count: int) -> None:
        for _ in range(count):
            assert self.polled.acquire(timeout=10)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site()
    monkeypatch.setattr("wsgi_bg.monitor.snapshot", site.take)
    return site


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    def nothing(environ: Any, start_response: Any) -> list[bytes]:
        start_response("404 Not Found", [])
        return [b""]

    # waitress would wait for the connections that the browser keeps.
    app = DispatcherMiddleware(nothing, {"/tasks": site.app})
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/tasks"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_shows_the_snapshot_and_breaks_no_policy(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.texts("#running tbody tr td:first-child")[1] == CHARGE
    assert "36,033" in browser.text("#totals")
    assert browser.texts("#charts figcaption b") == [
        "Tasks a minute",
        "Wait before the call",
        "Run of the call",
    ]
    assert len(browser.texts("#charts rect.bar")) > 60
    assert browser.complaints == []
