"""Marks for tests that not every Python can pass."""

from __future__ import annotations

import sys

import pytest

needs_threads_at_exit = pytest.mark.skipif(
    (3, 12, 0) <= sys.version_info < (3, 12, 2),
    reason="Python 3.12.0 and 3.12.1 start no thread once the main one has ended (gh-113964)",
)
