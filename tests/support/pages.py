"""The README and the pages of the documentation, for the tests that read and run them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Page:
    """A Markdown file of the project.

    :ivar path: from the root of the project, with slashes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text(encoding="utf-8")

    def __repr__(self) -> str:
        return self.path

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Each line with the text of its heading; no text if the line is no heading."""
        is_code = False
        for line in self.text.splitlines(keepends=True):
            is_code ^= line.startswith("```")
            heading = None if is_code else re.match(r"#+ (.*)", line)
            yield line, heading[1] if heading else ""

    @property
    def titles(self) -> list[str]:
        """All headings, in order."""
        return [title for _, title in self._lines() if title]

    @property
    def anchors(self) -> list[str]:
        """The anchors that GitHub derives from the headings."""
        words = [re.sub(r"[^\w -]", "", title.lower()) for title in self.titles]
        return [word.replace(" ", "-") for word in words]

    @property
    def links(self) -> list[str]:
        """The targets of all links outside of code blocks."""
        prose = re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", self.text)
        return re.findall(r"\]\(([^)]*)\)", prose)

    def section(self, title: str) -> str:
        """The text below the heading, up to the next heading."""
        found = ""
        is_inside = False
        for line, heading in self._lines():
            if heading:
                is_inside = heading == title
            elif is_inside:
                found += line
        assert found, f"{self.path} has no section {title!r}"
        return found

    def rows(self, title: str) -> dict[str, list[str]]:
        """The table below the heading: a dict of the rows' cells, by the first cell."""
        lines = [line for line in self.section(title).splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        return {name.strip("`"): rest for name, *rest in cells}

    def blocks(self, language: str, title: str | None = None) -> list[str]:
        """The code blocks of the page, or of the section below the heading."""
        text = self.text if title is None else self.section(title)
        return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


README = Page("README.md")
CHANGELOG = Page("CHANGELOG.md")
CONTRIBUTING = Page("CONTRIBUTING.md")
DOCS = [
    Page(path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / "docs").rglob("*.md"))
]


def run(block: str, title: str, **names: Any) -> dict[str, Any]:
    """Run a block in a new namespace, and the tests that the block defines.

    If a test takes a fixture, pytest runs the tests, as for the reader.
    """
    namespace = {"__name__": "block", **names}
    exec(compile(block, title, "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    if any(inspect.signature(test).parameters for test in tests):
        _run_by_pytest(block)
    else:
        for test in tests:
            test()
    return namespace


def _run_by_pytest(source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_block.py").write_text(source, encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "--strict-markers", "-W", "error"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout
