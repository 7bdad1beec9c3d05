"""The exit of a uWSGI worker with an event loop, which does not run Python's ``atexit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def call_before_exit(call: Callable[[], object]) -> None:
    """Call ``call()`` when uWSGI ends this worker; does nothing under another server.

    uWSGI skips Python's exit if async cores are on (``uwsgi_python_atexit``), but uWSGI's
    gevent loop calls ``uwsgi.atexit``. If the application has set ``uwsgi.atexit``, that
    function is called after ``call()``. A forked worker skips callbacks of its master.
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
