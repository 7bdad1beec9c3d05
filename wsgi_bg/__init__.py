"""FastAPI's ``BackgroundTasks`` for every WSGI application.

Add a function while you handle a request. The function runs after the response, and no
response waits for its own tasks on any server.

Each name is imported on first use. pytest imports this package for its plugin, and test runs
that do not use the plugin should not pay for Werkzeug.
"""

# Imported here because concurrent.futures.thread cannot be imported after the main thread has
# ended, and a thread may use one of the names below for the first time after that.
import concurrent.futures.thread as _futures  # noqa: F401
import threading as _threading
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from wsgi_bg._version import __version__

__all__ = [
    "ENVIRON_KEY",
    "BackgroundTask",
    "BackgroundTasks",
    "BackgroundTasksMiddleware",
    "DurableRunner",
    "InlineRunner",
    "PoolRunner",
    "Retry",
    "__version__",
    "background_tasks",
    "drain",
    "get_background_tasks",
    "inject",
    "portal",
    "registered_task",
    "serve",
    "wait",
]

# The module that defines each name.
_HOMES = {
    "ENVIRON_KEY": "_tasks.current",
    "BackgroundTask": "_tasks.task",
    "BackgroundTasks": "_tasks.background_tasks",
    "BackgroundTasksMiddleware": "_request.middleware",
    "DurableRunner": "_durable.runner",
    "InlineRunner": "runners",
    "PoolRunner": "runners",
    "Retry": "_tasks.retry",
    "background_tasks": "_tasks.current",
    "drain": "runners.shutdown",
    "get_background_tasks": "_tasks.current",
    "inject": "_request.injection",
    "portal": "_loop.portal",
    "registered_task": "_tasks.registry",
    "serve": "_serving.serve",
    "wait": "runners.shutdown",
}

# Held while a name is imported. If two threads imported a package and a module of it at the
# same moment, Python would raise a _DeadlockError.
_lock = _threading.RLock()

# Modules for which ``import wsgi_bg`` is enough; 0.2 imported the first four with the package.
_MODULES = {"exceptions", "hooks", "runners", "shutdown", "status"}

if TYPE_CHECKING:
    from wsgi_bg import exceptions as exceptions
    from wsgi_bg import hooks as hooks
    from wsgi_bg import runners as runners
    from wsgi_bg import shutdown as shutdown
    from wsgi_bg import status as status
    from wsgi_bg._durable.runner import DurableRunner
    from wsgi_bg._loop.portal import portal
    from wsgi_bg._request.injection import inject
    from wsgi_bg._request.middleware import BackgroundTasksMiddleware
    from wsgi_bg._serving.serve import serve
    from wsgi_bg._tasks.background_tasks import BackgroundTasks
    from wsgi_bg._tasks.current import ENVIRON_KEY, background_tasks, get_background_tasks
    from wsgi_bg._tasks.registry import registered_task
    from wsgi_bg._tasks.retry import Retry
    from wsgi_bg._tasks.task import BackgroundTask
    from wsgi_bg.runners import InlineRunner, PoolRunner
    from wsgi_bg.runners.shutdown import drain, wait
else:  # hidden: a type checker would accept any name as an attribute

    def __getattr__(name: str) -> object:
        if name not in _HOMES and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with _lock:
            module = _import_module(f".{_HOMES.get(name, name)}", __name__)
        value = module if name in _MODULES else getattr(module, name)
        globals()[name] = value  # for the next use
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
