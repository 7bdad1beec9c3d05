"""Servers that are killed at random moments lose no task of a response that was a success."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(*, requests: int, kills: int, seed: int, only: str) -> str:
    """Run the benchmark, which checks the tasks, and return its output."""
    command = [sys.executable, "-m", "benchmarks.kill", f"--seed={seed}", f"--only={only}"]
    ended = subprocess.run(
        [*command, f"--requests={requests}", f"--kills={kills}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_server_that_is_killed_loses_no_task_of_a_success() -> None:
    out = killed(requests=60, kills=2, seed=4, only="wsgi_bg")
    assert "lost 0 twice alive 0 order 0" in out


@pytest.mark.slow
def test_workers_and_a_master_that_are_killed_lose_no_task_of_a_success() -> None:
    out = killed(requests=300, kills=8, seed=3, only="gunicorn")
    assert "lost 0 twice alive 0 order 0" in out
    successes = re.search(r"(\d+) successes", out)
    assert successes is not None
    assert int(successes[1]) >= 300
