"""What docs/servers.md says, for the tests that try it."""

from __future__ import annotations

import re
from configparser import ConfigParser

from tests.servers.process import ROOT

TEXT = (ROOT / "docs/servers.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under the heading, up to the next one."""
    sections: list[str] = re.split(r"^#+ ", TEXT, flags=re.MULTILINE)
    return next(text for text in sections if text.startswith(f"{title}\n"))


def rows(title: str) -> dict[str, list[str]]:
    """The table under the heading: its cells, by the name in the first one."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name.strip("`"): rest for name, *rest in cells}


def blocks(title: str, language: str) -> list[str]:
    """The blocks of code under the heading."""
    pattern = rf"^```{language}\n(.*?)^```$"
    found: list[str] = re.findall(pattern, section(title), re.DOTALL | re.MULTILINE)
    return found


def block(title: str, language: str) -> str:
    """The first block of code under the heading; empty if there is none."""
    return next(iter(blocks(title, language)), "")


def title_of(link: str) -> str:
    """The heading that a link of this page leads to."""
    anchor = link.partition("(#")[2].rstrip(")")
    titles: list[str] = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    return next(title for title in titles if title.lower().replace(" ", "-") == anchor)


def uwsgi_options() -> list[str]:
    """The file of options under "uWSGI", as those of a command."""
    parser = ConfigParser()
    parser.read_string(block("uWSGI", "ini"))
    options = [(f"--{key}", value) for key, value in parser["uwsgi"].items()]
    return [word for pair in options for word in pair if word != "true"]
