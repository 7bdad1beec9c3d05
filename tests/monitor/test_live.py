"""The page in Chromium, while real tasks run in processes of their own."""

from __future__ import annotations

import http.client
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.monitor.browser import Browser
from tests.support import TIMEOUT
from tests.support.command import ROOT, Command, running


class Worker:
    """A process of the shop."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self.page = f"http://127.0.0.1:{command.port}/admin/tasks/"

    def post(self, path: str) -> None:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._command.port, timeout=TIMEOUT
        )
        connection.request("POST", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"ok")
        connection.close()

    def kill(self) -> None:
        self._command.send(signal.SIGKILL)


@contextmanager
def worker(*paths: Path) -> Iterator[Worker]:
    arguments = [sys.executable, "-m", "tests.monitor.shop", *map(str, paths)]
    with running(arguments, Path(ROOT)) as command:
        yield Worker(command)


def names(browser: Browser, section: str) -> list[str]:
    """The names of the tasks that a section of the page shows."""
    return browser.texts(f"#{section} tbody td:first-child, #{section} .facts span:first-child")


def test_a_task_appears_and_ends_and_fails(browser: Browser, tmp_path: Path) -> None:
    with worker(tmp_path) as shop:
        browser.open(shop.page)
        browser.wait(lambda: browser.text("#running .nothing") == "No task runs.")
        shop.post("/add/wait_at_gate")
        browser.wait(lambda: names(browser, "running") == ["__main__.wait_at_gate"])
        assert "POST /add/wait_at_gate" in browser.text("#running")
        shop.post("/open")
        browser.wait(lambda: names(browser, "running") == [])
        browser.wait(lambda: "Succeeded\n1" in browser.text("#totals"))

        shop.post("/add/fail")
        browser.wait(lambda: names(browser, "failures") == ["__main__.fail"])
        assert "LookupError" in browser.text("#failures")
        assert "secret" not in browser.run("return document.documentElement.outerHTML")
        browser.click("#failures summary")
        browser.wait(lambda: "LookupError: secret 4711" in browser.text("#failures pre"))
        assert "Failed\n1" in browser.text("#totals")
        assert browser.complaints == []


def test_the_tasks_of_a_killed_process_show_as_lost(browser: Browser, tmp_path: Path) -> None:
    with worker(tmp_path) as shop, worker(tmp_path) as other:
        browser.open(shop.page)
        other.post("/add/wait_at_gate")
        browser.wait(lambda: names(browser, "running") == ["__main__.wait_at_gate"])
        assert not browser.shows("#lost")
        states = "#processes td[data-label=State]"
        assert browser.texts(states) == ["lives", "lives"]
        other.kill()
        browser.wait(lambda: names(browser, "lost") == ["__main__.wait_at_gate"])
        assert names(browser, "running") == []
        assert sorted(browser.texts("#processes td[data-label=State]")) == [
            "lives",
            "was killed",
        ]
        assert "Lost\n1" in browser.text("#totals")


def test_ten_thousand_functions_and_names_with_marks_are_shown(
    browser: Browser, tmp_path: Path
) -> None:
    with worker(tmp_path) as shop:
        shop.post("/named?count=1&name=%3Cscript%3Edocument.title='evil'%3C/script%3E")
        shop.post("/named?count=10000&name=function_")
        browser.open(shop.page)
        browser.wait(lambda: "10,001" in browser.text("#totals"))
        assert "100 are shown" in browser.text("#names .count")
        browser.click("#filter input")
        browser.keys("<script>")
        browser.wait(
            lambda: names(browser, "names") == ["shop.<script>document.title='evil'</script>0"]
        )
        assert browser.run("return document.title") == "Background tasks"
        assert browser.complaints == []


def test_a_failed_durable_task_is_retried_and_a_waiting_one_discarded(
    browser: Browser, tmp_path: Path
) -> None:
    with worker(tmp_path / "tasks", tmp_path / "tasks") as shop:
        shop.post("/charge")
        shop.post("/charge")
        browser.open(shop.page)
        states = "#durable .state"
        browser.wait(lambda: browser.texts(states) == ["failed", "failed"])
        browser.click("#durable summary")
        browser.wait(lambda: "ValueError: card 4711" in browser.text("#durable pre"))
        assert "Arguments:\n  'card 4711'" in browser.text("#durable pre")
        shop.post("/open")
        browser.click("#durable .buttons button:nth-child(1)")
        browser.wait(lambda: browser.texts(states) == ["succeeded", "failed"])
        browser.wait(lambda: browser.text("#durable pre") == "The arguments are not kept.")
        browser.click("#durable .buttons button:nth-child(2)")
        browser.driver.switch_to.alert.dismiss()
        assert browser.text("#durable .item:nth-child(2) .buttons") == "Retry\nDiscard"
        browser.click("#durable .buttons button:nth-child(2)")
        browser.driver.switch_to.alert.accept()
        browser.wait(lambda: browser.texts(states) == ["succeeded"])


def test_an_order_without_the_cookie_is_refused_and_the_page_says_so(
    browser: Browser, tmp_path: Path
) -> None:
    with worker(tmp_path / "tasks", tmp_path / "tasks") as shop:
        shop.post("/charge")
        browser.open(shop.page)
        browser.wait(lambda: browser.texts("#durable .state") == ["failed"])
        browser.driver.delete_all_cookies()
        browser.click("#durable .buttons button")
        browser.wait(lambda: "stale: reload the page" in browser.text("#durable .buttons"))
        assert browser.texts("#durable .state") == ["failed"]
        browser.open(shop.page)
        browser.wait(lambda: browser.texts("#durable .state") == ["failed"])
        shop.post("/open")
        browser.click("#durable .buttons button")
        browser.wait(lambda: browser.texts("#durable .state") == ["succeeded"])
