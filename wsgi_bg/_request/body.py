"""The response iterable that the server gets if tasks were added or may still be added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from wsgi_bg._process.interrupts import is_raised_here
from wsgi_bg._request.unclosed import ABANDONED, EXHAUSTED, RAISED, UNREAD, Outcome, collections
from wsgi_bg._tasks.background_tasks import ENDED

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_bg._request.request_tasks import RequestTasks

# An exhausted iterator; each call of next() raises StopIteration again.
_NOTHING: Iterator[bytes] = iter(())


class Body:
    """Wraps the application's iterable; ``close()`` ends the request.

    A body has no ``__next__``. The server iterates over an iterator that holds the body,
    because some adapters keep only the iterator.

    :param app_iter: the iterable of bytes; each subclass wraps a certain type.
    """

    __slots__ = ("_app_iter", "_environ", "_guard", "_open", "_outcome", "_tasks")

    def __init__(self, app_iter: Any, environ: WSGIEnvironment, tasks: RequestTasks) -> None:
        self._app_iter = app_iter
        self._environ = environ
        self._outcome = UNREAD  # until the end; a generator's body also sets ABANDONED
        self._open: list[None] = [None]  # emptied by the first call of close()
        self._guard = Guard(environ, tasks) if tasks.is_used else None
        tasks.is_declared_late = not tasks.status
        self._tasks = tasks  # last: see __del__()

    @property
    def headers(self) -> Sequence[tuple[str, str]] | None:
        """Headers of the last call of ``start_response``; None before that call."""
        return self._tasks.headers

    def __iter__(self) -> Iterator[bytes]:
        """The application's chunks, unchanged."""
        try:
            # No "yield from": when the server drops this generator, "yield from" would call
            # the close() of the iterable, which must be called once, by Body.close().
            for chunk in self._app_iter:  # noqa: UP028
                yield chunk
        except GeneratorExit:  # the server drops this generator: the client has left
            raise
        except BaseException:
            self._outcome = RAISED
            raise
        self._outcome = EXHAUSTED

    def close(self) -> None:
        """Close the application's iterable, then end the request; later calls do nothing.

        :raises BaseException: the exception of the application's ``close()``, after the
            tasks were run or handed over.
        """
        try:
            self._open.pop()  # one atomic step: close() may be called on several threads
        except IndexError as exc:
            if not is_raised_here(exc):
                raise
            return
        outcome = self._outcome
        if outcome is ABANDONED:
            outcome = self._look(is_freed=False)
        try:
            close = getattr(self._app_iter, "close", None)
            if close is not None:
                close()
        finally:
            tasks = self._tasks
            if not tasks.close():
                tasks.submit(self._environ, outcome)
                if self._guard is not None:
                    self._guard.is_needed = False

    def _look(self, *, is_freed: bool) -> Outcome:
        """Find how the iteration has ended, if ``__iter__`` did not see the end.

        Called for ABANDONED, the outcome of a generator that was begun.
        """
        raise NotImplementedError

    def __del__(self) -> None:
        # This may run within a garbage collection. A call of close() may have been interrupted
        # by the exception of a signal handler.
        try:
            tasks = self._tasks
        except AttributeError:  # the construction of this body was interrupted
            return
        if tasks.phase != ENDED:
            outcome = self._outcome
            if outcome is ABANDONED:
                outcome = self._look(is_freed=True)
            tasks.collect(self._environ, outcome)
            if self._guard is not None:
                self._guard.is_needed = False


class Guard:
    """Is freed after its :class:`Body`, and ends the request if the body's finalizer failed.

    A signal handler may raise in a finalizer, and Python calls no finalizer a second time.
    """

    __slots__ = ("_environ", "_tasks", "is_needed")

    def __init__(self, environ: WSGIEnvironment, tasks: RequestTasks) -> None:
        self.is_needed: bool = True
        self._environ = environ
        self._tasks = tasks

    def __del__(self) -> None:
        if self.is_needed:
            self._tasks.collect(self._environ, ABANDONED)


class GeneratorBody(Body):
    """A :class:`Body` around a generator; no Python code of the body runs for each chunk."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        """The application's chunks, unchanged.

        ``chain`` calls this again when the generator has ended.
        """
        if self._outcome is UNREAD:  # do not read gi_frame, which makes an object here
            self._outcome = ABANDONED
        elif self._app_iter.gi_frame is None:
            self._outcome = EXHAUSTED
            return _NOTHING
        return chain(self._app_iter, self)

    def _look(self, *, is_freed: bool) -> Outcome:
        # A generator that raised has no frame. An unfinished generator has a frame until its
        # close() is called, which a garbage collection that frees body and generator may do.
        is_over = self._app_iter.gi_frame is None
        return RAISED if is_over and not (is_freed and collections.are_running) else ABANDONED


class SizedBody(Body):
    """A :class:`Body` around a list or tuple, with the same length.

    Servers derive a Content-Length from a sized body of one chunk. eventlet iterates over a
    sized body twice, so only a body that can be iterated again may have a length.
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._app_iter)
