"""Checks by name: ``nox -s lint types`` in an environment with the extra ``dev``.

``nox -s tests-3.13`` makes an environment for that Python and runs the tests there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types"]
nox.options.error_on_missing_interpreters = True

HERE = Path(sys.executable).parent


@nox.session(python=["3.11", "3.12", "3.13", "3.14", "3.15"])
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "--quiet", "-n", "auto", *session.posargs)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Look for mistakes, wrong format, and imports in the wrong direction."""
    session.run(f"{HERE}/ruff", "check", ".")
    session.run(f"{HERE}/ruff", "format", "--check", ".")
    session.run(f"{HERE}/lint-imports")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Check types, and that users' type checkers find a type for each public name."""
    session.run(f"{HERE}/mypy")
    pyright = (f"{HERE}/pyright", "--pythonpath", sys.executable)
    session.run(*pyright)
    # pyright does not follow an editable installation, so it is told of this folder.
    is_complete = ("--verifytypes", "wsgi_bg", "--ignoreexternal")
    session.run(*pyright, *is_complete, env={"PYTHONPATH": "."})
