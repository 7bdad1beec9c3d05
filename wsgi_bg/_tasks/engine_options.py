"""Options of engines such as Celery, checked and read only by the engine's own module.

The engine's module is imported by name with the first such option. So the core imports no
engine, and a wrong option fails at the line that gives it, even if the runner ignores options
of that engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_CHECKED_BY = {"celery": "wsgi_bg.celery.options"}


def for_function(engine: str, given: Any) -> Any:
    """Check options of ``registered_task`` and sort them for the engine's runner.

    :raises TypeError: if a value is of the wrong type.
    :raises ValueError: if an option is unknown, or a value is out of range.
    """
    return import_module(_CHECKED_BY[engine]).for_function(given)


def for_one_call(engine: str, given: Any) -> Any:
    """Check options of ``using``; raises as :func:`for_function` does."""
    return import_module(_CHECKED_BY[engine]).for_one_call(given)
