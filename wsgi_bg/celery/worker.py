"""The worker's side: every registered function is a task of the Celery application."""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from celery import Celery, Task, signals
from celery._state import pop_current_task, push_current_task
from celery.exceptions import MaxRetriesExceededError, Retry, TaskPredicate

from wsgi_bg._loop import portal
from wsgi_bg._loop.asgiref_state import detached
from wsgi_bg._loop.coroutines import is_awaitable
from wsgi_bg._messages import headers, retries
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.registry import Registration
from wsgi_bg._tasks.retry import Plan
from wsgi_bg._tasks.task import BackgroundTask, Caller, current
from wsgi_bg._worker.added import AddedTasks
from wsgi_bg._worker.observed import ObservedCall
from wsgi_bg.celery import messages
from wsgi_bg.celery.options import NO_OPTIONS
from wsgi_bg.exceptions import (
    MessageError,
    OptionValueError,
    PlainCallError,
    UnsafeCeleryError,
)
from wsgi_bg.runners.attached import Attached
from wsgi_bg.runners.shutdown import finish

HIDDEN = messages.HIDDEN

_ADDED = "_wsgi_bg_added"  # the attribute of Celery's request that has the AddedTasks


class _Served(Attached):
    """How a Celery application makes the calls of registered functions.

    :ivar plain_calls: True if a call may have plain arguments, of any sender.
    """

    plain_calls = False


_served: dict[Celery, _Served] = {}
"""The applications that have the registered functions."""

_outside: ContextVar[Context | None] = ContextVar("wsgi_bg.celery._outside", default=None)
"""The context in which ``__call__`` of the application's own task class was called."""


def check_settings(app: Celery) -> None:
    """Check that messages can make a worker of ``app`` run registered functions only.

    :raises ValueError: if a setting allows more; the message names the setting.
    """
    conf = app.conf
    for setting in ("task_serializer", "result_serializer", "event_serializer"):
        if _is_unsafe(conf[setting]):
            raise UnsafeCeleryError(setting, conf[setting], "'json'")
    for setting in ("accept_content", "result_accept_content"):
        accepted = conf[setting] or ()
        if any(map(_is_unsafe, accepted)):
            raise UnsafeCeleryError(setting, accepted, "['json']")
    accepted = conf.accept_content
    if not {"json", "application/json"} & {str(each) for each in accepted or ()}:
        raise OptionValueError("accept_content of celery_app", accepted, "a list with 'json'")
    if conf.worker_pool_restarts:  # else control messages name modules to import
        raise UnsafeCeleryError("worker_pool_restarts", True, "False")


def _is_unsafe(serializer: object) -> bool:
    name = str(serializer).lower()
    return "pickle" in name or "python-serialize" in name


def serve(app: Celery, options: Options, *, plain_calls: bool) -> None:
    """Make each registered function a task of ``app``, also if registered later.

    :param options: those of the calls until :func:`attach` is called; they name the runner.
    :param plain_calls: True if a call may have plain arguments. One runner of ``app`` suffices.
    """
    served = _served.get(app)
    if served is None:
        served = _served[app] = _Served(options)
        messages.hide_arguments_in_log()
        registry.subscribe(partial(_add, app))
        # A process of the pool ends by os._exit().
        signals.worker_process_shutdown.connect(_end_process)
    served.plain_calls = served.plain_calls or plain_calls


def _end_process(**_: Any) -> None:
    finish()


def attach(app: Celery, options: Options) -> None:
    """Let the workers of ``app`` make the calls under the options of a middleware."""
    _served[app].attach(options)


def takes_plain_calls(app: Celery) -> bool:
    """True if a call of ``app`` may have plain arguments."""
    return _served[app].plain_calls


def is_served(task: Any) -> bool:
    """True if :func:`serve` has made this Celery task."""
    return hasattr(task, "_is_of_wsgi_bg")


def _add(app: Celery, registration: Registration) -> None:
    options = dict((registration.celery or NO_OPTIONS).task)
    of_class = getattr(app.Task, "dont_autoretry_for", ())
    # A retry would read the same broken message.
    options["dont_autoretry_for"] = (*options.get("dont_autoretry_for", of_class), MessageError)
    options.setdefault("ignore_result", True)
    if registration.retry is not None:  # in place of the retries of the user's task class
        options["autoretry_for"] = ()
    app.task(
        name=registration.name,
        bind=True,
        base=_base(app),
        shared=False,
        **options,
    )(_run)


def _run(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read the message and call the function, on a worker; ``self`` is Celery's task."""
    if args and isinstance(args[0], _Raised):
        raise args[0].error
    served = _served[self.app]
    request = self.request
    call = messages.read(self.name, args, kwargs, request, plain_calls=served.plain_calls)
    registration = call.registration
    task = BackgroundTask(registration.func, *call.args, **call.kwargs)
    context = detached(copy_context())
    carried = messages.headers_of(request)
    headers.restore(context, carried)
    calls = served.options.calls
    if _is_entered(calls):
        calls = calls.without_around()
    retry = retries.find(carried.get(retries.RETRY), registration.retry)
    attempt = request.retries + 1
    task.plan = Plan(retry, attempt, on_worker=True)
    if not request.called_directly:  # else no one would run the tasks that the task adds
        added = AddedTasks(task, served.options, carried.get(headers.REQUEST))
        setattr(request, _ADDED, added)
        context.run(current.set, added.tasks)
        task.keep_id(request.id)
        calls.received(task, added.tasks)
    observed = ObservedCall(task, calls, context)
    try:
        with observed:
            result = _call(self, task, calls, context)
    except TaskPredicate as exc:  # raised by Celery's own functions: a retry, for example
        # Celery calls neither on_retry() nor after_return() for Ignore and Reject.
        if isinstance(exc, Retry):
            observed.retried(exc.exc or exc, _seconds_to(exc), is_logged=False)
        else:
            observed.discarded(f"it has raised Celery's {type(exc).__name__}")
            _leave(request, again=getattr(exc, "requeue", False))
        raise
    except Exception as exc:
        if retry is None or not retry.allows(attempt, exc):
            by_celery = _find_autoretry(self, exc)
            if by_celery is not None:
                observed.retried(exc, _seconds_to(by_celery), is_logged=False)
                raise by_celery from exc
            observed.failed(exc)
            raise
        seconds = retry.wait_before(attempt + 1)
        observed.retried(exc, seconds)
        raise self.retry(exc=exc, countdown=seconds, max_retries=retry.attempts - 1) from exc
    except BaseException as exc:
        observed.stopped(exc)
        if not request.called_directly:
            vars(request).pop(_ADDED).stop(exc)
        raise
    observed.finished()
    # Celery logs the result. The next task of a chain needs it, although none is stored.
    return result if call.is_plain or not self.ignore_result else None


class _Raised(NamedTuple):
    """In place of the arguments: the error of the call, for Celery's ``autoretry_for``."""

    error: Exception


def _find_autoretry(task: Any, exc: Exception) -> Retry | None:
    """Return Celery's retry, already sent, if ``autoretry_for`` repeats a call; else None."""
    if hasattr(task, "_orig_run"):  # Celery has put a function that repeats calls around _run()
        try:
            task.run(_Raised(exc))
        except Retry as retry:
            return retry
        except Exception:  # perhaps ``exc``, which that function will see once more
            return None
    return None


def _seconds_to(retry: Retry) -> float:
    """The seconds until a retry that Celery makes."""
    if isinstance(retry.when, datetime):
        return max(0.0, (retry.when - datetime.now(retry.when.tzinfo)).total_seconds())
    return float(retry.when or 0.0)


def _is_entered(calls: Caller) -> bool:
    """True if the application's own task class has entered the context of the calls."""
    before = _outside.get()
    is_entered = getattr(calls.around, "is_entered", None)
    return before is not None and is_entered is not None and bool(is_entered(before))


def _call(celery_task: Any, task: BackgroundTask, calls: Caller, context: Context) -> Any:
    """Make the call; blocks until it is done. An async task runs on the process's loop."""
    result = context.run(calls.make, task, None)
    if result is not None and is_awaitable(result):
        inside: Any = _InTask(context, celery_task)
        result, error = portal.wait_for(inside, result)
        if error is not None:
            raise error
    return result


class _InTask:
    """A context in which ``celery.current_task`` is a task, on whatever thread.

    Celery keeps the current task by thread. The steps of several async tasks take turns on the
    loop's thread, so each step sets the current task. Stands for a ``Context`` in functions
    that call nothing but ``run()``.
    """

    def __init__(self, context: Context, task: Any) -> None:
        self._context = context
        self._task = task
        self._request = task.request_stack.top

    def run(self, func: Any, *args: Any) -> Any:
        """Call ``func(*args)`` as :meth:`Context.run` does."""
        push_current_task(self._task)
        self._task.request_stack.push(self._request)
        try:
            return self._context.run(func, *args)
        finally:
            self._task.request_stack.pop()
            pop_current_task()


def _leave(request: Any, *, again: bool) -> None:
    """Look after the tasks that a task has added: the call is over.

    Celery calls the functions of a task in the worker's main process too, where no call is.

    :param again: True if the task will be called again, and will add the tasks again; else
        they are sent, or run here.
    """
    added: AddedTasks | None = vars(request).pop(_ADDED, None)
    if added is not None:
        leave = added.drop if again else added.hand_over
        leave()


class _NoMoreRetriesError(MaxRetriesExceededError):  # type: ignore[misc]
    """Celery's error without the arguments, which are data."""

    def __init__(self, message: str = "", **_: object) -> None:
        super().__init__(message.partition(" args:")[0])


def _base(app: Celery) -> type:
    """Subclass ``app.Task``, which may be a class of the user."""

    class RegisteredTask(app.Task):  # type: ignore[misc]
        abstract = True
        _is_of_wsgi_bg = True
        MaxRetriesExceededError = _NoMoreRetriesError

        def apply_async(self, *args: Any, **options: Any) -> Any:
            # Called by the runner; by Celery's retry; and by delay(), beat and chains.
            given = options.get("headers") or {}
            if messages.CALL not in given:
                if not takes_plain_calls(app):
                    raise PlainCallError(self.name)
                options = messages.for_plain_call(self.name, args, options)
            # Without these two, Celery would show the arguments of a retry.
            return super().apply_async(
                *args, **{**options, "argsrepr": HIDDEN, "kwargsrepr": HIDDEN}
            )

        def after_return(self, *args: Any) -> None:
            _leave(self.request, again=False)
            super().after_return(*args)

        def on_retry(self, *args: Any) -> None:
            _leave(self.request, again=True)
            super().on_retry(*args)

    if app.Task.Request == Task.Request:
        RegisteredTask.Request = "wsgi_bg.celery.request:_Request"
    if app.Task.__call__ is Task.__call__:
        return RegisteredTask

    class CalledTask(RegisteredTask):
        """Notes the context in which the user's own ``__call__`` begins."""

        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            token = _outside.set(copy_context())
            try:
                return super().__call__(*args, **kwargs)
            finally:
                _outside.reset(token)

    return CalledTask
