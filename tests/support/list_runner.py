"""An engine without workers: its messages go to a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from wsgi_bg.outbox import Connection, EncodedCall, EngineOptions, Message, OutboxRunner


class ListRunner(OutboxRunner):
    """Sends to a list. ``sent`` has the batches; ``away`` makes the broker refuse."""

    engine_options: ClassVar[EngineOptions] = {"weight": ((int, float), "a number")}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sent: list[list[EncodedCall]] = []
        self.away = False

    def connect(self) -> Connection:
        return ToList(self)


class ToList(Connection):
    def __init__(self, runner: ListRunner) -> None:
        self._runner = runner

    def send(self, messages: Sequence[Message], confirmed: Callable[[int], object]) -> None:
        if self._runner.away:
            raise ConnectionError
        self._runner.sent.append([each.data for each in messages])
        for index in range(len(messages)):
            confirmed(index)
