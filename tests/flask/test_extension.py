"""The Flask extension: its installation, and the contexts in which tasks run."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort, current_app, g, render_template_string, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError

from tests.conftest import Log
from tests.support import TIMEOUT, Gate, run_python
from tests.support.hooks import Diary
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
)
from wsgi_bg._loop import portal
from wsgi_bg.exceptions import InstalledTwiceError
from wsgi_bg.flask import Background
from wsgi_bg.hooks import Hooks, TaskRecord


def make_app(name: str = "shop", **config: Any) -> Flask:
    app = Flask(name)
    app.config.update(config)
    return app


def visit(app: Flask, view: Callable[[], Any]) -> int:
    """Make ``app`` handle a request by ``view``; return the status."""
    app.add_url_rule("/", view_func=view, endpoint="view")
    return app.test_client().get("/", buffered=True).status_code


def adding(*functions: Callable[[], Any]) -> Callable[[], str]:
    def view() -> str:
        for function in functions:
            background_tasks.add_task(function)
        return "ok"

    return view


class Known(InlineRunner):
    """A runner that records its use."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def submit(self, batch: Any) -> None:
        self.batches += 1
        super().submit(batch)


# Installation


def test_nothing_but_the_extension_is_to_be_installed() -> None:
    app, done = make_app(), list[str]()
    extension = Background(app)
    assert visit(app, adding(lambda: done.append("ran"))) == 200
    assert done == ["ran"]
    assert app.extensions["wsgi_bg"] is extension


def test_an_extension_serves_several_applications_of_a_factory() -> None:
    runner = Known()
    extension = Background(runner=runner)
    done: list[str] = []
    for name in ("shop", "blog"):
        app = make_app(name)
        extension.init_app(app)
        visit(app, adding(lambda: done.append(current_app.name)))
    assert done == ["shop", "blog"]
    assert runner.batches == 2


def test_a_second_installation_is_refused() -> None:
    app = make_app()
    extension = Background(app)
    for again in (extension.init_app, Background):
        with pytest.raises(RuntimeError, match="'shop' has wsgi_bg's Background already") as e:
            again(app)
        assert isinstance(e.value, InstalledTwiceError)
        assert e.value.app == "shop"


@pytest.mark.parametrize("name", ["inline", "pool"])
def test_the_runner_may_be_named_in_code_and_in_the_configuration(name: Any) -> None:
    threads: list[str] = []
    ran = threading.Event()

    def look() -> None:
        threads.append(threading.current_thread().name)
        ran.set()

    for app, runner in ((make_app(WSGI_BG_RUNNER=name), None), (make_app(), name)):
        Background(app, runner)
        visit(app, adding(look))
        assert ran.wait(TIMEOUT)
        ran.clear()
    here = threading.current_thread().name
    assert [thread != here for thread in threads] == [name == "pool"] * 2


def test_the_configuration_wins() -> None:
    runner, done = Known(), list[str]()
    app = make_app(WSGI_BG_RUNNER=runner, WSGI_BG_RUN_ON="always", WSGI_BG_STOP_ON_ERROR=True)
    Background(app, runner="pool", run_on="error", stop_on_error=False)

    def view() -> str:
        background_tasks.add_task(done.append, "before")
        background_tasks.add_task(abort, 500)
        background_tasks.add_task(done.append, "after")
        return "ok"

    visit(app, view)
    assert done == ["before"]
    assert runner.batches == 1


def test_the_constructors_options_hold_if_the_configuration_omits_them() -> None:
    failed: list[str] = []
    added: list[str] = []

    def tell(task: BackgroundTask, exc: BaseException) -> None:
        failed.append(type(exc).__name__)

    class Names(Hooks):
        def task_added(self, record: TaskRecord) -> None:
            added.append(record.task.name)

    app = make_app(WSGI_BG_RUN_ON=None)
    Background(app, run_on="always", on_error=tell, hooks=Names())

    def view() -> None:
        background_tasks.add_task(divmod, 1, 0)
        abort(503)

    assert visit(app, view) == 503
    assert (added, failed) == (["builtins.divmod"], ["ZeroDivisionError"])


def test_every_option_has_a_key_in_the_configuration() -> None:
    failed: list[str] = []
    added: list[str] = []

    def tell(task: BackgroundTask, exc: BaseException) -> None:
        failed.append(type(exc).__name__)

    class Names(Hooks):
        def task_added(self, record: TaskRecord) -> None:
            added.append(record.task.name)

    app = make_app(
        WSGI_BG_RUNNER=(runner := Known()),
        WSGI_BG_RUN_ON="error",
        WSGI_BG_FAILED_FROM=404,
        WSGI_BG_ON_ERROR=tell,
        WSGI_BG_STOP_ON_ERROR=True,
        WSGI_BG_HOOKS=[Names()],
    )
    Background(app, failed_from=500)

    def view() -> None:
        background_tasks.add_task(divmod, 1, 0)
        background_tasks.add_task(failed.append, "not stopped")
        abort(404)

    assert visit(app, view) == 404
    assert added[0] == "builtins.divmod"
    assert failed == ["ZeroDivisionError"]
    assert runner.batches == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"WSGI_BG_RUNNER": "threads"}, "WSGI_BG_RUNNER must be 'inline', 'pool' or a runner"),
        ({"WSGI_BG_RUN_ON": "never"}, "WSGI_BG_RUN_ON must be 'success'"),
        ({"WSGI_BG_STOP_ON_ERROR": "yes"}, "WSGI_BG_STOP_ON_ERROR must be True or False"),
        ({"WSGI_BG_FAILED_FROM": 99}, "WSGI_BG_FAILED_FROM must be 100 to 600; got 99"),
        ({"WSGI_BG_ON_ERROR": "log"}, "WSGI_BG_ON_ERROR must be a plain function"),
        ({"WSGI_BG_HOOKS": Hooks}, "WSGI_BG_HOOKS must be a wsgi_bg.hooks.Hooks object"),
        ({"WSGI_BG_DURABLE": 5}, "WSGI_BG_DURABLE must be the path of a folder; got 5"),
    ],
)
def test_a_wrong_configuration_names_its_key(config: dict[str, Any], message: str) -> None:
    app = make_app(**config)
    with pytest.raises((TypeError, ValueError), match=message):
        Background(app)
    assert "wsgi_bg" not in app.extensions
    app.config.clear()
    Background().init_app(app)


def test_a_wrong_option_names_itself() -> None:
    with pytest.raises(ValueError, match="run_on must be"):
        Background(make_app(), run_on="never")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="app must be a Flask application; got <function"):
        Background(make_app)  # type: ignore[arg-type]


def test_the_repr_shows_the_options() -> None:
    assert repr(Background(runner="pool")) == "Background(runner='pool')"
    assert repr(Background()) == "Background()"


@pytest.mark.parametrize(
    ("package", "module"), [("flask", "flask"), ("pytest", "pytest_plugin")]
)
def test_without_flask_the_error_names_the_package_to_install(
    package: str, module: str
) -> None:
    result = run_python(f"""
        import sys
        sys.modules["{package}"] = None
        try:
            import wsgi_bg.{module}
        except ImportError as exc:
            print(exc)
    """)
    assert result.stdout.strip() == (
        f"wsgi_bg.{module} needs a package that is not installed: "
        f"pip install 'wsgi_bg[{package}]'"
    )


def test_an_outer_middleware_runs_the_tasks_in_the_applications_context() -> None:
    app, done = make_app(), list[str]()
    Background(app)
    runner = Known()
    app.wsgi_app = BackgroundTasksMiddleware(app.wsgi_app, runner=runner)  # type: ignore[method-assign]
    visit(app, adding(lambda: done.append(current_app.name)))
    assert done == ["shop"]
    assert runner.batches == 1


# Outcome


def test_an_error_that_flask_answers_with_500_is_a_failed_request(log: Log) -> None:
    app, done = make_app(), list[str]()
    Background(app)

    def view() -> None:
        background_tasks.add_task(done.append, "success")
        background_tasks.using(run_on="error").add_task(done.append, "error")
        raise ValueError("a bug")

    assert visit(app, view) == 500
    assert done == ["error"]
    assert "was not run: the request failed" in log.warnings[0]


@pytest.mark.parametrize("code", [400, 404])
def test_an_error_of_the_clients_is_none(code: int) -> None:
    app, done = make_app(), list[str]()
    Background(app)

    def view() -> None:
        background_tasks.add_task(done.append, "ran")
        abort(code)

    assert visit(app, view) == code
    assert done == ["ran"]


# Contexts


class Contexts:
    """An application that records the contexts of its tasks and the teardowns."""

    def __init__(self, **options: Any) -> None:
        self.app = make_app()
        Background(self.app, **options)
        self.seen: list[tuple[bool, Any]] = []
        self.torn_down: list[tuple[Any, str]] = []
        self.app.teardown_appcontext(self._tear_down)

    def _tear_down(self, exc: BaseException | None) -> None:
        if hasattr(g, "task"):
            self.torn_down.append((g.task, type(exc).__name__))

    def look(self, name: str) -> None:
        is_ours = current_app._get_current_object() is self.app  # type: ignore[attr-defined]
        self.seen.append((is_ours, g.get("of_view")))
        assert not hasattr(g, "task")
        g.task = name

    def task(self) -> None:
        self.look("plain")

    async def async_task(self) -> None:
        self.look("async")
        await asyncio.sleep(0)
        assert g.task == "async"

    def failing(self) -> None:
        self.look("failing")
        raise ValueError

    async def async_failing(self) -> None:
        await asyncio.sleep(0)
        self.look("async failing")
        raise ValueError

    def view(self) -> str:
        g.of_view = 5
        for task in (self.task, self.async_task, self.failing, self.async_failing, self.task):
            background_tasks.add_task(task)
        background_tasks.add_task(lambda: self.async_task())
        return "ok"


def test_each_task_runs_in_a_new_application_context() -> None:
    contexts = Contexts()
    visit(contexts.app, contexts.view)
    assert contexts.seen == [(True, None)] * 6
    assert contexts.torn_down == [
        ("plain", "NoneType"),
        ("async", "NoneType"),
        ("failing", "ValueError"),
        ("async failing", "ValueError"),
        ("plain", "NoneType"),
        ("async", "NoneType"),
    ]


def test_a_task_of_the_pool_or_called_by_hand_runs_in_a_new_context() -> None:
    runner = PoolRunner()
    contexts = Contexts(runner=runner)

    def view() -> str:
        background_tasks.add_task(contexts.async_task)
        background_tasks()
        background_tasks.add_task(contexts.task)
        assert g.get("task") is None
        return "ok"

    visit(contexts.app, view)
    assert runner.drain(TIMEOUT) == []
    assert contexts.seen == [(True, None)] * 2
    assert [name for name, _ in contexts.torn_down] == ["async", "plain"]


def test_the_views_context_is_torn_down_once_and_before_its_tasks() -> None:
    app, order = make_app(), list[str]()
    Background(app)

    @app.teardown_appcontext
    def tear_down(exc: BaseException | None) -> None:
        order.append(f"{g.get('owner', 'task')} is torn down")

    def view() -> str:
        g.owner = "view"
        background_tasks.add_task(order.append, "task")
        return "ok"

    visit(app, view)
    assert order == ["view is torn down", "task", "task is torn down"]


def test_a_teardown_that_raises_is_the_tasks_error(log: Log) -> None:
    app, done = make_app(), list[str]()
    Background(app)

    @app.teardown_appcontext
    def tear_down(exc: BaseException | None) -> None:
        if hasattr(g, "task"):
            raise OSError("the database is gone")

    visit(app, adding(lambda: setattr(g, "task", 1), lambda: done.append("next")))
    assert [str(exc) for exc in log.tracebacks] == ["the database is gone"]
    assert done == ["next"]


def test_templates_are_there_for_a_mail() -> None:
    app, mails = make_app(), list[str]()
    Background(app)

    def send(name: str) -> None:
        mails.append(render_template_string("Dear {{ name }}", name=name))

    visit(app, adding(lambda: send("Ada")))
    assert mails == ["Dear Ada"]


def test_request_is_still_found_in_a_task_and_not_promised() -> None:
    """Flask 3.0 and 3.1 have separate contexts for request and application."""
    app, paths = make_app(), list[str]()
    Background(app)
    visit(app, adding(lambda: paths.append(request.path)))
    assert paths == ["/"]


def test_a_waiting_batch_keeps_the_request_alive(gate: Gate) -> None:
    runner = PoolRunner()
    app = make_app()
    Background(app, runner=runner)
    requests: list[weakref.ref[Any]] = []

    def view() -> str:
        requests.append(weakref.ref(request._get_current_object()))  # type: ignore[attr-defined]
        background_tasks.add_task(gate.task)
        background_tasks.add_task(int)
        return "ok"

    visit(app, view)
    assert gate.begun.wait(TIMEOUT)
    gc.collect()
    assert requests[0]() is not None
    gate.open()
    assert runner.drain(TIMEOUT) == []
    gc.collect()
    assert requests[0]() is None


# Flask-SQLAlchemy


class Shop:
    """An application with a database on SQLite."""

    def __init__(self, folder: Path) -> None:
        self.app = make_app(SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder / 'shop.db'}")
        self.runner = PoolRunner()
        Background(self.app, runner=self.runner)
        self.db = db = SQLAlchemy(self.app)

        class Order(db.Model):  # type: ignore[name-defined, misc]
            id = db.Column(db.Integer, primary_key=True)
            name = db.Column(db.String, unique=True)

        self.order_type = Order
        with self.app.app_context():
            db.create_all()

    def save(self, name: str) -> None:
        self.db.session.add(self.order_type(name=name))
        self.db.session.commit()

    async def save_async(self, name: str) -> None:
        self.save(name)
        await asyncio.sleep(0)
        assert self.db.session.query(self.order_type).filter_by(name=name).count() == 1

    def saved(self) -> list[str]:
        with self.app.app_context():
            return sorted(order.name for order in self.db.session.query(self.order_type))

    @property
    def left_open(self) -> tuple[int, int]:
        """The numbers of open sessions and connections."""
        with self.app.app_context():
            pool: Any = self.db.engine.pool
        return len(self.db.session.registry.registry), pool.checkedout()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    with shop.app.app_context():
        shop.db.engine.dispose()


@pytest.mark.parametrize("kind", ["save", "save_async"])
def test_a_task_leaves_no_session_and_no_connection_behind(
    shop: Shop, kind: str, log: Log
) -> None:
    save = getattr(shop, kind)

    def view() -> str:
        for name in ("Ada", "Ada", "Grace"):  # the second "Ada" fails
            background_tasks.add_task(save, name)
        return "ok"

    visit(shop.app, view)
    assert shop.runner.drain(TIMEOUT) == []
    assert [type(exc) for exc in log.tracebacks] == [IntegrityError]
    assert shop.saved() == ["Ada", "Grace"]
    assert shop.left_open == (0, 0)


def test_a_task_does_not_see_uncommitted_changes_of_its_view(shop: Shop) -> None:
    counts: list[int] = []

    def count() -> None:
        counts.append(shop.db.session.query(shop.order_type).count())

    def view(tasks: BackgroundTasks) -> str:
        shop.db.session.add(shop.order_type(name="Ada"))
        tasks.add_task(count)
        return "ok"

    visit(shop.app, view)  # type: ignore[arg-type]
    assert shop.runner.drain(TIMEOUT) == []
    assert counts == [0]
    assert shop.left_open == (0, 0)


async def never() -> None:
    raise AssertionError


def test_without_a_loop_the_context_of_a_task_is_left(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    app, torn_down = make_app(), list[str]()
    Background(app)
    app.teardown_appcontext(lambda exc: torn_down.append(g.get("owner", "view")))

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("no thread")

    def returns_awaitable() -> Any:
        g.owner = "task"
        return never()

    monkeypatch.setattr(portal, "_thread", broken)
    visit(app, adding(returns_awaitable))
    assert torn_down == ["view", "task"]
    assert [str(exc) for exc in log.tracebacks] == ["no thread"]


def test_a_task_with_options_keeps_the_applications_context_and_hooks() -> None:
    app, names, diary = make_app(), list[str](), Diary()
    Background(app, hooks=diary)

    def view() -> str:
        g.of_view = 5
        background_tasks.using(run_on="always").add_task(
            lambda: names.append(f"{current_app.name} {g.get('of_view')}")
        )
        return "ok"

    visit(app, view)
    assert names == ["shop None"]
    assert len(diary.moments) == 3


def test_no_record_is_kept_if_only_the_runner_checks_tasks() -> None:
    class Looking(PoolRunner):
        def check(self, task: Any) -> None:
            pass

    app = make_app()
    Background(app, Looking())
    kept: list[Any] = []

    def view() -> str:
        background_tasks.add_task(int)
        kept.append(hasattr(background_tasks.tasks[0], "_record"))
        return "ok"

    visit(app, view)
    assert kept == [False]
