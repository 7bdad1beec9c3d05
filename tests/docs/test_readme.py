"""The README's commands and its fifteen lines work, and the changelog has this version."""

from __future__ import annotations

import configparser
import re
from queue import SimpleQueue

import pytest

import wsgi_bg
from tests.support.examples import EXAMPLES
from tests.support.pages import CHANGELOG, README, ROOT, run

TIMEOUT = 10.0  # seconds


def command(title: str) -> str:
    """The command in the last line of the first shell block below the heading."""
    return README.blocks("sh", title)[0].splitlines()[-1]


def test_the_fifteen_lines_answer_and_then_send_their_mail() -> None:
    printed: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    [block] = README.blocks("python", "Fifteen lines")
    app = run(block, "README.md", print=lambda *words: printed.put(words))["app"]
    answer = app.test_client().post("/orders/ada@example.com", buffered=True)
    assert answer.json == {"message": "Thank you"}
    assert printed.get(timeout=TIMEOUT) == ("To", "ada@example.com", "Your order")


def test_the_fifteen_lines_are_fifteen_at_most() -> None:
    [block] = README.blocks("python", "Fifteen lines")
    assert README.blocks("python")[0] == block
    assert len([line for line in block.splitlines() if line]) <= 15


def test_the_readme_has_150_lines_at_most() -> None:
    assert len(README.text.splitlines()) <= 150


@pytest.mark.parametrize("title", ["Try it", "Run the tests"])
def test_the_extras_that_a_command_installs_exist(title: str) -> None:
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = re.findall(r"'\.\[([\w,]+)\]'", command(title))
    assert len(named) == 1
    assert set(named[0].split(",")) <= set(setup["options.extras_require"])


def test_the_test_command_stands_alone_under_its_heading() -> None:
    assert len(README.blocks("sh", "Run the tests")) == 1
    assert command("Run the tests") == (
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' "
        "&& .venv/bin/pytest -n auto"
    )


def test_the_test_extra_installs_the_program_of_the_test_command() -> None:
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options.extras_require"]["test"].split()
    assert any(requirement.startswith("pytest>") for requirement in wanted)
    assert "pytest-xdist" in wanted  # for -n


def test_the_first_command_serves_the_example_that_the_curl_line_asks() -> None:
    example = EXAMPLES[0]
    module = example.name.removesuffix(".py")
    assert command("Try it").endswith(f" && .venv/bin/wsgi-bg examples.{module}:app")
    assert f"    wsgi-bg examples.{module}:app [--port PORT]\n" in example.source
    curl = f"curl -X {example.method} http://127.0.0.1:8080{example.path}\n"
    assert README.blocks("sh", "Try it")[1] == curl
    assert README.blocks("json", "Try it") == [example.answer]
    assert f"`{example.line.strip()}`" in README.section("Try it")


def test_this_version_is_the_newest_entry_of_the_changelog() -> None:
    entries = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", CHANGELOG.text, re.MULTILINE)
    assert entries[0] == wsgi_bg.__version__
