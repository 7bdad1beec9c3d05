"""Times the middleware for requests that add no task: ``python -m benchmarks.idle``.

Each request does the steps of a server: call the application, take the length of every
chunk, close. The peer is werkzeug's ``ClosingIterator``, the usual way to get a callback
at the end of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import Flask
from werkzeug.test import EnvironBuilder
from werkzeug.wsgi import ClosingIterator

from benchmarks.measure import HEADERS, App, alone, interleave, request, row, run
from wsgi_bg import BackgroundTasksMiddleware
from wsgi_bg.flask import Background

THOUSAND = [b"x"] * 1000


def list_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return [b"ok"]


def generator_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return (chunk for chunk in (b"ok",))


def thousand_in_a_list(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return THOUSAND


def thousand_from_a_generator(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return generate()


def thousand_from_an_iterator(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return Iterated()


def generate() -> Iterator[bytes]:
    for chunk in THOUSAND:
        yield chunk


class Iterated:
    """An iterator written in Python, as werkzeug's responses are."""

    def __init__(self) -> None:
        self._next = iter(THOUSAND).__next__

    def __iter__(self) -> Iterated:
        return self

    def __next__(self) -> bytes:
        return self._next()


class BareClosingIterator:
    """A middleware that only calls a function at the end of each response."""

    def __init__(self, app: App) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return ClosingIterator(self.app(environ, start_response), done)


class TasksByHand:
    """Background tasks written with ``ClosingIterator``: run unless the request failed.

    The class has no proxy, does not know whether the client has its response, and ignores
    errors in the body and a ``close()`` that is called twice or never.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["tasks"] = tasks = list[Any]()
        seen: list[str] = []

        def watched(status: str, headers: Any, exc_info: Any = None) -> Any:
            seen.append(status)
            return start_response(status, headers, exc_info)

        def run() -> None:
            if seen[-1] < "500":
                for func, args, kwargs in tasks:
                    func(*args, **kwargs)

        return ClosingIterator(self.app(environ, watched), run)


def done() -> None:
    """The callback that the peer is given."""


def added_cost(what: str, app: App, goal: str) -> None:
    bare, ours, peer, by_hand = interleave(
        request(alone(app)),
        request(BackgroundTasksMiddleware(alone(app))),
        request(BareClosingIterator(alone(app))),
        request(TasksByHand(alone(app))),
        calls=5000,
    )
    for name, cost in (
        ("ClosingIterator", peer - bare),
        ("the feature by hand", by_hand - bare),
    ):
        row(
            f"idle request, {what}, added",
            f"+{ours - bare:.2f}",
            f"{name} +{cost:.2f}",
            f"{cost / (ours - bare):.1f} times less",
            goal,
        )


def chunk_cost(what: str, app: App, goal: str) -> None:
    bare, ours, peer = interleave(
        request(alone(app)),
        request(BackgroundTasksMiddleware(alone(app))),
        request(BareClosingIterator(alone(app))),
        calls=100,
    )
    row(
        f"1000 chunks, {what}",
        f"{ours:.1f}",
        f"bare {bare:.1f}, ClosingIterator {peer / bare:.2f}x",
        f"{ours / bare:.2f}x of bare",
        goal,
    )


def flask_cost() -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "ok", endpoint="index")
    environ = EnvironBuilder("/").get_environ()
    bare, ours = interleave(
        request(app.wsgi_app, environ),
        request(BackgroundTasksMiddleware(app.wsgi_app), environ),
        calls=500,
    )
    row(
        "idle Flask request",
        f"{ours:.1f}",
        f"bare {bare:.1f}",
        f"{ours / bare:.3f}x",
        "<= 1.06",
    )


def extension_cost() -> None:
    """Time the Flask extension beside the middleware, for views without parameters."""
    plain, extended = Flask(__name__), Flask(__name__)
    for app in (plain, extended):
        app.add_url_rule("/", view_func=lambda: "ok", endpoint="index")
    plain.wsgi_app = BackgroundTasksMiddleware(plain.wsgi_app)  # type: ignore[method-assign]
    Background(extended)
    environ = EnvironBuilder("/").get_environ()
    middleware, ours = interleave(
        request(plain.wsgi_app, environ), request(extended.wsgi_app, environ), calls=500
    )
    row(
        "the same with wsgi_bg.flask.Background",
        f"{ours:.1f}",
        f"the middleware alone {middleware:.1f}",
        f"{ours / middleware:.3f}x",
        "nothing measurable",
    )


GOAL = "<= 1.2 (3.11), 1.6 (3.13)"
ROWS: dict[str, Callable[[], None]] = {
    "list": lambda: added_cost("list body", list_app, "<= 0.65"),
    "generator": lambda: added_cost("generator body", generator_app, "<= 1.25"),
    "1000": lambda: chunk_cost("list", thousand_in_a_list, "<= 1.05"),
    "1000-generator": lambda: chunk_cost("generator", thousand_from_a_generator, GOAL),
    "1000-iterator": lambda: chunk_cost("iterator in Python", thousand_from_an_iterator, GOAL),
    "flask": flask_cost,
    "extension": extension_cost,
}


if __name__ == "__main__":
    run("A request that adds no task", ROWS)
