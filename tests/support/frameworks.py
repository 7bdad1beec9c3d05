"""The same site in each framework of the table in docs/how-to/other-frameworks.md.

The views of all pages begin with the same call of the service. Then ``/`` answers, ``/missing``
answers 404 as the framework does, ``/broken`` raises, and ``/stream`` streams rows. The code
that installs the middleware and finds the tasks stands here as on that page.
"""

# ruff: noqa: RET504

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest

from tests.conftest import Log
from tests.support import TIMEOUT
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
    get_background_tasks,
    inject,
)

Answer = tuple[int, bytes]


def two_rows() -> Iterator[bytes]:
    yield b"Ada,"
    yield b"Grace"


class Site(NamedTuple):
    """The part of the views that is independent of the framework."""

    enter: Callable[[BackgroundTasks], object]
    """Called first, with the result of ``get_background_tasks``."""
    rows: Callable[[], Iterator[bytes]] = two_rows
    """The rows of ``/stream``."""

    def fail(self) -> Any:
        raise ValueError("a bug")


class Seen(SimpleQueue[str]):
    """Values that tasks and views record, on any thread."""

    def next(self, count: int) -> list[str]:
        return [self.get(timeout=TIMEOUT) for _ in range(count)]


@inject
def injected(tasks: BackgroundTasks) -> BackgroundTasks:
    return tasks


def service(tasks: BackgroundTasks) -> None:
    """Called by a view without the tasks; finds the tasks by ``inject`` and compares both."""
    assert background_tasks == tasks
    assert injected() is tasks
    assert isinstance(tasks, BackgroundTasks)


def add_pages(app: Any, site: Site, request: Any, abort: Callable[[int], Any]) -> None:
    """Add the views of Flask and Bottle, whose route decorators have the same names."""

    @app.route("/")  # type: ignore[untyped-decorator]
    def index() -> str:
        site.enter(get_background_tasks(request.environ))
        return "ok"

    @app.route("/missing")  # type: ignore[untyped-decorator]
    def missing() -> Any:
        return index() and abort(404)

    @app.route("/broken")  # type: ignore[untyped-decorator]
    def broken() -> Any:
        return index() and site.fail()

    @app.route("/stream")  # type: ignore[untyped-decorator]
    def stream() -> Iterator[bytes]:
        index()
        return site.rows()


def make_flask(site: Site) -> Any:
    from flask import Flask, abort, request

    from wsgi_bg.flask import Background

    app = Flask("site")
    add_pages(app, site, request, abort)
    Background(app)
    return app


def make_bottle(site: Site, **config: Any) -> Any:
    from bottle import Bottle, abort, request

    app = Bottle()
    app.config.update(config)
    add_pages(app, site, request, abort)
    app.wsgi = BackgroundTasksMiddleware(app.wsgi)
    return app


def make_werkzeug(site: Site) -> Any:
    from werkzeug import Request, Response
    from werkzeug.exceptions import NotFound

    @Request.application
    def app(request: Request) -> Response:
        site.enter(get_background_tasks(request.environ))
        if request.path == "/missing":
            raise NotFound
        if request.path == "/broken":
            site.fail()
        return Response(site.rows() if request.path == "/stream" else "ok")

    app = BackgroundTasksMiddleware(app)
    return app


def make_django(site: Site) -> Any:
    from asgiref.sync import sync_to_async
    from django.http import Http404, HttpResponse, StreamingHttpResponse
    from django.urls import path

    from tests.support.django import settings
    from wsgi_bg.django import get_wsgi_application

    def index(request: Any) -> Any:
        site.enter(get_background_tasks(request.environ))
        return HttpResponse("ok")

    async def index_async(request: Any) -> Any:
        index(request)
        return await sync_to_async(index)(request)

    def missing(request: Any) -> Any:
        index(request)
        raise Http404

    def broken(request: Any) -> Any:
        return index(request) and site.fail()

    def stream(request: Any) -> Any:
        return index(request) and StreamingHttpResponse(site.rows())

    # A process has only one Django: its URLs are these views from now on.
    settings.ROOT_URLCONF = (
        path("", index),
        path("async", index_async),
        path("missing", missing),
        path("broken", broken),
        path("stream", stream),
    )
    application = get_wsgi_application()
    return application


def make_pyramid(site: Site) -> Any:
    from pyramid.config import Configurator
    from pyramid.httpexceptions import HTTPNotFound
    from pyramid.response import Response

    def view(request: Any) -> Any:
        site.enter(get_background_tasks(request.environ))
        if request.path == "/missing":
            raise HTTPNotFound
        if request.path == "/broken":
            site.fail()
        return Response(app_iter=site.rows()) if request.path == "/stream" else Response("ok")

    config = Configurator()
    config.add_route("page", "/*rest")
    config.add_view(view, route_name="page")
    app = BackgroundTasksMiddleware(config.make_wsgi_app())
    return app


def make_falcon(site: Site) -> Any:
    import falcon

    class Pages:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
            site.enter(get_background_tasks(req.env))
            resp.text = "ok"

        def on_get_missing(self, req: falcon.Request, resp: falcon.Response) -> None:
            self.on_get(req, resp)
            raise falcon.HTTPNotFound

        def on_get_broken(self, req: falcon.Request, resp: falcon.Response) -> None:
            self.on_get(req, resp)
            site.fail()

        def on_get_stream(self, req: falcon.Request, resp: falcon.Response) -> None:
            site.enter(get_background_tasks(req.env))
            resp.stream = site.rows()

    app: Any = falcon.App()  # its types do not know PEP 3333's exc_info
    app.add_route("/", Pages())
    for page in ("missing", "broken", "stream"):
        app.add_route(f"/{page}", Pages(), suffix=page)
    app = BackgroundTasksMiddleware(app)
    return app


def make_plain(site: Site) -> Any:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        site.enter(get_background_tasks(environ))
        path = environ["PATH_INFO"]
        if path == "/broken":
            site.fail()
        status = "404 Not Found" if path == "/missing" else "200 OK"
        start_response(status, [("Content-Type", "text/plain")])
        return site.rows() if path == "/stream" else [b"ok"]

    app = BackgroundTasksMiddleware(app)
    return app


def via_werkzeug(app: Any, path: str) -> Answer:
    from werkzeug.test import Client

    response = Client(app).get(path, buffered=True)
    return response.status_code, response.data


def via_webtest(app: Any, path: str) -> Answer:
    from webtest import TestApp

    response = TestApp(app).get(path, expect_errors=True)
    return response.status_int, response.body


def via_falcon(app: Any, path: str) -> Answer:
    from falcon.testing import TestClient

    response = TestClient(app).simulate_get(path)
    return response.status_code, response.content


class Framework(NamedTuple):
    """A row of the page's table, and the way to test the framework."""

    name: str
    make: Callable[[Site], Any]
    get: Callable[[Any, str], Answer]
    lets_errors_out: bool = False
    """Whether an exception in a view leaves the application; else there is a 500."""


FLASK = Framework("Flask", make_flask, via_werkzeug)
WERKZEUG = Framework("Werkzeug", make_werkzeug, via_werkzeug, True)
DJANGO = Framework("Django", make_django, via_werkzeug)
BOTTLE = Framework("Bottle", make_bottle, via_webtest)
PYRAMID = Framework("Pyramid", make_pyramid, via_webtest, True)
FALCON = Framework("Falcon", make_falcon, via_falcon)
PLAIN = Framework("any other", make_plain, via_werkzeug, True)
FRAMEWORKS = [FLASK, WERKZEUG, DJANGO, BOTTLE, PYRAMID, FALCON, PLAIN]
STRICT_BOTTLE = Framework(
    "Bottle without catchall",
    functools.partial(make_bottle, catchall=False),
    via_webtest,
    True,
)


def check_failure(framework: Framework, log: Log) -> None:
    seen = Seen()

    def send_receipt() -> None:
        seen.put("a receipt for what failed")

    def enter(tasks: BackgroundTasks) -> None:
        tasks.add_task(send_receipt)
        tasks.using(run_on="error").add_task(seen.put, "an alarm")

    app = framework.make(Site(enter))
    if framework.lets_errors_out:
        with pytest.raises(ValueError, match="a bug"):
            framework.get(app, "/broken")
    else:
        assert framework.get(app, "/broken")[0] == 500
    assert seen.next(1) == ["an alarm"]
    assert seen.empty()
    [warning] = log.warnings
    assert "send_receipt was not run: the request failed" in warning
