"""Starts a server that has no command: ``serve.py SERVER PORT MODULE``."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any

from tests.servers import fastcgi

HOST = "127.0.0.1"


def waitress(app: Any, port: int) -> None:
    from waitress import serve

    serve(app, listen=f"{HOST}:{port}")


def werkzeug(app: Any, port: int, **options: Any) -> None:
    from werkzeug.serving import run_simple

    run_simple(HOST, port, app, **options)


def werkzeug_threaded(app: Any, port: int) -> None:
    werkzeug(app, port, threaded=True)


def werkzeug_debugger(app: Any, port: int) -> None:
    werkzeug(app, port, threaded=True, use_debugger=True)


def wsgiref(app: Any, port: int) -> None:
    from wsgiref.simple_server import make_server

    make_server(HOST, port, app).serve_forever()


def cheroot(app: Any, port: int) -> None:
    from cheroot.wsgi import Server

    Server((HOST, port), app).safe_start()


def cherrypy(app: Any, port: int) -> None:
    import cherrypy

    cherrypy.config.update(
        {
            "server.socket_host": HOST,
            "server.socket_port": port,
            "engine.autoreload.on": False,
            "checker.on": False,
        }
    )

    def started(environ: Any, start_response: Any) -> Any:
        # bjoern answers before its start is complete, and a signal in between ends it at once.
        cherrypy.engine.wait(cherrypy.engine.states.STARTED)
        return app(environ, start_response)

    cherrypy.tree.graft(started)
    cherrypy.engine.signals.subscribe()
    cherrypy.engine.start()
    cherrypy.engine.block()


def gevent(app: Any, port: int) -> None:
    from gevent.pywsgi import WSGIServer

    WSGIServer((HOST, port), app).serve_forever()


def uvicorn(app: Any, port: int) -> None:
    from uvicorn import run

    run(app, host=HOST, port=port)


def uvicorn_a2wsgi(app: Any, port: int) -> None:
    from a2wsgi import WSGIMiddleware

    uvicorn(WSGIMiddleware(app), port)


def uvicorn_starlette(app: Any, port: int) -> None:
    import warnings

    warnings.filterwarnings("ignore", "starlette.middleware.wsgi is deprecated")
    from starlette.middleware.wsgi import WSGIMiddleware

    uvicorn(WSGIMiddleware(app), port)


def uvicorn_asgiref(app: Any, port: int) -> None:
    from asgiref.wsgi import WsgiToAsgi

    uvicorn(WsgiToAsgi(app), port)


def django(app: Any, port: int) -> None:
    from django.conf import settings
    from django.core.servers.basehttp import run

    settings.configure()
    run(HOST, port, app, threading=True)


def flup(app: Any, port: int, kind: str = "fcgi") -> None:
    """Start flup as a web server does: standard input is the listening socket."""
    with socket.create_server((HOST, 0)) as listener:
        os.dup2(listener.fileno(), 0)
        fastcgi.serve((HOST, port), backend=listener.getsockname())
    importlib.import_module(f"flup.server.{kind}").WSGIServer(app).run()


def flup_single(app: Any, port: int) -> None:
    flup(app, port, "fcgi_single")


def twisted(app: Any, port: int) -> None:
    from twisted.internet import reactor
    from twisted.web.server import Site
    from twisted.web.wsgi import WSGIResource

    pool = reactor.getThreadPool()
    reactor.listenTCP(port, Site(WSGIResource(reactor, pool, app)), interface=HOST)
    reactor.run()


def tornado(app: Any, port: int, executor: Any = None) -> None:
    from tornado.httpserver import HTTPServer
    from tornado.ioloop import IOLoop
    from tornado.wsgi import WSGIContainer

    HTTPServer(WSGIContainer(app, executor)).listen(port, HOST)
    IOLoop.current().start()


def tornado_threads(app: Any, port: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tornado(app, port, ThreadPoolExecutor(4))


def bjoern(app: Any, port: int) -> None:
    from bjoern import run

    run(app, HOST, port)


def make_asgi(module: str) -> Any:
    """Make the ASGI application of the module."""
    from a2wsgi import WSGIMiddleware

    return WSGIMiddleware(importlib.import_module(module).application)


def main(name: str, port: str, module: str) -> None:
    if name.endswith("-monkey"):
        from gevent import monkey

        monkey.patch_all()
        name = name.removesuffix("-monkey")
    globals()[name.replace("-", "_")](importlib.import_module(module).application, int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
