"""The options of tasks that a process runs and has not added."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgi_bg._tasks.options import Options


class Attached:
    """Keeps the options under which a runner makes calls that another process has added.

    :ivar options: those of the first middleware that was given the runner, or of the first
        with the context of an application; until then those of the constructor.
    """

    def __init__(self, options: Options) -> None:
        self.options: Options = options
        self._is_attached = False

    def attach(self, options: Options) -> None:
        """Use ``options``, those of a middleware, unless a better middleware came earlier."""
        is_better = options.calls.around is not None and self.options.calls.around is None
        if is_better or not self._is_attached:
            self._is_attached = True
            self.options = options
