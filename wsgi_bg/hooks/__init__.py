"""``Hooks``: methods called when a task or a batch changes state, for monitors and tracers."""

from wsgi_bg.hooks.base import BatchRecord, Hooks, TaskRecord

__all__ = ["BatchRecord", "Hooks", "TaskRecord"]
