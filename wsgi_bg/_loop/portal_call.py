"""``PortalCall``: a call of the portal, and the event that its thread waits for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from wsgi_bg._process.greenlets import event


class _Portal(Protocol):
    def cancel_call(self, call: Future[Any]) -> None:
        """Cancel ``call``, begun or not."""


class PortalCall(Future[Any]):
    """The future of a portal call, which the calling thread can end, even before its begin.

    The thread makes the object before the call: a signal handler may raise as soon as the loop
    knows the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.portal: _Portal | None = None  # the portal that has got the call
        self.ended = ended = event()
        # Added before the loop knows the future: the exception of a signal handler could leave
        # the future's lock locked.
        self.add_done_callback(lambda _: ended.set())

    @property
    def is_pending(self) -> bool:
        """True if the call was made and has neither returned nor raised."""
        return self.portal is not None and not self.ended.wait(0.0)

    def end(self, timeout: float) -> bool:
        """Cancel the call, begun or not, and wait for its end; not on the portal's thread.

        :param timeout: the longest wait, in seconds.
        :return: True if the call has ended.
        """
        if self.portal is None:
            return True
        self.portal.cancel_call(self)
        return bool(self.ended.wait(timeout))
