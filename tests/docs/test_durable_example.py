"""The example of durable tasks: killed before its task has run, and started again."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.support import text_of, wait_until
from tests.support.examples import Example, ask, serving

EXAMPLE = Example(
    "durable_app.py", "POST", "/orders/7", "", '{"message":"Ordered"}\n', "Charged order 7\n"
)


def test_the_task_of_a_killed_process_runs_when_the_example_is_started_again(
    tmp_path: Path,
) -> None:
    with serving(EXAMPLE, tmp_path, delay=3600, stop=signal.SIGKILL) as port:
        assert ask(EXAMPLE, port) == EXAMPLE.answer
    assert text_of(tmp_path / "log.txt") == ""
    with serving(EXAMPLE, tmp_path, delay=0):
        assert wait_until(lambda: text_of(tmp_path / "log.txt") == EXAMPLE.line)


def test_the_docstring_has_the_commands_to_run_and_ask_the_example() -> None:
    docstring = EXAMPLE.source.split('"""')[1]
    assert f"    python examples/{EXAMPLE.name} [PORT]\n" in docstring
    assert "    curl -X POST http://127.0.0.1:8080/orders/7\n" in docstring
