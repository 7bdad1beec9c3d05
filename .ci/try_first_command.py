"""Runs the README's first command as a new user does, and asks the server that it starts.

Usage: try_first_command.py CLONE COMMAND. The port is the one thing that is not as written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

TIMEOUT = 600.0  # seconds, for the installation


def main(clone: str, command: str) -> int:
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command + " --port 0"],
        cwd=clone,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    stop = threading.Timer(TIMEOUT, os.killpg, (process.pid, signal.SIGKILL))
    stop.start()
    try:
        assert process.stdout is not None
        address = next(line.split()[-1] for line in process.stdout if "Serving on" in line)
        request = urllib.request.Request(
            f"{address}/send-notification/ada@example.com", method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            print(response.read().decode().strip())
        log = Path(clone, "log.txt")
        assert not log.exists(), "the answer has waited for the mail"
        pause = threading.Event()
        while not (log.exists() and log.read_text()):
            pause.wait(0.05)
        print(f"log.txt: {log.read_text().strip()}")
    finally:
        stop.cancel()
        os.killpg(process.pid, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
