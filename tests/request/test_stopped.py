"""Single places at which a signal handler stops the server's thread.

tests/request/test_interrupted.py has all places, under a tracer that hides them from coverage.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest

from tests.conftest import Log
from tests.support import (
    TIMEOUT,
    Gate,
    Server,
    app_that,
    make_server_environ,
    no_threads,
    nothing,
    respond,
    submit,
    wait_until,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    get_background_tasks,
    wait,
)
from wsgi_bg._loop import portal
from wsgi_bg._loop.coroutines import is_awaitable
from wsgi_bg._loop.portal import LoopJob, PortalThread
from wsgi_bg._process import exit as ending
from wsgi_bg._process import interrupts, log, repeated, workers
from wsgi_bg._request import servers, unclosed
from wsgi_bg._request.body import Body
from wsgi_bg._request.unclosed import Collector, collectors
from wsgi_bg._tasks import batch, task_log
from wsgi_bg.runners import pool

pytestmark = pytest.mark.usefixtures("no_request_left")


class TimeLimitError(Exception):
    """An error that a handler of SIGALRM may raise."""


@contextmanager
def handler(exc: type[BaseException]) -> Iterator[Callable[..., Any]]:
    """Yield a function that raises ``exc`` from a signal handler, at its first call only."""

    def raise_it(number: int, frame: object) -> None:
        raise exc

    def stop(*args: Any) -> Any:
        if not calls:
            calls.append(args)
            signal.raise_signal(signal.SIGUSR1)

    calls: list[Any] = []
    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)


def first_stopped(stop: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Wrap ``function``: ``stop()`` interrupts the first call before its begin."""

    def stopped(*args: Any, **kwargs: Any) -> Any:
        stop()
        return function(*args, **kwargs)

    return stopped


def test_after_a_time_limit_in_submit_the_tasks_still_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    with handler(TimeLimitError) as stop, monkeypatch.context() as patch:
        patch.setattr(workers.Workers, "submit", first_stopped(stop, workers.Workers.submit))
        with pytest.raises(TimeLimitError):
            submit(PoolRunner(), partial(seen.append, 1))
    assert wait(TIMEOUT) == []
    assert seen == [1]


def test_a_task_that_was_to_be_discarded_is_named_in_spite_of_a_time_limit(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def add(environ: object) -> None:
        background_tasks.using(run_on="error").add_task(int)

    app = BackgroundTasksMiddleware(app_that(add), runner=PoolRunner())
    with handler(TimeLimitError) as stop, monkeypatch.context() as patch:
        patch.setattr(task_log, "log_skipped", first_stopped(stop, task_log.log_skipped))
        with pytest.raises(TimeLimitError):
            Server().run(app, make_server_environ())
    assert wait(TIMEOUT) == []
    assert log.warnings == [
        "background task builtins.int was not run: the request succeeded with 200, and run_on "
        "is 'error'"
    ]


@pytest.mark.parametrize("ends", [True, False])
def test_a_time_limit_while_an_async_task_runs_is_that_tasks_error(
    ends: bool, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """A task that goes on after its cancellation stops the batch."""
    monkeypatch.setattr(batch, "_CANCEL_TIMEOUT", TIMEOUT if ends else 0.01)
    seen, gate = list[str](), Gate()

    async def slow() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(TIMEOUT)
        except asyncio.CancelledError:
            if ends:
                raise
            gate.task()  # blocks the loop

    def add(environ: object) -> None:
        background_tasks.add_task(slow)
        background_tasks.add_task(seen.append, "ran")

    app = BackgroundTasksMiddleware(app_that(add), runner=InlineRunner())
    with handler(TimeLimitError) as stop:
        signal.signal(signal.SIGUSR1, lambda *_: raises(stop))
        with suppress(TimeLimitError):
            respond(app)
            assert ends
    gate.open()
    named = [*log.warnings, *log.errors]
    if ends:
        assert seen == ["ran"]
        assert [message.rpartition(" ")[2] for message in named] == ["TimeLimitError"]
    else:
        assert seen == []
        assert len(named) == 2
        assert all("TimeLimitError stopped its worker" in message for message in named)


def test_a_time_limit_that_is_no_exception_is_the_async_tasks_error_too(log: Log) -> None:
    """``gevent.Timeout`` is such a limit, and comes from no signal handler."""
    seen: list[str] = []

    class Timeout(BaseException):
        pass

    async def slow() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(TIMEOUT)

    def add(environ: object) -> None:
        background_tasks.add_task(slow)
        background_tasks.add_task(seen.append, "ran")

    with handler(Timeout):
        respond(BackgroundTasksMiddleware(app_that(add), runner=InlineRunner()))
    assert seen == ["ran"]
    assert [message.rpartition(" ")[2] for message in log.errors] == ["Timeout"]
    assert log.warnings == []


def test_a_ctrl_c_while_an_async_task_runs_goes_through(log: Log) -> None:
    async def slow() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(TIMEOUT)

    def add(environ: object) -> None:
        background_tasks.add_task(slow)
        background_tasks.add_task(int)

    app = BackgroundTasksMiddleware(app_that(add), runner=InlineRunner())
    with handler(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        respond(app)
    named = [message.rpartition(": ")[2] for message in log.warnings]
    assert named == ["KeyboardInterrupt stopped its worker"] * 2


def test_after_a_time_limit_the_next_task_waits_for_the_clean_up(log: Log) -> None:
    seen: list[str] = []

    async def slow() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0.01)
            seen.append("cleaned up")

    def add(environ: object) -> None:
        background_tasks.add_task(slow)
        background_tasks.add_task(seen.append, "ran")

    with handler(TimeLimitError):
        respond(BackgroundTasksMiddleware(app_that(add), runner=InlineRunner()))
    assert seen == ["cleaned up", "ran"]
    assert len(log.errors) == 1


def raises(stop: object) -> None:
    raise TimeLimitError


def awaits() -> Any:
    return asyncio.sleep(0)


@pytest.mark.parametrize("function", [lambda: "result", awaits])
def test_a_stop_after_the_call_of_a_task_names_the_task_only_if_it_waits(
    function: Any, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def add(environ: object) -> None:
        background_tasks.add_task(function)
        background_tasks.add_task(int)

    app = BackgroundTasksMiddleware(app_that(add), runner=InlineRunner())
    with handler(KeyboardInterrupt) as stop, monkeypatch.context() as patch:
        patch.setattr(batch, "is_awaitable", first_stopped(stop, is_awaitable))
        with pytest.raises(KeyboardInterrupt):
            respond(app)
    assert len(log.warnings) == (2 if function is awaits else 1)
    assert "builtins.int" in log.warnings[-1]


def test_a_stop_after_the_record_of_a_failed_task_does_not_name_the_task_again(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def add(environ: object) -> None:
        background_tasks.add_task(int, "one")
        background_tasks.add_task(int)

    app = BackgroundTasksMiddleware(app_that(add), runner=InlineRunner())
    with handler(KeyboardInterrupt) as stop, monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "_settle", first_stopped(stop, batch.Batch._settle))
        with pytest.raises(KeyboardInterrupt):
            respond(app)
    assert log.errors == ["background task builtins.int raised ValueError"]
    assert log.warnings == [
        "background task builtins.int was not run: KeyboardInterrupt stopped its worker"
    ]


def test_a_call_in_a_context_in_use_runs_outside_of_that_context() -> None:
    context, seen = copy_context(), list[int]()
    context.run(batch._run_in, context, seen.append, 1)
    assert seen == [1]


def test_a_response_whose_making_was_stopped_is_freed_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", raised.append)
    Body.__new__(Body)  # __init__ was interrupted
    gc.collect()
    assert raised == []


def test_a_name_that_a_signal_handler_stops_is_not_replaced() -> None:
    class Stopping:
        def __getattr__(self, name: str) -> str:
            for stop in stops:
                stop()
            raise AttributeError(name)

        def __call__(self) -> None: ...

    stops: list[Callable[..., Any]] = []
    task = BackgroundTask(Stopping())
    with handler(TimeLimitError) as stop:
        stops.append(stop)
        with pytest.raises(TimeLimitError):
            task.name  # noqa: B018


def test_without_a_loops_thread_a_leftover_does_not_hit_the_next_task(no_loop: None) -> None:
    seen: list[str] = []
    kept: list[Any] = []

    async def keep() -> None:
        kept.append(asyncio.current_task())

    async def then() -> None:
        kept[0].cancel()
        await asyncio.sleep(0)
        seen.append("ran")

    def add(environ: object) -> None:
        background_tasks.add_task(keep)
        background_tasks.add_task(then)

    with no_threads():
        respond(BackgroundTasksMiddleware(app_that(add)))
    assert seen == ["ran"]


def test_a_runner_that_raises_after_the_batch_is_logged(log: Log) -> None:
    class Odd(InlineRunner):
        def submit(self, batch: Any) -> None:
            super().submit(batch)
            raise ValueError

    seen: list[int] = []
    submit(Odd(), partial(seen.append, 1))
    assert seen == [1]
    assert log.errors == ["Odd() raised in submit()"]


def test_two_threads_do_not_log_the_same_warning_at_a_time(log: Log) -> None:
    warning = repeated.RepeatedWarning("%d")
    warning._turn.pop()  # by another thread, which logs
    warning.count()
    assert log.warnings == []
    warning._turn.append(None)
    warning.count()
    assert log.warnings == ["2"]


def test_the_thread_for_unclosed_responses_survives_an_unexpected_error(
    log: Log, own_collector: Collector
) -> None:
    collector = own_collector
    collector.start()
    unexpected: Any = object()
    collector.queue.put(unexpected)
    collector.flush()
    assert log.errors == ["the thread for unclosed responses raised"]


def test_a_thread_for_unclosed_responses_that_is_killed_is_replaced(
    monkeypatch: pytest.MonkeyPatch, own_collector: Collector
) -> None:
    class KillError(BaseException):
        """As gevent's GreenletExit, if the thread were a greenlet."""

    monkeypatch.setattr(unclosed, "stops_worker", lambda exc: isinstance(exc, KillError))
    collector, ended = own_collector, threading.Event()

    def kill(item: object) -> None:
        raise KillError

    work = collector._work

    def work_to_the_end() -> None:
        with suppress(KillError):
            work()
        ended.set()

    monkeypatch.setattr(collector, "_take", kill)
    monkeypatch.setattr(collector, "_work", work_to_the_end)
    collector.start()
    collector.queue.put(threading.Event())
    assert ended.wait(TIMEOUT)
    assert not collector._has_thread


class Said(defaultdict[Any, Any]):
    """Raises after the record has been made."""

    def __getitem__(self, key: Any) -> Any:
        super().__getitem__(key)
        raise ValueError


def test_a_record_that_was_made_is_not_made_again(
    log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsgi_bg._process import log as logs

    logs.warning("said", said=Said())
    assert log.warnings == ["said"]
    assert capsys.readouterr().err == ""


class Silent(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise ValueError


def test_an_error_whose_str_raises_is_logged_by_its_type(log: Log) -> None:
    from wsgi_bg._process import log as logs

    logs.error("%s", Silent())
    assert log.errors == ["Silent"]


class Raising(logging.Filter):
    def __init__(self, exc: BaseException) -> None:
        super().__init__()
        self.exc = exc

    def filter(self, record: logging.LogRecord) -> bool:
        raise self.exc


@contextmanager
def filtered(exc: BaseException) -> Iterator[None]:
    raising = Raising(exc)
    log.logger.addFilter(raising)
    try:
        yield
    finally:
        log.logger.removeFilter(raising)


def test_a_record_that_cannot_be_logged_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with filtered(ValueError("no id")):
        log.error("said %s", "so", exc_info=KeyError("key"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ERROR wsgi_bg: said so"
    assert "KeyError: 'key'" in lines
    assert lines[-1] == "ValueError: no id"


def test_a_record_that_can_be_neither_logged_nor_printed_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with filtered(ValueError()):
        log.error("said")


class Closing:
    def write(self, text: str) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["filter", "printing", "text", "repr"])
def test_a_ctrl_c_during_a_log_call_goes_through(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise KeyboardInterrupt

        __repr__ = __str__

    if place == "printing":
        monkeypatch.setattr("sys.stderr", Closing())
    exc = KeyboardInterrupt() if place == "filter" else ValueError()
    given: Any = "so"
    if place == "text":
        given = Interrupted()
    elif place == "repr":
        given = [Interrupted()]
    with filtered(exc), pytest.raises(KeyboardInterrupt):
        log.error("said %s", given)


def test_a_ctrl_c_as_the_level_is_asked_for_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(level: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(log.logger, "isEnabledFor", stop)
    with pytest.raises(KeyboardInterrupt):
        log.is_debug()


class StoppingList(list[Any]):
    """A list whose ``pop`` is stopped before its begin."""

    stop: Callable[..., Any]

    def pop(self, *args: Any) -> Any:
        self.stop()
        return super().pop(*args)


def stopping(stop: Callable[..., Any], *items: Any) -> Any:
    made = StoppingList(items)
    made.stop = stop
    return made


def test_an_index_error_of_a_signal_handler_is_not_taken_for_a_claim_that_failed() -> None:
    task = BackgroundTask(int)
    with handler(IndexError) as stop:
        task.unclaimed = stopping(stop, None)
        with pytest.raises(IndexError):
            task.claim()
    assert task.claim()


def test_an_index_error_of_a_signal_handler_in_a_batch_stops_it(log: Log) -> None:
    def add(environ: object) -> None:
        background_tasks.add_task(int)
        background_tasks.tasks[0].unclaimed = stopping(stop, None)

    with handler(IndexError) as stop, pytest.raises(IndexError):
        respond(BackgroundTasksMiddleware(app_that(add), runner=InlineRunner()))
    assert log.warnings == [
        "background task builtins.int was not run: IndexError stopped its worker"
    ]


def test_an_index_error_of_a_signal_handler_is_not_taken_for_a_second_close() -> None:
    seen: list[int] = []
    app = BackgroundTasksMiddleware(
        app_that(lambda environ: background_tasks.add_task(seen.append, 1))
    )
    body: Any = app(make_server_environ(), Server().start_response)
    with handler(IndexError) as stop:
        body._open = stopping(stop, None)
        with pytest.raises(IndexError):
            body.close()
    del body
    assert wait(TIMEOUT) == []
    assert seen == [1]


def test_an_index_error_of_a_signal_handler_wakes_no_worker_and_is_raised() -> None:
    some: workers.Workers[int] = workers.Workers(int, 1, "some")
    with handler(IndexError) as stop:
        some._idle = stopping(stop, int)
        with pytest.raises(IndexError):
            some.submit(1)


def test_a_runtime_error_of_a_signal_handler_is_not_taken_for_a_closed_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Loop:
        def call_soon_threadsafe(self, *args: object, **options: object) -> None:
            stop()

    thread, loop = PortalThread(), Loop()
    with handler(RuntimeError) as stop, monkeypatch.context() as patch:
        patch.setattr(thread, "_loop", loop)
        with pytest.raises(RuntimeError):
            thread._wake()
    thread.stop(TIMEOUT)


def test_a_runtime_error_of_a_signal_handler_is_not_taken_for_a_missing_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with handler(RuntimeError) as stop, monkeypatch.context() as patch:
        patch.setattr(portal, "_thread", first_stopped(stop, portal._thread))
        with pytest.raises(RuntimeError):
            portal.wait_for(copy_context(), nothing())


def test_a_time_limit_after_the_call_of_a_task_is_not_the_tasks_error(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def add(environ: object) -> None:
        background_tasks.add_task(lambda: "result")

    app = BackgroundTasksMiddleware(app_that(add), runner=InlineRunner())
    with handler(TimeLimitError) as stop, monkeypatch.context() as patch:
        patch.setattr(batch, "is_awaitable", first_stopped(stop, is_awaitable))
        with pytest.raises(TimeLimitError):
            respond(app)
    assert log.warnings == log.errors == []


@pytest.mark.parametrize("exc", [KeyboardInterrupt, TimeLimitError])
def test_after_a_stop_before_the_batch_exists_the_tasks_still_run(
    exc: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    with handler(exc) as stop, monkeypatch.context() as patch:
        patch.setattr(servers, "is_written", first_stopped(stop, servers.is_written))
        with pytest.raises(exc):
            submit(PoolRunner(), partial(seen.append, 1))
    assert wait(TIMEOUT) == []
    assert seen == [1]


def test_the_exit_of_another_process_drains_nothing_here() -> None:
    drained: list[bool] = []
    ending._drain(os.getpid() + 1, drained.append, is_last=True)
    assert drained == []


def test_a_generator_may_be_iterated_twice() -> None:
    app = BackgroundTasksMiddleware(app_that(bool, body=lambda: (c for c in (b"o", b"k"))))
    body: Any = app(make_server_environ(), Server().start_response)
    assert next(iter(body)) == b"o"
    assert [*body] == [b"k"]
    body.close()


def test_under_gevent_the_loop_has_an_executor_for_code_that_is_thread_sensitive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from asgiref.sync import sync_to_async

    names: list[str] = []

    async def task() -> None:
        names.append(await sync_to_async(lambda: threading.current_thread().name)())

    monkeypatch.setattr(portal, "are_threads", lambda: True)
    thread = PortalThread()
    done = threading.Event()
    thread.start(None, LoopJob(lambda _: task(), bool, lambda _: done.set()))
    assert done.wait(TIMEOUT)
    thread.stop(TIMEOUT)
    assert names[0].startswith("wsgi_bg-loop")


def test_a_stop_in_a_repr_is_no_error_of_the_repr() -> None:

    class Slow:
        def __repr__(self) -> str:
            stop()
            return "slow"

    with handler(TimeLimitError) as stop, pytest.raises(TimeLimitError):
        interrupts.safe_repr(Slow())


def test_an_error_in_a_repr_is_shown_instead_of_the_repr() -> None:

    class Broken:
        def __repr__(self) -> str:
            raise ValueError

    assert "Broken object, whose repr() raises" in interrupts.safe_repr(Broken())


def test_a_handler_that_restores_the_default_before_it_raises_stops_the_worker(
    log: Log,
) -> None:
    """The usual way to let a second signal end the process at once."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGUSR1, before)
        raise SystemExit

    before = signal.signal(signal.SIGUSR1, leave)
    seen: list[str] = []

    def add(environ: object) -> None:
        background_tasks.add_task(signal.raise_signal, signal.SIGUSR1)
        background_tasks.add_task(seen.append, "no")

    with pytest.raises(SystemExit):
        respond(BackgroundTasksMiddleware(app_that(add)))
    assert seen == []
    assert len(log.warnings) == 2


def test_a_functions_own_frame_among_its_arguments_makes_no_handler() -> None:
    def fail(number: int, *frames: object) -> None:
        raise SystemExit

    def call() -> None:
        fail(1, None)

    with pytest.raises(SystemExit) as caught:
        call()
    assert not interrupts.stops_worker(caught.value)


def test_of_two_threads_that_start_the_thread_for_unclosed_responses_one_does(
    own_collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(work: object, name: str) -> None:
        own_collector.start()  # another thread, which comes too late
        started.append(name)

    monkeypatch.setattr(unclosed, "start_daemon", start)

    class Right(list[None]):
        def __bool__(self) -> bool:
            return True  # read before the other thread has popped

    own_collector._right_to_start = Right([None])
    own_collector.start()
    assert started == ["wsgi_bg-unclosed"]


def test_a_stop_as_the_thread_for_unclosed_responses_starts_lets_it_start_later(
    own_collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unclosed, "start_daemon", stop)
        with pytest.raises(KeyboardInterrupt):
            own_collector.start()
    assert not own_collector._has_thread
    own_collector.start()
    assert own_collector._has_thread


def test_a_stop_in_the_claim_of_the_thread_for_unclosed_responses_goes_through(
    own_collector: Collector,
) -> None:
    def fail() -> None:
        raise IndexError("of a signal handler")

    class Right(list[None]):
        def pop(self, *args: Any) -> None:
            fail()

    own_collector._right_to_start = Right([None])
    with pytest.raises(IndexError, match="of a signal handler"):
        own_collector.start()


def open_stream(collector: Collector, add_first: bool) -> Any:
    """A response in progress; its task was added before or after its body was made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collector, "start", bool)
        patch.setattr(collectors, "get", lambda: collector)
        environ = make_server_environ()

        def add(environ: Any) -> None:
            get_background_tasks(environ).add_task(int)

        do = add if add_first else bool
        body: Any = BackgroundTasksMiddleware(app_that(do, body=lambda: iter([b"ok"])))(
            environ, Server().start_response
        )
        if not add_first:
            add(environ)
        return body


@pytest.mark.parametrize("add_first", [True, False])
def test_a_freed_response_is_put_into_the_queue_once(
    own_collector: Collector, add_first: bool
) -> None:
    """Two threads could submit two outcomes of the request, and neither kind of task ran."""
    body = open_stream(own_collector, add_first)
    next(iter(body))
    del body
    gc.collect()
    assert own_collector.queue.qsize() == 1


def test_the_guard_of_a_response_stands_in_for_a_finalizer_that_was_interrupted(
    own_collector: Collector,
) -> None:
    body = open_stream(own_collector, add_first=True)
    del body._tasks  # its finalizer does nothing now
    del body
    gc.collect()
    assert own_collector.queue.qsize() == 1


def test_a_pools_thread_outlives_an_exception_that_stops_workers(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    class KillError(BaseException):
        """As gevent's GreenletExit, if the thread were a greenlet."""

    def kill() -> None:
        raise KillError

    monkeypatch.setattr(batch, "stops_worker", lambda exc: isinstance(exc, KillError))
    runner = PoolRunner(threads=1)
    submit(runner, kill, int)
    submit(runner, int)
    assert runner.drain(TIMEOUT) == []
    assert runner.statistics().succeeded == 1
    assert len(log.warnings) == 2
    assert "was stopped" in log.errors[0]


def test_a_batch_whose_tasks_another_batch_runs_sends_nothing() -> None:
    seen: list[str] = []

    class Runner(InlineRunner):
        def submit(self, batch: Any) -> None:
            batch.again().run()
            batch.send()

    request_tasks = app_that(lambda e: background_tasks.add_task(seen.append, "ran"))
    respond(BackgroundTasksMiddleware(request_tasks, runner=Runner()))
    assert seen == ["ran"]


def test_a_batch_whose_tasks_another_batch_runs_runs_no_async_task() -> None:
    seen: list[str] = []

    async def task() -> None:
        seen.append("ran")

    class Runner(InlineRunner):
        def submit(self, batch: Any) -> None:
            batch.again().run()
            portal.portal().call(batch.run_async)

    app = app_that(lambda e: background_tasks.add_task(task))
    respond(BackgroundTasksMiddleware(app, runner=Runner()))
    assert seen == ["ran"]


def test_a_record_is_made_outside_of_a_context_that_is_in_use() -> None:
    seen: list[str] = []
    context = copy_context()
    context.run(batch._run_in, context, seen.append, "logged")
    assert seen == ["logged"]

    def fail() -> None:
        seen.append("begun")
        raise RuntimeError("of the function")

    with pytest.raises(RuntimeError, match="of the function"):
        batch._run_in(context, fail)
    assert seen == ["logged", "begun"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_portal_that_cannot_start_fails_the_task_and_not_the_pool(
    stops: bool, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """A policy for event loops may raise whatever it likes."""

    def fail(*args: object) -> None:
        raise SystemExit

    monkeypatch.setattr(portal, "peek", lambda: None)
    monkeypatch.setattr(portal, "_thread", fail)
    monkeypatch.setattr(pool, "stops_worker", lambda exc: stops)

    async def task() -> None:
        pass

    runner = PoolRunner()
    submit(runner, task)
    outcome = "was stopped" if stops else "raised SystemExit"
    assert wait_until(lambda: any(outcome in each for each in log.errors))
    submit(runner, int)
    left = runner.drain(0.5 if stops else TIMEOUT)
    assert len(left) == int(stops)
    assert runner.statistics().succeeded == 1
    runner.abandon()
    for unfinished in runner.ledger.batches:  # else the exit of the tests waits for it
        runner.ledger.remove(unfinished)


def test_a_time_limit_of_a_task_called_by_hand_is_raised_unchanged(gate: Gate) -> None:
    """The loop is in the middle of a step, in the task's context."""

    class TimeLimitError(Exception):
        """The handler's exception."""

    def limit(number: int, frame: object) -> None:
        raise TimeLimitError

    async def blocks() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        gate.task()

    before = signal.signal(signal.SIGUSR1, limit)
    try:
        with pytest.raises(TimeLimitError):
            BackgroundTask(blocks)()
    finally:
        signal.signal(signal.SIGUSR1, before)
