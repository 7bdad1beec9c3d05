"""``Hooks``: methods called when a task changes state, for monitors and tracers."""

from wsgi_bg._tasks.hooks import Hooks, TaskRecord

__all__ = ["Hooks", "TaskRecord"]
