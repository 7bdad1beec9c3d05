"""The responses of test clients, which leave them open.

Flask's and Werkzeug's clients call ``close()`` only if they are told to, and no task would
run. So while the pytest fixture is in use, what ``BackgroundTasksMiddleware`` gives to a
test client was read and closed before, or closes itself when it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from wsgi_bg.body import Body, SizedBody
from wsgi_bg.servers import BODYLESS


def is_finite(body: Body) -> bool:
    """Whether a response may be read to its end before the client has asked for it."""
    environ, tasks = body._environ, body._tasks
    if isinstance(body, SizedBody) or environ.get("REQUEST_METHOD") == "HEAD":
        return True
    if "paste.testing" in environ:
        return True  # WebTest reads every response, and there drops a TypeError
    if getattr(tasks, "_status", "").startswith(BODYLESS):
        return True
    return any(name.lower() == "content-length" for name, _ in getattr(tasks, "_headers", ()))


def read(body: Body, chunks: Iterator[bytes]) -> tuple[Iterable[bytes], bool]:
    """Read what is left of a response and close it.

    :param chunks: what the iteration over ``body`` has still to give.
    :return: the chunks, and whether they are all: if the application has raised, they are
        an iterator that raises the same at the same place.
    :raises BaseException: what the application's ``close()`` raises.
    """
    seen: list[bytes] = []
    try:
        # No list(chunks): what came before an error is kept.
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
    """Nothing is to be told any more."""


def _not_the_end(call: Callable[[], None]) -> None:
    """Make a call within ``__next__``, where a task's ``StopIteration`` would be the end."""
    try:
        call()
    except StopIteration as exc:
        raise RuntimeError("a background task raised StopIteration") from exc


class Stream:
    """A response of unknown length, which closes itself at its end.

    :param body: the response.
    :param on_close: called after it was closed for its end or by the client, on that
        thread; what it raises goes to the client.
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
            self._on_close = _nothing  # the client gets this error, and no other after it
            self._close()
            raise

    def _first(self) -> bytes:
        """The first chunk, for which an application may at last call ``start_response``."""
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
        """The client closes it, or has read it.

        :raises BaseException: what the application's ``close()`` raises, or ``on_close``.
        """
        on_close, self._on_close = self._on_close, _nothing  # once: a client closes twice
        self._close()
        on_close()

    def _close(self) -> None:
        self._is_over = True
        self._body.close()

    def cut(self) -> None:
        """Close it if the client has not; on any thread.

        :raises BaseException: what the application's ``close()`` raises.
        """
        self._is_cut = not self._is_over
        self._close()
