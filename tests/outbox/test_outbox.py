"""The outbox: no server thread waits for an engine, and no message is lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from werkzeug.test import Client

import wsgi_bg
from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Gate,
    Server,
    app_that,
    make_server_environ,
    no_threads,
    post,
    text_of,
    wait_until,
)
from tests.support.durable import left_by_a_dead_process, open_files
from tests.support.post import FilePost, Post, add, request, send, send_or_run
from tests.support.recording import late as late_stream
from tests.support.recording import recording
from wsgi_bg import (
    BackgroundTasksMiddleware,
    InlineRunner,
    Retry,
    _testing,
    background_tasks,
    registered_task,
)
from wsgi_bg._outbox import outbox as sending
from wsgi_bg._outbox import stored as reading
from wsgi_bg._outbox.stored import Stored
from wsgi_bg._store.folder import check_folder
from wsgi_bg._store.inspection import list_tasks, order
from wsgi_bg._store.rows import Row, Settings
from wsgi_bg._store.store import Store
from wsgi_bg.exceptions import OptionError, OutboxFullError, PublishError, StoreError
from wsgi_bg.hooks import Hooks, TaskRecord
from wsgi_bg.runners import Statistics
from wsgi_bg.runners.ledger import ledgers_here
from wsgi_bg.runners.pool import START_DELAY

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Wait for messages that a test has left: the next one would see their records."""
    yield
    for ledger in ledgers_here():
        ledger.abandon_unsent()
    assert wait_until(lambda: not post.under_way)
    post.here.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an outbox try again soon."""
    monkeypatch.setattr(sending, "_PAUSES", (0.01, 0.02))


def settled(runner: Post) -> bool:
    return wait_until(lambda: not runner.ledger.unsent)


# Sending


def test_close_does_not_wait_for_the_engine(gate: Gate) -> None:
    runner = Post()
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1, 2))
    assert gate.begun.wait(TIMEOUT)
    assert runner.got == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, 0, waiting=2)
    assert [task.func for task in wsgi_bg.wait(0)] == [send, send]
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    assert sorted(runner.got) == [1, 2]
    assert runner.statistics() == Statistics(0, 0, 0, 0, 0, sent=2)
    assert post.here == []


def test_messages_are_sent_in_batches_over_few_connections() -> None:
    runner = Post()
    for _ in range(3):
        request(runner, add(send, *range(250)))
        assert settled(runner)
    assert len(runner.got) == 750
    assert len(runner.connections) <= sending.SENDERS
    sizes = [size for each in runner.connections for size in each.sizes]
    assert max(sizes) <= sending.CHUNK
    assert len(sizes) < 750 / 2


def test_tasks_of_running_tasks_are_sent_and_others_run_here() -> None:
    runner = Post(local="inline")
    background: list[Any] = []

    async def adds_async() -> None:
        add(send, 3)()

    def do() -> None:
        background_tasks.add_task(add(send, 2))
        background_tasks.add_task(adds_async)
        background_tasks.add_task(send, 1)
        background_tasks.add_task(background.append, "here")

    request(runner, do)
    assert wsgi_bg.wait(TIMEOUT) == []
    assert sorted(runner.got) == [1, 2, 3]
    assert background == ["here"]
    statistics = runner.statistics()
    assert (statistics.succeeded, statistics.sent) == (3, 3)


async def send_async() -> None:
    """Registered below: the engine's."""


wsgi_bg.registered_task(name="post.async")(send_async)


def test_an_async_task_is_put_into_the_outbox_on_the_loop() -> None:
    runner = Post()

    async def adds() -> None:
        background_tasks.add_task(send_async, 1)  # type: ignore[call-arg]

    request(runner, lambda: background_tasks.add_task(adds))
    assert wsgi_bg.wait(TIMEOUT) == []
    assert runner.got == [1]


span: ContextVar[str] = ContextVar("span", default="none")


def test_hooks_are_told_when_the_engine_has_confirmed_and_in_the_tasks_context() -> None:
    told: list[Any] = []

    class Told(Hooks):
        def task_sent(self, record: TaskRecord) -> None:
            told.append((record.task.id, span.get(), list(runner.got)))

    runner = Post()
    added: list[Any] = []

    def do() -> None:
        span.set("request")
        added.append(background_tasks.add_task(send, 1))

    request(runner, do, hooks=Told())
    assert settled(runner)
    assert told == [(added[0].id, "request", [1])]


def test_a_hook_that_raises_stops_no_message(log: Log) -> None:
    class Broken(Hooks):
        def task_sent(self, record: TaskRecord) -> None:
            raise SystemExit

    runner = Post()
    request(runner, add(send, 1, 2), hooks=Broken())
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]
    assert runner.statistics().sent == 2


def test_a_connection_that_was_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "IDLE", 0.0)
    runner = Post()
    for number in range(2):
        request(runner, add(send, number))
        assert settled(runner)
    first, _ = runner.connections
    assert first.is_closed.wait(TIMEOUT)
    assert sorted(runner.got) == [0, 1]


def ends(outbox: Any) -> bool:
    return wait_until(lambda: not outbox._is_managed)


def test_a_runner_that_is_not_used_closes_its_connections_and_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "IDLE", 0.01)
    monkeypatch.setattr(sending, "IDLE_TIMEOUT", 0.02)
    monkeypatch.setattr("wsgi_bg._process.workers.IDLE_TIMEOUT", 0.02)
    runner = Post()
    request(runner, add(send, 1))
    assert settled(runner)
    (connection,) = runner.connections
    assert connection.is_closed.wait(TIMEOUT)
    assert ends(runner._states.get().outbox)
    request(runner, add(send, 2))  # starts the thread again
    assert settled(runner)
    freed = weakref.ref(runner)
    del runner, connection
    assert wait_until(lambda: gc.collect() >= 0 and freed() is None)


def test_a_thread_that_ends_while_a_task_is_put_into_the_outbox_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "IDLE_TIMEOUT", 0.02)
    put = sending.Outbox.put

    def put_late(outbox: Any, *given: Any) -> Any:
        queue = put(outbox, *given)
        assert ends(outbox)
        return queue

    monkeypatch.setattr(sending.Outbox, "put", put_late)
    runner = Post()
    request(runner, add(send, 1))
    assert settled(runner)
    assert runner.got == [1]


# An engine that is away, or refuses a message


@pytest.mark.usefixtures("quick")
def test_tasks_are_held_while_the_engine_is_away(log: Log) -> None:
    runner = Post()
    runner.is_up = False
    request(runner, add(send, *range(5)))
    assert wait_until(lambda: bool(log.warnings))
    assert runner.statistics().waiting == 5
    runner.is_up = True
    assert settled(runner)
    assert sorted(runner.got) == [0, 1, 2, 3, 4]
    assert "5 background tasks of <" in log.warnings[0]
    assert post.here == []


@pytest.mark.usefixtures("quick")
def test_a_single_message_probes_an_engine_that_was_away(gate: Gate, log: Log) -> None:
    runner = Post()
    runner.is_up = False
    request(runner, add(send, 0))
    assert wait_until(lambda: bool(log.warnings))  # from now on each try is a probe
    request(runner, add(send, *range(1, 300)))
    runner.before = lambda value: gate.task()
    runner.is_up = True
    assert gate.begun.wait(TIMEOUT)
    assert [each.sizes for each in runner.connections] == [[1]]
    gate.open()
    assert settled(runner)
    assert sorted(runner.got) == list(range(300))


def test_a_message_that_is_refused_holds_up_no_other(log: Log) -> None:
    failed: list[Any] = []
    runner = Post()
    request(
        runner,
        add(send, 1, "refused", 2),
        on_error=lambda task, exc: failed.append((task.args, exc)),
    )
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]
    ((args, error),) = failed
    assert args == ("refused",)
    assert isinstance(error, PublishError)
    assert isinstance(error.__cause__, ValueError)
    assert log.errors == ["background task tests.support.post.send raised PublishError"]
    statistics = runner.statistics()
    assert (statistics.sent, statistics.failed) == (2, 1)


def forget_to_confirm(self: Any, messages: Any, confirmed: Any) -> None:
    pass


def cancel(self: Any, messages: Any, confirmed: Any) -> None:
    raise CancelledError  # no Exception: the client of an engine may use asyncio


def lose(self: Any, messages: Any, confirmed: Any) -> None:
    raise post.AwayError


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fails", [forget_to_confirm, cancel, lose])
def test_a_message_that_a_connection_has_not_confirmed_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, log: Log, fails: Any
) -> None:
    """However ``send`` has ended, and if ``is_lost`` raises too."""
    send_all = post.Connection.send

    def fail_once(self: Any, messages: Any, confirmed: Any) -> None:
        monkeypatch.setattr(post.Connection, "send", send_all)
        fails(self, messages, confirmed)

    def is_lost(self: Any, exc: Exception) -> bool:
        raise KeyError

    monkeypatch.setattr(post.Connection, "send", fail_once)
    monkeypatch.setattr(post.Connection, "is_lost", is_lost)
    runner = Post()
    request(runner, add(send, 1, 2))
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]
    assert runner.statistics().sent == 2
    stopped = {cancel: ["wsgi_bg-send was stopped"], lose: ["is_lost() of"]}
    wanted = stopped.get(fails, [])
    # Another thread may have sent the messages before the stopped thread logs.
    assert wait_until(lambda: [error.partition(" <")[0] for error in log.errors] == wanted)
    assert "could not be reached" in log.warnings[0]


def test_a_message_that_breaks_each_connection_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """Redis closes the connection if a message is too big, and takes nothing of its batch."""
    monkeypatch.setattr(sending, "_PAUSES", (0.001, 1e6))
    monkeypatch.setattr(sending, "_LONGEST_ALONE", 0.002)
    runner = Post()
    batches: list[list[Any]] = []
    limit = 1
    send_all = post.Connection.send

    def send_small(self: Any, messages: Any, confirmed: Any) -> None:
        batches.append([message.data[0] for message in messages])
        if any(len(str(value)) > limit for value in batches[-1]):
            raise post.AwayError
        send_all(self, messages, confirmed)

    monkeypatch.setattr(post.Connection, "send", send_small)
    request(runner, add(send, 1, "too big", 2))
    assert wait_until(lambda: sorted(runner.got) == [1, 2])
    assert wait_until(lambda: batches.count(["too big"]) > 30)
    request(runner, add(send, *range(3, 10)))
    assert wait_until(lambda: sorted(runner.got) == [*range(1, 10)])
    known = batches[batches.index(["too big"]) :]
    assert all(batch == ["too big"] for batch in known if "too big" in batch)
    limit = 10
    assert settled(runner)
    assert runner.got[-1] == "too big"
    assert runner.statistics().sent == 10


@pytest.mark.usefixtures("quick")
def test_with_local_a_task_runs_here_after_publish_timeout(log: Log) -> None:
    runner = Post(when_unsent="local", publish_timeout=0.05, local="inline")
    runner.is_up = False
    told: list[Any] = []

    class Told(Hooks):
        def task_finished(self, record: TaskRecord) -> None:
            told.append(record.task.id)

    added: list[Any] = []
    request(runner, lambda: added.append(background_tasks.add_task(send, 1)), hooks=Told())
    assert wait_until(lambda: post.here == [1])
    assert wait_until(lambda: told == [added[0].id])
    assert settled(runner)
    assert runner.statistics().succeeded == 1
    (warning,) = [each for each in log.warnings if each.startswith("background task")]
    assert warning == (
        "background task tests.support.post.send runs in this process: tests.support.post.send "
        "was not sent: the broker has not answered in time"
    )


gates: list[Gate] = []


@registered_task(name="outbox.add_others", when_unsent="local")
def add_others() -> None:
    gates[0].task()
    background_tasks.add_task(send, "added")


@pytest.mark.usefixtures("quick")
def test_tasks_that_a_task_adds_here_are_put_into_the_outbox(gate: Gate) -> None:
    gates[:] = [gate]
    gate.open()
    runner = Post(publish_timeout=0.05)
    runner.is_up = False
    request(runner, lambda: background_tasks.add_task(add_others))
    assert wait_until(lambda: runner.statistics().succeeded == 1)
    assert [task.func for task in wsgi_bg.wait(0)] == [send]
    assert post.here == []
    runner.is_up = True
    assert settled(runner)
    assert runner.got == ["added"]


def running_here(gate: Gate) -> Post:
    """A runner whose broker is away: its only task runs here soon, and waits for ``gate``."""
    gates[:] = [gate]
    runner = Post(publish_timeout=0.05, when_unsent="local")
    runner.is_up = False
    request(runner, lambda: background_tasks.add_task(add_others))
    return runner


@pytest.mark.usefixtures("quick")
def test_wait_and_drain_wait_for_a_task_that_runs_here(gate: Gate) -> None:
    runner = running_here(gate)
    left: list[Any] = []
    waiters = [
        threading.Thread(target=lambda: left.append(wsgi_bg.wait(TIMEOUT))),
        threading.Thread(target=lambda: left.append(runner.drain(TIMEOUT))),
    ]
    for waiter in waiters:
        waiter.start()
    assert gate.begun.wait(TIMEOUT)
    assert [task.func for task in wsgi_bg.wait(0)] == [add_others]
    assert left == []
    gate.open()
    for waiter in waiters:
        waiter.join(TIMEOUT)
    assert left == [[], []]
    assert wait_until(lambda: post.here == ["added"])


@pytest.mark.usefixtures("quick")
def test_a_drain_names_a_task_that_runs_here_and_does_not_end(gate: Gate) -> None:
    runner = running_here(gate)
    left = runner.drain(0.2)
    assert [task.func for task in left] == [add_others]
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []


@pytest.mark.usefixtures("quick")
def test_with_local_a_task_that_has_expired_does_not_run(log: Log) -> None:
    class Expired(Post):
        def message(self, task: Any) -> Any:
            made = super().message(task)
            return made and made._replace(expires=time.time() - 1)

    runner = Expired(when_unsent="local", publish_timeout=0.05, local="inline")
    runner.is_up = False
    errors: list[Any] = []
    request(runner, add(send, 1), on_error=lambda task, exc: errors.append(str(exc)))
    assert settled(runner)
    assert post.here == []
    assert len(errors) == 1
    assert errors[0].endswith("has not answered in time, and it has expired")
    assert log.errors == ["background task tests.support.post.send raised PublishError"]


@pytest.mark.usefixtures("quick")
def test_the_function_and_the_view_say_what_becomes_of_a_task(log: Log) -> None:
    runner = Post(publish_timeout=0.05, local="inline")
    runner.is_up = False

    def do() -> None:
        background_tasks.add_task(send, "held")
        background_tasks.add_task(send_or_run, "local")
        background_tasks.using(when_unsent="discard").add_task(send_or_run, "discarded")

    request(runner, do)
    assert wait_until(lambda: post.here == ["local"])
    assert wait_until(lambda: runner.statistics().failed == 1)
    assert runner.statistics().waiting == 1
    assert log.errors == ["background task tests.support.post.send_or_run raised PublishError"]
    runner.is_up = True
    assert settled(runner)
    assert runner.got == ["held"]


def test_a_task_that_cannot_run_here_is_held_or_refused() -> None:
    runner = Post(when_unsent="local")
    kept: list[str] = []

    def view(environ: Any) -> None:
        for options in ({"delay": 60}, {"retry": Retry()}):
            tasks = background_tasks.using(**options)
            task = tasks.add_task(send, 1)
            kept.append(task.message.message.when_unsent)
            for refused in (tasks.using(when_unsent="local"), tasks):
                func = send if refused is not tasks else send_or_run
                with pytest.raises(OptionError, match="cannot run in this process"):
                    refused.add_task(func, 1)
        background_tasks.tasks.clear()

    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    Server().run(app, make_server_environ())
    # Post gives its messages no time, so that only the Retry and the delay are looked at.
    assert kept == ["hold", "hold"]


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(OptionError, match="when_unsent must be 'hold', 'local' or 'discard'"):
        Post(when_unsent="later")
    with pytest.raises(OptionError, match="when_unsent must be"):
        wsgi_bg.registered_task(when_unsent="later")(print)  # type: ignore[call-overload]


@pytest.mark.usefixtures("quick")
def test_after_hold_for_a_task_is_given_up_and_named(log: Log) -> None:
    runner = Post(hold_for=0.05, publish_timeout=600)
    runner.is_up = False
    failed: list[Any] = []
    request(runner, add(send, 1), on_error=lambda task, exc: failed.append(exc))
    assert wait_until(lambda: bool(failed))
    assert isinstance(failed[0], PublishError)
    assert settled(runner)
    assert runner.statistics().failed == 1
    assert log.errors == ["background task tests.support.post.send raised PublishError"]


def test_a_task_may_be_held_for_longer_than_any_float(log: Log) -> None:
    runner = Post(hold_for=10**400)
    request(runner, add(send, 1))
    assert wait_until(lambda: runner.statistics().sent == 1)
    assert log.errors == []


def test_a_message_that_is_confirmed_too_late_is_named(log: Log, gate: Gate) -> None:
    runner = Post(when_unsent="local", publish_timeout=0.05, local="inline")
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1))
    assert gate.begun.wait(TIMEOUT)
    assert wait_until(lambda: post.here == [1])
    gate.open()
    late = "post.send was sent after its time was up: it may run twice"
    assert wait_until(lambda: f"background task tests.support.{late}" in log.warnings)
    assert "the broker has not answered in time, and it may have been sent" in log.warnings[0]


def test_the_view_is_told_if_the_outbox_is_full(gate: Gate) -> None:
    runner = Post(max_unsent=2)
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1, 2))
    refused: list[OutboxFullError] = []

    def view(environ: Any) -> None:
        background_tasks.add_task(post.here.append, "others run")
        with pytest.raises(
            OutboxFullError, match=r"tests\.support\.post\.send was not added: 2 tasks"
        ) as e:
            background_tasks.add_task(send, 3)
        refused.append(e.value)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )
    assert (refused[0].name, refused[0].limit) == ("tests.support.post.send", 2)
    gate.open()
    assert wsgi_bg.wait(TIMEOUT) == []
    request(runner, add(send, 4))
    assert settled(runner)
    assert sorted(runner.got) == [1, 2, 4]
    assert post.here == ["others run"]


def test_the_tasks_of_a_request_that_goes_on_count_as_unsent() -> None:
    runner = Post(max_unsent=2)

    def view(environ: Any) -> None:
        add(send, 1, 2)()
        with pytest.raises(OutboxFullError):
            background_tasks.add_task(send, 3)

    Server().run(
        BackgroundTasksMiddleware(app_that(view), runner=runner), make_server_environ()
    )
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]


def test_a_request_that_fails_leaves_room_for_the_tasks_of_others() -> None:
    runner = Post(max_unsent=1)
    for _ in range(2):
        request(runner, add(send, "not sent"), run_on="error")
        gc.collect()
    assert runner.got == []


def test_tasks_wait_for_a_thread_if_none_can_be_had() -> None:
    runner = Post()
    with no_threads():
        request(runner, add(send, 1))
    assert runner.statistics().waiting == 1
    request(runner, add(send, 2))
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]


def test_a_local_runner_that_refuses_a_task_loses_none(log: Log) -> None:
    class Broken(InlineRunner):
        def submit_later(self, batch: Any) -> None:
            raise ZeroDivisionError

    runner = Post(when_unsent="local", publish_timeout=0.05, local=Broken())
    runner.is_up = False
    request(runner, add(send, 1))
    assert wait_until(lambda: post.here == [1])
    assert "did not take" in log.errors[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_sends_its_own_tasks_only(tmp_path: Path, gate: Gate) -> None:
    runner = Post()
    runner.before = lambda value: gate.task()
    request(runner, add(send, "parent"))
    assert gate.begun.wait(TIMEOUT)
    child = os.fork()
    if child == 0:  # no assertion in the child: pytest would go on there
        try:
            runner.before = lambda value: None
            request(runner, add(send, "child"))
            wsgi_bg.wait(TIMEOUT)
            (tmp_path / "child").write_text(f"{runner.got}", encoding="utf-8")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert text_of(tmp_path / "child") == "['child']"
    gate.open()
    assert settled(runner)
    assert runner.got == ["parent"]


# Exit


def test_drain_waits_for_the_engine_and_abandon_names_what_was_not_sent(
    log: Log, gate: Gate
) -> None:
    runner = Post()
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1))
    assert gate.begun.wait(TIMEOUT)
    assert [task.func for task in runner.drain(0.01)] == [send]
    assert [task.func for task in runner.ledger.abandon_unsent()] == [send]
    assert log.warnings == ["background task tests.support.post.send may have been sent"]
    assert runner.drain(0) == []
    gate.open()
    assert wait_until(lambda: len(log.warnings) == 2)


EXIT = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s", level="INFO", stream=sys.stdout)
from tests.support.post import *
runner = Post(drain_timeout=float(sys.argv[1]))
runner.is_up = sys.argv[2] == "up"
request(runner, add(send, 1))
def look():
    print("got", runner.got)
import atexit
atexit.register(look)
"""


@pytest.mark.parametrize(("is_up", "got"), [("up", "[1]"), ("away", "[]")])
def test_exit_sends_what_only_memory_holds_or_names_it(is_up: str, got: str) -> None:
    command = [sys.executable, "-c", EXIT, "30" if is_up == "up" else "0.1", is_up]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, check=True
    )
    assert f"got {got}" in done.stdout, done.stderr
    named = (
        "ERROR background task tests.support.post.send was not finished since it was not sent: "
        "the process ends without it"
    )
    assert (named in done.stdout) == (is_up == "away")


# In a folder


@contextmanager
def process(folder: Path, *values: str) -> Iterator[subprocess.Popen[str]]:
    """A process that adds a task for each of ``values``, or takes over those of others."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.support.post_process", str(folder), *values],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


def sent(folder: Path) -> list[str]:
    return text_of(folder / "sent").splitlines()


def test_messages_of_a_killed_process_are_sent_by_another(tmp_path: Path) -> None:
    with process(tmp_path, "a", "b"):  # killed at the end; the engine is away
        pass
    assert sent(tmp_path) == []
    (tmp_path / "is_up").touch()
    with process(tmp_path):
        assert wait_until(lambda: len(sent(tmp_path)) == 2)
    assert sorted(sent(tmp_path)) == ["a", "b"]
    with process(tmp_path, "c"):
        assert wait_until(lambda: "c" in sent(tmp_path))


def test_the_file_of_a_killed_process_goes_when_its_messages_are_sent(tmp_path: Path) -> None:
    with process(tmp_path, "a"):
        pass
    folder = check_folder(tmp_path / "tasks" / "outbox")
    [left] = folder.numbers()
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    request(runner, add(send, "b"))
    assert wait_until(lambda: sorted(sent(tmp_path)) == ["a", "b"])
    assert wait_until(lambda: left not in folder.numbers())


def test_hooks_see_the_ends_of_messages_of_a_dead_process(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str | None, str]] = []

    class Ends(Hooks):
        def task_sent(self, record: TaskRecord) -> None:
            seen.append(("sent", record.id, record.request, record.runner))

        def task_failed(self, record: TaskRecord) -> None:
            seen.append(("failed", record.id, record.request, record.runner))

    request(FilePost(tmp_path / "before"), add(send, "good"))
    [found] = list_tasks(check_folder(tmp_path / "before" / "tasks" / "outbox"))
    named = found.outcome.row.context
    good = Row("post.send", '["good"]', context=named, id="good")
    refused = Row("post.send", '["refused"]', id="refused")
    left_by_a_dead_process(tmp_path / "tasks" / "outbox", good, refused)
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    BackgroundTasksMiddleware(app_that(print), runner=runner, hooks=Ends())
    runner.start()
    assert wait_until(lambda: len(seen) == 2)
    assert sorted(seen) == [
        ("failed", "refused", None, "FilePost"),
        ("sent", "good", "GET /", "FilePost"),
    ]


def test_many_messages_of_a_dead_process_wait_for_no_further_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_READ", 3)
    monkeypatch.setattr(reading, "_LOOK", 10 * TIMEOUT)
    rows = [Row("post.send", f"[{number}]") for number in range(25)]
    left_by_a_dead_process(tmp_path / "tasks" / "outbox", *rows)
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    runner.start()
    assert wait_until(lambda: len(sent(tmp_path)) == 25)
    assert sorted(map(int, sent(tmp_path))) == [*range(25)]
    assert runner.drain(TIMEOUT) == []


def test_messages_that_are_not_read_yet_as_the_drain_begins_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, goes_on = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        reads.set()
        assert goes_on.wait(TIMEOUT)

    monkeypatch.setattr(reading, "time", SimpleNamespace(time=time.time, sleep=sleep))
    rows = [Row("post.send", f"[{number}]") for number in range(3)]
    left_by_a_dead_process(tmp_path / "tasks" / "outbox", *rows)
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    runner.start()
    assert reads.wait(TIMEOUT)
    runner.prepare_drain()
    goes_on.set()
    assert wait_until(lambda: sent(tmp_path) == ["0"])
    assert runner.drain(TIMEOUT) == []
    assert sent(tmp_path) == ["0"]
    assert [state for state, _ in stored(tmp_path)] == ["waiting"] * 2


def test_files_of_dead_processes_in_which_no_message_is_due_are_not_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    path = tmp_path / "tasks" / "outbox"
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    for name in ("a", "b"):
        left_by_a_dead_process(path, Row("post.send", f'["{name}"]', due=now() + 3600))
    runner.start()
    assert wait_until(lambda: runner.statistics().waiting == 2)
    assert wait_until(
        lambda: {name[:8] for name in open_files(path)} == {"owners.l", "00000003"}
    )
    (first, second) = list_tasks(check_folder(path))
    assert first.is_owned
    assert second.is_owned
    order(check_folder(path), first, "discard")
    assert wait_until(lambda: runner.statistics().waiting == 1)
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    assert wait_until(lambda: sent(tmp_path) == ["b"])
    assert wait_until(lambda: check_folder(path).numbers() == [3])


def test_a_message_that_a_delayed_task_adds_is_stored_and_sent(tmp_path: Path) -> None:
    runner = FilePost(tmp_path, local="inline")
    request(runner, lambda: background_tasks.using(delay=0.001).add_task(add(send, 1)))
    assert wait_until(lambda: len(stored(tmp_path)) == 1)
    (tmp_path / "is_up").touch()
    assert wait_until(lambda: sent(tmp_path) == ["1"])


def test_a_message_that_was_sent_is_not_sent_again(tmp_path: Path) -> None:
    (tmp_path / "is_up").touch()
    with process(tmp_path, "a"):
        assert wait_until(lambda: sent(tmp_path) == ["a"])
        assert wait_until(lambda: stored(tmp_path) == [])  # the process has noted it
    with process(tmp_path, "b"):
        assert wait_until(lambda: "b" in sent(tmp_path))
    assert sent(tmp_path) == ["a", "b"]


def stored(folder: Path) -> list[tuple[str, str]]:
    """State and id of the tasks in the folder, but for those that were sent."""
    found = list_tasks(check_folder(folder / "tasks" / "outbox"))
    return [
        (each.outcome.state, each.outcome.row.id)
        for each in found
        if each.outcome.state not in ("done", "gone")
    ]


def test_messages_are_stored_before_the_answer(tmp_path: Path) -> None:
    runner = FilePost(tmp_path)
    seen: list[Any] = []
    added: list[Any] = []

    class Looks(Server):
        def start_response(self, *given: Any) -> Any:
            return super().start_response(*given)

    app = BackgroundTasksMiddleware(
        app_that(lambda environ: added.append(background_tasks.add_task(send, 1))),
        runner=runner,
    )
    body: Any = app(make_server_environ(), Looks().start_response)
    seen.append(stored(tmp_path))
    list(body)
    body.close()
    assert seen == [[("waiting", added[0].id)]]
    assert runner.drain(TIMEOUT) == []  # leaves the message in the file


def test_a_request_whose_messages_cannot_be_stored_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)

    def fail(*args: Any) -> None:
        raise StoreError("tasks", "the disk is full")

    def view(environ: Any) -> None:
        background_tasks.add_task(send, "success")
        background_tasks.using(run_on="error").add_task(send, "error")

    app = BackgroundTasksMiddleware(app_that(view), runner=runner)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", fail)
        patch.setattr(sending.Outbox, "room", 0)
        with pytest.raises(StoreError):
            app(make_server_environ(), Server().start_response)
        assert wait_until(lambda: sent(tmp_path) == ["error"])  # from memory
    request(runner, add(send, 2))
    assert wait_until(lambda: sent(tmp_path) == ["error", "2"])


def test_a_view_that_fails_takes_its_messages_back(tmp_path: Path, log: Log) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)

    def view(environ: Any) -> None:
        background_tasks.add_task(send, "success")
        background_tasks.using(run_on="error").add_task(send, "error")

    def body() -> Iterator[bytes]:
        yield b"a"
        raise ValueError("the view's own")

    app = BackgroundTasksMiddleware(app_that(view, headers=[], body=body), runner=runner)
    with pytest.raises(ValueError, match="the view's own"):
        Server().run(app, make_server_environ())
    assert wait_until(lambda: sent(tmp_path) == ["error"])
    assert wait_until(lambda: stored(tmp_path) == [])


def test_messages_beyond_max_unsent_wait_in_the_file(tmp_path: Path) -> None:
    runner = FilePost(tmp_path, max_unsent=2)
    request(runner, add(send, *range(7)))
    assert runner.statistics().waiting == 2
    (tmp_path / "is_up").touch()
    assert wait_until(lambda: len(sent(tmp_path)) == 7)
    assert sorted(sent(tmp_path)) == [*"0123456"]


def test_late_tasks_are_stored_by_add_task(tmp_path: Path) -> None:
    runner = FilePost(tmp_path, local="inline")
    seen: list[int] = []

    def adds() -> None:
        background_tasks.add_task(send, 1)
        seen.append(len(stored(tmp_path)))

    request(runner, lambda: background_tasks.add_task(adds))
    assert seen == [1]
    (tmp_path / "is_up").touch()
    assert wait_until(lambda: sent(tmp_path) == ["1"])


@pytest.mark.usefixtures("quick")
def test_after_hold_for_a_message_is_put_aside(tmp_path: Path, log: Log) -> None:
    runner = FilePost(tmp_path, hold_for=0.05, publish_timeout=0.02)
    added: list[Any] = []
    request(runner, lambda: added.append(background_tasks.add_task(send, 1)))
    assert wait_until(lambda: stored(tmp_path) == [("aside", added[0].id)])


@pytest.mark.usefixtures("quick")
def test_no_message_is_dropped_since_many_are_put_aside(tmp_path: Path, log: Log) -> None:
    runner = FilePost(tmp_path, hold_for=0.05, publish_timeout=0.02)
    for start in range(0, 1100, 100):
        request(runner, add(send, *range(start, start + 100)))
    assert wait_until(lambda: [each for each, _ in stored(tmp_path)] == ["aside"] * 1100)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("func", [send_or_run, "fails"])
def test_a_stored_message_goes_when_its_task_has_run_here(
    tmp_path: Path, log: Log, func: Any
) -> None:
    runner = FilePost(tmp_path, publish_timeout=0.05, when_unsent="local", local="inline")
    request(runner, add(fails if func == "fails" else func, 1))
    state = "failed" if func == "fails" else None
    assert wait_until(lambda: bool(post.here))
    assert wait_until(lambda: [each for each, _ in stored(tmp_path)] == [state] * bool(state))


@wsgi_bg.registered_task(name="post.fails")
def fails(value: Any) -> None:
    post.here.append(value)
    raise ValueError


def test_rows_of_unknown_tasks_wait_and_forged_rows_are_put_aside(
    tmp_path: Path, log: Log
) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    store = Store.own(check_folder(tmp_path / "tasks" / "outbox"), Settings())
    rows = [
        Row("os.system", '["echo"]'),
        Row("post.send", "no JSON"),
        Row("post.send", "[" * 100_000),
        Row("post.late", '["late"]'),
        Row("post.send", '["good"]'),
    ]
    store.leave(store.add(rows))
    runner._states.get().files._has_left_some = True  # type: ignore[union-attr]
    runner.start()
    assert wait_until(lambda: sent(tmp_path) == ["good"])
    assert wait_until(lambda: len(log.errors) == 4)
    assert "a message for post.send was put aside" in " ".join(log.errors)
    assert runner.statistics().aside == 2
    wsgi_bg.registered_task(name="post.late")(late)
    assert wait_until(lambda: sent(tmp_path) == ["good", "late"])
    states = ["aside", "aside", "waiting"]
    assert wait_until(lambda: sorted(each for each, _ in stored(tmp_path)) == states)


def test_messages_of_unknown_tasks_take_no_memory(tmp_path: Path, log: Log) -> None:
    def of_unknown(each: Any) -> bool:
        return type(each) is Row and each.name == "post.never"

    (tmp_path / "is_up").touch()
    rows = [Row("post.never", f'["lost {number}"]') for number in range(2)]
    left_by_a_dead_process(tmp_path / "tasks" / "outbox", *rows)
    del rows
    runner = FilePost(tmp_path)
    runner.start()
    assert wait_until(lambda: bool(log.errors))
    assert "post.never" in log.errors[0]
    assert wait_until(lambda: not any(map(of_unknown, gc.get_objects())))
    assert [state for state, _ in stored(tmp_path)] == ["waiting"] * 2
    assert len(log.errors) == 1


def test_rows_of_a_file_that_cannot_be_read_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def fail_once(store: Store, now: float, limit: int) -> list[Row]:
        monkeypatch.setattr(Store, "read", read)
        raise StoreError("outbox", "the file cannot be read")

    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    store = Store.own(check_folder(tmp_path / "tasks" / "outbox"), Settings())
    store.leave(store.add([Row("post.send", '["good"]')]))
    runner._states.get().files._has_left_some = True  # type: ignore[union-attr]
    read = Store.read
    monkeypatch.setattr(Store, "read", fail_once)
    runner.start()
    assert wait_until(lambda: sent(tmp_path) == ["good"])
    assert any("could not be looked at" in message for message in log.errors)


def late(value: Any) -> None:
    """Registered after its message was read."""


def test_a_message_with_a_long_delay_waits_in_the_file_until_it_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_bg._outbox.runner._LONG", 0.5)

    class Delayed(FilePost):
        def message(self, task: Any) -> Any:
            made = super().message(task)
            assert made is not None
            return made._replace(due=due)

    due = time.time() + 1.0
    (tmp_path / "is_up").touch()
    runner = Delayed(tmp_path)
    request(runner, add(send, "later"))
    assert runner.statistics().waiting == 1
    assert wait_until(lambda: sent(tmp_path) == ["later"])
    assert time.time() >= due
    assert wait_until(lambda: runner.statistics().waiting == 0)


def test_without_a_folder_a_long_delay_is_a_warning(log: Log) -> None:
    class Delayed(Post):
        def message(self, task: Any) -> Any:
            made = super().message(task)
            return made and made._replace(due=time.time() + 3600)

    runner = Delayed()
    request(runner, add(send, 1, 2))
    assert settled(runner)
    assert sorted(runner.got) == [1, 2]
    (warning,) = log.warnings
    assert warning.startswith("1 tasks are sent with a delay of more than 15 minutes")


def test_at_exit_stored_messages_stay_in_the_file(tmp_path: Path, log: Log) -> None:
    runner = FilePost(tmp_path)
    request(runner, add(send, 1, 2))
    assert runner.drain(TIMEOUT) == []
    assert log.warnings == [] or "could not be reached" in log.warnings[0]
    assert len(stored(tmp_path)) == 2


def test_a_message_that_was_discarded_by_hand_is_not_sent(tmp_path: Path) -> None:
    runner = FilePost(tmp_path)
    ended: list[str] = []

    class Told(Hooks):
        def task_discarded(self, record: TaskRecord) -> None:
            ended.append(record.reason or "")

    request(runner, add(send, 1), hooks=Told())
    ((_, task_id),) = stored(tmp_path)
    command = [sys.executable, "-m", "wsgi_bg", "tasks", str(tmp_path / "tasks" / "outbox")]
    subprocess.run([*command, "discard", task_id], check=True, cwd=ROOT, timeout=TIMEOUT)
    assert wait_until(lambda: stored(tmp_path) == [])
    (tmp_path / "is_up").touch()
    request(runner, add(send, 2))
    assert wait_until(lambda: sent(tmp_path) == ["2"])
    assert settled(runner)
    assert ended == ["it was discarded by hand"]


def test_a_durable_runner_may_have_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    durable = wsgi_bg.DurableRunner(tmp_path / "tasks")
    request(durable, add(send, "durable"))
    request(runner, add(send, "sent"))
    assert wait_until(lambda: post.here == ["durable"])
    assert wait_until(lambda: sent(tmp_path) == ["sent"])


def test_the_threads_of_an_outbox_are_few() -> None:
    runner = Post()
    for _ in range(20):
        request(runner, add(send, 1))
    assert settled(runner)
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("wsgi_bg-send-") for name in names) >= 1


# In tests


@pytest.mark.parametrize("mode", ["record", "run"])
def test_in_a_test_with_the_pytest_plugin_no_engine_is_asked(mode: str) -> None:
    runner = Post()
    runner.is_up = False
    with recording(mode) as recorder:
        request(runner, add(send, 1))
        recorder.run()
        assert runner.statistics().waiting == 0
    assert post.here == [1]
    assert runner.connections == []


def fail_once() -> None:
    post.here.append("called")
    if len(post.here) == 1:
        raise ValueError


def fail_here_and_send() -> None:
    background_tasks.using(retry=Retry(2, first=0)).add_task(fail_once)
    background_tasks.add_task(send, 1)


def test_in_a_test_with_real_tasks_the_offer_to_the_engine_is_no_attempt() -> None:
    runner = Post(local="inline")
    with recording("real") as recorder:
        request(runner, fail_here_and_send)
        recorder.join(TIMEOUT)
        assert recorder.tasks[0].attempts == 2


def test_in_a_test_with_real_tasks_join_waits_for_the_engine(gate: Gate) -> None:
    runner = Post()
    runner.before = lambda value: gate.task()
    with recording("real") as recorder:
        request(runner, add(send, 1))
        with pytest.raises(TimeoutError, match=r"not finished after 0\.05 s: .*\.post\.send"):
            recorder.join(0.05)
        gate.open()
        recorder.join(TIMEOUT)
        assert runner.got == [1]


def test_in_a_test_with_real_tasks_join_raises_that_a_task_was_not_sent() -> None:
    runner = Post()
    with recording("real") as recorder:
        request(runner, add(send, "refused"))
        with pytest.raises(PublishError, match="does not like it"):
            recorder.join(TIMEOUT)
        assert [type(error) for error in recorder.errors] == [PublishError]


@registered_task(name="outbox.wait_and_fail")
def wait_and_fail() -> None:
    gates.pop().task()
    raise ValueError("failed here")


@pytest.mark.usefixtures("quick")
def test_in_a_test_with_real_tasks_join_waits_for_what_runs_here_and_raises_its_error(
    gate: Gate,
) -> None:
    runner = Post(when_unsent="local", publish_timeout=0.05)
    runner.is_up = False
    gates.append(gate)
    with recording("real") as recorder:
        request(runner, lambda: background_tasks.add_task(wait_and_fail))
        assert gate.begun.wait(TIMEOUT)
        with pytest.raises(TimeoutError, match="wait_and_fail"):
            recorder.join(0.0)
        gate.open()
        with pytest.raises(ValueError, match="failed here"):
            recorder.join(TIMEOUT)


def test_the_end_of_a_test_with_real_tasks_gives_up_what_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Post()
    runner.is_up = False
    monkeypatch.setattr(_testing, "TEARDOWN_TIMEOUT", 0.01)
    with (
        pytest.raises(TimeoutError, match=r"finished after 0\.01 s: .*\.post\.send"),
        recording("real"),
    ):
        request(runner, add(send, 1))
    assert runner.statistics().waiting == 0


def test_a_message_waits_for_a_moment_since_the_server_may_still_write() -> None:
    runner = Post()
    sent_at: list[float] = []
    runner.before = lambda value: sent_at.append(time.monotonic())
    asked = time.monotonic()
    request(runner, add(send, 1))
    assert settled(runner)
    assert sent_at[0] >= asked + START_DELAY - sending._SLACK


# Rare places


def test_a_drain_sends_here_if_no_thread_can_start() -> None:
    """Since Python 3.12 no thread can be started when the interpreter exits."""
    runner = Post()
    with no_threads():
        request(runner, add(send, 1, 2))
        assert runner.drain(TIMEOUT) == []
    assert sorted(runner.got) == [1, 2]


def test_a_task_runs_here_if_no_thread_can_submit_it(gate: Gate) -> None:
    runner = Post(when_unsent="local", publish_timeout=0.05, local="inline")
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1))
    assert gate.begun.wait(TIMEOUT)
    with no_threads():
        assert wait_until(lambda: post.here == [1])


class Own:
    """A runner with the methods of the protocol only, which runs a batch at once."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def submit(self, batch: Any) -> None:
        batch.run()
        if self._error is not None:
            raise self._error

    def drain(self, timeout: float) -> list[Any]:
        return []

    def statistics(self) -> Statistics:
        return Statistics(0, 0, 0, 0, 0)


@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
def test_a_local_runner_of_the_user_runs_a_task_once(log: Log, error: Exception | None) -> None:
    runner = Post(when_unsent="local", publish_timeout=0.05, local=Own(error))
    runner.is_up = False
    request(runner, add(send, 1))
    assert wait_until(lambda: post.here == [1])
    assert wait_until(lambda: len(log.errors) == (error is not None))


def test_the_outbox_goes_on_after_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(sending, "_AFTER_ERROR", 0.01)
    failing = [ZeroDivisionError()]
    runner = Post()
    outbox = runner._states.get().outbox

    def expire(self: Any, now: float) -> None:
        if failing and self is outbox:  # and not the outbox of an earlier test
            raise failing.pop()

    monkeypatch.setattr(sending.Outbox, "_expire", expire)
    request(runner, add(send, 1))
    assert settled(runner)
    assert "the outbox of <" in log.errors[0]


def test_a_task_that_comes_as_the_thread_begins_to_sleep_is_seen() -> None:
    outbox: Any = Post()._states.get().outbox
    outbox._queue.append("new")
    outbox._sleep(10 * TIMEOUT, None)  # and the test would fail by its timeout


def test_a_task_that_is_being_put_as_the_thread_begins_to_sleep_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outbox: Any = Post()._states.get().outbox

    def look(self: Any) -> None:  # in this moment a thread is within put()
        outbox._last_put = time.monotonic()

    monkeypatch.setattr(sending.Outbox, "_last", look)
    outbox._sleep(10 * TIMEOUT, None)  # and the test would fail by its timeout


def test_a_task_wakes_the_thread_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_BUSY", 0.0)
    monkeypatch.setattr(sending, "IDLE", 10 * TIMEOUT)
    runner = Post()
    outbox: Any = runner._states.get().outbox
    request(runner, add(send, 1))
    assert settled(runner)
    assert wait_until(lambda: outbox._is_asleep)
    monkeypatch.setattr(sending, "_BUSY", 10 * TIMEOUT)
    request(runner, add(send, 2))
    assert settled(runner)


def test_a_thread_that_is_about_to_end_sends_what_was_put_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [False, True]
    monkeypatch.setattr(
        sending.Outbox, "_is_used", lambda self: answers.pop(0) if answers else True
    )
    runner = Post()
    request(runner, add(send, 1))
    assert settled(runner)
    assert answers == []


def test_a_stored_message_that_is_being_sent_at_exit_is_left_in_the_file(
    tmp_path: Path, gate: Gate
) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    runner.before = lambda value: gate.task()
    request(runner, add(send, 1))
    assert gate.begun.wait(TIMEOUT)
    assert runner.drain(0.01) != []
    assert runner.ledger.abandon_unsent() == []
    assert len(stored(tmp_path)) == 1
    gate.open()


def test_without_room_for_a_note_a_message_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "is_up").touch()

    def fail(self: Any, row: Any) -> bool:
        raise StoreError("tasks", "no room")

    monkeypatch.setattr(Store, "begin", fail)
    request(FilePost(tmp_path), add(send, 1))
    assert wait_until(lambda: sent(tmp_path) == ["1"])


def test_a_folder_that_cannot_be_used_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)

    def fail(*args: Any) -> Any:
        raise StoreError("tasks", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "own", fail)
        with pytest.raises(StoreError):
            runner.start()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "next_due", fail)
        runner.start()
        path = str(tmp_path / "tasks" / "outbox")
        assert wait_until(lambda: f"{path} could not be looked at" in log.errors)
    request(runner, add(send, 1))
    assert wait_until(lambda: sent(tmp_path) == ["1"])


def test_a_stored_task_with_a_delay_is_sent_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    request(runner, lambda: background_tasks.using(delay=60).add_task(send, 1))
    assert wait_until(lambda: sent(tmp_path) == ["1"])


def test_a_single_thread_ends_a_task(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    runner = Post()
    runner.is_up = False
    runner.start()  # nothing to take over without a folder
    request(runner, add(send, 1))
    (unsent,) = runner.ledger.unsent
    assert isinstance(unsent, sending.Unsent)
    outbox = runner._states.get().outbox
    assert unsent.claim()
    unsent.deadline = outbox._next_deadline = 0.0
    outbox._expire(1.0)
    outbox._refuse(unsent, ValueError())
    monkeypatch.setattr(Stored, "begin", lambda self: False)
    assert not outbox._begins(unsent)
    assert unsent.give_up() == []
    runner.ledger.end_unsent(unsent)
    assert log.errors == []
    assert runner.statistics() == Statistics(0, 0, 0, 0, 0)


def test_a_connection_that_was_left_for_too_long_is_closed() -> None:
    runner = Post()
    outbox = runner._states.get().outbox
    old = runner.connect()
    outbox._idle.append((old, 0.0))
    assert outbox._take_idle() is None
    assert old.is_closed.wait(TIMEOUT)


@pytest.mark.parametrize("mode", ["record", "run"])
def test_with_the_fixture_no_message_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Not one that a stream adds, or a task that runs: the next process would send it."""
    (tmp_path / "is_up").touch()
    runner = FilePost(tmp_path)
    monkeypatch.setattr(Store, "add", no_row)
    with recording(mode) as recorder:
        Client(late_stream((post.send, "late"), add_more, runner=runner)).get("/").get_data()
        recorder.run()
        assert [task.func for task in recorder.tasks] == [post.send, add_more, post.send]
    assert post.here == ["late", "more"]
    assert os.listdir(tmp_path / "tasks" / "outbox") == []


def add_more() -> None:
    background_tasks.add_task(send, "more")


def no_row(self: Store, rows: list[Row], *_: Any) -> None:
    raise AssertionError(rows)


def test_a_message_that_is_left_for_the_next_process_is_not_sent_by_this_one(
    tmp_path: Path, gate: Gate
) -> None:
    """A thread had the message in hand, and went on to send it."""
    (tmp_path / "is_up").touch()

    class Slow(FilePost):
        def connect(self) -> Any:
            gate.task()
            return super().connect()

    runner = Slow(tmp_path)
    request(runner, add(send, "once"))
    assert gate.begun.wait(TIMEOUT)
    runner.prepare_drain()
    gate.open()
    outbox = runner._states.get().outbox
    assert wait_until(lambda: not outbox._busy)
    assert sent(tmp_path) == []
    assert [state for state, _ in stored(tmp_path)] == ["waiting"]


@pytest.mark.parametrize("is_up", [True, False])
def test_a_message_that_is_given_up_while_a_thread_connects_is_not_sent(
    gate: Gate, log: Log, is_up: bool
) -> None:
    class Slow(Post):
        def connect(self) -> Any:
            gate.task()
            return super().connect()

    runner = Slow(when_unsent="discard", publish_timeout=0.05)
    request(runner, add(send, "late"))
    assert gate.begun.wait(TIMEOUT)
    assert wait_until(lambda: runner.statistics().failed == 1)
    runner.is_up = is_up
    gate.open()
    outbox = runner._states.get().outbox
    assert wait_until(lambda: not outbox._busy)
    assert runner.got == []
    assert log.warnings == []
