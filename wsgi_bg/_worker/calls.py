"""``run_call``: calls a registered function on a worker, as its message says."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from wsgi_bg._loop import portal
from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._loop.coroutines import is_awaitable
from wsgi_bg._messages import headers, retries
from wsgi_bg._messages.codec import decode
from wsgi_bg._request.layer import merge_options
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.registry import Registration
from wsgi_bg._tasks.retry import Plan
from wsgi_bg._tasks.task import DIRECT, BackgroundTask, current
from wsgi_bg._worker.added import AddedTasks
from wsgi_bg._worker.observed import ObservedCall
from wsgi_bg.exceptions import MessageError

if TYPE_CHECKING:
    from wsgi_bg._outbox.runner import OutboxRunner


class RetryLater(Exception):  # noqa: N818  # not an error
    """Raised by :func:`run_call` if the call is to be made again; the cause is the error.

    :ivar seconds: the wait before the next call.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"again in {seconds:.3g} seconds")
        self.seconds: float = seconds


def run_call(
    runner: OutboxRunner,
    name: str,
    text: object,
    given: object,
    attempt: int = 1,
    id: str | None = None,  # noqa: A002
    *,
    failures: tuple[type[BaseException], ...] = (Exception,),
) -> Any:
    """Call a registered function on a worker; blocks until the call is done.

    An async function runs on the event loop of the process. The call is made in the
    application's context, if a middleware with such a context has the runner. Tasks that the
    function adds are sent, or run on this thread, when the function has ended, unless the call
    is to be made again.

    The name, the text and the headers may be forged: the name is looked up and never imported.

    :param name: the name of the function.
    :param text: the arguments, as :func:`encode_call` has encoded them.
    :param given: the headers of the message.
    :param attempt: the number of the call: 1, or more if the function has raised before.
    :param id: the id of the message, which was that of the task; for hooks.
    :param failures: the errors by which a call fails; all others stop the worker.
    :return: the result of the function.
    :raises RetryLater: if the function has raised, and its ``Retry`` lets the task try again.
    :raises MessageError: a ``ValueError``, if the message cannot be read, or the function is
        not registered or does not take the arguments.
    :raises PublishError: a ``ConnectionError``, if the broker has not confirmed the added tasks
        in the runner's ``drain_timeout``. They go on waiting in the process.
    :raises BaseException: the error of the call.
    """
    registration, task = _read(name, text)
    carried: Mapping[str, object] = given if isinstance(given, dict) else {}
    context = detached(copy_context())
    headers.restore(context, carried)
    options = runner.options
    if options.calls is DIRECT:  # no middleware has the runner
        options = merge_options(options, runner=runner)
    added = AddedTasks(task, options, carried.get(headers.REQUEST))
    context.run(current.set, added.tasks)
    retry = retries.find(carried.get(retries.RETRY), registration.retry)
    task.plan = Plan(retry, attempt, on_worker=True)
    if id is not None:
        task.keep_id(id)
    calls = options.calls
    calls.received(task, added.tasks)
    call = ObservedCall(task, calls, context)
    try:
        with call:
            result = context.run(calls.make, task, None)
            if result is not None and is_awaitable(result):
                result, error = portal.wait_for(context, result)
                if error is not None:
                    try:
                        raise error
                    finally:
                        del error  # or it refers to itself, by this frame
    except failures as exc:
        if retry is None or not retry.allows(attempt, exc):
            call.failed(exc)
            added.hand_over()
            raise
        added.drop()
        seconds = retry.wait_before(attempt + 1)
        call.retried(exc, seconds)
        raise RetryLater(seconds) from exc
    except BaseException as exc:
        call.stopped(exc)
        added.stop(exc)
        raise
    call.finished()
    added.hand_over()
    return result


def _read(name: str, text: object) -> tuple[Registration, BackgroundTask]:
    registration = registry.get(name) if isinstance(name, str) else None
    if registration is None:
        raise MessageError("no function is registered by the name of the message")
    args, kwargs = decode(text)
    try:
        registration.signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise MessageError(f"the function does not take the arguments: {exc}") from None
    return registration, BackgroundTask(registration.func, *args, **kwargs)
