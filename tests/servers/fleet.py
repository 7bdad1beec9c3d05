"""The servers of a run: each is started when a test first asks for it."""

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
    """Start a process of the set-up, which ends with ``stack``; does not wait for it.

    :param files: what its folder has in it, by name; the folder can be imported from.
    :param module: what it serves the ``application`` of.
    :param options: put behind its command.
    :param env: variables added to its environment.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wsgi_bg-")))
    folder.chmod(0o755)  # mod_wsgi's user reads it
    for name, text in files.items():
        (folder / name).write_text(text)
    launch = Launch(free_port(), folder, module)
    command = [*setup.command(launch), *options]
    process = Process(command, launch, control, env)
    stack.callback(process.end)
    return process


class Fleet:
    """The servers that were asked for so far; one that did not start fails each test."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._stack = ExitStack()
        self._started: dict[str, Process | AssertionError] = {}

    def get(self, setup: Setup) -> Process:
        """The set-up's process, which answers."""
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
        """Stop all: each is asked first, so that they end side by side."""
        for process in self._started.values():
            if isinstance(process, Process):
                process.stop()
        self._stack.close()
