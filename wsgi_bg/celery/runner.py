"""``CeleryRunner``: sends registered tasks to Celery's workers; all others run here."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from wsgi_bg._messages import headers
from wsgi_bg._messages.codec import encode
from wsgi_bg._messages.retries import RETRY, to_text
from wsgi_bg._process import log
from wsgi_bg._process.per_process import PerProcess
from wsgi_bg._process.workers import Workers
from wsgi_bg._tasks import registry
from wsgi_bg._tasks.checks import seconds
from wsgi_bg.celery.options import NO_OPTIONS, TIMES
from wsgi_bg.exceptions import (
    ExtraMissingError,
    NameTakenError,
    OptionTypeError,
    OptionValueError,
    PublishError,
    RegistrationError,
)
from wsgi_bg.runners import Runner, resolve
from wsgi_bg.runners.ledger import Ledger, LedgerRunner
from wsgi_bg.runners.pool import START_DELAY

try:
    from celery import Celery
except ImportError as _exc:
    raise ExtraMissingError("celery", "wsgi_bg.celery") from _exc

from wsgi_bg.celery import worker as celery_worker
from wsgi_bg.celery.publisher import Message, Publisher

if TYPE_CHECKING:
    from wsgi_bg._tasks.batch import Batch
    from wsgi_bg._tasks.task import BackgroundTask

OnPublishError = Literal["local", "discard"]

_THREADS = 4  # for the batches of responses that must not wait for the broker


class CeleryRunner(LedgerRunner):
    """Sends each task whose function is registered to Celery; other tasks run on ``local``.

    Registered functions are tasks of ``celery_app`` under their registered names, also if
    they are registered after the runner was made. So the worker loads the module that makes
    the runner: ``celery -A module worker``.

    ``add_task`` encodes the arguments. An argument that a worker would not get back unchanged
    raises ``TypeError`` there, and later changes to an argument have no effect. The tasks are
    sent when the response is closed: on the server's thread if the response is complete, else
    on a thread of the runner, so no client waits for the broker. A batch's registered tasks
    are sent in order before its local tasks run; workers keep no order. A sent task counts as
    succeeded; only the worker knows how the task ends. The delay of a sent task is Celery's
    ``countdown``, and its ``Retry`` Celery's own retry on the worker.

    :param celery_app: the Celery application; its messages are JSON.
    :param local: the runner for tasks that are not sent, or its name; default: shared pool.
    :param publish_timeout: seconds for which a task waits for the broker. After a timeout no
        task is sent for the same time again, and ``on_publish_error`` applies to each.
    :param on_publish_error: for a task that was not sent, or only perhaps: ``"local"`` runs
        the task on ``local``, so the task may run twice; ``"discard"`` drops the task with an
        ERROR record and calls ``on_error``.
    :param drain_timeout: seconds for which interpreter exit waits until all tasks are sent
        and the local tasks are done.
    :raises ValueError: if a message could make a worker of ``celery_app`` run any code, for
        example because pickle is accepted; if an option is out of range.
    :raises TypeError: if an option has the wrong type.
    """

    sends_delayed = True

    def __init__(
        self,
        celery_app: Celery,
        *,
        local: Runner | Literal["inline", "pool"] | None = None,
        publish_timeout: float = 5.0,
        on_publish_error: OnPublishError = "local",
        drain_timeout: float = 30.0,
    ) -> None:
        if not isinstance(celery_app, Celery):
            raise OptionTypeError("celery_app", celery_app, "a celery.Celery application")
        # The timeout of a socket is twice publish_timeout.
        limit = threading.TIMEOUT_MAX / 2
        seconds("publish_timeout", publish_timeout, above_zero=True, most=limit)
        seconds("drain_timeout", drain_timeout)
        if on_publish_error not in get_args(OnPublishError):
            raise OptionValueError("on_publish_error", on_publish_error, "'local' or 'discard'")
        celery_worker.check_settings(celery_app)
        self._app = celery_app
        self._local = resolve("pool" if local is None else local)
        self._discards = on_publish_error == "discard"
        self._timeout = publish_timeout
        self.drain_timeout = drain_timeout
        self._states = PerProcess(self._make_state)
        celery_worker.serve(celery_app)

    def _make_state(self) -> _State:
        threads: Workers[Batch] = Workers(self._send_later, _THREADS, "wsgi_bg-celery")
        return _State(Ledger(), Publisher(self._app, self._timeout), threads)

    def check(self, task: BackgroundTask) -> Message | None:
        """Encode the arguments of an added task if the task's function is registered.

        :return: the message for :meth:`send`; None if the task runs in this process.
        :raises TypeError: if an argument cannot be sent, or Celery options were given for a
            function that is not registered.
        :raises ValueError: if ``celery_app`` has its own task of the same name.
        """
        registration = registry.find(task.func)
        given: Mapping[str, Any] = task.options.celery or {}
        if registration is None:
            if given:
                raise RegistrationError(
                    f"{task.name} has options for Celery, and is not registered: decorate "
                    "it with @registered_task",
                    task.func,
                )
            return None
        name = registration.name
        if not celery_worker.is_served(self._app.tasks.get(name)):
            raise NameTakenError(name, f"a task of {self._app!r}")
        text = encode(name, registration.signature, task.args, task.kwargs)
        options = {**(registration.celery or NO_OPTIONS).message, **given}
        if task.options.delay:
            options = {key: options[key] for key in options if key not in TIMES}
            options["countdown"] = task.options.delay
        carried = headers.current()
        if task.options.retry is not None:  # the worker knows the function's own
            carried[RETRY] = to_text(task.options.retry)
        return Message(name, text, carried, options)

    def may_send(self, task: BackgroundTask) -> bool:
        """False: a task without a message runs in this process."""
        return False

    def send(self, task: BackgroundTask, message: Message | None = None) -> bool:
        """Send a task to the broker; blocks for ``publish_timeout`` seconds at most.

        :param message: the message that :meth:`check` returned for the task.
        :return: False if the task is to run in this process.
        :raises PublishError: if the task was not sent and is to be discarded.
        """
        # Celery's setting task_always_eager is to run without a broker.
        if message is None or self._app.conf.task_always_eager:
            return False
        try:
            self._states.get().publisher.publish(message)
        except PublishError as exc:
            if self._discards:
                raise
            log.warning("background task %s runs in this process: %s", task.name, str(exc))
            return False
        return True

    def submit(self, batch: Batch) -> None:
        """Send the registered tasks of a batch; submit the remaining tasks to ``local``.

        If the response is complete, this blocks while sending; else a runner thread sends.

        :raises KeyboardInterrupt: or another exception that stops the server's worker.
        """
        state = self._states.get()
        takes_more = state.ledger.add(batch)
        if not batch.has_messages:
            self._local.submit(batch)
            return
        if batch.response_complete or not takes_more:
            self._send_now(batch)
            return
        batch.not_before = time.monotonic() + START_DELAY
        if not state.threads.submit(batch):
            self._local.submit(batch)  # local sends each task at its turn

    def _send_now(self, batch: Batch) -> None:
        batch.send()
        if batch.next_is_async is None:
            batch.run()  # all tasks are sent: only finish the batch
        else:
            self._local.submit(batch)

    def _send_later(self, batch: Batch) -> None:
        """Send a batch that was put off; runs on a thread of the runner."""
        time.sleep(max(0.0, batch.not_before - time.monotonic()))
        try:
            self._send_now(batch)
        except Exception as exc:  # raised by a user's runner
            log.error("%s did not take %s, which runs here", self._local, batch, exc_info=exc)
            batch.run()

    @property
    def ledger(self) -> Ledger:
        return self._states.get().ledger

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._app.main!r}, local={self._local!r})"


class _State(NamedTuple):
    """A runner's ledger, publisher and threads in one process."""

    ledger: Ledger
    publisher: Publisher
    threads: Workers[Batch]
