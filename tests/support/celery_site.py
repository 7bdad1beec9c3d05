"""A web server as a process, which tests kill: ``/7`` adds a task that writes the line 7."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import app_that, client, free_port, text_of, wait_until
from tests.support.brokers import Broker
from tests.support.celery_shop import note_line
from wsgi_bg import background_tasks, serve

TIMEOUT = 30.0


class Site:
    """``wsgi_bg.serve`` with a ``CeleryRunner``.

    :param lines: the file that the tasks write, one line each.
    :param options: options of the runner.
    """

    def __init__(self, broker: Broker, folder: Path, lines: Path, **options: Any) -> None:
        self.port = free_port()
        self._log = folder / f"site-{len(list(folder.glob('site-*')))}.log"
        arguments = json.dumps([self.port, broker, str(lines), options])
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.celery_site", arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert wait_until(lambda: self._listens or not self.is_alive, TIMEOUT), self.log
        assert self.is_alive, self.log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        return text_of(self._log)

    @property
    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def order(self, numbers: Iterable[int]) -> None:
        """Make a request for each number, which has to succeed."""
        with client.connect(self.port) as connection:
            for number in numbers:
                assert connection.ask(path=f"/{number}").status == 200, self.log

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT)

    def stop(self) -> None:
        """Stop the server with SIGTERM: the runner has its drain time."""
        self._process.terminate()
        self._process.wait(2 * TIMEOUT)


@contextmanager
def site(broker: Broker, folder: Path, lines: Path, **options: Any) -> Iterator[Site]:
    """Start a site, which is killed at the end if the test has not ended it."""
    started = Site(broker, folder, lines, **options)
    try:
        yield started
    finally:
        if started.is_alive:
            started.kill()


def main(port: int, broker: list[Any], lines: str, options: dict[str, Any]) -> None:
    def add(environ: dict[str, Any]) -> None:
        background_tasks.add_task(note_line, lines, int(environ["PATH_INFO"][1:]))

    app = app_that(add)
    serve(app, port=port, runner=Broker(*broker).runner(**options))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
