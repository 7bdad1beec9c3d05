"""A wrong command line: a program prints one line on standard error, and the status is 2."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UsageError(Exception):
    """The command line is wrong; the message gives the reason in a line."""


class Parser(argparse.ArgumentParser):
    """A parser that raises ``UsageError``, and neither prints nor exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")
