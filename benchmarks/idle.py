"""Times the middleware for requests that add no task: ``python -m benchmarks.idle``.

Each request does the steps of a server: call the application, take the length of every
chunk, close. The peer is werkzeug's ``ClosingIterator``, the usual way to get a callback
at the end of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flask import Flask
from werkzeug.test import EnvironBuilder
from werkzeug.wsgi import ClosingIterator

from benchmarks.measure import HEADERS, App, alone, interleave, request, row, run
from wsgi_bg import BackgroundTasksMiddleware

OK = b"ok"
THOUSAND = [b"x"] * 1000

Body = Callable[[], Iterable[bytes]]


class Iterated:
    """An iterator written in Python, as werkzeug's responses are."""

    def __init__(self) -> None:
        self._next = iter(THOUSAND).__next__

    def __iter__(self) -> Iterated:
        return self

    def __next__(self) -> bytes:
        return self._next()


def answering(body: Body) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", HEADERS)
        return body()

    return alone(app)


class BareClosingIterator:
    """A middleware that only calls a function at the end of each response."""

    def __init__(self, app: App) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return ClosingIterator(self.app(environ, start_response), done)


def done() -> None:
    """The callback that the peer is given."""


def beside_peer(body: Body, calls: int) -> list[float]:
    """Return the times of a request to the bare application, with wsgi_bg, with the peer."""
    return interleave(
        request(answering(body)),
        request(BackgroundTasksMiddleware(answering(body))),
        request(BareClosingIterator(answering(body))),
        calls=calls,
    )


def added_cost(what: str, body: Body, goal: str) -> None:
    bare, ours, peer = beside_peer(body, calls=5000)
    row(f"idle request, {what}, added", ours - bare, "ClosingIterator", peer - bare, goal)


def chunk_cost(what: str, body: Body, goal: str) -> None:
    bare, ours, peer = beside_peer(body, calls=100)
    row(f"1000 chunks, {what}", ours, "bare", bare, f"ratio {goal}")
    row(f"1000 chunks, {what}", ours, "ClosingIterator", peer)


def flask_cost() -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "ok", endpoint="index")
    environ = EnvironBuilder("/").get_environ()
    bare, ours = interleave(
        request(app.wsgi_app, environ),
        request(BackgroundTasksMiddleware(app.wsgi_app), environ),
        calls=500,
    )
    row("idle Flask request", ours, "bare", bare, "ratio <= 1.06")


GOAL = "<= 1.2 (3.11), 1.6 (3.13)"
ROWS: dict[str, Callable[[], None]] = {
    "list": partial(added_cost, "list body", lambda: [OK], "<= 0.65"),
    "generator": partial(
        added_cost, "generator body", lambda: (chunk for chunk in (OK,)), "<= 1.25"
    ),
    "1000": partial(chunk_cost, "list", lambda: THOUSAND, "<= 1.05"),
    "1000-generator": partial(
        chunk_cost, "generator", lambda: (chunk for chunk in THOUSAND), GOAL
    ),
    "1000-iterator": partial(chunk_cost, "iterator in Python", Iterated, GOAL),
    "flask": flask_cost,
}


if __name__ == "__main__":
    run("A request that adds no task", ROWS)
