"""``TaskRecorder``, the object of the fixture ``background_tasks``, in its three modes."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any
from unittest.mock import ANY

import falcon.testing
import pytest
from flask import Flask, current_app
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client
from werkzeug.wsgi import ClosingIterator

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Environ,
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
    waitress,
)
from tests.support.client import ask
from tests.support.recording import (
    LENGTH,
    TYPE,
    add,
    apps,
    body_of,
    by_werkzeug,
    clients,
    done,
    fail,
    recording,
    send,
    send_async,
    stream,
    whole,
)
from wsgi_bg import (
    BackgroundTasks,
    BackgroundTasksMiddleware,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._request.observer import observers
from wsgi_bg._tasks.batch import Batch
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.pytest_plugin import RecordedTask, TaskRecorder

recorder = pytest.fixture(lambda background_tasks: background_tasks, name="recorder")
run = pytest.mark.wsgi_bg(mode="run")
real = pytest.mark.wsgi_bg(mode="real")


@pytest.fixture(autouse=True)
def _clear() -> None:
    done.clear()


# Mode "record"


@clients
@apps
def test_a_task_is_recorded_and_not_run(recorder: TaskRecorder, client: Any, app: Any) -> None:
    assert recorder.mode == "record"
    assert body_of(client(app((send, "ada")))) == b"ok"
    name = "tests.support.recording.send"
    assert recorder.tasks == [RecordedTask(send, ("ada",), {}, "/", name)]
    recorder.assert_added(send, "ada")
    assert recorder.errors == done == []


@pytest.mark.parametrize("runner", ["inline", "pool"])
def test_recorded_tasks_run_in_order_and_once_at_a_call_of_run(
    recorder: TaskRecorder, runner: Any
) -> None:
    by_werkzeug(whole((send, "ada"), (send_async, "grace"), runner=runner))
    by_werkzeug(whole((send, "joan"), runner=runner))
    recorder.run()
    assert done == ["ada", "grace", "joan"]
    recorder.run()
    assert len(done) == len(recorder.tasks) == 3


def test_a_task_that_a_recorded_task_adds_runs_too_and_is_shown(recorder: TaskRecorder) -> None:
    def outer() -> None:
        background_tasks.using(run_on="error").add_task(send, "no one")
        background_tasks.add_task(send, "ada", copies=2)

    by_werkzeug(whole(outer))
    assert [task.func for task in recorder.tasks] == [outer]
    recorder.run()
    assert done == [("ada", 2)]
    assert [task.func for task in recorder.tasks] == [outer, send]
    recorder.assert_added(send, "ada", copies=2)


def test_requests_that_a_recorded_task_makes_are_recorded_and_run(
    recorder: TaskRecorder,
) -> None:
    by_werkzeug(whole((by_werkzeug, whole((send, "ada")))))
    recorder.run()
    assert done == ["ada"]


def test_recorded_tasks_run_in_their_context_variables_on_this_thread(
    recorder: TaskRecorder,
) -> None:
    request_id = ContextVar("request_id", default="none")
    seen: list[Any] = []

    def task() -> None:
        seen.extend([request_id.get(), threading.get_ident()])

    def view(environ: Environ) -> None:
        token = request_id.set("7")
        background_tasks.add_task(task)
        request_id.reset(token)

    respond(BackgroundTasksMiddleware(app_that(view)))
    recorder.run()
    assert seen == ["7", threading.get_ident()]


def test_a_task_of_flask_has_its_application_context_and_the_test_needs_none(
    recorder: TaskRecorder,
) -> None:
    app = Flask("shop")
    Background(app)

    def task() -> None:
        done.append(current_app.name)

    @app.get("/")
    def view(tasks: BackgroundTasks) -> str:
        tasks.add_task(task)
        return "ok"

    app.test_client().get("/")
    recorder.assert_added(task)
    recorder.run()
    assert done == ["shop"]


def test_run_raises_the_first_error_after_all_tasks_and_keeps_every_error(
    recorder: TaskRecorder, log: Log
) -> None:
    by_werkzeug(whole((fail, "first"), (fail, "second"), (send, "ada")))
    with pytest.raises(ValueError, match="first"):
        recorder.run()
    assert done == ["ada"]
    assert [str(error) for error in log.tracebacks] == ["first", "second"]
    assert [str(error) for error in recorder.errors] == ["first", "second"]
    recorder.run()


def test_stop_on_error_holds_for_recorded_tasks(recorder: TaskRecorder, log: Log) -> None:
    app = app_that(add(fail, (send, "ada")))
    respond(BackgroundTasksMiddleware(app, stop_on_error=True))
    with pytest.raises(ValueError, match="boom"):
        recorder.run()
    assert done == []
    assert "with stop_on_error set" in log.warnings[0]


def test_a_task_that_the_application_runs_by_hand_is_not_recorded(
    recorder: TaskRecorder,
) -> None:
    def view(environ: Environ) -> None:
        background_tasks.add_task(send, "ada")
        background_tasks()
        background_tasks.add_task(send, "grace")

    respond(BackgroundTasksMiddleware(app_that(view)))
    assert done == ["ada"]
    assert [task.args for task in recorder.tasks] == [("grace",)]


def test_a_task_that_the_outcome_of_its_request_skips_is_not_recorded(
    recorder: TaskRecorder, log: Log
) -> None:
    by_werkzeug(whole((send, "ada"), status="500 OOPS"))
    assert recorder.tasks == []
    recorder.assert_none()
    recorder.run()
    assert done == []
    assert "the request failed with 500, and run_on is 'success'" in log.warnings[0]


def test_failed_from_holds_for_recorded_tasks_and_for_tasks_that_they_add(
    recorder: TaskRecorder,
) -> None:
    def first() -> None:
        background_tasks.using(failed_from=600).add_task(send, "ada")
        background_tasks.using(failed_from=400).add_task(send, "grace")

    def view(environ: Environ) -> None:
        background_tasks.add_task(send, "nobody")
        background_tasks.using(failed_from=405).add_task(first)

    app = app_that(view, status="404 NOT FOUND")
    respond(BackgroundTasksMiddleware(app, failed_from=400))
    assert [task.func for task in recorder.tasks] == [first]
    recorder.run()
    assert [task.func for task in recorder.tasks] == [first, send]
    assert done == ["ada"]


def test_the_tasks_of_an_application_that_raises_are_recorded_under_its_path(
    recorder: TaskRecorder,
) -> None:
    def view(environ: Environ) -> None:
        add((send, "admin"), run_on="error")(environ)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        Client(BackgroundTasksMiddleware(app_that(view))).get("/orders")
    recorder.assert_added(send, "admin")
    assert recorder.tasks[0].path == "/orders"


def test_the_path_is_that_of_the_url(recorder: TaskRecorder) -> None:
    app = app_that(add((send, "ada")))
    dispatched = DispatcherMiddleware(app_that(print), {"/shop": app})
    Client(BackgroundTasksMiddleware(dispatched)).get("/shop/caf\u00e9")
    mounted = DispatcherMiddleware(app, {"/shop": BackgroundTasksMiddleware(app)})
    Client(mounted).get("/shop/caf\u00e9?q=1")
    assert [task.path for task in recorder.tasks] == ["/shop/caf\u00e9"] * 2


def test_layers_of_middleware_share_a_single_record(recorder: TaskRecorder) -> None:
    inner = BackgroundTasksMiddleware(app_that(add((send, "ada"))), run_on="always")
    by_werkzeug(BackgroundTasksMiddleware(inner))
    assert len(recorder.tasks) == 1


def test_hooks_see_that_a_recorded_task_was_discarded_with_its_test(
    log: Log,
) -> None:
    reasons: list[str | None] = []

    class Watcher(Hooks):
        def task_discarded(self, record: TaskRecord) -> None:
            reasons.append(record.reason)

    with recording() as recorder:
        respond(BackgroundTasksMiddleware(app_that(add((send, "ada"))), hooks=Watcher()))
        assert reasons == []
    assert reasons == ["the test is over"]
    recorder.run()
    assert done == []


# assert_added, assert_none


def test_assert_added_compares_the_function_and_all_arguments(recorder: TaskRecorder) -> None:
    by_werkzeug(whole((send, "ada")))
    recorder.assert_added(send, ANY)
    for args in [(), ("grace",), ("ada", 1)]:
        with pytest.raises(AssertionError):
            recorder.assert_added(send, *args)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        recorder.assert_added(send, "ada", copies=1)
    with pytest.raises(AssertionError):
        recorder.assert_added(send_async, "ada")


def test_any_is_asked_before_an_argument_that_equals_nothing(recorder: TaskRecorder) -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]

    by_werkzeug(whole((print, Odd())))
    recorder.assert_added(print, ANY)


def test_assert_added_shows_added_tasks_and_skipped_tasks(
    recorder: TaskRecorder,
) -> None:
    with pytest.raises(AssertionError) as nothing:
        recorder.assert_added(send, "ada", copies=2)
    assert str(nothing.value) == (
        "tests.support.recording.send('ada', copies=2) was not added; no task was added"
    )
    by_werkzeug(whole((send, "grace")))
    by_werkzeug(whole((send, "joan"), status="503 OOPS"))
    with pytest.raises(AssertionError) as other:
        recorder.assert_added(send, "ada")
    assert str(other.value) == (
        "tests.support.recording.send('ada') was not added; added were:\n"
        "  tests.support.recording.send('grace') by /\n"
        "not to run, after the way their request ended:\n"
        "  tests.support.recording.send('joan') by /"
    )


def test_a_message_shortens_long_arguments_and_survives_their_repr(
    recorder: TaskRecorder,
) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ValueError

    by_werkzeug(whole((print, Odd(), "x" * 1000)))
    with pytest.raises(
        AssertionError, match=r"print\(<Odd instance at .*>, 'xx.*\.\.\."
    ) as info:
        recorder.assert_none()
    assert len(str(info.value)) < 400


def test_assert_none_shows_added_tasks(recorder: TaskRecorder) -> None:
    recorder.assert_none()
    by_werkzeug(whole((send, "ada")))
    with pytest.raises(AssertionError, match=r"was expected; added were:\n  .*\('ada'\) by /"):
        recorder.assert_none()


def test_the_repr_of_the_recorder_shows_the_mode(recorder: TaskRecorder) -> None:
    assert repr(recorder) == "<TaskRecorder mode='record'>"


# Mode "run"


@run
@clients
@pytest.mark.parametrize("runner", ["inline", "pool"])
@apps
def test_tasks_run_before_the_client_has_the_last_of_its_response(
    recorder: TaskRecorder, client: Any, runner: Any, app: Any
) -> None:
    def here() -> None:
        done.append(threading.get_ident())

    response = client(app(here, (send, "ada"), runner=runner))
    assert body_of(response) == b"ok"
    assert done == [threading.get_ident(), "ada"]
    assert [task.func for task in recorder.tasks] == [here, send]


@run
@clients
@pytest.mark.parametrize("error", [ValueError, TypeError])
@apps
def test_an_error_of_a_task_is_raised_to_the_client(
    recorder: TaskRecorder, client: Any, app: Any, error: Any
) -> None:
    def task() -> None:
        raise error("boom")

    with pytest.raises(error, match="boom"):
        body_of(client(app(task, (send, "ada"))))
    assert done == ["ada"]


@run
def test_only_the_request_with_the_error_raises_the_error(recorder: TaskRecorder) -> None:
    with pytest.raises(ValueError, match="boom"):
        by_werkzeug(whole(fail, (fail, "second")))
    by_werkzeug(whole((send, "ada")))
    assert [str(error) for error in recorder.errors] == ["boom", "second"]


@run
def test_a_request_that_a_task_makes_raises_into_that_task(recorder: TaskRecorder) -> None:
    with pytest.raises(ValueError, match="boom"):
        by_werkzeug(whole((by_werkzeug, whole(fail))))
    assert len(recorder.errors) == 2


@run
def test_an_application_that_raises_is_not_hidden_by_its_task(recorder: TaskRecorder) -> None:
    def view(environ: Environ) -> None:
        add(fail, run_on="error")(environ)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        by_werkzeug(BackgroundTasksMiddleware(app_that(view)))
    assert [str(error) for error in recorder.errors] == ["boom"]


@run
def test_on_a_server_an_error_waits_for_join(recorder: TaskRecorder) -> None:
    with waitress(whole(fail)) as port:
        assert ask(port).body == b"ok"
        with pytest.raises(ValueError, match="boom"):
            recorder.join(TIMEOUT)


@run
def test_on_a_server_no_stream_waits_for_its_tasks(recorder: TaskRecorder, gate: Gate) -> None:
    with waitress(stream(gate.task)) as port:
        assert ask(port).body == b"ok"
        gate.open()
        recorder.join(TIMEOUT)
    assert gate.passed == [True]


# Mode "real"


class Here:
    """A runner that runs a batch in ``submit()``."""

    def __init__(self) -> None:
        self.sends: list[bool] = []

    def submit(self, batch: Batch) -> None:
        self.sends.append(batch.sends)
        batch.run()

    def drain(self, timeout: float) -> list[Any]:
        return []

    def statistics(self) -> Any:
        raise NotImplementedError


class Sender(Here):
    """A runner that sends to another process."""

    def send(self, task: Any) -> bool:
        done.append("sent")
        return True


@real
@clients
@apps
def test_the_applications_own_runner_has_the_tasks_and_join_waits_for_them(
    recorder: TaskRecorder, client: Any, gate: Gate, app: Any
) -> None:
    assert body_of(client(app(gate.task, (send, "ada"), runner="pool"))) == b"ok"
    assert done == []
    gate.open()
    recorder.join(TIMEOUT)
    assert done == ["ada"]
    recorder.assert_added(send, "ada")


@pytest.mark.parametrize(
    ("timeout", "error"), [(None, TypeError), ("1", TypeError), (-1, ValueError)]
)
def test_join_refuses_what_is_no_timeout(
    recorder: TaskRecorder, timeout: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="timeout must be"):
        recorder.join(timeout)


@real
def test_join_waits_without_a_limit(recorder: TaskRecorder) -> None:
    by_werkzeug(whole((send, "ada"), runner="pool"))
    recorder.join(10**400)
    assert done == ["ada"]


@real
def test_join_names_unfinished_tasks_and_then_raises_the_first_error(
    recorder: TaskRecorder, gate: Gate
) -> None:
    by_werkzeug(whole(fail, gate.task, (send, "ada"), runner="pool"))
    assert gate.begun.wait(TIMEOUT)
    with pytest.raises(TimeoutError) as info:
        recorder.join(0.01)
    assert str(info.value) == (
        "not finished after 0.01 s: tests.support.Gate.task, tests.support.recording.send"
    )
    gate.open()
    with pytest.raises(ValueError, match="boom"):
        recorder.join(TIMEOUT)
    recorder.join(TIMEOUT)


@real
def test_a_runner_that_sends_does(recorder: TaskRecorder) -> None:
    sender = Sender()
    by_werkzeug(whole((send, "ada"), runner=sender))
    assert (done, sender.sends) == (["sent"], [True])


@pytest.mark.parametrize("mode", ["record", "run"])
def test_in_the_modes_record_and_run_nothing_is_sent(mode: Any) -> None:
    sender = Sender()
    with recording(mode) as recorder:
        by_werkzeug(whole((send, "ada"), runner=sender))
        recorder.run()
    assert (done, sender.sends) == (["ada"], [])


@real
def test_a_runner_that_refuses_is_named_in_the_log(recorder: TaskRecorder, log: Log) -> None:
    class Refuses(Here):
        def submit(self, batch: Batch) -> None:
            raise OSError("the broker is down")

        def __repr__(self) -> str:
            return "Refuses()"

    by_werkzeug(whole((send, "ada"), runner=Refuses()))
    assert done == ["ada"]
    assert log.errors[0].startswith("Refuses() did not take")


@real
def test_join_waits_for_a_batch_of_which_nothing_runs(recorder: TaskRecorder) -> None:
    by_werkzeug(whole((send, "ada"), runner="pool", status="500 OOPS"))
    recorder.join(TIMEOUT)
    assert recorder.tasks == []


# join, on any thread and on servers


def test_join_waits_for_a_server_to_close_the_response(recorder: TaskRecorder) -> None:
    closing = threading.Event()

    def app(environ: Environ, start_response: Any) -> Any:
        tasks = get_background_tasks(environ)

        def close() -> None:
            assert closing.wait(TIMEOUT)
            tasks.add_task(send, "ada")

        start_response("200 OK", LENGTH)
        return ClosingIterator([b"ok"], close)

    with waitress(BackgroundTasksMiddleware(app)) as port:
        assert ask(port, path="/orders").body == b"ok"
        with pytest.raises(TimeoutError, match="the response of /orders, which was not closed"):
            recorder.join(0)
        closing.set()
        recorder.join(TIMEOUT)
    recorder.assert_added(send, "ada")


def test_join_waits_for_an_application_that_has_not_returned(recorder: TaskRecorder) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def view(environ: Environ) -> None:
        begun.set()
        assert goes_on.wait(TIMEOUT)

    app = BackgroundTasksMiddleware(app_that(view))
    thread = threading.Thread(target=respond, args=(app,))
    thread.start()
    assert begun.wait(TIMEOUT)
    with pytest.raises(TimeoutError, match="the response of /"):
        recorder.join(0)
    goes_on.set()
    recorder.join(TIMEOUT)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_join_finds_no_request_in_an_environ_that_the_application_has_emptied(
    recorder: TaskRecorder,
) -> None:
    def view(environ: Environ) -> None:
        environ.clear()

    respond(BackgroundTasksMiddleware(app_that(view)))
    recorder.join(0)


def test_a_batch_without_a_name_is_described_by_its_path(recorder: TaskRecorder) -> None:
    by_werkzeug(whole((send, "ada")))
    request = recorder._requests[0]
    assert request.describe() == "tests.support.recording.send"
    recorder.run()
    assert request.describe() == "tasks of /"


def test_join_ends_while_a_test_has_stopped_the_time(
    recorder: TaskRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond(BackgroundTasksMiddleware(app_that(add((send, "ada")))))
    recorder._requests[0].batch = None
    with monkeypatch.context() as stopped:
        stopped.setattr("time.monotonic", lambda: 0.0)
        with pytest.raises(TimeoutError):
            recorder.join(0.02)


def test_a_response_that_a_server_frees_without_closing_is_recorded(
    recorder: TaskRecorder,
) -> None:
    body: Any = stream((send, "ada"))(make_server_environ(), Server().start_response)
    del body
    recorder.join(TIMEOUT)
    recorder.assert_added(send, "ada")
    assert done == []


def test_requests_on_several_threads_are_all_recorded(recorder: TaskRecorder) -> None:
    app = whole((send, "ada"))
    threads = [threading.Thread(target=by_werkzeug, args=(app,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(recorder.tasks) == 8
    recorder.run()
    assert done == ["ada"] * 8


# Tests in sequence


def test_a_request_of_an_earlier_test_stays_with_that_test_and_its_runner(log: Log) -> None:
    sender = Sender()
    app = stream(fail, runner=sender)
    with recording("real") as first:
        body: Any = app(make_server_environ(), Server().start_response)
        first._requests.clear()  # or the end of the test would wait
    with recording() as second:
        body.close()
        second.assert_none()
        assert second.errors == []
    assert (sender.sends, done) == ([True], ["sent"])


def test_tasks_of_a_response_closed_after_the_test_never_run(log: Log) -> None:
    sender = Sender()
    environ = make_server_environ()
    with recording():
        body: Any = stream((send, "ada"), runner=sender)(environ, Server().start_response)
    with pytest.raises(RuntimeError, match="was not added"):
        add((send, "grace"))(environ)
    body.close()
    assert done == []
    assert log.errors == []


def test_the_end_of_a_test_waits_for_a_server_to_close_a_response_with_tasks() -> None:
    closed = threading.Event()

    def close() -> None:
        assert closed.wait(TIMEOUT)
        body.close()

    thread = threading.Thread(target=close)
    with recording("run"):
        app = stream((send, "ada"))
        body: Any = app(make_server_environ(), Server().start_response)
        thread.start()
        threading.Timer(0.02, closed.set).start()
    assert done == ["ada"]
    thread.join(TIMEOUT)


def test_the_end_of_a_test_waits_for_no_response_without_tasks(log: Log) -> None:
    with recording("run"):
        body: Any = stream()(make_server_environ(), Server().start_response)
        begun = time.monotonic()
    assert time.monotonic() - begun < TIMEOUT / 2
    body.close()


def test_an_error_of_a_task_without_a_request_is_not_this_tests(
    recorder: TaskRecorder, log: Log
) -> None:
    tasks = BackgroundTasks()
    tasks.add_task(fail, "first")
    tasks.add_task(fail, "second")
    with pytest.raises(ValueError, match="first"):
        tasks()
    assert recorder.errors == []


def test_nothing_is_kept_of_a_test_that_is_over() -> None:
    with recording() as recorder:
        by_werkzeug(whole((send, "ada")))
        unread = by_werkzeug(stream((send, "grace")))
    freed = weakref.ref(recorder)
    del recorder, unread
    gc.collect()
    assert freed() is None
    assert done == []


def test_the_fixture_leaves_the_middleware_unchanged() -> None:
    before = vars(BackgroundTasksMiddleware)["__call__"]
    with recording(), recording("run"):
        by_werkzeug(whole((send, "ada")))
        assert vars(BackgroundTasksMiddleware)["__call__"] is before
    assert observers.observe is None
    environ = make_environ()
    body: Any = stream((send, "grace"))(environ, Server().start_response)
    assert list(body) == [b"o", b"k"]
    done.clear()
    body.close()
    assert done == ["grace"]


def test_falcons_client_finds_a_wsgi_application(recorder: TaskRecorder) -> None:
    """Falcon counts the arguments of ``__call__``: three mean ASGI."""

    class Page:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
            get_background_tasks(req.env).add_task(send, "ada")
            resp.text = "ok"

    app: Any = falcon.App()
    app.add_route("/", Page())
    client = falcon.testing.TestClient(BackgroundTasksMiddleware(app))
    assert client.simulate_get("/").text == "ok"
    recorder.assert_added(send, "ada")


def test_the_end_waits_for_tasks_though_the_close_of_a_stream_raises() -> None:
    def slow() -> None:
        threading.Event().wait(0.1)
        done.append("slow")

    def body() -> Iterable[bytes]:
        return ClosingIterator(iter([b"o", b"k"]), lambda: fail("in close"))

    broken = BackgroundTasksMiddleware(app_that(lambda environ: None, headers=TYPE, body=body))
    responses: list[Any] = []

    def test_it() -> None:
        with recording("real"):
            by_werkzeug(whole(slow, runner="pool"))
            responses.append(by_werkzeug(broken))  # held, since a freed response closes itself

    with pytest.raises(ValueError, match="in close"):
        test_it()
    assert done == ["slow"]
