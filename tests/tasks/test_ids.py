"""The id of a task: one text, whoever reads it first."""

from __future__ import annotations

import gc
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support import TIMEOUT, Server, app_that, make_server_environ, run_python, wait_until
from tests.support import durable_shop as shop
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    DurableRunner,
    PoolRunner,
    Retry,
    background_tasks,
)
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks
from wsgi_bg._tasks import task as tasks_module
from wsgi_bg.hooks import Hooks, TaskRecord


def handle(runner: Any, view: Any, **options: Any) -> None:
    app = BackgroundTasksMiddleware(app_that(view), runner=runner, **options)
    Server().run(app, make_server_environ())


def test_add_task_returns_the_task_and_each_task_has_an_id() -> None:
    found: list[BackgroundTask] = []

    def view(environ: Any) -> None:
        found.append(background_tasks.add_task(print))
        found.append(background_tasks.using(run_on="always").add_task(print))
        assert found == background_tasks.tasks

    handle("inline", view)
    first, second = found
    assert isinstance(first.id, str)
    assert first.id == first.id
    assert first.id != second.id


def test_many_tasks_on_many_threads_have_as_many_ids() -> None:
    found: list[str] = []
    barrier = threading.Barrier(4)

    def read() -> None:
        barrier.wait(TIMEOUT)
        found.extend(BackgroundTask(print).id for _ in range(5_000))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(set(found)) == 20_000
    assert {uuid.UUID(each).version for each in found} == {4}


def test_a_forked_process_has_other_ids_than_its_parent() -> None:
    process = run_python(
        """
        import os
        from wsgi_bg import BackgroundTask

        BackgroundTask(print).id  # the parent has made ids, of which the child knows
        pid = os.fork()
        ids = [BackgroundTask(print).id for _ in range(5)]
        if pid:
            os.waitpid(pid, 0)
        os.write(1, ("\\n".join(ids) + "\\n").encode())
        if not pid:
            os._exit(0)
        """
    )
    ids = process.stdout.split()
    assert len(set(ids)) == len(ids) == 10, process.stderr


def test_a_forked_process_does_not_run_the_tasks_of_its_parent() -> None:
    process = run_python(
        """
        import os, threading
        import wsgi_bg
        from tests.support import TIMEOUT, app_that, respond
        from wsgi_bg import BackgroundTask, BackgroundTasksMiddleware, background_tasks, status

        def run():
            begun.set()
            go_on.wait(TIMEOUT)

        begun, go_on = threading.Event(), threading.Event()
        added, ids = [], []

        def view(environ):
            added.extend(background_tasks.add_task(run) for _ in range(2))
            ids.extend(task.id for task in added)

        respond(BackgroundTasksMiddleware(app_that(view), runner="pool", status=True))
        assert begun.wait(TIMEOUT)
        for generation in range(2):  # a child and its child
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                break
        assert [task.id for task in added] == ids
        assert BackgroundTask(print).id not in ids
        print(generation if pid else 2, *map(status.of, ids), flush=True)
        if generation or not pid:
            os._exit(0)
        go_on.set()
        assert wsgi_bg.wait(TIMEOUT) == []
        """
    )
    assert process.stdout.splitlines() == ["2 None None", "1 None None", "0 running waiting"]


def test_threads_that_read_the_id_at_once_get_the_same() -> None:
    for _ in range(50):
        task, barrier = BackgroundTask(print), threading.Barrier(4)
        found: list[str] = []

        def read(
            task: BackgroundTask = task,
            barrier: threading.Barrier = barrier,
            found: list[str] = found,
        ) -> None:
            barrier.wait(TIMEOUT)
            found.append(task.id)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert len(found) == 4
        assert len(set(found)) == 1


def test_a_task_whose_id_no_one_reads_has_none() -> None:
    gc.collect()
    before = len(tasks_module._ids)
    handle("inline", lambda environ: background_tasks.add_task(int))
    assert len(tasks_module._ids) <= before


def test_states_can_be_read_while_the_garbage_collector_frees_tasks() -> None:
    kept = [BackgroundTask(print) for _ in range(50)]
    ids = [task.id for task in kept]
    threshold = gc.get_threshold()
    gc.disable()
    try:
        for _ in range(50):
            task = BackgroundTask(print, [])
            task.args[0].append(task)  # only the collector frees the task
            assert task.id
        gc.set_threshold(1)  # now a new object may start the collector
        gc.enable()
        found = tasks_module.tasks_with_ids()
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
    assert set(ids) <= {id for _, id in found}  # noqa: A001
    assert tasks_module.tasks_with_ids(ids[7]) == [(kept[7], ids[7])]


def test_a_copy_in_a_second_batch_has_an_id_of_its_own() -> None:
    task = BackgroundTask(int)
    first, second = BackgroundTasks([task]), BackgroundTasks([task])
    assert first.tasks[0].id == task.id
    assert second.tasks[0].id != task.id


def test_each_attempt_of_a_task_has_the_same_id() -> None:
    seen: list[str] = []

    class Seen(Hooks):
        def task_started(self, record: TaskRecord) -> None:
            seen.append(record.task.id)

    def fail() -> None:
        raise ValueError

    runner = PoolRunner()
    added: list[BackgroundTask] = []

    def view(environ: Any) -> None:
        retried = background_tasks.using(retry=Retry(3, first=0))
        added.append(retried.add_task(fail))

    handle(runner, view, hooks=Seen())
    assert wait_until(lambda: runner.statistics().failed == 1)
    assert seen == [added[0].id] * 3


@pytest.mark.usefixtures("fresh_shop")
def test_a_stored_task_has_its_id_in_the_file(tmp_path: Path) -> None:
    runner = DurableRunner(tmp_path / "tasks")
    added: list[BackgroundTask] = []
    handle(runner, lambda environ: added.append(background_tasks.add_task(shop.write, 1)))
    assert shop.wait_for(1) == [1]
    folder = check_folder(runner.path)
    assert wait_until(
        lambda: [each.outcome.row.id for each in list_tasks(folder)] == [added[0].id]
    )


@pytest.fixture
def fresh_shop() -> Any:
    shop.calls.clear()
    yield
    shop.calls.clear()
