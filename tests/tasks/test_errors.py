"""The effects of a task's error, and their limits (rules 4, 5 and 10)."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
from greenlet import GreenletExit, greenlet

from tests.conftest import Log
from tests.support import (
    Gate,
    Server,
    app_that,
    make_environ,
    make_server_environ,
    respond,
    run_python,
)
from wsgi_bg import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    InlineRunner,
    PoolRunner,
    background_tasks,
    get_background_tasks,
)
from wsgi_bg._loop import portal
from wsgi_bg.hooks import BatchRecord, Hooks, TaskRecord

correlation: contextvars.ContextVar[str] = contextvars.ContextVar("correlation")


def fail(error: BaseException, secret: str = "") -> None:
    raise error


async def fail_async(error: BaseException, secret: str = "") -> None:
    await asyncio.sleep(0)
    raise error


async def fail_at_once(error: BaseException) -> None:
    raise error


def run(*calls: Any, **options: Any) -> None:
    """Handle a request of a test client that adds ``calls`` as tasks."""

    def add(environ: object) -> None:
        for func, *args in calls:
            background_tasks.add_task(func, *args)

    respond(BackgroundTasksMiddleware(app_that(add), **options))


ERRORS = [
    ValueError("x"),
    SystemExit(1),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    GeneratorExit(),
    BaseException("odd"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "func", [fail, fail_async, fail_at_once, lambda error: fail_async(error)]
)
def test_a_tasks_error_is_logged_and_the_next_task_runs(
    log: Log, func: Any, error: BaseException
) -> None:
    if func is fail and isinstance(error, KeyboardInterrupt):
        pytest.skip("on the main thread that is a Ctrl-C, shown below")
    seen: list[object] = []
    told: list[tuple[BackgroundTask, BaseException]] = []

    async def then() -> None:
        await asyncio.sleep(0)
        seen.append("async")

    run(
        (func, error),
        (then,),
        (seen.append, "plain"),
        on_error=lambda t, e: told.append((t, e)),
    )
    assert seen == ["async", "plain"]
    assert [e for _, e in told] == log.tracebacks == [error]
    assert told[0][0].func is func
    assert log.errors == [f"background task {told[0][0].name} raised {type(error).__name__}"]


class UnformattableError(Exception):
    """Stands for any error on Python 3.15 while no file can be opened."""

    @property
    def __suppress_context__(self) -> bool:  # type: ignore[override]
        raise OSError


def test_an_error_without_a_formattable_traceback_is_logged_without_the_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run((fail, UnformattableError()))
    assert caplog.messages == [
        "background task tests.tasks.test_errors.fail raised UnformattableError "
        "(UnformattableError(), whose traceback cannot be formatted)"
    ]


def raise_in_attribute(error: BaseException, *given: object) -> Any:
    raise RuntimeError


@pytest.mark.parametrize("func", [fail, fail_async])
@pytest.mark.parametrize("kind", [Exception, BaseException])
@pytest.mark.parametrize("name", ["__traceback__", "__class__", "__getattribute__"])
def test_an_error_whose_attributes_raise_stops_no_task(
    name: str, kind: type[BaseException], func: Any, caplog: pytest.LogCaptureFixture
) -> None:
    is_method = name == "__getattribute__"
    attribute = raise_in_attribute if is_method else property(raise_in_attribute)
    error = type("WrongError", (kind,), {name: attribute})()
    seen: list[str] = []
    run((func, error), (seen.append, "next"), on_error=lambda *_: seen.append("on_error"))
    run((func, error), (seen.append, "next"), status=True)  # the recorder sees errors, too
    assert seen == ["on_error", "next", "next"]
    wanted = f"background task tests.tasks.test_errors.{func.__name__} raised WrongError"
    assert [message.partition(" (")[0] for message in caplog.messages] == [wanted] * 2


def test_a_record_whose_filter_raises_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise UnformattableError

    logger = logging.getLogger("wsgi_bg")
    logger.addFilter(refuse)
    try:
        run((fail, ValueError()))
    finally:
        logger.removeFilter(refuse)
    printed = capsys.readouterr().err
    assert "background task tests.tasks.test_errors.fail raised ValueError" in printed
    assert printed.endswith("raised for this record:\nUnformattableError()\n")


def test_messages_do_not_show_arguments(log: Log) -> None:
    run((fail, ValueError(), "password"), (fail_async, ValueError(), "password"))
    assert not any("password" in message for message in log.errors)


def test_an_on_error_that_raises_is_logged_and_the_next_task_runs(log: Log) -> None:
    seen: list[str] = []

    def on_error(task: BackgroundTask, error: BaseException) -> None:
        raise SystemExit(2)

    run((fail, ValueError()), (seen.append, "next"), on_error=on_error)
    assert seen == ["next"]
    assert log.errors[1] == "on_error raised for background task tests.tasks.test_errors.fail"
    assert isinstance(log.tracebacks[1], SystemExit)


def test_errors_are_logged_in_the_tasks_context(log: Log) -> None:
    """Correlation ids and the contexts of structlog and Sentry are there."""
    seen: list[str] = []

    class Filter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            message = record.getMessage()  # and not about a task of an earlier test
            if f"{__name__}.fail" in message or "builtins.print" in message:
                seen.append(correlation.get())
            return True

    def add(environ: object) -> None:
        token = correlation.set("request 1")
        background_tasks.add_task(fail, ValueError())
        background_tasks.add_task(fail_async, ValueError())
        background_tasks.using(run_on="error").add_task(print)
        correlation.reset(token)

    logger = logging.getLogger("wsgi_bg")
    keep = Filter()
    logger.addFilter(keep)
    try:
        respond(
            BackgroundTasksMiddleware(
                app_that(add), on_error=lambda t, e: seen.append(correlation.get())
            )
        )
    finally:
        logger.removeFilter(keep)
    assert seen == ["request 1"] * 7  # two tasks have an ERROR, a DEBUG record and on_error


@pytest.mark.parametrize("func", [fail, fail_async])
def test_stop_on_error_skips_and_names_the_rest(log: Log, func: Any) -> None:
    seen: list[str] = []
    runner = InlineRunner()

    async def never() -> None:
        seen.append("no")

    run(
        (seen.append, "first"),
        (func, ValueError()),
        (never,),
        (seen.append, "no"),
        stop_on_error=True,
        runner=runner,
    )
    assert seen == ["first"]
    reason = "a task before it failed, with stop_on_error set"
    name = (
        f"{__name__}.{test_stop_on_error_skips_and_names_the_rest.__qualname__}.<locals>.never"
    )
    assert log.warnings == [
        f"background task {name} was not run: {reason}",
        f"background task list.append was not run: {reason}",
    ]
    numbers = runner.statistics()
    assert (numbers.succeeded, numbers.failed, numbers.discarded) == (1, 1, 2)


def test_a_cancellation_that_a_task_leaves_behind_does_not_hit_the_next(log: Log) -> None:
    seen: list[str] = []

    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def then() -> None:
        await asyncio.sleep(0)
        seen.append("ran")

    run((cancel_itself,), (then,))
    assert seen == ["ran"]
    assert [type(error) for error in log.tracebacks] == [asyncio.CancelledError]


def test_a_cancellation_that_a_task_does_not_wait_for_does_not_hit_the_next() -> None:
    seen: list[str] = []

    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def then() -> None:
        await asyncio.sleep(0)
        seen.append("ran")

    before = portal.portal()
    run((cancel_itself,), (then,))
    run((cancel_itself,))
    run((then,))
    assert seen == ["ran", "ran"]
    assert portal.portal() is before


def test_a_cancellation_that_a_task_swallows_does_not_hit_the_next() -> None:
    seen: list[int] = []

    async def swallow() -> None:
        task: Any = asyncio.current_task()
        task.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            seen.append(task.cancelling())

    async def then() -> None:
        task: Any = asyncio.current_task()
        seen.append(task.cancelling())

    run((swallow,), (then,))
    assert seen == [1, 0]


def test_a_generator_that_nobody_runs_is_a_failure(log: Log) -> None:
    """A decorated generator function, which ``add_task`` cannot recognise."""

    def generate() -> Any:
        yield

    async def generate_async() -> Any:
        yield

    run((lambda: generate(),), (lambda: (x for x in [1]),), (lambda: generate_async(),))
    assert [str(error) for error in log.tracebacks] == [
        "it returned a generator that no one runs: nothing was done",
        "it returned a generator that no one runs: nothing was done",
        "it returned an async generator that no one runs: nothing was done",
    ]


def test_a_generator_of_the_results_of_a_pool_is_an_ordinary_result(log: Log) -> None:
    done: list[int] = []
    with ThreadPoolExecutor(1) as executor, ThreadPool(1) as pool:
        run((executor.map, done.append, [1, 2]), (pool.imap, done.append, [3, 4], 2))
        pool.close()
        pool.join()
    assert sorted(done) == [1, 2, 3, 4]
    assert log.errors == []


@pytest.mark.filterwarnings("error")
def test_a_coroutine_of_an_on_error_or_a_hook_that_nobody_awaits_is_logged(log: Log) -> None:
    """The options refuse ``async def`` functions, but see no lambda's result."""

    async def notify(*given: object) -> None:
        pass

    class Notifying(Hooks):
        def task_failed(self, record: TaskRecord) -> Any:
            return notify(record)

        def batch_ended(self, record: BatchRecord) -> Any:
            return notify(record)

    run((fail, ValueError("x")), on_error=lambda *given: notify(*given), hooks=Notifying())
    name = "background task tests.tasks.test_errors.fail"
    hooks = Notifying.__qualname__
    assert log.errors == [
        f"{name} raised ValueError",
        f"{hooks}.task_failed raised for {name}",
        f"on_error raised for {name}",
        f"{hooks}.batch_ended raised for a batch",
    ]
    assert [str(error) for error in log.tracebacks[1:]] == [
        "it returned a coroutine that no one runs: nothing was done"
    ] * 3


def test_a_coroutine_that_was_begun_is_an_ordinary_result_of_an_on_error(log: Log) -> None:
    async def notify() -> None:
        pass

    def begin(task: BackgroundTask, error: BaseException) -> Any:
        coroutine = notify()
        with pytest.raises(StopIteration):
            coroutine.send(None)
        return coroutine

    run((fail, ValueError("x")), on_error=begin)
    assert log.errors == ["background task tests.tasks.test_errors.fail raised ValueError"]


def test_a_generator_that_was_begun_is_an_ordinary_result(log: Log) -> None:
    def begun() -> Any:
        generator = (x for x in (1, 2))
        next(generator)
        return generator

    run((begun,), (lambda: "a result",))
    assert log.errors == []


def test_adding_to_a_batch_whose_worker_was_stopped_is_refused(log: Log) -> None:
    kept: list[Any] = []

    def add(environ: Any) -> None:
        kept.append(get_background_tasks(environ))
        background_tasks.add_task(fail, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        respond(BackgroundTasksMiddleware(app_that(add)))
    with pytest.raises(RuntimeError, match="the batch has ended"):
        kept[0].add_task(print)


# Exceptions that stop the server's worker leave close() (rule 5).


def test_a_keyboard_interrupt_on_the_main_thread_goes_through_and_names_the_rest(
    log: Log,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run((print,), (fail, KeyboardInterrupt()), (print,))
    reason = "KeyboardInterrupt stopped its worker"
    assert log.warnings == [
        f"background task tests.tasks.test_errors.fail was not run to its end: {reason}",
        f"background task builtins.print was not run: {reason}",
    ]


def test_a_keyboard_interrupt_on_another_thread_is_the_tasks_own(log: Log) -> None:
    thread = threading.Thread(target=run, args=((fail, KeyboardInterrupt()),))
    thread.start()
    thread.join(10)
    assert [type(error) for error in log.tracebacks] == [KeyboardInterrupt]


def stop(number: int, frame: object) -> None:
    raise SystemExit(0)


class Stopper:
    def stop(self, number: int, frame: object) -> None:
        raise SystemExit(0)

    __call__ = stop


def raise_signal(then: Any = None) -> None:
    signal.raise_signal(signal.SIGUSR1)
    threading.Event().wait(10)  # Python runs the handler here at the latest


cancelled = threading.Event()


async def raise_signal_from_the_loop() -> None:
    """Raise the signal while the main thread still waits for the loop to take the task."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        cancelled.set()
        raise


async def raise_signal_later() -> None:
    """Raise the signal while the main thread waits for the task."""
    await asyncio.sleep(0.1)
    await raise_signal_from_the_loop()


@pytest.mark.parametrize(
    "handler", [stop, Stopper().stop, Stopper()], ids=["function", "method", "callable"]
)
@pytest.mark.parametrize(
    "task",
    [
        raise_signal,
        raise_signal_from_the_loop,
        raise_signal_later,
        lambda: raise_signal_later(),
    ],
)
def test_a_signal_handlers_exit_goes_through_and_names_the_rest(
    log: Log, handler: Any, task: Any
) -> None:
    seen: list[str] = []

    async def never() -> None:
        seen.append("no")

    cancelled.clear()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit):
            run((task,), (never,), (seen.append, "no"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == []
    assert [message.split(":")[0].split()[-1] for message in log.warnings] == [
        "end",
        "run",
        "run",
    ]
    assert log.errors == []
    assert task is raise_signal or cancelled.wait(10)


def test_an_async_task_that_had_not_begun_when_its_worker_was_stopped_does_not_begin(
    log: Log,
) -> None:
    """The signal comes while the loop is busy and the main thread waits for the loop."""
    seen: list[str] = []
    blocking, stopped = threading.Event(), threading.Event()

    async def block() -> None:
        blocking.set()
        threading.Event().wait(0.2)  # slow, so that the main thread begins to wait for the loop
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        stopped.wait(10)

    async def never() -> None:
        seen.append("no")

    other = threading.Thread(target=run, args=((block,),))
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        other.start()
        assert blocking.wait(10)
        with pytest.raises(SystemExit):
            run((never,))
    finally:
        signal.signal(signal.SIGUSR1, before)
        stopped.set()
    other.join(10)
    run((seen.append, "then"), (fail_async, ValueError()))  # queued behind on the loop
    assert seen == ["then"]
    assert "never was not run: SystemExit" in log.warnings[0]


def test_a_partials_signal_handler_is_known_too(log: Log) -> None:
    import functools

    before = signal.signal(signal.SIGUSR1, functools.partial(stop))
    try:
        with pytest.raises(SystemExit):
            run((raise_signal,))
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_to_a_real_server_process_ends_it() -> None:
    """werkzeug on the main thread, stopped in the middle of a task, as a supervisor does."""
    done = run_python(
        """
        import http.client, logging, os, signal, sys, threading
        from werkzeug.serving import make_server
        from wsgi_bg import BackgroundTasksMiddleware, background_tasks

        logging.basicConfig(format="%(message)s")
        started = threading.Event()

        def slow():
            started.set()
            while True:  # Python runs a handler between two steps
                threading.Event().wait(0.05)

        def app(environ, start_response):
            background_tasks.add_task(slow)
            background_tasks.add_task(print, "never")
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]

        server = make_server("127.0.0.1", 0, BackgroundTasksMiddleware(app))
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))

        def client():
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("GET", "/")
            print(connection.getresponse().read())
            assert started.wait(10)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

        threading.Thread(target=client).start()
        server.serve_forever()
        """
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "b'ok'\n"
    assert "__main__.slow was not run to its end: SystemExit stopped its worker" in done.stderr
    assert "builtins.print was not run: SystemExit stopped its worker" in done.stderr


def test_a_greenlets_kill_goes_through(log: Log) -> None:
    """gevent throws GreenletExit in this way; the greenlet swallows the exception."""
    seen: list[str] = []

    def work() -> None:
        run((greenlet.getcurrent().parent.switch,), (seen.append, "no"))
        seen.append("no")

    worker = greenlet(work)
    worker.switch()
    assert isinstance(worker.throw(GreenletExit), GreenletExit)
    assert seen == []
    assert [message.split(":")[0].split()[-1] for message in log.warnings] == ["end", "run"]


def test_an_exit_of_a_greenlet_on_a_real_thread_is_an_error_of_the_task(log: Log) -> None:
    runner = PoolRunner(threads=1)
    run((fail, GreenletExit()), runner=runner)
    run((print,), runner=runner)
    assert runner.drain(10) == []
    assert runner.statistics().succeeded == 1
    assert "fail raised GreenletExit" in log.errors[0]


def test_an_error_in_a_batch_of_the_pool_is_logged_there(log: Log) -> None:
    runner = InlineRunner()
    told: list[str] = []

    def add(environ: object) -> None:
        background_tasks.add_task(fail, SystemExit(1))
        background_tasks.add_task(fail_async, ValueError())

    app = BackgroundTasksMiddleware(
        app_that(add, headers=[]),
        runner=runner,
        on_error=lambda t, e: told.append(threading.current_thread().name),
    )
    Server().run(app, make_server_environ())
    assert runner.drain(10) == []
    assert told[0].startswith("wsgi_bg-pool")
    assert told[1] == "wsgi_bg-portal"
    assert runner.statistics().failed == 2


class Broken(InlineRunner):
    def submit(self, batch: object) -> None:
        raise OSError("no broker")


def test_a_runner_that_fails_loses_no_task(log: Log) -> None:
    seen: list[str] = []
    run((seen.append, "ran"), runner=Broken())
    assert seen == ["ran"]
    assert log.errors == ["Broken() did not take list.append, which run in this process"]


def test_a_runner_that_fails_keeps_no_response_waiting(log: Log) -> None:
    gate = Gate()
    app = app_that(lambda e: background_tasks.add_task(gate.task), headers=[])
    Server().run(BackgroundTasksMiddleware(app, runner=Broken()), make_server_environ())
    gate.open()
    gate.wait()
    assert gate.passed == [True]


def test_an_interrupt_in_a_runner_goes_through_and_names_the_tasks(log: Log) -> None:
    class Interrupted(InlineRunner):
        def submit(self, batch: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((print,), runner=Interrupted())
    assert "builtins.print was not run: KeyboardInterrupt stopped its worker" in log.warnings[0]


def test_an_interrupt_in_on_error_goes_through(log: Log) -> None:
    def on_error(task: BackgroundTask, error: BaseException) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((fail, ValueError()), (print,), on_error=on_error)
    assert "builtins.print was not run" in log.warnings[-1]


def test_an_interrupt_in_tasks_called_by_hand_goes_through() -> None:
    def add(environ: object) -> None:
        background_tasks.add_task(fail, KeyboardInterrupt())
        background_tasks()

    with pytest.raises(KeyboardInterrupt):
        Server().run(BackgroundTasksMiddleware(app_that(add)), make_environ())
