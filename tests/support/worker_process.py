"""A worker of an engine, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import text_of, wait_until

TIMEOUT = 30.0


class WorkerProcess:
    """Starts the worker, and waits until it is ready.

    :param folder: gets the log of the worker.
    :param ready: the worker logs this text when it is ready.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], folder: Path, ready: str
    ) -> None:
        self._log = folder / f"worker-{len(list(folder.glob('worker-*')))}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that a prefork worker dies with its children
            )
        wait_until(lambda: ready in self.log or not self.is_alive, TIMEOUT)
        assert self.is_alive, self.log
        assert ready in self.log, self.log

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        return text_of(self._log)

    def kill(self) -> None:
        """Kill all processes of the worker with SIGKILL."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT)

    def stop(self) -> None:
        if self.is_alive:
            self._process.terminate()
            try:
                self._process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait_for(self, path: Path) -> str:
        """Wait for a file that a task writes; return the text."""
        assert wait_until(path.exists, TIMEOUT), self.log
        return path.read_text(encoding="utf-8")
