"""Celery's request for a registered function, in the worker's main process."""

from __future__ import annotations

from celery.app.task import Context
from celery.worker import request

from wsgi_bg.celery import messages, worker
from wsgi_bg.exceptions import MessageError


class _Request(request.Request):  # type: ignore[misc]
    """Rejects a message that no worker of this version can read, in place of acknowledging it.

    Without ``acks_late`` Celery acknowledges a message when a process begins its task. The task
    finds the same error and fails. The broker can keep a rejected message: RabbitMQ passes the
    message to the queue's dead letter exchange.
    """

    def acknowledge(self) -> None:
        """Tell the broker that the message is done, or that it is refused."""
        if self.acknowledged or self._is_readable:
            super().acknowledge()
        else:
            self.reject(requeue=False)

    @property
    def _is_readable(self) -> bool:
        try:
            messages.read(
                self.type,
                self.args,
                self.kwargs,
                Context(self.request_dict),
                plain_calls=worker.takes_plain_calls(self.app),
            )
        except MessageError:
            return False
        return True
