"""The page about servers, for the tests that check the page's claims."""

from __future__ import annotations

from configparser import ConfigParser

from tests.support.pages import Page

PAGE = Page("docs/how-to/servers.md")


def code_of(title: str) -> str:
    """The first block of Python below the heading; empty if there is none."""
    return next(iter(PAGE.blocks("python", title)), "")


def title_of(link: str) -> str:
    """The heading of this page that a link points to."""
    anchor = link.partition("(#")[2].rstrip(")")
    return PAGE.titles[PAGE.anchors.index(anchor)]


def uwsgi_options() -> list[str]:
    """The options of the file below "uWSGI", as options of a command."""
    parser = ConfigParser()
    parser.read_string(PAGE.blocks("ini", "uWSGI")[0])
    options = [(f"--{key}", value) for key, value in parser["uwsgi"].items()]
    return [word for pair in options for word in pair if word != "true"]
