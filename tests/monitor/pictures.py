"""Pictures of the page: ``python -m tests.monitor.pictures FOLDER``.

``light.png`` belongs to the documentation, as ``docs/reference/monitor.png``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from tests.monitor import samples
from tests.monitor.browser import chromium
from tests.monitor.support import open_monitor, serving
from tests.support import wait_until


def take(folder: Path) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(open_monitor(actions=True)) as port,
        tempfile.TemporaryDirectory() as profile,
        chromium(Path(profile)) as browser,
    ):
        shown = samples.snapshot()
        patch.setattr("wsgi_bg.monitor.application.snapshot", lambda path: shown)
        browser.look(1280)
        browser.open(f"http://127.0.0.1:{port}")
        assert wait_until(lambda: browser.text("#state") == "Live")
        browser.click("#failures summary")
        assert wait_until(lambda: "declined" in browser.text("#failures pre"))
        browser.run("document.activeElement.blur()")
        for name, width, is_dark in (
            ("light", 1120, False),
            ("dark", 1280, True),
            ("narrow", 390, False),
        ):
            browser.look(width, is_dark=is_dark)
            height = browser.run("return document.documentElement.scrollHeight")
            browser.look(width, height, is_dark=is_dark)
            browser.driver.save_screenshot(str(folder / f"{name}.png"))


if __name__ == "__main__":
    take(Path(sys.argv[1]))
