"""The page in Chromium, with numbers of an invented shop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from tests.monitor.browser import Browser, chromium, processes_of
from tests.monitor.samples import CHARGE, snapshot
from tests.monitor.support import serving
from tests.support import TIMEOUT
from wsgi_bg.monitor import Monitor
from wsgi_bg.status import NameCounts, Snapshot

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"


class Site:
    """A monitor below ``/tasks`` of a site, whose numbers a test sets."""

    def __init__(self) -> None:
        self.snapshot = snapshot()
        self.options: dict[str, Any] = {"actions": True}
        self.is_allowed = True
        self.polls: Counter[str] = Counter()
        self._polled = threading.Condition()

    def take(self, path: object = None) -> Snapshot:
        return self.snapshot

    def app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/overview.json":
            with self._polled:
                self.polls[environ["SCRIPT_NAME"]] += 1
                self._polled.notify_all()
        monitor = Monitor(allowed=lambda environ: self.is_allowed, **self.options)
        return monitor(environ, start_response)

    def wait_for_polls(self, mounted_at: str, count: int) -> None:
        """Wait until a page has asked ``count`` times more."""
        with self._polled:
            wanted = self.polls[mounted_at] + count
            assert self._polled.wait_for(
                lambda: self.polls[mounted_at] >= wanted, count * TIMEOUT
            )


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site()
    monkeypatch.setattr("wsgi_bg.monitor.application.snapshot", site.take)
    return site


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    def nothing(environ: Any, start_response: Any) -> list[bytes]:
        start_response("404 Not Found", [])
        return [b""]

    app = DispatcherMiddleware(nothing, dict.fromkeys(("/tasks", "/clock"), site.app))
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}/tasks"


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


def test_the_headings_count_tasks_as_the_totals_do(
    site: Site, browser: Browser, url: str
) -> None:
    site.snapshot = replace(
        site.snapshot,
        durable=site.snapshot.durable * 40,
        counts=replace(site.snapshot.counts, running=3_000),
    )
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.texts("h2")[:5] == [
        "Running 3,000, the first 3 are shown",
        "Waiting 15",
        "Failed 61, the newest 3 are shown",
        "Lost 1",
        "Durable tasks 200 or more, the newest 200 are shown",
    ]


def test_no_process_of_the_browser_is_left(tmp_path: Path) -> None:
    with chromium(tmp_path) as browser:
        browser.open("about:blank")
        assert processes_of(tmp_path)
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_tests_that_miss_the_browser_are_skipped_unless_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WSGI_BG_REQUIRE_BROWSER", required)
    with pytest.raises(outcome, match="apt install chromium"), chromium(tmp_path):
        pass


def test_names_are_text_whatever_is_in_them(site: Site, browser: Browser, url: str) -> None:
    shown = site.snapshot
    site.snapshot = replace(
        shown,
        running=(replace(shown.running[0], name=EVIL, request=EVIL, thread=EVIL, id=EVIL),),
        waiting={EVIL: 1},
        failures=(replace(shown.failures[0], name=EVIL, error=EVIL, traceback=EVIL),),
        lost=(replace(shown.lost[0], name=EVIL),),
        names=(NameCounts(EVIL, running=1),),
        processes=(replace(shown.processes[0], command=EVIL),),
        durable=(replace(shown.durable[3], name=EVIL, id=EVIL, error=EVIL),),
    )
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    browser.click("#failures summary")
    browser.wait(lambda: browser.text("#failures pre").endswith(f"\n{EVIL}"))
    for section in ("running", "waiting", "failures", "lost", "names", "processes", "durable"):
        assert EVIL in browser.text(f"#{section}"), section
    assert browser.run("return document.querySelectorAll('img, main script').length") == 0
    assert browser.run("return document.title") == "Background tasks"
    assert browser.complaints == []


def test_ten_thousand_names_do_not_break_the_page(
    site: Site, browser: Browser, url: str
) -> None:
    names = [f"shop.function_{number:05d}" for number in range(10_000)]
    site.snapshot = replace(
        site.snapshot,
        names=tuple(NameCounts(name, succeeded=1) for name in names),
        waiting=dict.fromkeys(names, 2),
        counts=replace(site.snapshot.counts, waiting=20_000),
    )
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.text("#names .count") == "10,000, 100 are shown"
    waiting = "20,000 of 10,000 functions, the first 200 are shown"
    assert browser.text("#waiting .count") == waiting
    assert browser.run("return document.querySelectorAll('*').length") < 6_000
    browser.click("#filter input")
    browser.keys("9876")
    browser.wait(lambda: browser.texts("#names tbody td:first-child") == [names[9876]])
    assert browser.text("#names .count") == "1 of 10,000 match"
    browser.keys("x")
    browser.wait(lambda: browser.text("#names .nothing") == "No function has this name.")
    assert browser.run("return document.activeElement.name") == "name"


def test_the_page_asks_again_and_keeps_the_focus_and_what_is_unfolded(
    site: Site, browser: Browser, url: str
) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    browser.run("document.querySelector('#failures summary').focus()")
    browser.keys("\ue007")  # Enter
    browser.wait(lambda: "card 4711 was declined" in browser.text("#failures pre"))
    error = "Task 50f1\n\nCardDeclined: 4711\n\nTraceback"  # first: the box shows a part only
    assert browser.text("#failures pre").startswith(error)
    shown = site.snapshot
    newer = replace(shown.failures[0], name="shop.newest", ended=shown.taken)
    site.snapshot = replace(shown, failures=(newer, *shown.failures))
    browser.wait(lambda: "shop.newest" in browser.text("#failures"))
    is_open = "return [...document.querySelectorAll('#failures details')].map((d) => d.open)"
    assert browser.run(is_open) == [False, True, False, False]
    focused = "return document.activeElement.innerText"
    assert CHARGE in browser.run(focused)


def test_a_hidden_page_asks_for_nothing(site: Site, browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    with browser.second_window(url.replace("/tasks", "/clock")):
        browser.driver.minimize_window()
        assert browser.run("return document.visibilityState") == "hidden"
        site.wait_for_polls("/clock", 1)
        polls = site.polls["/tasks"]
        site.wait_for_polls("/clock", 2)  # more than two seconds
        assert site.polls["/tasks"] == polls
        browser.driver.set_window_rect(0, 0, 1280, 900)
        site.wait_for_polls("/tasks", 2)


def test_a_paused_page_asks_for_nothing_but_for_what_the_user_filters(
    site: Site, browser: Browser, url: str
) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    with browser.second_window(url.replace("/tasks", "/clock")):
        browser.click("#pause")
        assert browser.text("#state") == "Paused"
        polls = site.polls["/tasks"]
        site.wait_for_polls("/clock", 2)
        assert site.polls["/tasks"] == polls
        assert browser.text("#pause") == "Resume"
        browser.click("#filter input")
        browser.keys("charge")
        browser.wait(lambda: browser.texts("#names tbody td:first-child") == [CHARGE])
        assert (browser.text("#state"), site.polls["/tasks"]) == ("Paused", polls + 1)
        site.wait_for_polls("/clock", 2)
        assert site.polls["/tasks"] == polls + 1
        browser.click("#pause")
        browser.wait(lambda: browser.text("#state") == "Live")


def test_the_page_says_that_it_gets_no_answer_and_asks_less_often(
    site: Site, browser: Browser, url: str
) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    site.is_allowed = False
    browser.wait(lambda: browser.text("#state") == "No answer")
    assert browser.text("#notice") == (
        "Access was refused: log in again, and reload the page. The numbers below are old. "
        "The next request is in 4.0 s."
    )
    assert CHARGE in browser.text("#running")
    browser.wait(lambda: "8.0 s" in browser.text("#notice"))
    site.is_allowed = True
    browser.click("#pause")
    browser.click("#pause")  # asks at once
    browser.wait(lambda: browser.text("#state") == "Live")
    assert not browser.shows("#notice")


def test_errors_do_not_unfold_if_the_option_says_so(
    site: Site, browser: Browser, url: str
) -> None:
    site.options = {"show_errors": False}
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert "CardDeclined" in browser.text("#failures")
    assert browser.run("return document.querySelectorAll('details').length") == 0
    assert browser.run("return document.querySelectorAll('.buttons button').length") == 0


def test_a_page_without_recorded_status_says_how_to_record(
    site: Site, browser: Browser, url: str
) -> None:
    site.snapshot = replace(site.snapshot, minutes=(), failures=())
    browser.open(url)
    browser.wait(lambda: browser.shows("#recording"))
    assert browser.text("#failures") == "Failed 61"  # and not that no task has failed
    assert "status=True" in browser.text("#recording")
    assert not browser.shows("#charts")


def test_the_page_can_be_used_by_keyboard(site: Site, browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    named = """
        const e = document.activeElement;
        return e.id || e.name || e.getAttribute("aria-label") || e.innerText.split("\\n")[0]
    """
    order = [""]
    while order[-1] != "sort":
        assert len(order) < 50, order
        browser.keys("\ue004")  # Tab
        order.append(str(browser.run(named)))
        style = "return getComputedStyle(document.activeElement).outlineStyle"
        assert browser.run(style) == "solid", order
    assert order[1] == "pause"
    assert order[2].startswith("Tasks a minute, the last hour. At most ")
    assert f"Retry {CHARGE} 50f1" in order
    assert order[-2:] == ["name", "sort"]
    browser.run("document.querySelector('svg').focus()")
    browser.keys("\ue012")  # the arrow to the left
    assert "succeeded" in browser.text(".read")


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_no_width_needs_a_scroll_bar_to_the_side(
    site: Site, browser: Browser, url: str, width: int
) -> None:
    browser.look(width)
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.run("return document.documentElement.scrollWidth") == width


def test_a_task_that_is_in_the_same_state_after_an_order_has_its_buttons_again(
    site: Site, browser: Browser, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg.monitor.application.durable_folders", lambda path: [])
    monkeypatch.setattr("wsgi_bg.monitor.application.give_order", lambda *_: CHARGE)
    browser.open(url)
    failed = "#durable .item:nth-child(4) .buttons"
    browser.wait(lambda: browser.text(failed) == "Retry\nDiscard")
    browser.click(f"{failed} button")
    browser.wait(lambda: browser.text(failed) == "Retry ordered")
    browser.wait(lambda: browser.text(failed) == "Retry\nDiscard")


LINES = """
const cell = document.querySelector(`#running td[data-label=${arguments[0]}]`);
const label = document.createElement("span");
label.textContent = arguments[0];
label.style.font = getComputedStyle(cell, "::before").font;
document.body.append(label);
const isWhole = parseFloat(getComputedStyle(cell, "::before").width) >= label.offsetWidth - 1;
const text = document.createRange();
text.selectNodeContents(cell);
return [isWhole, new Set([...text.getClientRects()].map((box) => box.top)).size];
"""


def test_a_long_request_breaks_neither_labels_nor_ids(
    site: Site, browser: Browser, url: str
) -> None:
    request, id_ = f"GET /{'x' * 300}", "17256675-1388-409f-a359-7737b15b5442"
    task = replace(site.snapshot.running[0], request=request, id=id_)
    site.snapshot = replace(site.snapshot, running=(task,))
    browser.look(1280)
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.run(LINES, "Id")[1] <= 2
    browser.look(360)
    assert browser.run(LINES, "Id")[0]
    assert browser.run(LINES, "Request")[0]


FAINT = """
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = channels(color).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return channels(color)[3] === 0 ? behind(element.parentElement) : color;
    };
    const isText = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    const hasText = (element) => [...element.childNodes].some(isText);
    const contrast = (element) => {
        const [one, two] = [light(getComputedStyle(element).color), light(behind(element))];
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    };
    return [...document.querySelectorAll("body *")]
        .filter((element) => element.checkVisibility() && hasText(element))
        .filter((element) => contrast(element) < 4.5)
        .map((element) => element.textContent);
"""


@pytest.mark.parametrize("is_dark", [False, True])
def test_each_text_has_the_contrast_that_wcag_asks_for(
    browser: Browser, url: str, is_dark: bool
) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    browser.look(1280, is_dark=is_dark)
    assert browser.run(FAINT) == []


def test_the_page_is_dark_if_the_system_is(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    color = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(color)
    browser.look(1280, is_dark=True)
    assert browser.run(color) != light


def test_a_long_name_of_a_thread_leaves_room_for_the_request(
    site: Site, browser: Browser, url: str
) -> None:
    thread, path = "Thread-12 (process_request_thread)", "x" * 100
    task = replace(site.snapshot.running[0], request=f"GET /{path}", thread=thread)
    site.snapshot = replace(site.snapshot, running=(task,))
    browser.look(760)
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.run(LINES, "Request")[1] <= 10
    browser.look(320)
    assert browser.run(LINES, "Thread") == [True, 2]


def test_a_moment_that_has_just_come_is_now(site: Site, browser: Browser, url: str) -> None:
    taken = site.snapshot.taken
    failure = replace(site.snapshot.failures[0], ended=taken)
    process = replace(site.snapshot.processes[0], updated=taken + 60)  # by another clock
    site.snapshot = replace(site.snapshot, failures=(failure,), processes=(process,))
    browser.look(1280)
    browser.open(url)
    browser.wait(lambda: browser.text("#state") == "Live")
    assert browser.text("#failures .facts :last-child") == "now"
    assert browser.text("#processes td:last-child") == "now"
