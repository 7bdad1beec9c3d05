"""Celery's filesystem transport, whose messages are seen whole or not at all.

kombu's own writes a message where a worker may be looking for one: read too early it is
empty, and that ends the worker (celery/kombu issue 1551). The rest cannot be tested so.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):  # type: ignore[misc]
    """Gives a message its name, by which it is found, when it is written."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"  # in order
        part = Path(self.data_folder_out, f"{name}.part")
        part.write_text(dumps(payload), encoding="utf-8")
        part.replace(part.with_suffix(""))


class Transport(filesystem.Transport):  # type: ignore[misc]
    """What ``filesystem://`` means in the processes of the tests."""

    Channel = Channel


def install() -> None:
    TRANSPORT_ALIASES["filesystem"] = f"{__name__}:Transport"
