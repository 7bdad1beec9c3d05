"""Closes responses for test clients, which do not call ``close()``.

Flask's and Werkzeug's clients call ``close()`` only on request, and without ``close()`` no
task runs. So while the pytest fixture is in use, a test client gets a response that is
already read and closed, or a :class:`Stream`, which closes itself at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from wsgi_bg._request.servers import declared_length

if TYPE_CHECKING:
    from wsgi_bg._request.observer import Response


class Stream:
    """A response that closes itself at its end.

    :param on_close: called after the client or the end of the response has closed the
        response, on the same thread; an error of ``on_close`` is raised to the client.
    :param whole: True to read also a response of unknown length in one step.
    :ivar is_over: True if the response was closed, but not by :meth:`cut`.
    """

    def __init__(
        self, response: Response, on_close: Callable[[], None], *, whole: bool
    ) -> None:
        self._response = response
        self._on_close = on_close
        self._whole = whole
        self._chunks = self._read_later()
        self._is_cut = False
        self.is_over: bool = False

    def read(self) -> Iterable[bytes]:
        """Read the response and close it; if its length is unknown, read only the first chunk.

        :return: the chunks. If the application raised, an iterator over the chunks that
            raises the same error at the same place.
        :raises BaseException: as :meth:`close` does.
        """
        seen: list[bytes] = []
        chunks = iter(self._response)
        try:
            # Not list(chunks), which would lose the chunks before an error.
            for chunk in chunks:
                seen.append(chunk)
                # Only now: the application may call start_response with its first chunk.
                if not (self._whole or self._has_length()):
                    self._chunks = chain(seen, chunks)
                    return self._chunks
        except BaseException as exc:
            self._close_after_error()
            if isinstance(exc, Exception):
                return _replay(seen, exc)
            raise
        self.close()
        return seen

    def _read_later(self) -> Iterator[bytes]:
        yield from self.read()

    def _has_length(self) -> bool:
        headers = self._response.headers or ()
        return hasattr(self._response, "__len__") or declared_length(headers) > 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._is_cut:
            raise RuntimeError(
                "the fixture background_tasks was used, or the test ended, before this "
                "response was read to its end, and has closed it: read it first"
            )
        try:
            return next(self._chunks)
        except StopIteration:
            self.close()
            raise
        except BaseException:
            self._close_after_error()
            raise

    def _close_after_error(self) -> None:
        self.is_over = True  # raise no second error to the client
        self._response.close()

    def close(self) -> None:
        """Close the response; the client calls this, or the end of the response.

        :raises BaseException: the error of the application's ``close()``, or of ``on_close``.
        """
        if not self.is_over:  # a client closes twice
            self.is_over = True
            self._response.close()
            self._on_close()

    def cut(self) -> None:
        """Close the response if the client has not; on any thread.

        :raises BaseException: the error of the application's ``close()``.
        """
        if not self.is_over:
            self._is_cut = True
            self._response.close()


def _replay(chunks: list[bytes], exc: Exception) -> Iterator[bytes]:
    yield from chunks
    raise exc
