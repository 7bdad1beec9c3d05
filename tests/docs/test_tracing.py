"""The blocks of the pages about traces and logs, which change their process for good, run."""

from __future__ import annotations

import pytest

from tests.support import run_python
from tests.support.pages import Page

BLOCKS = [
    pytest.param(block, id=f"{page.path}-{number}")
    for page in (Page("docs/how-to/tracing.md"), Page("docs/how-to/logging.md"))
    for number, block in enumerate(page.blocks("python"))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_runs_in_a_process_of_its_own(block: str) -> None:
    done = run_python(block)
    assert done.returncode == 0, done.stderr
