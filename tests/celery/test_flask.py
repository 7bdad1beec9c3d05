"""A worker of a Flask application: contexts, tasks that tasks add, and plain calls."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from celery.beat import Scheduler
from celery.exceptions import MaxRetriesExceededError
from celery.schedules import schedule

from tests.support import celery_flask, text_of, wait_until
from tests.support.celery import (
    TIMEOUT,
    Shop,
    Worker,
    filesystem,
    messages,
    request,
    wait_for,
    worker,
)
from tests.support.celery_flask import (
    NAME,
    Order,
    db,
    exhaust,
    look,
    look_and_fail,
    look_async,
    make_site,
    note_order,
    note_task,
    pay,
    pay_async,
    retry_by_celery,
    spread,
    spread_and_fail,
    spread_and_retry,
    spread_async,
)
from wsgi_bg import background_tasks
from wsgi_bg.celery import CeleryRunner, correlation_id
from wsgi_bg.exceptions import ArgumentError, OptionError, PlainCallError
from wsgi_bg.flask import Background
from wsgi_bg.runners import Statistics


def environ(folder: Path, **more: str) -> dict[str, str]:
    return {"SITE_DATABASE": str(folder / "site.db"), **more}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A worker of the site with a single process, and a database with an order."""
    folder = tmp_path_factory.mktemp("site")
    app = make_site(str(folder / "site.db"))
    with app.app_context():
        db.create_all()
        db.session.add(Order(id=1, state="new"))
        db.session.add(Order(id=2, state="new"))
        db.session.commit()
    broker = filesystem(folder)
    started = Worker(
        broker,
        folder,
        "--pool=prefork",
        "--concurrency=1",
        module=celery_flask.MODULE,
        environ=environ(folder),
    )
    try:
        yield Shop(broker, started, broker.runner(plain_calls=True))
    finally:
        started.kill()


def lines(path: Path) -> list[str]:
    return text_of(path).splitlines()


def wait_for_lines(path: Path, count: int, worker: Worker) -> list[str]:
    assert wait_until(lambda: len(lines(path)) >= count), worker.log
    return lines(path)


@pytest.mark.parametrize("func", [look, look_async])
def test_a_task_runs_in_a_context_of_its_own_which_is_torn_down(
    site: Shop, tmp_path: Path, func: Any
) -> None:
    path = tmp_path / "seen"
    site.send(func, str(path))
    site.send(func, str(path))
    assert wait_for_lines(path, 4, site.worker) == [f"{NAME}, 1, False", "torn down"] * 2


@pytest.mark.parametrize("name", ["look", "look_async"])
@pytest.mark.parametrize("has_own_class", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_the_context_is_entered_once_whatever_the_task_class(
    tmp_path: Path, name: str, *, has_own_class: bool, is_open: bool
) -> None:
    """In this process, in which a context may be open already."""
    app, path = make_site(str(tmp_path / "site.db")), tmp_path / "seen"

    class OwnTask(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with app.app_context() if has_own_class else nullcontext():
                return self.run(*args, **kwargs)

    celery_app = Celery("own", task_cls=OwnTask, set_as_current=False)
    Background(app, runner=CeleryRunner(celery_app, plain_calls=True))
    task = celery_app.tasks[f"tests.support.celery_flask.{name}"]
    with app.app_context() if is_open else nullcontext():
        task.apply(args=(str(path),))
        task.apply(args=(str(path),))
    assert lines(path) == [f"{NAME}, {1 + is_open}, False", "torn down"] * 2


def test_each_attempt_has_a_context(site: Shop, tmp_path: Path) -> None:
    path = tmp_path / "seen"
    site.send(look_and_fail, str(path))
    assert wait_for_lines(path, 6, site.worker) == [f"{NAME}, 1, False", "torn down"] * 3


@pytest.mark.parametrize(("func", "number"), [(pay, 1), (pay_async, 2)])
def test_flask_sqlalchemy_works_and_no_session_stays_open(
    site: Shop, tmp_path: Path, func: Any, number: int
) -> None:
    path = tmp_path / "order"
    site.send(func, number)
    site.send(note_order, str(path), number)
    assert wait_for(path, site.worker) == "paid, 0 open"


@pytest.mark.parametrize("variable", ["SITE_TASK_CLASS", "SITE_PUSHED"])
def test_flasks_task_class_enters_the_only_context_and_an_open_one_does_not_count(
    tmp_path: Path, variable: str
) -> None:
    broker = filesystem(tmp_path)
    depth = 2 if variable == "SITE_PUSHED" else 1
    variables = environ(tmp_path, **{variable: "1"})
    with worker(
        broker, tmp_path, "--pool=solo", module=celery_flask.MODULE, environ=variables
    ) as started:
        shop = Shop(broker, started, broker.runner())
        shop.send(look, str(tmp_path / "plain"))
        shop.send(look_async, str(tmp_path / "async"))
        # The context of the task class is not the one of the tasks that the task adds.
        shop.send(spread_and_fail, str(tmp_path / "added"), str(tmp_path / "sent"))
        for name in ("plain", "async", "added"):
            found = wait_for_lines(tmp_path / name, 2, started)
            assert found == [f"{NAME}, {depth}, False", "torn down"]
        started.kill()


def test_async_tasks_that_take_turns_each_have_their_current_task(tmp_path: Path) -> None:
    broker, path = filesystem(tmp_path), tmp_path / "tasks"
    with worker(
        broker,
        tmp_path,
        "--pool=threads",
        "--concurrency=2",
        module=celery_flask.MODULE,
        environ=environ(tmp_path),
    ) as started:
        shop = Shop(broker, started, broker.runner())
        shop.send(note_task, str(path), 2)
        shop.send(note_task, str(path), 2)
        found = wait_for_lines(path, 4, started)
        started.kill()
    ids = found[:2]
    assert ids[0] != ids[1]
    name = f"{celery_flask.MODULE}.note_task"
    assert sorted(found[2:]) == sorted(f"{each} True {name}" for each in ids)


def test_an_async_task_may_retry_by_celerys_own_means(site: Shop, tmp_path: Path) -> None:
    path = tmp_path / "attempts"
    site.send(retry_by_celery, str(path), "sec-ret")
    assert wait_for_lines(path, 3, site.worker) == ["0 sec-ret", "1 sec-ret", "2 sec-ret"]
    assert "sec-ret" not in site.worker.log


def test_the_end_of_the_retries_shows_no_arguments(site: Shop) -> None:
    site.send(exhaust, "sec-ret")
    assert wait_until(lambda: "Can't retry site.exhaust[" in site.worker.log)
    assert wait_until(lambda: "MaxRetriesExceededError" in site.worker.log)
    assert "sec-ret" not in site.worker.log


def test_the_error_after_the_last_retry_has_no_arguments(site: Shop) -> None:
    result = plain_app(site).tasks["site.exhaust"].apply(args=("sec-ret",)).result
    assert isinstance(result, MaxRetriesExceededError)
    assert "sec-ret" not in f"{result!r} {vars(result)}"
    assert pickle.loads(pickle.dumps(result)).args == result.args


def test_celery_gets_the_error_of_an_async_task(site: Shop, tmp_path: Path) -> None:
    task = plain_app(site).tasks["tests.support.celery_shop.fail_always"]
    result = task.apply(args=(str(tmp_path / "path"),), max_retries=0)
    assert isinstance(result.result, ConnectionResetError)


@pytest.mark.parametrize("func", [spread, spread_async, spread_and_retry])
def test_tasks_that_a_task_adds_run_or_are_sent_after_its_last_attempt(
    site: Shop, tmp_path: Path, func: Any
) -> None:
    path, sent = tmp_path / "path", tmp_path / "sent"

    def do() -> None:
        correlation_id.set("request-7")
        background_tasks.add_task(func, str(path), str(sent))

    request(site.runner, do)
    written = wait_for(sent, site.worker)
    pid = int(written[1:].split(",")[0])
    assert ("request-7" in written) == (func is spread)
    site.works(tmp_path / "after")
    assert lines(path) == [f"attempt {pid}", f"attempt {pid}", f"local {pid}"]
    assert pid != os.getpid()


def test_tasks_that_a_failed_task_has_added_run_each_in_a_context(
    site: Shop, tmp_path: Path
) -> None:
    path, sent = tmp_path / "path", tmp_path / "sent"
    site.send(spread_and_fail, str(path), str(sent))
    wait_for(sent, site.worker)
    assert wait_for_lines(path, 2, site.worker) == [f"{NAME}, 1, False", "torn down"]


@pytest.mark.parametrize("run_on", ["success", "error"])
def test_the_tasks_to_send_come_first_and_the_outcome_of_the_request_is_long_known(
    tmp_path: Path, run_on: Any
) -> None:
    broker, path = filesystem(tmp_path), tmp_path / "path"
    app, runner = make_site(str(tmp_path / "site.db")), broker.runner(plain_calls=True)
    app.config["WSGI_BG_RUNNER"] = runner
    Background(app, run_on=run_on)
    folder = broker.options["data_folder_out"]
    runner._app.tasks["site.order"].apply(args=(folder, str(path)))
    assert lines(path) == ["1"]
    assert len(messages(broker)) == 2
    assert runner.statistics() == Statistics(0, 0, 1, 0, 0, sent=2)


def test_a_task_that_is_dropped_before_a_retry_is_named(
    site: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "wsgi_bg")
    path, sent = str(tmp_path / "path"), str(tmp_path / "sent")
    plain_app(site).tasks["tests.support.celery_flask.spread_async"].apply(args=(path, sent))
    adder = "tests.support.celery_flask.spread_async"
    dropped = [each for each in caplog.messages if "was dropped" in each]
    assert dropped == [
        f"background task {name} was dropped: {adder}, which has added it, is called again"
        for name in ("tests.support.files.append", "tests.support.celery_shop.note")
    ]


@pytest.mark.parametrize("how", ["ignored", "rejected", "repeated"])
def test_what_a_task_adds_that_celery_ignores_or_rejects(
    site: Shop, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "path"
    result = plain_app(site).tasks["site.leave"].apply(args=(how, str(path)))
    assert result.state == "IGNORED" if how == "ignored" else "REJECTED"
    assert lines(path) == ([] if how == "repeated" else [how])


def test_another_service_calls_a_registered_function_by_its_name(
    site: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "total"
    site.forge("site.total", [1], {"second": 2, "path": str(path)})
    assert wait_for(path, site.worker) == "3"


def test_celery_call_calls_a_registered_function(site: Shop, tmp_path: Path) -> None:
    path = tmp_path / "total"
    arguments = {"second": 3, "path": str(path)}
    command = [sys.executable, "-m", "celery", "-A", celery_flask.MODULE, "call", "site.total"]
    subprocess.run(
        [*command, "--args", "[1]", "--kwargs", json.dumps(arguments)],
        env={
            **os.environ,
            **environ(tmp_path),
            "SHOP_BROKER": json.dumps(site.broker),
        },
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
        check=True,
    )
    assert wait_for(path, site.worker) == "4"


def test_beat_calls_a_registered_function(site: Shop, tmp_path: Path) -> None:
    app, path = plain_app(site), tmp_path / "total"
    scheduler = Scheduler(app, lazy=True)
    entry = scheduler.Entry(
        name="every day",
        task="site.total",
        schedule=schedule(86400.0),
        args=[2],
        kwargs={"path": str(path)},
        app=app,
    )
    scheduler.apply_async(entry, advance=False)
    assert wait_for(path, site.worker) == "2"


def plain_app(site: Shop) -> Celery:
    app = site.broker.app()
    CeleryRunner(app, plain_calls=True)
    return app


def test_delay_and_a_chain_work_as_with_celerys_own_tasks(site: Shop, tmp_path: Path) -> None:
    task = plain_app(site).tasks["site.total"]
    assert task.ignore_result
    task.delay(1, second=4, path=str(tmp_path / "delay"))
    assert wait_for(tmp_path / "delay", site.worker) == "5"
    steps = task.s(1, second=2) | task.s(second=5) | task.s(path=str(tmp_path / "chain"))
    steps.delay()
    assert wait_for(tmp_path / "chain", site.worker) == "8"


def test_a_correlation_id_goes_with_a_plain_call_of_this_application(
    site: Shop, tmp_path: Path
) -> None:
    task = plain_app(site).tasks["tests.support.celery_flask.spread"]

    def call() -> None:
        correlation_id.set("request-8")
        task.delay(str(tmp_path / "path"), str(tmp_path / "sent"))

    copy_context().run(call)
    assert "request-8" in wait_for(tmp_path / "sent", site.worker)


def test_a_plain_call_is_repeated_with_its_arguments_and_shows_none_in_logs(
    site: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "attempts"
    plain_app(site).tasks["site.retry"].delay(str(path), secret="sec-ret")
    site.forge("site.retry", [str(tmp_path / "forged"), "by-others"])
    assert wait_for_lines(path, 3, site.worker) == ["0 sec-ret", "1 sec-ret", "2 sec-ret"]
    wait_for_lines(tmp_path / "forged", 3, site.worker)
    assert "sec-ret" not in site.worker.log


def test_a_plain_text_that_looks_like_encoded_arguments_is_a_text(
    site: Shop, tmp_path: Path
) -> None:
    path, marker = tmp_path / "seen", f"{uuid.uuid4()}"
    site.forge(
        "tests.support.celery_flask.look", [json.dumps([1, [str(path)], {}])], task_id=marker
    )
    assert wait_until(lambda: f"look[{marker}] raised" in site.worker.log)
    assert not path.exists()


def test_a_message_of_the_version_before_is_read_among_plain_calls(
    site: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "seen"
    site.forge(
        "tests.support.celery_flask.look_and_fail",
        [json.dumps([1, [str(path)], {}])],
        argsrepr="(...)",
        kwargsrepr="(...)",
    )
    wait_for_lines(path, 6, site.worker)


def test_delay_checks_the_arguments_where_it_is_called(site: Shop) -> None:
    task = plain_app(site).tasks["site.total"]
    with pytest.raises(ArgumentError, match="missing a required argument: 'first'"):
        task.delay(second=1)
    with pytest.raises(ArgumentError, match="too many positional arguments"):
        task.apply_async(args=(1, 2))


def test_celerys_eager_mode_takes_plain_calls(site: Shop, tmp_path: Path) -> None:
    app = plain_app(site)
    app.conf.task_always_eager = True
    path, sent = tmp_path / "path", tmp_path / "sent"
    app.tasks["tests.support.celery_flask.spread"].delay(str(path), str(sent))
    pid = os.getpid()
    assert lines(path) == [f"attempt {pid}", f"attempt {pid}", f"local {pid}"]
    assert sent.exists()
    assert app.tasks["site.total"].delay(3, second=4).get() == 7


def test_a_direct_call_of_the_task_is_a_call(site: Shop) -> None:
    app = plain_app(site)
    assert app.tasks["site.total"](3, second=4) == 7
    with pytest.raises(RuntimeError, match="background_tasks works while"):
        app.tasks["tests.support.celery_flask.spread_and_fail"]("path", "sent")


def test_without_plain_calls_the_refusal_names_the_option(site: Shop, tmp_path: Path) -> None:
    app = site.broker.app()
    CeleryRunner(app)
    task = app.tasks["site.total"]
    for call in (task.delay, task.s(1).delay, task.s(1).apply_async):
        with pytest.raises(PlainCallError, match=r"CeleryRunner\(\.\.\., plain_calls=True\)"):
            call()
    result = task.apply(args=(1,), headers={"x-wsgi-bg-call": "plain"})
    assert "plain_calls=True" in str(result.result)
    assert "plain_calls=True" in str(task.apply(args=(1, 2)).result)


def test_a_request_class_of_the_user_stays(site: Shop) -> None:
    class OwnTask(Task):  # type: ignore[misc]
        Request = "own:Request"

    app = Celery("own", task_cls=OwnTask, set_as_current=False)
    CeleryRunner(app)
    assert app.tasks["site.total"].Request == "own:Request"
    assert (
        site.broker.runner()._app.tasks["site.total"].Request
        == "wsgi_bg.celery.request:_Request"
    )


def test_plain_calls_is_a_flag(site: Shop) -> None:
    with pytest.raises(OptionError, match="plain_calls must be True or False; got 1"):
        site.broker.runner(plain_calls=1)
