"""Debian's Chromium, driven by Selenium, for the tests of the page.

``apt install chromium chromium-driver`` and ``pip install -e '.[browser]'`` install both. If
one is missing, the tests are skipped; with ``WSGI_BG_REQUIRE_BROWSER=1``, as in the gate, they
fail.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import TIMEOUT, wait_until

PROGRAMS = ("chromium", "chromedriver")

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # for root, and containers
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--lang=en-US",
)


def why_not() -> str | None:
    """The reason why no browser can be started; None if all is there."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not here: apt install chromium chromium-driver"
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not here: pip install -e '.[browser]'"
    return None


class Browser:
    """A browser with a tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *args: Any) -> Any:
        """Run a script in the page, and return the result."""
        return self.driver.execute_script(script, *args)

    def text(self, selector: str) -> str:
        """The text of the first element of the selector; empty if there is none."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(self.run(script, selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
        return [str(text) for text in self.run(script, selector)]

    def shows(self, selector: str) -> bool:
        """True if the first element of the selector is visible."""
        script = "return document.querySelector(arguments[0]).checkVisibility()"
        return bool(self.run(script, selector))

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def keys(self, *keys: str) -> None:
        """Press keys; the element that has the focus gets them."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def wait(self, predicate: Callable[[], object]) -> None:
        """Wait until the page looks as wanted."""
        assert wait_until(predicate, 2 * TIMEOUT), self.text("body")

    @contextmanager
    def second_window(self, url: str) -> Iterator[None]:
        """Show a page in a window of its own; the first window stays the one that is driven."""
        first = self.driver.current_window_handle
        self.driver.switch_to.new_window("window")
        second = self.driver.current_window_handle
        self.driver.get(url)
        self.driver.switch_to.window(first)
        try:
            yield
        finally:
            self.driver.switch_to.window(second)
            self.driver.close()
            self.driver.switch_to.window(first)

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def look(self, width: int, height: int = 900, *, is_dark: bool = False) -> None:
        """Set the size of the window, and light or dark."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    @property
    def complaints(self) -> list[str]:
        """The errors in the console since the last look, such as broken policies."""
        return [each["message"] for each in self.driver.get_log("browser")]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start a browser with a new profile; no process of the browser is left at the end."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("WSGI_BG_REQUIRE_BROWSER"):
            pytest.fail(f"{reason}; WSGI_BG_REQUIRE_BROWSER is set")
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program, driver_program = (shutil.which(name) for name in PROGRAMS)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = folder / "profile"
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = None
    patch = pytest.MonkeyPatch()
    patch.setenv("no_proxy", "localhost,127.0.0.1")  # or Selenium asks a proxy for the driver
    try:
        driver = webdriver.Chrome(options=options, service=Service(driver_program))
        driver.set_page_load_timeout(2 * TIMEOUT)
        driver.set_script_timeout(TIMEOUT)
        yield Browser(driver)
    finally:
        if driver is not None:
            driver.quit()
        patch.undo()
        for pid in processes_of(profile):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(profile: Path) -> list[int]:
    """The processes of the browser that has the profile."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(profile) in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found
