"""The examples as processes, with the commands of their docstrings."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support import text_of, wait_until

FOLDER = Path(__file__).parents[2] / "examples"
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
