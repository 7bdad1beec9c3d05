"""A process with the engine of the folder ``argv[1]``; further arguments are tasks to add."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.post import FilePost, add, request, send

runner = FilePost(Path(sys.argv[1]))
if sys.argv[2:]:
    request(runner, add(send, *sys.argv[2:]))
else:
    runner.start()
print("ready", flush=True)
sys.stdin.readline()
