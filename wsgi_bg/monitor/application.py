"""``Monitor``: a web page that shows the tasks, as a WSGI application to mount anywhere.

Each request is answered at once: no request waits for an event, so that the page holds no
thread of the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, quote

from wsgi_bg._process import log
from wsgi_bg._process.interrupts import is_from_signal_handler, type_name
from wsgi_bg._process.repeated import RepeatedError, RepeatedWarning
from wsgi_bg._status.recorder import recorder
from wsgi_bg._status.snapshots import durable_folders
from wsgi_bg._tasks.callables import is_plain
from wsgi_bg._tasks.task_log import fields_of
from wsgi_bg.exceptions import OptionTypeError, OptionValueError
from wsgi_bg.monitor import token
from wsgi_bg.monitor.durable import RefusedError, details, give_order
from wsgi_bg.monitor.overview import Query, find_error, overview
from wsgi_bg.monitor.response import Response
from wsgi_bg.status import snapshot

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

T = TypeVar("T")

_HTML = "text/html; charset=utf-8"
_FILES = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
_ACTIONS = ("retry", "discard")


class Monitor:
    """A WSGI application: a page that shows what runs, waits and failed.

    Mount the application at any path, or pass it to
    :class:`wsgi_bg.flask.Background` as ``monitor``. The page asks for new numbers every two
    seconds while it is visible. Each request is answered at once, on the server's thread.

    :param allowed: called with the environ of each request, on the server's thread. The
        request is answered if the result is ``True``; any other result and an exception make
        a 403, and a log record once a minute at most.
    :param actions: True if the page may retry and discard durable tasks.
    :param show_arguments: True if the page may show the arguments of durable tasks.
    :param show_errors: False if the page must show no more of an error than its class.
    :param path: the ``status_path`` of the processes to show, or the folder of their
        ``DurableRunner``; None for the ``status_path`` of this process, or without that for
        this process alone.
    :ivar path: the path that was given.
    :raises TypeError: if ``allowed`` is no plain function, or an option has the wrong type.
    """

    __module__ = "wsgi_bg.monitor"  # the name that users import it by

    def __init__(
        self,
        *,
        allowed: Callable[[WSGIEnvironment], bool],
        actions: bool = False,
        show_arguments: bool = False,
        show_errors: bool = True,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if not callable(allowed) or not is_plain(allowed):
            wanted = "a plain function that takes the environ and returns True or False"
            raise OptionTypeError("allowed", allowed, wanted)
        flags = (("actions", actions), ("show_arguments", show_arguments))
        for name, value in (*flags, ("show_errors", show_errors)):
            if type(value) is not bool:
                raise OptionTypeError(name, value, "True or False")
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise OptionTypeError("path", path, "the path of a folder, or None")
        self._allowed = allowed
        self._actions = actions
        self._show_arguments = show_arguments
        self._show_errors = show_errors
        self.path: str | None = None if path is None else os.fspath(path)
        self._refusals = RepeatedWarning(
            "%d requests for the monitor were refused since the last record of this kind: "
            "allowed returned an object of type %s, and not True"
        )
        self._denial = RepeatedError("allowed of the monitor raised: the request is refused")
        self._failure = RepeatedError("the monitor could not read the status")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(actions={self._actions}, "
            f"show_arguments={self._show_arguments}, show_errors={self._show_errors}, "
            f"path={self.path!r})"
        )

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request: PEP 3333's application side."""
        return self._respond(environ).send(environ, start_response)

    def _respond(self, environ: WSGIEnvironment) -> Response:
        if not self._is_allowed(environ):
            return Response.of_text("403 Forbidden", "Forbidden")
        path, mounted_at = environ.get("PATH_INFO", ""), environ.get("SCRIPT_NAME", "")
        if not path and mounted_at:
            # The links of the page are relative, and need the slash. The location is relative,
            # too: a proxy may have removed a part of the path.
            last = quote(mounted_at.rpartition("/")[2], encoding="latin-1")
            location = ("Location", f"./{last}/")
            return Response.of_text("308 Permanent Redirect", "", location)
        name = path.removeprefix("/")
        answer, methods = self._answer(name)
        if answer is None:
            return Response.of_text("404 Not Found", "Not Found")
        if environ["REQUEST_METHOD"] not in methods:
            allow = ("Allow", ", ".join(methods))
            return Response.of_text("405 Method Not Allowed", "Method Not Allowed", allow)
        try:
            return answer(environ, name)
        except RefusedError as exc:
            return Response.of_json({"error": exc.reason}, exc.status)
        except Exception as exc:
            self._failure.log(exc)
            reason = f"The status cannot be read ({type_name(exc)}): see the log."
            return Response.of_json({"error": reason}, "500 Internal Server Error")

    def _is_allowed(self, environ: WSGIEnvironment) -> bool:
        try:
            result: object = self._allowed(environ)
        except BaseException as exc:  # sys.exit() is no "yes", and must end no worker
            if is_from_signal_handler(exc):
                raise
            self._denial.log(exc)
            return False
        if result is not True:
            self._refusals.count(type_name(result))
        return result is True

    def _answer(
        self, name: str
    ) -> tuple[Callable[[WSGIEnvironment, str], Response] | None, tuple[str, ...]]:
        """Return the function that answers requests for ``name``, and their methods."""
        if name in _ACTIONS:
            return (self._act if self._actions else None), ("POST",)
        answers = {
            "": self._page,
            "overview.json": self._overview,
            "error.json": self._error if self._show_errors else None,
            "task.json": self._task,
        }
        answer = self._file if name in _FILES else answers.get(name)
        return answer, ("GET", "HEAD")

    def _page(self, environ: WSGIEnvironment, name: str) -> Response:
        page = _content("page.html")
        if not self._actions:
            return Response("200 OK", _HTML, page.replace(b"{{token}}", b""))
        text, cookie = token.issue(environ)
        return Response("200 OK", _HTML, page.replace(b"{{token}}", text.encode()), cookie)

    def _file(self, environ: WSGIEnvironment, name: str) -> Response:
        return Response("200 OK", _FILES[name], _content(name))

    def _overview(self, environ: WSGIEnvironment, name: str) -> Response:
        query = Query.of(environ.get("QUERY_STRING", ""))
        data = overview(self._read(snapshot), query)
        data["actions"] = self._actions
        data["shows"] = {"arguments": self._show_arguments, "errors": self._show_errors}
        return Response.of_json(data)

    def _error(self, environ: WSGIEnvironment, name: str) -> Response:
        found = find_error(self._read(snapshot), _field(environ, "key"))
        if found is None:
            raise RefusedError("404 Not Found", "Newer failures have displaced this one.")
        return Response.of_json(found)

    def _task(self, environ: WSGIEnvironment, name: str) -> Response:
        shown = details(
            self._read(durable_folders),
            _field(environ, "id"),
            has_arguments=self._show_arguments,
            has_traceback=self._show_errors,
        )
        return Response.of_json(shown)

    def _act(self, environ: WSGIEnvironment, name: str) -> Response:
        reason = token.why_refused(environ)
        if reason is not None:
            log.warning("the monitor refused to %s a task: %s", name, reason)
            raise RefusedError("403 Forbidden", f"Refused: {reason}.")
        id = _field(environ, "id")  # noqa: A001
        task = give_order(self._read(durable_folders), id, name)
        extra = fields_of(task, id)
        log.info("the monitor ordered to %s durable task %s", name, task, extra=extra)
        return Response.of_json({"ordered": name}, "202 Accepted")

    def _read(self, read: Callable[[str | None], T]) -> T:
        """Return ``read(path)`` for the folder to show, or for this process alone."""
        recorder.start()  # or this process is not shown before its first request
        own = next((folder.path for folder in recorder.folders), None)
        try:
            return read(own if self.path is None else self.path)
        except OptionValueError as exc:
            reason = "No process has written its status into the folder yet."
            raise RefusedError("503 Service Unavailable", reason) from exc


@cache
def _content(name: str) -> bytes:
    return resources.files("wsgi_bg.monitor").joinpath(name).read_bytes()


def _field(environ: WSGIEnvironment, name: str) -> str:
    """Return a field of the query string; empty if there is none."""
    query: str = environ.get("QUERY_STRING", "")
    fields = parse_qs(query, errors="replace")
    return fields.get(name, [""])[0]
