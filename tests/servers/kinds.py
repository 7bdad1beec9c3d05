"""The kinds of response: the application's answer, the request, the expected bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

Add = Callable[[], object]
"""Adds the request's task."""

Answer = Callable[[Add, Any], Iterable[bytes]]
"""The rest of an application: calls :data:`Add` and ``start_response``, returns the body."""


class Kind(NamedTuple):
    """A kind of response."""

    answer: Answer
    body: bytes | None = b""
    """The body that the client gets; None for a page of the server."""
    status: int = 200
    method: str = "GET"
    version: str = "1.1"
    run_on: Literal["success", "error", "always"] | None = None


OK = "200 OK"
TEXT = ("Content-Type", "text/plain")
TWO = [TEXT, ("Content-Length", "2")]
NONE = [TEXT, ("Content-Length", "0")]


def _answer(
    status: str, headers: list[tuple[str, str]], make_body: Callable[[], Iterable[bytes]]
) -> Answer:
    def answer(add: Add, start_response: Any) -> Iterable[bytes]:
        add()
        start_response(status, headers)
        return make_body()

    return answer


def _stream(add: Add, start_response: Any) -> Iterator[bytes]:
    start_response(OK, [TEXT])
    yield b"before "
    add()
    yield b"after"


def _declare_late(add: Add, start_response: Any) -> Iterator[bytes]:
    start_response(OK, TWO)
    add()
    yield b"ok"


def _raise(add: Add, start_response: Any) -> Iterable[bytes]:
    add()
    raise ValueError("the application raises, as it is to")


LENGTH = _answer(OK, TWO, lambda: [b"ok"])

KINDS = {
    "length": Kind(LENGTH, b"ok"),
    "length-generator": Kind(_answer(OK, TWO, lambda: (c for c in (b"o", b"k"))), b"ok"),
    "length-late": Kind(_declare_late, b"ok"),
    "length-0": Kind(_answer(OK, NONE, lambda: [b""])),
    "length-0-no-chunk": Kind(_answer("201 CREATED", NONE, list), status=201),
    "list-of-one": Kind(_answer(OK, [TEXT], lambda: [b"ok"]), b"ok"),
    "stream": Kind(_stream, b"before after"),
    "http10": Kind(_stream, b"before after", version="1.0"),
    "http10-length": Kind(LENGTH, b"ok", version="1.0"),
    "head": Kind(LENGTH, method="HEAD"),
    "204": Kind(_answer("204 NO CONTENT", [], list), status=204),
    "304": Kind(_answer("304 NOT MODIFIED", [("ETag", '"x"')], list), status=304),
    "empty": Kind(_answer(OK, [TEXT], list)),
    "raises": Kind(_raise, None, 500, run_on="error"),
    "raises-always": Kind(_raise, None, 500, run_on="always"),
}
