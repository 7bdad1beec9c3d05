"""``Response``: an answer of the monitor, with the headers that protect the page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        # No text becomes HTML: textContent needs no trusted type.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The Content-Security-Policy of each response."""

_HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)


class Response:
    """A response whose whole body is known.

    :param kind: the Content-Type.
    :param headers: further headers.
    """

    __slots__ = ("_body", "_headers", "_status")

    def __init__(self, status: str, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        self._status = status
        self._body = body
        self._headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            *headers,
            *_HEADERS,
        ]

    @classmethod
    def of_text(cls, status: str, text: str, *headers: tuple[str, str]) -> Response:
        """Return a response of plain text."""
        return cls(status, "text/plain; charset=utf-8", text.encode(), *headers)

    @classmethod
    def of_json(cls, data: Any, status: str = "200 OK") -> Response:
        """Return a response of JSON; a lone surrogate stays escaped."""
        text = json.dumps(data, separators=(",", ":"))
        return cls(status, "application/json", text.encode())

    def send(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Start the response, and return the body; an empty body for HEAD."""
        start_response(self._status, self._headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [self._body]
