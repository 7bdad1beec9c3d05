"""Files by which tasks in other processes tell a test about their calls."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write(path: str, text: object) -> None:
    """Write a file atomically: readers see the whole text or no file."""
    part = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.part")
    part.write_text(str(text), encoding="utf-8")
    part.replace(path)


def append(path: str, line: str) -> list[str]:
    """Append a line; return all lines of the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return Path(path).read_text(encoding="utf-8").splitlines()
