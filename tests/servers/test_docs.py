"""The page about servers has every set-up, with the results of this suite."""

from __future__ import annotations

import re

import pytest

from tests.servers import docs
from tests.servers.kinds import KINDS
from tests.servers.setups import MISSING, SETUPS, SILENT, Setup
from wsgi_bg._request.servers import SERVERS, Server

KNOWN_BY, _, INSTEAD = range(3)
"""The columns of the table "The set-ups"."""

MARKS = {server.name: server for server in SERVERS}


def in_code(text: str) -> set[str]:
    return set(re.findall("`([^`]*)`", text))


def parts(server: Server) -> set[str]:
    return {server.key, *server.values}


def test_the_promise_is_made_for_every_kind_of_response() -> None:
    assert set(KINDS) <= in_code(docs.PAGE.section("The promise"))


@pytest.mark.parametrize("title", ["The set-ups", "SIGTERM"])
def test_the_tables_have_the_set_ups(title: str) -> None:
    assert list(docs.PAGE.rows(title)) == list(MISSING)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_table_names_the_mark_of_each_server(setup: Setup) -> None:
    cell = in_code(docs.PAGE.rows("The set-ups")[setup.name][KNOWN_BY])
    assert cell <= (parts(MARKS[setup.mark]) if setup.mark else set())
    assert bool(cell) == bool(setup.mark)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_table_names_the_servers_replacement_responses(setup: Setup) -> None:
    cell = docs.PAGE.rows("The set-ups")[setup.name][INSTEAD]
    assert in_code(cell) == set(setup.instead)
    assert ("never answers" in cell) == (SILENT in setup.instead.values())


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_the_page_names_every_mark(server: Server) -> None:
    assert parts(server) <= in_code(docs.PAGE.text.replace("\n", " "))


def test_the_hooks_are_found() -> None:
    titles = {docs.title_of(row[1]) for row in docs.PAGE.rows("SIGTERM").values() if row[1]}
    with_code = {title for title in titles if docs.code_of(title)}
    assert titles - with_code == {"uWSGI", "bjoern"}
