"""The token of a POST: no other site has it, and each process can check it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Log
from tests.monitor.support import Answer, open_monitor, token_of

STALE = "Refused: the token is missing or stale: reload the page."
FOREIGN = "Refused: the request comes from another site"


def load(**environ: Any) -> tuple[str, str, str]:
    """Load the page; return the token in the page, the cookie and its attributes."""
    answer = Answer(open_monitor(actions=True), "/", **environ)
    cookie, _, attributes = answer.headers["Set-Cookie"].partition("; ")
    return token_of(answer.body), cookie, attributes


def post(token: str = "", cookie: str = "", **environ: Any) -> str:
    """Order to retry an unknown task, in another process so to say; return the error."""
    given = {"HTTP_X_WSGI_BG_TOKEN": token, "HTTP_COOKIE": cookie, **environ}
    answer = Answer(open_monitor(actions=True), "/retry?id=1", "POST", **given)
    assert answer.code == (403 if answer.json["error"].startswith("Refused") else 404)
    return str(answer.json["error"])


def passes(*args: str, **environ: Any) -> bool:
    return post(*args, **environ) == "The task is not there any more."


def test_a_token_is_good_for_a_monitor_that_has_not_issued_it() -> None:
    token, cookie, _ = load()
    assert len(token) == 43
    assert passes(token, cookie)
    assert passes(token, f"session=5; {cookie}; other=6")


def test_no_script_reads_the_cookie_and_no_other_site_sends_it() -> None:
    _, cookie, attributes = load()
    assert cookie.startswith("wsgi_bg_monitor=")
    assert attributes == "HttpOnly; SameSite=Strict; Path=/"


def test_over_https_no_subdomain_can_set_the_cookie() -> None:
    https = {"wsgi.url_scheme": "https"}
    token, cookie, attributes = load(**https)
    assert cookie.startswith("__Host-wsgi_bg_monitor=")
    assert attributes == "HttpOnly; SameSite=Strict; Path=/; Secure"
    assert passes(token, cookie, **https)
    assert post(token, cookie.removeprefix("__Host-"), **https) == STALE


def test_a_second_tab_has_the_token_of_the_first() -> None:
    token, cookie, _ = load()
    assert load(HTTP_COOKIE=cookie)[:2] == (token, cookie)
    for forged in ("wsgi_bg_monitor=short", f"xwsgi_bg_monitor={token}"):
        assert load(HTTP_COOKIE=forged)[0] != token


def test_a_post_without_its_token_is_refused_and_logged(log: Log) -> None:
    (token, cookie, _), (other, _, _) = load(), load()
    assert token != other
    for wrong in (("", cookie), (token, ""), (other, cookie), ("", ""), ("\xe4", cookie)):
        assert post(*wrong) == STALE
    empty = "wsgi_bg_monitor="
    assert post("", empty) == STALE
    reason = "the token is missing or stale: reload the page"
    assert log.warnings == [f"the monitor refused to retry a task: {reason}"] * 6


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", ""])
def test_a_post_that_the_browser_calls_foreign_is_refused(site: str) -> None:
    token, cookie, _ = load()
    assert post(token, cookie, HTTP_SEC_FETCH_SITE=site).startswith(FOREIGN)


def test_the_browser_is_asked_first_and_then_the_origin() -> None:
    token, cookie, _ = load()
    own = {"HTTP_HOST": "shop.example:8080", "HTTP_ORIGIN": "http://shop.example:8080"}
    assert passes(token, cookie, **own)
    # A proxy has changed the Host header.
    behind = {**own, "HTTP_HOST": "127.0.0.1:9000"}
    assert passes(token, cookie, HTTP_SEC_FETCH_SITE="same-origin", **behind)
    assert post(token, cookie, **behind).startswith(FOREIGN)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://[", "//shop"])
def test_a_foreign_origin_is_refused(origin: str) -> None:
    token, cookie, _ = load()
    given = {"HTTP_HOST": "shop.example", "HTTP_ORIGIN": origin}
    assert post(token, cookie, **given).startswith(FOREIGN)


def test_without_actions_there_is_neither_token_nor_cookie() -> None:
    answer = Answer(open_monitor(), "/")
    assert b'name="token" content=""' in answer.body
    assert "Set-Cookie" not in answer.headers
