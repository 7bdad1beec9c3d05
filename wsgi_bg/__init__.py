"""FastAPI's ``BackgroundTasks`` for every WSGI application.

Add a function while you handle a request; it runs after the response, and no response
waits for its own tasks, whatever the server.
"""

from .context import ENVIRON_KEY, background_tasks, get_background_tasks
from .injection import inject
from .middleware import BackgroundTasksMiddleware
from .registry import registered_task
from .runners import InlineRunner, PoolRunner
from .serving import serve
from .shutdown import drain, wait
from .task import BackgroundTask
from .tasks import BackgroundTasks

__all__ = [
    "ENVIRON_KEY",
    "BackgroundTask",
    "BackgroundTasks",
    "BackgroundTasksMiddleware",
    "InlineRunner",
    "PoolRunner",
    "__version__",
    "background_tasks",
    "drain",
    "get_background_tasks",
    "inject",
    "registered_task",
    "serve",
    "wait",
]

__version__ = "0.2.0"
