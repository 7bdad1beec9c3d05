"""The token that a POST needs: a double-submit cookie, which each process can check.

The page's cookie has a random token, which no other site can read or set: the browser sends
the cookie for requests of the same site only, and no script reads the cookie. The page itself
has the token too, and sends the token in a header, which another site could only send after a
preflight request that the monitor never answers. No process keeps anything, so that any worker
checks a token that another worker has issued, also after a restart.
"""

from __future__ import annotations

import hmac
import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_NAME = "wsgi_bg_monitor"
_HEADER = "HTTP_X_WSGI_BG_TOKEN"


def issue(environ: WSGIEnvironment) -> tuple[str, tuple[str, str]]:
    """Return the token of the browser, and the header that sets the cookie.

    A browser that has a cookie keeps its token, so that pages in other tabs stay valid.
    """
    token = _of_cookie(environ) or secrets.token_urlsafe(32)
    is_secure = environ.get("wsgi.url_scheme") == "https"
    attributes = "; HttpOnly; SameSite=Strict; Path=/"
    if is_secure:
        attributes += "; Secure"
    return token, ("Set-Cookie", f"{_name(environ)}={token}{attributes}")


def why_refused(environ: WSGIEnvironment) -> str | None:
    """Return the reason why a POST is refused; None if the page of this browser has sent it."""
    site = environ.get("HTTP_SEC_FETCH_SITE")
    origin = environ.get("HTTP_ORIGIN")
    if site is not None:
        if site != "same-origin":
            return "the request comes from another site"
    elif origin is not None and not _is_host(origin, environ):
        return "the request comes from another site, or a proxy changes the Host header"
    cookie, header = _of_cookie(environ), environ.get(_HEADER, "")
    if not cookie or not hmac.compare_digest(cookie.encode(), header.encode()):
        return "the token is missing or stale: reload the page"
    return None


def _is_host(origin: str, environ: WSGIEnvironment) -> bool:
    host: str = environ.get("HTTP_HOST", "")
    # A proxy may speak HTTP with the server and HTTPS with the browser.
    return bool(host) and origin.partition("://")[2].lower() == host.lower()


def _name(environ: WSGIEnvironment) -> str:
    # A browser accepts the prefix from the host itself over HTTPS only, and not from the
    # host's subdomains.
    return f"__Host-{_NAME}" if environ.get("wsgi.url_scheme") == "https" else _NAME


def _of_cookie(environ: WSGIEnvironment) -> str | None:
    """Return the token of the request's cookie, if that has the form of a token."""
    pattern = rf"(?:^|;)\s*{re.escape(_name(environ))}=([A-Za-z0-9_-]{{43}})\s*(?:;|$)"
    found = re.search(pattern, environ.get("HTTP_COOKIE", ""))
    return found[1] if found else None
