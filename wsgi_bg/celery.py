"""``CeleryRunner``: registered tasks go to Celery's workers, all others stay here."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import celery_headers, log, registry
from .celery_headers import correlation_id, traceparent
from .celery_options import NO_OPTIONS
from .checks import seconds
from .encoding import encode
from .exceptions import (
    ExtraMissingError,
    NameTakenError,
    OptionTypeError,
    OptionValueError,
    PublishError,
    RegistrationError,
)
from .process import PerProcess
from .runners import Runner, Statistics, resolve
from .runners.ledger import Ledger
from .runners.pool import PUT_OFF
from .workers import Workers

try:
    from celery import Celery
except ImportError as _exc:
    raise ExtraMissingError("celery", "wsgi_bg.celery") from _exc

from . import celery_worker
from .publishing import Message, Publisher

if TYPE_CHECKING:
    from .batch import Batch
    from .task import BackgroundTask

__all__ = ["CeleryRunner", "correlation_id", "traceparent"]

OnPublishError = Literal["local", "discard"]

_CREW = 4  # threads for the batches of responses that must not wait for the broker


class CeleryRunner:
    """Sends each task whose function is registered to Celery; the others run on ``local``.

    The functions are tasks of ``celery_app`` under their names, those registered later
    too, once the module that makes the runner is imported. So the worker loads that module:
    ``celery -A module worker``.

    The arguments are encoded when a task is added: one that a worker would not get back as
    it is raises ``TypeError`` there, and what changes later is not seen. The tasks are sent
    when the response is closed, on the server's thread if the response is complete, and on
    a thread of the runner if not: no client waits for the broker. A batch's registered
    tasks are sent in order before its others run; workers keep no order. A task that
    was sent counts as succeeded, and what becomes of it is for the worker to tell.

    :param celery_app: the Celery application; its messages are JSON.
    :param local: the runner for what is not sent, or its name; the shared pool without.
    :param publish_timeout: how long a task waits for the broker, in seconds. When that time
        is up the broker is left alone for as long again, and tasks are treated as below.
    :param on_publish_error: what becomes of a task that could not be sent, or perhaps was:
        ``"local"`` runs it on ``local``, so that it may run twice; ``"discard"`` gives it
        up with an ERROR, and ``on_error`` is told.
    :param drain_timeout: how long interpreter exit waits for tasks to be sent, and for
        those that are not, in seconds.
    :raises ValueError: if a message could make a worker of ``celery_app`` run any code,
        pickle being accepted for one; if an option is out of range.
    :raises TypeError: if an option is of the wrong type.
    """

    work_is_in_ledgers = True

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
        # A socket is given twice as long.
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
        self._crews = PerProcess(lambda: _Crew(self))
        celery_worker.serve(celery_app)

    def check(self, task: BackgroundTask) -> None:
        """Encode the arguments of a task that is added, if its function is registered.

        :raises TypeError: if they cannot be sent, or options of Celery were given for a
            function that is not registered.
        :raises ValueError: if a task of Celery's own has the name.
        """
        registration = registry.find(task.func)
        given: Mapping[str, Any] = task._options.celery or {}
        if registration is None:
            if given:
                raise RegistrationError(
                    f"{task.name} has options for Celery, and is not registered: decorate "
                    "it with @registered_task",
                    task.func,
                )
            return
        name = registration.name
        if not celery_worker.is_served(self._app.tasks.get(name)):
            raise NameTakenError(name, f"a task of {self._app!r}")
        text = encode(name, registration.signature, task.args, task.kwargs)
        options = {**(registration.celery or NO_OPTIONS).message, **given}
        task._encoded = Message(name, text, celery_headers.current(), options)

    def may_send(self, task: BackgroundTask) -> bool:
        """Whether :meth:`send` has anything to do for a task; does not block."""
        return hasattr(task, "_encoded")

    def send(self, task: BackgroundTask) -> bool:
        """Send a task to the broker; blocks for ``publish_timeout`` at most.

        :return: False if it is to run here.
        :raises PublishError: if it was not sent and is to be given up.
        """
        try:
            message: Message = task._encoded
            del task._encoded  # sent once, and kept no longer
        except AttributeError:
            return False
        if self._app.conf.task_always_eager:  # Celery's way to run without a broker
            return False
        try:
            self._crews.get().publisher.publish(message)
        except PublishError as exc:
            if self._discards:
                raise
            log.warning("background task %s runs in this process: %s", task.name, str(exc))
            return False
        return True

    def submit(self, batch: Batch) -> None:
        """Send the registered tasks of a batch and give the others to ``local``.

        Blocks while it sends if the response is complete; if not, a thread does that.

        :raises KeyboardInterrupt: or what else stops the server's worker.
        """
        crew = self._crews.get()
        takes_more = crew.ledger.add(batch)
        if not any(map(self.may_send, batch.tasks)):
            self._local.submit(batch)
            return
        if batch.response_complete or not takes_more:
            self._send_now(batch)
            return
        batch.not_before = time.monotonic() + PUT_OFF
        if not crew.threads.submit(batch):
            self._local.submit(batch)  # which sends each task at its turn

    def _send_now(self, batch: Batch) -> None:
        batch.send()
        if batch.next_is_async is None:
            batch.run()  # nothing but its end
        else:
            self._local.submit(batch)

    def _send_later(self, batch: Batch) -> None:
        """On a thread of the runner."""
        time.sleep(max(0.0, batch.not_before - time.monotonic()))
        try:
            self._send_now(batch)
        except Exception as exc:  # of a user's runner
            log.error("%s did not take %s, which runs here", self._local, batch, exc_info=exc)
            batch.run()

    def drain(self, timeout: float) -> list[BackgroundTask]:
        """Wait until all is sent and what runs here is done; blocks.

        :param timeout: seconds to wait at most.
        :return: the tasks that were not finished by then. They go on.
        """
        return self._crews.get().ledger.drain(timeout)

    def abandon(self) -> list[BackgroundTask]:
        """Let no batch begin another task; return the tasks left undone. Does not block."""
        return self._crews.get().ledger.abandon()

    def statistics(self) -> Statistics:
        """Numbers of tasks, those on ``local`` included; one that was sent has succeeded."""
        return self._crews.get().ledger.statistics()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._app.main!r}, local={self._local!r})"


class _Crew:
    """What a runner has in one process."""

    def __init__(self, runner: CeleryRunner) -> None:
        self.ledger = Ledger()
        self.publisher = Publisher(runner._app, runner._timeout)
        self.threads: Workers[Batch] = Workers(runner._send_later, _CREW, "wsgi_bg-celery")
