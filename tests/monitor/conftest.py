"""Fixtures of the tests of the monitor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.monitor.browser import Browser, chromium
from wsgi_bg._request.layer import everywhere
from wsgi_bg._status.recorder import recorder


@pytest.fixture(autouse=True)
def recorder_is_off() -> Iterator[None]:
    """Let each test begin with a recorder that records nothing."""
    recorder.turn_off()
    yield
    recorder.turn_off()
    everywhere.clear()


@pytest.fixture(scope="session")
def chromium_of_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium_of_process: Browser) -> Iterator[Browser]:
    """A browser that shows an empty page before and after the test."""
    browser = chromium_of_process
    browser.open("about:blank")
    browser.look(1280)
    assert browser.complaints is not None
    yield browser
    browser.open("about:blank")
