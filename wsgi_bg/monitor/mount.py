"""``Mount``: an application that has the monitor below a path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wsgi_bg.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

DEFAULT = "/background-tasks"
"""The path of a monitor that is given without a path."""


class Mount:
    """A WSGI application that passes requests below ``at`` to the monitor, all others on."""

    def __init__(self, app: WSGIApplication, monitor: WSGIApplication, at: str) -> None:
        self._app = app
        self._monitor = monitor
        self._at = at.encode().decode("latin-1")  # as PEP 3333 has paths

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a request: PEP 3333's application side."""
        at, path = self._at, environ.get("PATH_INFO", "")
        if not path.startswith(at) or path[len(at) : len(at) + 1] not in ("", "/"):
            return self._app(environ, start_response)
        shifted = {
            **environ,
            "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + at,
            "PATH_INFO": path[len(at) :],
        }
        return self._monitor(shifted, start_response)

    def __repr__(self) -> str:
        return f"<{self._monitor!r} below {self._at!r} of {self._app!r}>"


def check_path(at: object) -> str:
    """Return the path of a monitor.

    :raises TypeError: if ``at`` is no text.
    :raises ValueError: if ``at`` is no path such as ``"/background-tasks"``.
    """
    wanted = "a path such as '/background-tasks', with a slash in front and none at the end"
    if not isinstance(at, str):
        raise OptionTypeError("monitor_at", at, wanted)
    if not at.startswith("/") or at.endswith("/") or "//" in at or set(at) & set("?#%\\"):
        raise OptionValueError("monitor_at", at, wanted)
    return at
