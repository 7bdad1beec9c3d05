"""Closes responses for test clients, which do not call ``close()``.

Flask's and Werkzeug's clients call ``close()`` only on request, and without ``close()`` no
task runs. So while the pytest fixture is in use, a test client gets a response that is
already read and closed, or a :class:`Stream`, which closes itself at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from wsgi_bg._request.body import Body, SizedBody
from wsgi_bg._request.servers import BODYLESS


def is_finite(body: Body) -> bool:
    """True if a response may be read to its end before the client reads the response."""
    environ, tasks = body._environ, body._tasks
    if isinstance(body, SizedBody) or environ.get("REQUEST_METHOD") == "HEAD":
        return True
    if "paste.testing" in environ:
        return True  # WebTest reads every response, and drops a TypeError meanwhile
    if getattr(tasks, "_status", "").startswith(BODYLESS):
        return True
    return any(name.lower() == "content-length" for name, _ in getattr(tasks, "_headers", ()))


def read(body: Body, chunks: Iterator[bytes]) -> tuple[Iterable[bytes], bool]:
    """Read the remaining chunks of a response and close the response.

    :param chunks: the unfinished iteration over ``body``.
    :return: the chunks and True; if the application raised, an iterator over the chunks that
        raises the same error at the same place, and False.
    :raises BaseException: the error of the application's ``close()``.
    """
    seen: list[bytes] = []
    try:
        # Not list(chunks), which would lose the chunks before an error.
        for chunk in chunks:
            seen.append(chunk)
    except Exception as exc:
        return _replay(seen, exc), False
    finally:
        body.close()
    return seen, True


def _replay(chunks: list[bytes], exc: Exception) -> Iterator[bytes]:
    yield from chunks
    raise exc


def _nothing() -> None:
    """Do nothing: the callback of a stream that has already called its ``on_close``."""


def _not_the_end(call: Callable[[], None]) -> None:
    """Make a call within ``__next__``: a task's ``StopIteration`` must not end the stream."""
    try:
        call()
    except StopIteration as exc:
        raise RuntimeError("a background task raised StopIteration") from exc


class Stream:
    """A response of unknown length, which closes itself at its end.

    :param body: the response.
    :param on_close: called after the end of the stream, or the client, has closed the
        stream, on the same thread; an error of ``on_close`` is raised to the client.
    """

    def __init__(self, body: Body, on_close: Callable[[], None]) -> None:
        self._body = body
        self._on_close = on_close
        self._chunks: Iterator[bytes] | None = None
        self._is_over = self._is_cut = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._is_cut:
            raise RuntimeError(
                "the fixture background_tasks was used, or the test ended, before this "
                "response was read to its end, and has closed it: read it first"
            )
        if self._chunks is None:
            return self._first()
        try:
            return next(self._chunks)
        except StopIteration:
            _not_the_end(self.close)
            raise
        except BaseException:
            self._on_close = _nothing  # raise no second error to the client
            self._close()
            raise

    def _first(self) -> bytes:
        """Return the first chunk, before which the application must call start_response."""
        self._chunks = iter(self._body)
        chunk = next(self)
        if is_finite(self._body):
            self._is_over = True
            rest, is_whole = read(self._body, self._chunks)
            self._chunks = iter(rest)
            if is_whole:
                _not_the_end(self.close)
            self._on_close = _nothing
        return chunk

    def close(self) -> None:
        """Close the stream; the client calls this, or the end of the stream.

        :raises BaseException: the error of the application's ``close()``, or of ``on_close``.
        """
        on_close, self._on_close = self._on_close, _nothing  # once: a client closes twice
        self._close()
        on_close()

    def _close(self) -> None:
        self._is_over = True
        self._body.close()

    def cut(self) -> None:
        """Close the stream if the client has not; on any thread.

        :raises BaseException: the error of the application's ``close()``.
        """
        self._is_cut = not self._is_over
        self._close()
