"""``RQRunner``: sends registered tasks to RQ's workers.

The runner is imported on first use, since the module needs RQ.
"""

from typing import TYPE_CHECKING

from wsgi_bg._messages.headers import correlation_id, traceparent

if TYPE_CHECKING:
    from wsgi_bg.rq.runner import RQRunner
else:  # hidden: a type checker would accept any name as an attribute

    def __getattr__(name: str) -> object:
        if name != "RQRunner":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from wsgi_bg.rq.runner import RQRunner

        return RQRunner


__all__ = ["RQRunner", "correlation_id", "traceparent"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
