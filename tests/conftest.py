"""Fixtures of the whole suite."""

from __future__ import annotations

import logging

import pytest


class Log:
    """What the package has logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def at(self, level: int) -> list[str]:
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name == "wsgi_bg" and record.levelno == level
        ]

    @property
    def warnings(self) -> list[str]:
        return self.at(logging.WARNING)

    @property
    def errors(self) -> list[str]:
        return self.at(logging.ERROR)

    @property
    def tracebacks(self) -> list[BaseException]:
        return [
            record.exc_info[1]
            for record in self._caplog.records
            if record.name == "wsgi_bg" and record.exc_info and record.exc_info[1]
        ]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.DEBUG, logger="wsgi_bg")
    return Log(caplog)
