"""README, CONTRIBUTING and docs: their code runs, their links resolve, no page is forgotten."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.support.pages import CHANGELOG, CONTRIBUTING, DOCS, README, ROOT, Page, run
from wsgi_bg._status.recorder import recorder

WITH_TESTS_OF_THEIR_OWN = {
    "docs/how-to/django.md": "tests/docs/test_django.py",
    "docs/how-to/servers.md": "tests/servers/test_stop.py",
    "docs/how-to/logging.md": "tests/docs/test_tracing.py",
    "docs/how-to/serverless.md": "tests/test_serverless.py",
    "docs/how-to/tracing.md": "tests/docs/test_tracing.py",
}
"""Pages whose blocks do not run alone, each with the test that runs them."""

BLOCKS = [
    pytest.param(block, f"{page.path}, Python block {number}", id=f"{page.path}-{number}")
    for page in (README, CONTRIBUTING, *DOCS)
    if page.path not in WITH_TESTS_OF_THEIR_OWN
    for number, block in enumerate(page.blocks("python"))
]

LINKS = sorted(
    {
        (page, link)
        for page in (README, CONTRIBUTING, CHANGELOG, *DOCS)
        for link in page.links
        if not link.startswith("https://")
    },
    key=str,
)


@pytest.mark.parametrize(("block", "title"), BLOCKS)
def test_each_python_block_runs_alone(
    block: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorder.turn_off()  # a block counts its own tasks alone
    close_database(run(block, title))
    recorder.turn_off()


def close_database(namespace: dict[str, Any]) -> None:
    """Close the connections that Flask-SQLAlchemy keeps, if the block has a database."""
    if "db" in namespace:
        with namespace["app"].app_context():
            for engine in namespace["db"].engines.values():
                engine.dispose()


def test_the_blocks_that_do_not_run_alone_have_tests() -> None:
    for page, test in WITH_TESTS_OF_THEIR_OWN.items():
        assert Page(page).blocks("python")
        assert (ROOT / test).exists()


def test_the_python_blocks_are_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    for number, param in enumerate(BLOCKS):
        block = str(param.values[0])
        if "flask_sqlalchemy" not in block:  # mypy knows no db.Model
            (tmp_path / f"block_{number}.py").write_text(block, encoding="utf-8")
    options = ["--strict", f"--config-file={ROOT / 'setup.cfg'}", f"--cache-dir={tmp_path}"]
    options.append("--no-warn-unused-ignores")
    # mypy rejects Flask's documented way to install a middleware.
    options.append("--disable-error-code=method-assign")
    report, errors, status = api.run([*options, *map(str, tmp_path.glob("*.py"))])
    assert (status, errors) == (0, ""), report


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(value))
def test_each_link_leads_to_a_file_of_the_project_or_a_heading(page: Page, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.path
    if path:
        target = os.path.normpath(PurePosixPath(page.path).parent / path)
    assert not target.startswith("..")
    assert (ROOT / target).exists()
    if anchor:
        assert Page(target).anchors.count(anchor) == 1


def test_the_index_lists_every_page() -> None:
    index = Page("docs/README.md")
    listed = {f"docs/{link}" for link in index.links}
    assert listed == {page.path for page in DOCS} - {index.path}


def test_the_architecture_has_a_room_for_each_module() -> None:
    rows = Page("docs/architecture.md").rows("Rooms")
    named = {
        f"{room}.{module}" if (ROOT / "wsgi_bg" / room).is_dir() else module
        for room, cells in rows.items()
        for module in re.findall("`(.+?)`", cells[0])
    }
    files = (path.relative_to(ROOT / "wsgi_bg") for path in ROOT.glob("wsgi_bg/**/*.py"))
    modules = {".".join(path.with_suffix("").parts) for path in files}
    assert named == {
        name for name in modules if name == "__init__" or not name.endswith("__init__")
    }


def test_the_files_and_benchmarks_that_contributing_names_exist() -> None:
    paths = re.findall(r"(?:tests|wsgi_bg|docs|\.ci)/[\w/-]+(?:\.\w+)?", CONTRIBUTING.text)
    benchmarks = re.findall(r"-m (benchmarks\.\w+)", CONTRIBUTING.text)
    files = [*paths, *(f"{name.replace('.', '/')}.py" for name in benchmarks)]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert len(paths) > 10
    assert len(benchmarks) > 3


LEVELS = {
    "log.error": "ERROR",
    "RepeatedError": "ERROR",
    "log.warning": "WARNING",
    "RepeatedWarning": "WARNING",
    "log.info": "INFO",
    "log.debug": "DEBUG",
}


def logged_messages() -> set[tuple[str, str]]:
    """The levels and the messages of all calls that log, with their placeholders."""
    found = set()
    for path in ROOT.glob("wsgi_bg/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in LEVELS:
                level = LEVELS[ast.unparse(node.func)]
                literals = ast.walk(node.args[0])
                found |= {
                    (level, str(literal.value))
                    for literal in literals
                    if isinstance(literal, ast.Constant) and isinstance(literal.value, str)
                }
    return found


@pytest.mark.parametrize(("level", "message"), sorted(logged_messages()))
def test_the_page_about_log_records_has_each_message_with_its_level(
    level: str, message: str
) -> None:
    section = Page("docs/reference/log-records.md").section(level)
    fixed = re.split(r"%\.?\d*[a-z]", message)
    assert all(part in section for part in fixed)


def test_a_table_says_for_each_runner_what_wait_and_drain_wait_for() -> None:
    page = (ROOT / "docs/reference/exit.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    names = "inline", "pool", "DurableRunner", "CeleryRunner", "RQRunner", "DramatiqRunner"
    assert [name for name in names if not any(name in row for row in rows)] == []
