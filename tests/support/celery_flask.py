"""A Flask application with a ``CeleryRunner``, and the module that a worker of the tests loads.

Each function writes its observations into a file whose name the test chooses.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from celery import Celery, Task, current_task
from celery.exceptions import Ignore, Reject
from flask import Flask, appcontext_popped, appcontext_pushed, current_app, g
from flask_sqlalchemy import SQLAlchemy

from tests.support import text_of
from tests.support.celery_shop import make_app, note
from tests.support.files import append, write
from wsgi_bg import BackgroundTasks, Retry, background_tasks, inject, registered_task
from wsgi_bg.celery import CeleryRunner, correlation_id
from wsgi_bg.flask import Background

MODULE = "tests.support.celery_flask"
NAME = "the site"

db = SQLAlchemy()
entered: list[None] = []
"""An item for each application context that is open in this process."""


class Order(db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)
    state = db.Column(db.String, nullable=False)


def make_site(database: str) -> Flask:
    app = Flask(NAME)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{database}"
    db.init_app(app)
    appcontext_pushed.connect(lambda *args, **_: entered.append(None), app, weak=False)
    appcontext_popped.connect(lambda *args, **_: entered.pop(), app, weak=False)

    @app.teardown_appcontext
    def note_teardown(exc: BaseException | None) -> None:
        if "path" in g:
            append(g.path, "torn down")

    return app


def note_context(path: str) -> None:
    """Note the application, how many contexts are open, and if ``g`` is this call's own."""
    append(path, f"{current_app.name}, {len(entered)}, {'path' in g}")
    g.path = path


@registered_task
def look(path: str) -> None:
    note_context(path)


@registered_task
async def look_async(path: str) -> None:
    await asyncio.sleep(0)
    note_context(path)


@registered_task(retry=Retry(3, first=0))
def look_and_fail(path: str) -> None:
    note_context(path)
    raise KeyError


@registered_task
def pay(number: int) -> None:
    """Change an order, and leave the session open."""
    db.session.get_one(Order, number).state = "paid"
    db.session.commit()
    db.session.get_one(Order, number)


@registered_task
async def pay_async(number: int) -> None:
    pay(number)


@registered_task
def note_order(path: str, number: int) -> None:
    """Note the state of an order, and how many sessions earlier tasks have left open."""
    open_sessions = db.engine.pool.checkedout()  # type: ignore[attr-defined]
    write(path, f"{db.session.get_one(Order, number).state}, {open_sessions} open")


@registered_task
async def note_task(path: str, together: int = 1) -> None:
    """Note the Celery task before and after other tasks have run on the loop."""
    first = current_task.request.id
    lines = append(path, first)
    while len(lines) < together:  # polls: no event spans processes
        await asyncio.sleep(0.01)
        lines = text_of(Path(path)).splitlines()
    append(path, f"{first} {current_task.request.id == first} {current_task.name}")


@registered_task(name="site.retry")
async def retry_by_celery(path: str, secret: str) -> None:
    if len(append(path, f"{current_task.request.retries} {secret}")) < 3:
        await asyncio.sleep(0)
        raise current_task.retry(countdown=0)


@registered_task(name="site.exhaust")
def exhaust(secret: str) -> None:
    raise current_task.retry(countdown=0, max_retries=0)


@registered_task(retry=Retry(2, first=0))
@inject
def spread(path: str, sent: str, tasks: BackgroundTasks) -> None:
    """Fail at first; add a task that is sent and a task that is not, in each attempt."""
    tasks.add_task(append, path, f"local {os.getpid()}")
    tasks.add_task(note, sent, correlation_id.get())
    if len(append(path, f"attempt {os.getpid()}")) == 1:
        raise KeyError


@registered_task(celery={"autoretry_for": (KeyError,), "default_retry_delay": 0})
async def spread_async(path: str, sent: str) -> None:
    await asyncio.sleep(0)
    background_tasks.add_task(append, path, f"local {os.getpid()}")
    background_tasks.add_task(note, sent)
    if len(append(path, f"attempt {os.getpid()}")) == 1:
        raise KeyError


@registered_task
def spread_and_retry(path: str, sent: str) -> None:
    background_tasks.add_task(append, path, f"local {os.getpid()}")
    background_tasks.add_task(note, sent)
    if len(append(path, f"attempt {os.getpid()}")) == 1:
        raise current_task.retry(countdown=0)


@registered_task
def spread_and_fail(path: str, sent: str) -> None:
    background_tasks.add_task(look, path)
    background_tasks.add_task(note, sent)
    raise KeyError


def count_messages(folder: str, path: str) -> None:
    """Note how many messages are in a folder, and add a task to send."""
    background_tasks.add_task(note, path)
    append(path, f"{len(list(Path(folder).glob('*.msg')))}")


@registered_task(name="site.order")
def add_in_order(folder: str, path: str) -> None:
    background_tasks.add_task(count_messages, folder, path)
    background_tasks.add_task(note, path)


@registered_task(name="site.leave")
def leave(how: str, path: str) -> None:
    """End by one of Celery's exceptions, after a task was added."""
    background_tasks.add_task(append, path, how)
    raise {
        "ignored": Ignore(),
        "rejected": Reject("by itself", requeue=False),
        "repeated": Reject("by itself", requeue=True),
    }[how]


@registered_task(name="site.total")
def total(first: int, *, second: int = 0, path: str = "") -> int:
    if path:
        write(path, first + second)
    return first + second


class FlaskTask(Task):  # type: ignore[misc]
    """The task class of Flask's page on Celery."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with site.app_context():
            return self.run(*args, **kwargs)


def make_celery(url: str, options: dict[str, Any]) -> Celery:
    made = make_app(url, options)
    if os.environ.get("SITE_TASK_CLASS"):
        made.Task = FlaskTask
    return made


if "SHOP_BROKER" in os.environ:
    site = make_site(os.environ["SITE_DATABASE"])
    if os.environ.get("SITE_PUSHED"):  # as many modules of workers do
        site.app_context().push()
    app = make_celery(*json.loads(os.environ["SHOP_BROKER"]))
    Background(site, runner=CeleryRunner(app, plain_calls=True))
