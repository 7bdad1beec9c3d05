"""uWSGI: the exit of a worker with an event loop, which runs no ``atexit`` of Python's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def call_at_exit(call: Callable[[], object]) -> None:
    """Call ``call()`` when uWSGI ends this worker; does nothing under another server.

    uWSGI leaves Python's exit out if it has async cores (``uwsgi_python_atexit``), but its
    gevent loop calls ``uwsgi.atexit``. A function that the application has put there is
    called after ``call()``. A forked worker does not call what its master has registered.
    """
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None:
        return
    of_application = getattr(uwsgi, "atexit", None)
    pid = os.getpid()

    def call_both() -> None:
        try:
            if pid == os.getpid():
                call()
        finally:
            if of_application is not None:
                of_application()

    uwsgi.atexit = call_both  # type: ignore[attr-defined]
