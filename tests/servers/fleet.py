"""The servers of a run: the first test that asks for a server starts the server."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from tests.servers.commands import APP, Launch
from tests.servers.control import Control
from tests.servers.process import Process
from tests.servers.setups import Setup
from tests.support import free_port


def start(
    stack: ExitStack,
    setup: Setup,
    control: Control,
    *,
    files: Mapping[str, str] = MappingProxyType({}),
    module: str = APP,
    options: Sequence[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
) -> Process:
    """Start a process of the set-up, which ends with ``stack``; do not wait for the start.

    :param files: texts of files in the process's folder, by name; the folder is importable.
    :param module: the module whose ``application`` is served.
    :param options: appended to the command.
    :param env: added to the environment.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wsgi_bg-")))
    folder.chmod(0o755)  # mod_wsgi's user reads the folder
    for name, text in files.items():
        (folder / name).write_text(text)
    launch = Launch(free_port(), folder, module)
    command = [*setup.command(launch), *options]
    process = Process(command, launch, control, env)
    stack.callback(process.end)
    return process


class Fleet:
    """The servers started so far; a server that did not start fails each of its tests."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._stack = ExitStack()
        self._started: dict[str, Process | AssertionError] = {}

    def get(self, setup: Setup) -> Process:
        """The set-up's process, once the process answers."""
        if setup.name not in self._started:
            self._started[setup.name] = self._start(setup)
        process = self._started[setup.name]
        if isinstance(process, AssertionError):
            raise process
        return process

    def _start(self, setup: Setup) -> Process | AssertionError:
        process = start(self._stack, setup, self._control)
        try:
            process.wait_until_up()
        except AssertionError as exc:
            return exc
        return process

    def close(self) -> None:
        """Stop all servers: ask all first, then wait, so that they end in parallel."""
        for process in self._started.values():
            if isinstance(process, Process):
                process.stop()
        self._stack.close()
