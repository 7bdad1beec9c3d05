"""Arguments that belong to the request: a WARNING names them, once for each function."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bottle
import falcon
import flask
import pytest
import webob
from django.core.files.uploadedfile import SimpleUploadedFile
from django.http import HttpResponse
from django.utils.functional import SimpleLazyObject
from flask import Flask
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.local import LocalProxy
from werkzeug.wrappers import Request, Response

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    app_that,
    lazy_module,
    make_environ,
    make_server_environ,
    respond,
)
from tests.support.django import RequestFactory
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    PoolRunner,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._request import arguments
from wsgi_bg.flask import Background


@pytest.fixture(autouse=True)
def none_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all functions that a WARNING has named."""
    monkeypatch.setattr(arguments, "_warned", set[str]())


def add(*args: Any, **kwargs: Any) -> None:
    """Handle a request whose task has these arguments."""

    def view(environ: Environ) -> None:
        get_background_tasks(environ).add_task(*args, **kwargs)

    respond(BackgroundTasksMiddleware(app_that(view)))


def store(upload: object, name: str = "", *parts: object, **more: object) -> None:
    """A task."""


STORE = "background task tests.request.test_arguments.store has an argument of the request: "


def unbound() -> Any:
    raise AssertionError("the proxy was asked for its object")


def webob_upload() -> Any:
    request: Any = webob.Request.blank("/", POST={"f": ("secret.txt", b"secret")})
    return request.POST["f"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: FileStorage(io.BytesIO(b"secret"), "secret.txt"), "its bytes, or the path"),
        (lambda: type("Upload", (FileStorage,), {})(), "its bytes, or the path"),
        (lambda: SimpleUploadedFile("secret.txt", b"secret"), "its bytes, or the path"),
        (lambda: bottle.FileUpload(io.BytesIO(), "f", "secret.txt"), "its bytes, or the path"),
        (lambda: webob_upload(), "its bytes, or the path"),
        (lambda: type("BodyPart", (), {"__module__": "falcon.media.multipart"})(), "its bytes"),
        (lambda: type("Part", (), {"__module__": "cherrypy._cpreqbody"})(), "its bytes"),
        (lambda: type("Request", (), {"__module__": "rest_framework.request"})(), "the values"),
        (lambda: type("_ThreadLocalProxy", (), {"__module__": "cherrypy"})(), "a value"),
        (lambda: Request(make_environ()), "the values that the task needs"),
        (lambda: flask.Request(make_environ()), "the values that the task needs"),
        (lambda: RequestFactory().get("/"), "the values that the task needs"),
        (lambda: bottle.BaseRequest(make_environ()), "the values that the task needs"),
        (lambda: falcon.Request(make_environ()), "the values that the task needs"),
        (lambda: webob.Request(make_environ()), "the values that the task needs"),
        (lambda: Response("secret"), "the values of it"),
        (lambda: flask.Response("secret"), "the values of it"),
        (lambda: HttpResponse("secret"), "the values of it"),
        (lambda: bottle.HTTPResponse("secret"), "the values of it"),
        (lambda: falcon.Response(), "the values of it"),
        (lambda: webob.Response("secret"), "the values of it"),
        (lambda: flask.request, "a value, or an id"),
        (lambda: flask.session, "a value, or an id"),
        (lambda: flask.g, "a value, or an id"),
        (lambda: LocalProxy(unbound), "a value, or an id"),
        (lambda: SimpleLazyObject(unbound), "a value, or an id"),
    ],
)
def test_an_argument_of_the_request_is_named_with_its_replacement(
    make: Callable[[], Any], expected: str, log: Log
) -> None:
    add(store, make())
    (message,) = log.warnings
    assert message.startswith(f"{STORE}argument 'upload' is a")
    assert f": pass {expected}" in message
    assert "secret" not in message


def test_a_function_is_warned_of_once(log: Log) -> None:
    def other(upload: object) -> None:
        """Another task."""

    for _ in range(2):
        add(store, FileStorage())
        add(store, "text", name=Request(make_environ()))
        add(other, upload=FileStorage())
    assert [message.split(" has an argument")[0] for message in log.warnings] == [
        "background task tests.request.test_arguments.store",
        f"background task {__name__}.test_a_function_is_warned_of_once.<locals>.other",
    ]


def test_each_argument_is_named_by_its_parameter_or_its_position(log: Log) -> None:
    file = FileStorage()
    add(store, 1, "name", 2, file, key=file, other=3)
    assert log.warnings[0].startswith(f"{STORE}positional argument 4 is an uploaded file")
    assert "; argument 'key' is an uploaded file" in log.warnings[0]


def test_an_annotation_may_have_a_name_that_only_type_checkers_know(log: Log) -> None:
    add(lazy_module("def func(upload: Upload) -> None: ...")["func"], FileStorage())
    assert "argument 'upload' is an uploaded file" in log.warnings[0]


def test_arguments_of_a_function_without_a_signature_are_named_by_position(log: Log) -> None:
    add(dict, FileStorage())
    assert "dict has an argument of the request: positional argument 1 is" in log.warnings[0]


def test_arguments_in_a_partial_are_looked_at_by_their_places_in_the_call(log: Log) -> None:
    add(partial(partial(store, FileStorage()), "name"), flask.request, key=FileStorage())
    (message,) = log.warnings
    assert message.startswith(f"{STORE}argument 'upload' is an uploaded file")
    assert "; positional argument 3 is a proxy" in message
    assert "; argument 'key' is an uploaded file" in message


def test_arguments_in_a_subclass_of_partial_are_looked_at(log: Log) -> None:
    class Named(partial[None]):
        pass

    add(Named(store, FileStorage()))
    assert "FileStorage" not in log.warnings[0]
    assert "its bytes, or the path" in log.warnings[0]


def test_an_argument_that_the_call_overrides_in_a_partial_is_no_matter(log: Log) -> None:
    add(partial(store, upload=FileStorage()), upload="text")
    assert log.warnings == []


def test_a_method_of_an_object_of_the_request_is_warned_of(log: Log, tmp_path: Path) -> None:
    add(FileStorage(io.BytesIO(b"secret")).save, tmp_path / "copy")
    add(partial(FileStorage(io.BytesIO(b"secret")).close))
    assert [message.partition(" is an uploaded file")[0] for message in log.warnings] == [
        "background task werkzeug.datastructures.file_storage.FileStorage."
        f"{name} has an argument of the request: the object of the method"
        for name in ("save", "close")
    ]


class Unhashable(type):
    """A class that defines ``__eq__`` and so has no hash."""

    def __eq__(cls, other: object) -> bool:
        return False


def test_a_class_that_cannot_be_hashed_is_no_matter(log: Log) -> None:
    seen: list[object] = []
    add(seen.append, Unhashable("Class", (), {})())
    assert len(seen) == 1
    assert log.warnings == log.errors == []


class Unhappy(type):
    """A class that raises when its ``__module__`` is read."""

    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise ValueError


@pytest.mark.parametrize(
    "value", [1, "x", object(), {"a": 1}, io.BytesIO(), Unhappy("Class", (), {})(), store]
)
def test_ordinary_arguments_are_no_matter(value: object, log: Log) -> None:
    seen: list[object] = []
    for _ in range(2):
        add(seen.append, value)
    assert len(seen) == 2
    assert log.warnings == log.errors == []


class Pair(NamedTuple):
    name: str
    upload: object


@dataclass
class Command:
    name: str
    upload: object


@dataclass(frozen=True, slots=True)
class FrozenCommand:
    upload: object


HOLDERS: list[Callable[[Any], Any]] = [
    lambda upload: [upload],
    lambda upload: ("a", upload),
    lambda upload: {upload},
    lambda upload: frozenset([upload]),
    lambda upload: {"photo": upload},
    lambda upload: {"photos": ["a", upload]},
    lambda upload: MultiDict([("photo", upload)]),
    lambda upload: Pair("a", upload),
    lambda upload: deque([upload]),
    lambda upload: Command("a", upload),
    lambda upload: [FrozenCommand(upload)],
]


@pytest.mark.parametrize("hold", HOLDERS)
def test_an_item_that_belongs_to_the_request_is_named_by_its_argument(
    hold: Callable[[Any], Any], log: Log
) -> None:
    add(store, hold(FileStorage(io.BytesIO(b"secret"))))
    assert log.warnings == [
        f"{STORE}argument 'upload' has an uploaded file, which is closed when the request "
        "ends: pass its bytes, or the path of a saved copy"
    ]


class NoItems(list[object]):
    def __iter__(self) -> Iterator[object]:
        raise AssertionError("the list was asked for its items")


@pytest.mark.parametrize(
    "value",
    [
        ["a", 1],
        {"a": ["b", {"c": 1}]},
        [object(), NoItems([1])],
        Command("a", [1]),
        Command,
        [[[[FileStorage()]]]],
        [*range(1000), FileStorage()],
    ],
)
def test_only_the_first_items_are_looked_at(value: object, log: Log) -> None:
    add(store, value)
    assert log.warnings == log.errors == []


class Interrupting(type):
    """A class that simulates Ctrl-C when its ``__module__`` is read."""

    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise KeyboardInterrupt


def test_ctrl_c_goes_through_and_the_tasks_are_named(log: Log) -> None:
    with pytest.raises(KeyboardInterrupt):
        add(store, Interrupting("Class", (), {})())
    assert log.warnings == [
        "background task tests.request.test_arguments.store was not run: KeyboardInterrupt "
        "stopped its worker"
    ]


def test_proxies_that_stand_for_the_right_object_in_a_task_are_no_matter(log: Log) -> None:
    add(store, background_tasks)
    add(store, flask.current_app)
    add(store, BackgroundTasks())
    assert log.warnings == []


def test_types_of_arguments_are_not_kept_without_limit(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    kinds = set[type]()
    monkeypatch.setattr(arguments, "_harmless", kinds)
    monkeypatch.setattr(arguments, "_MOST_HARMLESS", 3)
    add(store, 1, "x", 1.0, b"", None)
    assert len(kinds) == 3
    add(store, FileStorage())
    assert len(log.warnings) == 1


@pytest.mark.parametrize("runner", ["inline", "pool"])
@pytest.mark.parametrize("environ", [make_environ, make_server_environ])
def test_each_runner_and_server_warns_alike(
    runner: Any, environ: Callable[[], Environ], log: Log
) -> None:
    def view(environ: Environ) -> None:
        background_tasks.add_task(store, FileStorage())

    respond(BackgroundTasksMiddleware(app_that(view), runner=runner), environ())
    assert len(log.warnings) == 1


@pytest.fixture
def uploads() -> Iterator[tuple[Flask, PoolRunner, list[object]]]:
    app, runner, seen = Flask("uploads"), PoolRunner(), list[object]()
    Background(app, runner=runner)

    def read(upload: FileStorage) -> None:
        try:
            seen.append(upload.read())
        except ValueError as exc:
            seen.append(str(exc))

    @app.post("/file")
    def file() -> str:
        background_tasks.add_task(read, flask.request.files["file"])
        return "ok"

    @app.post("/bytes")
    def content() -> str:
        background_tasks.add_task(seen.append, flask.request.files["file"].read())
        return "ok"

    yield app, runner, seen
    runner.drain(TIMEOUT)


def test_flask_has_closed_an_uploaded_file_when_a_task_runs(
    uploads: tuple[Flask, PoolRunner, list[object]], log: Log
) -> None:
    app, runner, seen = uploads
    for path in ("/file", "/bytes"):
        data = {"file": (io.BytesIO(b"content"), "name.txt")}
        assert app.test_client().post(path, data=data, buffered=True).status_code == 200
        assert runner.drain(TIMEOUT) == []
    assert seen == ["I/O operation on closed file.", b"content"]
    assert len(log.warnings) == 1
    assert "argument 'upload' is an uploaded file" in log.warnings[0]
