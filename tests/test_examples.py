"""The examples: started as a reader would start them, and asked over a socket."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
TIMEOUT = 20.0  # seconds


class Example(NamedTuple):
    """The commands in the docstring of an example, and the output to expect."""

    name: str
    method: str
    path: str
    form: str
    answer: str
    line: str

    @property
    def source(self) -> str:
        return (FOLDER / self.name).read_text(encoding="utf-8")


EXAMPLES = [
    Example(
        "flask_app.py",
        "POST",
        "/send-notification/ada@example.com",
        "",
        '{"message":"Notification sent in the background"}\n',
        "To ada@example.com: You have news\n",
    ),
    Example(
        "django_app.py",
        "POST",
        "/subscribe",
        "email=ada@example.com",
        "Thank you\n",
        "To ada@example.com: You are subscribed\n",
    ),
    Example(
        "plain_wsgi.py", "GET", "/any/path", "", "Your visit is noted\n", "Visit of /any/path\n"
    ),
    Example(
        "werkzeug_app.py", "POST", "/", "name=Ada", "Ada is on the list\n", "Welcome, Ada\n"
    ),
]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def wait_until(predicate: Callable[[], object], timeout: float = TIMEOUT) -> bool:
    """True if ``predicate`` comes true within ``timeout`` seconds."""
    pause = threading.Event()
    for _ in range(int(timeout / 0.01)):
        if predicate():
            return True
        pause.wait(0.01)
    return False


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


@contextmanager
def serving(
    example: Example, folder: Path, delay: float, *, stop: int = signal.SIGTERM
) -> Iterator[int]:
    """Run the example in ``folder``, with tasks that take ``delay`` seconds; yield the port."""
    said, complaints = folder / "stdout", folder / "stderr"
    with said.open("w") as stdout, complaints.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, FOLDER / example.name, "0"],
            cwd=folder,
            env={**os.environ, "DELAY": str(delay)},
            stdout=stdout,
            stderr=stderr,
        )
    try:
        wait_until(lambda: text_of(said).endswith("\n") or process.poll() is not None)
        greeting, _, port = text_of(said).strip().rpartition(":")
        assert greeting == "Serving on http://127.0.0.1", text_of(complaints)
        yield int(port)
    finally:
        process.send_signal(stop)
        process.wait(TIMEOUT)


def ask(example: Example, port: int) -> str:
    """Return the answer to the example's request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        kind = {"Content-Type": "application/x-www-form-urlencoded"} if example.form else {}
        connection.request(example.method, example.path, example.form or None, kind)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


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
