"""Celery's filesystem transport with atomic writes: a worker never reads half a message.

kombu's transport writes into the folder that a worker reads. A worker that reads an empty
message too early ends (celery/kombu issue 1551), and no test could go on without a worker.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):  # type: ignore[misc]
    """Writes a message under a temporary name, then renames the whole file."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"  # sorts by time
        part = Path(self.data_folder_out, f"{name}.part")
        part.write_text(dumps(payload), encoding="utf-8")
        part.replace(part.with_suffix(""))


class Transport(filesystem.Transport):  # type: ignore[misc]
    """The transport behind ``filesystem://`` in the processes of the tests."""

    Channel = Channel


def install() -> None:
    TRANSPORT_ALIASES["filesystem"] = f"{__name__}:Transport"
