"""The address of a client of Redis, to compare the destinations of runners."""

from __future__ import annotations

from typing import Any

_DEFAULTS = {"host": "localhost", "port": 6379, "db": 0, "path": None}


def address_of(client: Any) -> tuple[Any, ...]:
    """Return the server and the database; equal for clients of the same database.

    :param client: a ``redis.Redis``. The other options of clients are objects that are never
        equal, such as those for retries.
    """
    pool = client.connection_pool
    given = {**_DEFAULTS, **pool.connection_kwargs}
    return *map(given.get, _DEFAULTS), getattr(pool, "service_name", None)
