"""Features of Django: async views, errors that leave the application, transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest
from django.db import transaction

from tests.conftest import Log
from tests.support import TIMEOUT, Gate, client, waitress
from tests.support.django import Order, settings
from tests.support.frameworks import (
    DJANGO,
    Seen,
    Site,
    check_failure,
    make_django,
    service,
    via_werkzeug,
)
from wsgi_bg import BackgroundTasks, BackgroundTasksMiddleware, PoolRunner, background_tasks


@pytest.fixture
def pool() -> Iterator[PoolRunner]:
    """A pool of one thread, on which each task finds the state of earlier tasks."""
    pool = PoolRunner(threads=1)
    yield pool
    assert pool.drain(TIMEOUT) == []


def run(pool: PoolRunner, enter: Callable[[BackgroundTasks], object], path: str = "/") -> None:
    """Handle a request whose tasks run in ``pool``."""
    via_werkzeug(BackgroundTasksMiddleware(make_django(Site(enter)), runner=pool), path)


def test_an_async_view_and_the_functions_that_run_in_a_thread_reach_the_tasks(
    gate: Gate,
) -> None:
    seen = Seen()

    def enter(tasks: BackgroundTasks) -> None:
        service(tasks)
        tasks.add_task(gate.async_task)
        tasks.add_task(seen.put, "done")

    with waitress(make_django(Site(enter))) as port:
        assert client.ask(port, path="/async").body == b"ok"
        gate.open()
        assert seen.next(2) == ["done", "done"]
    assert gate.passed == [True, True]


def test_an_exception_that_django_lets_out_is_a_failure(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "DEBUG_PROPAGATE_EXCEPTIONS", True)
    check_failure(DJANGO._replace(lets_errors_out=True), log)


@pytest.mark.parametrize(
    ("path", "count"), [("/", 1), ("/broken", 0)], ids=["committed", "rolled back"]
)
def test_a_task_runs_after_the_transaction_of_an_atomic_request(
    path: str,
    count: int,
    database: dict[str, object],
    pool: PoolRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(database, "ATOMIC_REQUESTS", True)
    counts: SimpleQueue[int] = SimpleQueue()

    def look() -> None:
        counts.put(Order.objects.count())

    def enter(tasks: BackgroundTasks) -> None:
        Order.objects.create()
        tasks.using(run_on="always").add_task(look)

    run(pool, enter, path)
    assert counts.get(timeout=TIMEOUT) == count


@pytest.mark.usefixtures("database")
def test_on_commit_may_add_a_task(pool: PoolRunner) -> None:
    seen = Seen()

    def enter(tasks: BackgroundTasks) -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: background_tasks.add_task(seen.put, "committed"))
            tasks.add_task(seen.put, "added before")

    run(pool, enter)
    assert seen.next(2) == ["added before", "committed"]
