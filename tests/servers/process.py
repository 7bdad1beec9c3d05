"""A server in a process: started, awaited, asked to stop, ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.servers.app import NONCE
from tests.servers.commands import Launch
from tests.servers.control import Control
from tests.servers.gate import ADDRESS
from tests.support import TIMEOUT
from tests.support.client import ask

ROOT = Path(__file__).parents[2]

PATIENT = {"WSGI_BG_TEST_BOUND": "30"}
"""For a process whose tasks stand at the gate while it starts or stops."""

START_TIMEOUT = 30.0  # seconds

_pause = threading.Event()  # never set


def _environment() -> dict[str, str]:
    """The environment without coverage's start, whose SIGTERM handler is not the server's."""
    return {key: os.environ[key] for key in os.environ if not key.startswith("COVERAGE_")}


class Process:
    """A server's process and the child processes."""

    def __init__(
        self, command: list[str], launch: Launch, control: Control, env: Mapping[str, str]
    ) -> None:
        self.port = launch.port
        self.facts: dict[str, Any] = {}
        self._nonce = secrets.token_hex(8)
        self._log = launch.folder / "log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                env={
                    **_environment(),
                    "PYTHONPATH": f"{launch.folder}:{ROOT}",
                    "PYTHONUNBUFFERED": "1",
                    ADDRESS: str(control.port),
                    NONCE: self._nonce,
                    **env,
                },
            )

    def wait_until_up(self) -> None:
        """Wait for the first answer, which fills ``facts``."""
        for _ in range(int(START_TIMEOUT / 0.01)):
            if self._process.poll() is not None:
                break
            with suppress(ConnectionRefusedError):
                self.facts = json.loads(ask(self.port, path="/about").body)
                assert self.facts["nonce"] == self._nonce, "another server has this port"
                return
            _pause.wait(0.01)
        raise AssertionError(f"the server did not start:\n{self.output}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """The output of the process and the child processes."""
        return self._log.read_text(errors="replace")

    def wait_until_it_says(self, text: str) -> None:
        """Wait for a line of the log."""
        for _ in range(int(TIMEOUT / 0.01)):
            if text in self.output:
                return
            _pause.wait(0.01)
        raise AssertionError(f"it did not say {text!r}:\n{self.output}")

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Ask the process to stop, as a service manager does; do not wait."""
        self._process.send_signal(by)

    def wait(self) -> int:
        """Wait for the exit; return the exit status."""
        return self._process.wait(TIMEOUT)

    def end(self) -> None:
        """Stop the process, by SIGKILL if needed."""
        self.stop()
        with suppress(subprocess.TimeoutExpired):
            self.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
