"""``CeleryRunner``: sends registered tasks to Celery's workers; all others run here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from wsgi_bg._messages.codec import encode
from wsgi_bg._messages.retries import headers_of_call
from wsgi_bg._outbox.runner import OutboxRunner
from wsgi_bg._outbox.stored import Message
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._request.layer import merge_options
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.checks import WhenUnsent
from wsgi_bg._tasks.options import Options
from wsgi_bg._tasks.registry import Registration
from wsgi_bg.celery.options import TIMES, for_messages, for_one_call, override, refuse_time
from wsgi_bg.exceptions import (
    ExtraMissingError,
    NameTakenError,
    OptionTypeError,
    OptionValueError,
    RegistrationError,
)
from wsgi_bg.runners import Runner

try:
    from celery import Celery
except ImportError as _exc:
    raise ExtraMissingError("celery", "wsgi_bg.celery") from _exc

from wsgi_bg.celery import captured, own_tasks
from wsgi_bg.celery import worker as celery_worker
from wsgi_bg.celery.connection import BrokerConnection
from wsgi_bg.celery.messages import CALL, ENCODED
from wsgi_bg.celery.own_tasks import Call

if TYPE_CHECKING:
    from wsgi_bg._tasks.task import BackgroundTask

OnPublishError = Literal["local", "discard"]


class CeleryRunner(OutboxRunner):
    """Sends each task whose function is registered to Celery; other tasks run on ``local``.

    Registered functions are tasks of ``celery_app`` under their registered names, also if
    they are registered after the runner was made. So the worker loads the module that makes
    the runner: ``celery -A module worker``. Celery's own tasks of ``celery_app``, their
    ``delay`` and their signatures are sent, too: ``add_task(celery_task, 1)``.

    ``add_task`` makes the message, with the id that the task has in Celery. An argument that a
    worker would not get back unchanged raises ``TypeError`` there, and later changes to an
    argument have no effect. ``close()`` puts the messages into an outbox and returns; threads
    of the package send them in batches, so no thread of the server waits for the broker. While
    the broker is away the messages wait in the outbox. Workers keep no order. Only the worker
    knows how a task ends that was sent. A delay counts from ``add_task``; a ``Retry`` is
    Celery's own retry on the worker.

    :param celery_app: the Celery application; its messages are JSON.
    :param local: the runner for tasks that are not sent, or its name; default: shared pool.
    :param plain_calls: True if Celery's own means may call registered functions by name:
        ``delay()``, ``celery call``, beat, chains and other services, with plain arguments.
    :param outbox: see :class:`~wsgi_bg.outbox.OutboxRunner`, as for the following parameters.
    :param on_publish_error: the former name of ``when_unsent``; deprecated.
    :raises ValueError: if a message could make a worker of ``celery_app`` run any code, for
        example because pickle is accepted; if an option is out of range.
    :raises TypeError: if an option has the wrong type.
    :raises StoreError: a ``RuntimeError``, if the folder of the outbox cannot be used.
    """

    def __init__(
        self,
        celery_app: Celery,
        *,
        local: Runner | Literal["inline", "pool"] | None = None,
        plain_calls: bool = False,
        outbox: str | os.PathLike[str] | None = None,
        when_unsent: WhenUnsent = "hold",
        publish_timeout: float = 5.0,
        hold_for: float = 3600.0,
        max_unsent: int = 100_000,
        drain_timeout: float = 30.0,
        on_publish_error: OnPublishError | None = None,
    ) -> None:
        if not isinstance(celery_app, Celery):
            raise OptionTypeError("celery_app", celery_app, "a celery.Celery application")
        if not isinstance(plain_calls, bool):
            raise OptionTypeError("plain_calls", plain_calls, "True or False")
        if on_publish_error is not None:
            if on_publish_error not in get_args(OnPublishError):
                wanted = "'local' or 'discard'"
                raise OptionValueError("on_publish_error", on_publish_error, wanted)
            if when_unsent not in ("hold", on_publish_error):  # "hold" is the default
                wanted = "None beside when_unsent"
                raise OptionValueError("on_publish_error", on_publish_error, wanted)
            message = "on_publish_error is called when_unsent now, and 'hold' is the default"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            when_unsent = on_publish_error
        celery_worker.check_settings(celery_app)
        super().__init__(
            local="pool" if local is None else local,
            outbox=outbox,
            when_unsent=when_unsent,
            publish_timeout=publish_timeout,
            hold_for=hold_for,
            max_unsent=max_unsent,
            drain_timeout=drain_timeout,
        )
        self._app = celery_app
        # Never opened; made late, since the application may be configured later.
        self._unconnected = PerProcess(celery_app.connection_for_write)
        options = merge_options(Options(), runner=self)  # until a middleware is attached
        celery_worker.serve(celery_app, options, plain_calls=plain_calls)

    def attach(self, options: Options) -> None:
        """Make the calls on workers under ``options``: in the context of an application.

        The first call holds, or the first call with the context of an application.
        """
        self.destination: object = self._app.connection_for_write().as_uri(
            include_password=True
        )
        super().attach(options)
        celery_worker.attach(self._app, options)

    def message(self, task: BackgroundTask) -> Message | None:
        """Make the message of an added task if Celery is to run the task.

        :raises TypeError: if an argument cannot be sent, Celery options were given for a
            function that is not registered, or a ``Retry`` for a task of Celery's own.
        :raises ValueError: if ``celery_app`` has its own task of the same name, or a ``Retry``
            was given for a function with ``autoretry_for``.
        """
        registration = registry.find(task.func)
        if registration is None:
            call = self._own_task(task)
            if call is not None:
                task.keep_name(call.name)
        else:
            call = self._registered(task, registration)
        if call is None:
            return None
        if self._app.conf.task_always_eager:  # Celery's setting for tests
            if registration is not None:
                return None
            task.keep_id(call.id or task.id)
            here = partial(own_tasks.call_eagerly, call, task.id)
            return Message(call.name, [], call_here=here, runs_here=True)
        return captured.capture(self._unconnected.get(), call, task)

    def _own_task(self, task: BackgroundTask) -> Call | None:
        given = _given(task)
        call = own_tasks.find(self._app, task, _with_delay(task, given))
        if call is not None and task.options.retry is not None:
            wanted = f"None for {call.name}, whose retries are Celery's: give it autoretry_for"
            raise OptionTypeError("retry", task.options.retry, wanted)
        if call is None and given:
            raise RegistrationError(
                f"{task.name} has options for Celery, and is not registered: decorate "
                "it with @registered_task",
                task.func,
            )
        return call

    def _registered(self, task: BackgroundTask, registration: Registration) -> Call:
        name = registration.name
        celery_task = self._app.tasks.get(name)
        if not celery_worker.is_served(celery_task):
            raise NameTakenError(name, f"a task of {self._app!r}")
        # Of the function, or of the application's own task class.
        retries = bool(getattr(celery_task, "autoretry_for", ()))
        if retries and task.options.retry is not None:
            wanted = f"None for {name}, which has autoretry_for"
            raise OptionValueError("retry", task.options.retry, wanted)
        text = encode(registration, task.args, task.kwargs)
        carried = headers_of_call(task.options.retry)
        options = _with_delay(task, override(for_messages(registration), _given(task)))
        options.update(headers={**carried, CALL: ENCODED}, serializer="json")
        apply_async = partial(celery_task.apply_async, (text,), **options)
        return Call(name, apply_async, bool(celery_task.ignore_result), retries)

    def connect(self) -> BrokerConnection:
        """Connect to the broker; blocks for ``publish_timeout`` seconds at most."""
        return BrokerConnection(self._app, self.publish_timeout)

    def dump(self, message: Message) -> str:
        """Return the messages of Celery as text.

        :raises TypeError: if a header is no JSON.
        """
        return captured.dump(message.data)

    def load(self, name: str, text: str) -> list[captured.Published]:
        """Return the messages of Celery in ``text``, which may be forged.

        :raises ValueError: or another error, if ``text`` has no message for the task ``name``.
        """
        return captured.load(self._app, name, text)

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the registered function of a message in a file, or else Celery's task."""
        own: Callable[..., Any] | None = self._app.tasks.get(name)
        return own if own is None else super().find(name) or own

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._app.main!r}, local={self.local!r})"


def _given(task: BackgroundTask) -> dict[str, Any]:
    """The options of ``using``: ``engine`` is another word for ``celery``.

    :raises ValueError: if an option is unknown, or sets the time of a task with a delay.
    :raises TypeError: if an option has the wrong type.
    """
    engine = task.options.engine or {}
    if engine and task.options.delay:
        refuse_time(engine, task.options.delay, "engine")
    return {**for_one_call(engine, "engine"), **(task.options.celery or {})}


def _with_delay(task: BackgroundTask, options: Mapping[str, Any]) -> dict[str, Any]:
    if not task.options.delay:
        return dict(options)
    others = {name: options[name] for name in options if name not in TIMES}
    return {**others, "countdown": task.options.delay}
