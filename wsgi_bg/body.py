"""The response iterable that the server gets where its end may have something to do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from .interrupts import is_raised_here
from .request import LEFT, RAISED, USED_UP, Outcome, RequestTasks
from .tasks import ENDED
from .unclosed import Unclosed, collections

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# An iterator that has ended, and ends again each time it is asked.
_NOTHING: Iterator[bytes] = iter(())


class Body:
    """The application's iterable, with the end of the request in its ``close()``.

    It has no ``__next__``: the server iterates over an iterator that holds this object,
    for there are adapters that keep nothing but the iterator. As with
    :class:`~wsgi_bg.request.RequestTasks` the middleware fills its slots.
    """

    __slots__ = ("_app_iter", "_environ", "_guard", "_open", "_outcome", "_tasks")

    _app_iter: Any  # an Iterable[bytes]; each subclass knows of which type
    _environ: WSGIEnvironment
    _guard: Guard  # only if the view has added a task
    _open: list[None]  # emptied by the call of close() that counts
    _outcome: Outcome
    _tasks: RequestTasks

    def __iter__(self) -> Iterator[bytes]:
        """The chunks, untouched."""
        try:
            # No "yield from": when the server lets go of this generator, that would call
            # the iterable's own close(), which is for our close() to do, once.
            for chunk in self._app_iter:  # noqa: UP028
                yield chunk
        except GeneratorExit:  # the server lets go of it: its client has left
            raise
        except BaseException:
            self._outcome = RAISED
            raise
        self._outcome = USED_UP

    def close(self) -> None:
        """Close the application's iterable, then end the request; only the first call does.

        :raises BaseException: what the application's ``close()`` raises, after the tasks
            were run or handed over.
        """
        try:
            self._open.pop()  # one atomic step, whatever threads this is called on
        except IndexError as exc:
            if not is_raised_here(exc):
                raise
            return
        outcome = self._outcome
        if outcome is LEFT:
            outcome = self._look(is_freed=False)
        try:
            close = getattr(self._app_iter, "close", None)
            if close is not None:
                close()
        finally:
            tasks = self._tasks
            if not tasks.end_if_empty():
                tasks.end(self._environ, outcome)

    def _look(self, *, is_freed: bool) -> Outcome:
        """How the iteration has ended, if that did not show."""
        return LEFT

    def __del__(self) -> None:
        # Perhaps within a garbage collection: no more than a put on a SimpleQueue. close()
        # may have been called, and interrupted by the exception of a signal handler.
        try:
            tasks = self._tasks
        except AttributeError:  # the making of this object was interrupted
            return
        if tasks._phase != ENDED and not (tasks.end_if_empty() or tasks._is_handed_over):
            outcome = self._outcome
            if outcome is LEFT:
                outcome = self._look(is_freed=True)
            tasks._collector.queue.put(Unclosed(tasks, self._environ, outcome))


class Guard:
    """Is freed after its :class:`Body`, and does what that one's finalizer may have missed.

    A signal handler may raise in a finalizer, which Python then calls no second time.
    """

    __slots__ = ("_environ", "_tasks")

    def __init__(self, tasks: RequestTasks, environ: WSGIEnvironment) -> None:
        self._tasks = tasks
        self._environ = environ

    def __del__(self) -> None:
        tasks = self._tasks
        if tasks._phase != ENDED and not tasks._is_handed_over:
            tasks._collector.queue.put(Unclosed(tasks, self._environ, LEFT))


class GeneratorBody(Body):
    """A :class:`Body` around a generator, which can be watched without a step a chunk."""

    __slots__ = ("_is_fresh",)

    _is_fresh: bool  # until the first iter()

    def __iter__(self) -> Iterator[bytes]:
        """The chunks, untouched.

        ``chain`` comes back here for what follows the generator once that has ended.
        """
        if self._is_fresh:  # to ask a generator that goes on for its frame makes an object
            self._is_fresh = False
        elif self._app_iter.gi_frame is None:
            self._outcome = USED_UP
            return _NOTHING
        return chain(self._app_iter, self)

    def _look(self, *, is_freed: bool) -> Outcome:
        # A generator that raised has no frame any more; one that was left has, until
        # close() takes it away. A garbage collection that frees both may have called it.
        is_over = self._app_iter.gi_frame is None and not self._is_fresh
        return RAISED if is_over and not (is_freed and collections.are_running) else LEFT


class SizedBody(Body):
    """A :class:`Body` around a list or tuple, which keeps its length.

    Servers make a Content-Length of a sized body of one chunk. eventlet iterates over a
    sized body twice, so nothing but what can be iterated again may have a length.
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._app_iter)
