"""``DramatiqRunner``: sends registered tasks to Dramatiq's workers.

The runner is imported on first use, since the module needs Dramatiq.
"""

from typing import TYPE_CHECKING

from wsgi_bg._messages.headers import correlation_id, traceparent

if TYPE_CHECKING:
    from wsgi_bg.dramatiq.runner import DramatiqRunner
else:  # hidden: a type checker would accept any name as an attribute

    def __getattr__(name: str) -> object:
        if name != "DramatiqRunner":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from wsgi_bg.dramatiq.runner import DramatiqRunner

        return DramatiqRunner


__all__ = ["DramatiqRunner", "correlation_id", "traceparent"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
