"""What is otherwise where gevent runs: threads that are greenlets, waits that stop a hub.

gevent runs many greenlets on one thread and switches between them where one of them waits
by gevent's means. With ``monkey.patch_all()`` those of :mod:`threading` are gevent's, and
its threads are greenlets; without, a wait for another thread stops all greenlets of this
one. Nothing here imports gevent: where the application has not, there is no greenlet.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any


def are_threads() -> bool:
    """Whether a ``threading.Thread`` would be a greenlet (of the thread that starts it)."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def start_real_thread(target: Callable[[], object], name: str) -> None:
    """Call ``target()`` on a daemon thread of the operating system, patched or not."""
    if are_threads():
        sys.modules["gevent.monkey"].get_original("_thread", "start_new_thread")(target, ())
    else:
        threading.Thread(target=target, name=name, daemon=True).start()


def event() -> Any:
    """An event that another thread may set and whose ``wait()`` lets greenlets run."""
    gevent = sys.modules.get("gevent")
    if gevent is not None and isinstance(gevent.getcurrent(), gevent.Greenlet):
        return sys.modules["gevent.event"].Event()
    return threading.Event()
