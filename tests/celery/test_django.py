"""A worker of a Django application closes old database connections around each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import text_of, wait_until
from tests.support.celery import Shop, filesystem, worker
from tests.support.celery_django import MODULE, query, query_async


@pytest.mark.parametrize(("func", "thread"), [(query, "main"), (query_async, "other")])
def test_a_connection_is_closed_on_the_thread_of_its_task(
    tmp_path: Path, func: Any, thread: str
) -> None:
    broker, path = filesystem(tmp_path), tmp_path / "connections"
    database = {"SITE_DATABASE": str(tmp_path / "database")}
    with worker(broker, tmp_path, "--pool=solo", module=MODULE, environ=database) as started:
        shop = Shop(broker, started, broker.runner())
        shop.send(func, str(path))
        shop.send(func, str(path))
        assert wait_until(lambda: text_of(path).count("\n") == 2), started.log
        started.kill()
    assert text_of(path) == f"closed on the {thread} thread\n" * 2
