"""The examples: started as a reader would start them, and asked over a socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import text_of, wait_until
from tests.support.examples import EXAMPLES, FOLDER, Example, ask, serving

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


@each_example
def test_the_task_writes_its_line_to_the_log(example: Example, tmp_path: Path) -> None:
    with serving(example, tmp_path, delay=0) as port:
        assert ask(example, port) == example.answer
        log = tmp_path / "log.txt"
        assert wait_until(lambda: text_of(log) == example.line), text_of(tmp_path / "stderr")


@each_example
def test_the_answer_comes_before_the_log_line(example: Example, tmp_path: Path) -> None:
    # Neither gate nor clock: an answer that waited for this task would never come.
    with serving(example, tmp_path, delay=3600) as port:
        assert ask(example, port) == example.answer
        assert not (tmp_path / "log.txt").exists()


def test_flask_answers_with_the_message_of_fastapis_tutorial(tmp_path: Path) -> None:
    with serving(EXAMPLES[0], tmp_path, delay=0) as port:
        answer = json.loads(ask(EXAMPLES[0], port))
    assert answer == {"message": "Notification sent in the background"}


def test_every_example_is_tested() -> None:
    have_a_module = ["celery_app.py", "durable_app.py"]
    tested = [example.name for example in EXAMPLES] + have_a_module
    assert sorted(file.name for file in FOLDER.glob("*.py")) == sorted(tested)


@each_example
def test_an_example_is_shorter_than_40_lines(example: Example) -> None:
    assert len(example.source.splitlines()) < 40


@each_example
def test_the_docstring_has_the_commands_to_run_and_ask_the_example(example: Example) -> None:
    docstring = example.source.split('"""')[1]
    assert f"python examples/{example.name} [PORT]" in docstring
    assert f"http://127.0.0.1:8080{example.path}\n" in docstring
    assert example.form in docstring
