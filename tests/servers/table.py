"""The table at the end of the run: set-up by kind of response, and further columns."""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest

import pytest

from tests.servers.kinds import KINDS
from tests.servers.setups import CLOSES, MISSING, SETUPS, SILENT, Setup

COLUMN = "column"
"""The marker that names a test's column; the default is the kind of response."""

_CELL = "wsgi_bg cell"

Outcomes = defaultdict[tuple[str, str], set[str]]


def note(item: pytest.Item) -> None:
    """Store the cell of the table that this test stands for in the test's reports."""
    callspec = getattr(item, "callspec", None)
    marker = item.get_closest_marker(COLUMN)
    if callspec is not None and isinstance(setup := callspec.params.get("setup"), Setup):
        column = marker.args[0] if marker else callspec.params.get("kind")
        if column is not None:
            item.user_properties.append((_CELL, (setup.name, column)))


def write(reporter: pytest.TerminalReporter) -> None:
    """Print the table, unless the table is empty."""
    outcomes: Outcomes = defaultdict(set)
    for outcome in ("passed", "failed"):
        for report in reporter.getreports(outcome):
            for key, cell in report.user_properties:
                if key == _CELL:
                    setup, column = cell  # a tuple, or a list from a worker of pytest -n
                    outcomes[setup, column].add(outcome)
    columns = [*KINDS, *sorted({column for _, column in outcomes} - {*KINDS})]
    if outcomes:
        reporter.section("the response is complete before its task goes on")
        for line in _lines(outcomes, columns):
            reporter.write_line(line)


def _lines(outcomes: Outcomes, columns: list[str]) -> list[str]:
    heads = [column.split("-") for column in columns]
    rows: list[list[str]] = [["", *words] for words in zip_longest(*heads, fillvalue="")]
    for setup in SETUPS:
        seen = [outcomes.get((setup.name, column), set()) for column in columns]
        if any(seen):
            cells = map(_cell, [setup] * len(columns), columns, seen)
            rows.append([setup.name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return lines + [f"{name}: not run: {why}" for name, why in MISSING.items() if why]


def _cell(setup: Setup, column: str, outcomes: set[str]) -> str:
    if not outcomes:
        return "-"
    if outcomes != {"passed"}:
        return "NO"
    instead = setup.instead.get(column, "yes")
    return {CLOSES: "closes", SILENT: "silent"}.get(str(instead), str(instead))
