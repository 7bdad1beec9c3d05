"""``CeleryRunner``: sends registered tasks to Celery's workers.

The runner is imported on first use: the options of ``registered_task(celery=...)`` are checked
in processes that have no Celery, too.
"""

from typing import TYPE_CHECKING

from wsgi_bg._messages.headers import correlation_id, traceparent

if TYPE_CHECKING:
    from wsgi_bg.celery.runner import CeleryRunner
else:  # hidden: a type checker would accept any name as an attribute

    def __getattr__(name: str) -> object:
        if name != "CeleryRunner":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from wsgi_bg.celery.runner import CeleryRunner

        return CeleryRunner


__all__ = ["CeleryRunner", "correlation_id", "traceparent"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
