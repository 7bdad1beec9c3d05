"""A pytest plugin: writes the ids of skipped tests, a line each, to the file SKIPPED_TESTS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ids: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _ids.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the process that all reports reach
        text = "".join(f"{each}\n" for each in sorted(_ids))
        Path(os.environ["SKIPPED_TESTS"]).write_text(text, encoding="utf-8")
