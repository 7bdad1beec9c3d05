"""The worker's side: every registered function is a task of the Celery application."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from typing import Any

from celery import Celery
from celery.exceptions import TaskPredicate

from wsgi_bg._messages import headers, retries
from wsgi_bg._messages.codec import decode
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.registry import Registration
from wsgi_bg._tasks.retry import Plan
from wsgi_bg._tasks.task import BackgroundTask
from wsgi_bg._tasks.task_log import log_attempt
from wsgi_bg.celery.options import NO_OPTIONS
from wsgi_bg.exceptions import MessageError, OptionValueError, UnsafeCeleryError

HIDDEN = "(...)"
"""Celery's logs and headers show this text in place of arguments, which are data."""

# The applications that have the registered functions.
_served: set[Celery] = set()


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


def serve(app: Celery) -> None:
    """Make each registered function a task of ``app``, also if registered later."""
    if app not in _served:
        _served.add(app)
        registry.subscribe(partial(_add, app))


def is_served(task: Any) -> bool:
    """True if :func:`serve` has made this Celery task."""
    return hasattr(task, "_is_of_wsgi_bg")


def _add(app: Celery, registration: Registration) -> None:
    options = dict((registration.celery or NO_OPTIONS).task)
    # A retry would read the same broken message.
    options["dont_autoretry_for"] = (*options.get("dont_autoretry_for", ()), MessageError)
    options.setdefault("ignore_result", True)
    app.task(
        name=registration.name,
        bind=True,
        base=_base(app),
        shared=False,
        **options,
    )(_run)


def _run(self: Any, *message: Any, **others: Any) -> Any:
    """Decode the message and call the function, on a worker; ``self`` is Celery's task."""
    registration = registry.get(self.name)
    if registration is None or others or len(message) != 1:
        raise MessageError("the arguments are not wsgi_bg's: not one text")
    args, kwargs = decode(message[0])
    context = copy_context()
    headers.restore(context, self.request.get)
    task = BackgroundTask(registration.func, *args, **kwargs)
    try:
        # This blocks the thread; an async task runs on the process's event loop.
        result = context.run(task)
    except TaskPredicate:  # raised by Celery's own functions: a retry, for example
        raise
    except Exception as exc:
        retry = retries.find(self.request.get(retries.RETRY), registration.retry)
        attempt = self.request.retries + 1
        if retry is None or not retry.allows(attempt, exc):
            raise
        task.plan = Plan(retry, attempt)
        seconds = retry.wait_before(attempt + 1)
        context.run(log_attempt, task, exc, seconds)
        raise self.retry(exc=exc, countdown=seconds, max_retries=retry.attempts - 1) from exc
    return None if self.ignore_result else result


def _base(app: Celery) -> type:
    """Subclass ``app.Task`` (Flask's enters a context) to hide the arguments."""

    class RegisteredTask(app.Task):  # type: ignore[misc]
        abstract = True
        _is_of_wsgi_bg = True

        def apply_async(self, *args: Any, **options: Any) -> Any:
            # Celery's retry comes here too; without these options it would show arguments.
            return super().apply_async(
                *args, **{**options, "argsrepr": HIDDEN, "kwargsrepr": HIDDEN}
            )

    return RegisteredTask
