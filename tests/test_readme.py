"""The README and the changelog say what is the case."""

from __future__ import annotations

import configparser
import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import wsgi_bg
from tests.test_examples import EXAMPLES, FOLDER

ROOT = FOLDER.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in ("docs/celery.md", "docs/what-to-hand-to-a-task.md")
}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
TIMEOUT = 10.0  # seconds


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    """What stands under the heading of level two."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def command(title: str) -> str:
    """The last line of the first shell block under the heading: the command itself."""
    return blocks("sh", section(title))[0].splitlines()[-1]


def run_block(number: int, **names: Any) -> dict[str, Any]:
    """Run a Python block of the README; see :func:`run`."""
    return run(blocks("python")[number], f"README.md, Python block {number}", **names)


def run(block: str, title: str, **names: Any) -> dict[str, Any]:
    """Run a block in a namespace of its own, and the tests that it defines.

    If one of them takes a fixture, pytest runs them, as the reader will.
    """
    namespace = {"__name__": "block", **names}
    exec(compile(block, title, "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    if any(inspect.signature(test).parameters for test in tests):
        run_by_pytest(block)
    else:
        for test in tests:
            test()
    return namespace


def run_by_pytest(source: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_readme.py").write_text(source, encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "--strict-markers", "-W", "error"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_each_python_block_runs_on_its_own(number: int) -> None:
    run_block(number)


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, n) for page, text in PAGES.items() for n in range(len(blocks("python", text)))],
)
def test_each_python_block_of_a_page_runs_on_its_own(page: str, number: int) -> None:
    run(blocks("python", PAGES[page])[number], f"{page}, Python block {number}")


def test_the_python_blocks_are_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    for number, block in enumerate(blocks("python")):
        (tmp_path / f"block_{number}.py").write_text(block, encoding="utf-8")
    options = [
        "--strict",
        "--no-warn-unused-ignores",
        f"--config-file={ROOT / 'setup.cfg'}",
        f"--cache-dir={tmp_path}",
    ]
    # How Flask's documentation installs a middleware is an error to mypy.
    options.append("--disable-error-code=method-assign")
    report, errors, status = api.run([*options, *map(str, tmp_path.glob("*.py"))])
    assert (status, errors) == (0, ""), report


def test_the_fifteen_lines_answer_and_then_send_their_mail() -> None:
    printed: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    app = run_block(0, print=lambda *words: printed.put(words))["app"]
    answer = app.test_client().post("/orders/ada@example.com", buffered=True)
    assert answer.json == {"message": "Thank you"}
    assert printed.get(timeout=TIMEOUT) == ("To", "ada@example.com", "Your order")


def test_the_fifteen_lines_are_fifteen_at_most() -> None:
    assert blocks("python", section("Fifteen lines")) == blocks("python")[:1]
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 15


@pytest.mark.parametrize("title", ["Try it", "Run the tests"])
def test_the_extras_that_a_command_installs_exist(title: str) -> None:
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = re.findall(r"'\.\[([\w,]+)\]'", command(title))
    assert len(named) == 1
    assert set(named[0].split(",")) <= set(setup["options.extras_require"])


def test_the_test_command_stands_alone_under_its_heading() -> None:
    assert len(blocks("sh", section("Run the tests"))) == 1
    assert command("Run the tests") == (
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    )


def test_the_test_extra_installs_what_the_test_command_starts() -> None:
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options.extras_require"]["test"].split()
    assert any(requirement.startswith("pytest>") for requirement in wanted)


def test_the_first_command_serves_the_example_that_the_curl_line_asks() -> None:
    example = EXAMPLES[0]
    module = example.name.removesuffix(".py")
    assert command("Try it").endswith(f" && .venv/bin/wsgi-bg examples.{module}:app")
    assert f"    wsgi-bg examples.{module}:app [--port PORT]\n" in example.source
    curl = f"curl -X {example.method} http://127.0.0.1:8080{example.path}\n"
    assert blocks("sh", section("Try it"))[1] == curl
    assert blocks("json", section("Try it")) == [example.answer]
    assert f"`{example.line.strip()}`" in section("Try it")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]*)\)", README))
def test_each_link_leads_to_a_file_of_the_project_or_a_heading(link: str) -> None:
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    words = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
    anchors = {"#" + heading.replace(" ", "-") for heading in words}
    assert link in anchors or (ROOT / link).exists()


def test_this_version_is_the_newest_entry_of_the_changelog() -> None:
    entries = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)
    assert entries[0] == wsgi_bg.__version__
