"""Each test begins with a recorder that records nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from wsgi_bg._request.layer import everywhere
from wsgi_bg._status.recorder import recorder


@pytest.fixture(autouse=True)
def recorder_is_off() -> Iterator[None]:
    recorder.turn_off()
    yield
    recorder.turn_off()
    everywhere.clear()
