"""The tables of a file of tasks, and the statements on them.

Each statement releases the GIL and may wait 5 ms to get it back while the thread has the turn
to write. So a list of rows or keys is one statement, which reads the list from a text of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from wsgi_bg._store.rows import DISCARDED, NO_LIMIT, Outcome, Row, Settings

Statement = tuple[str, Sequence[Any]]

VERSION = 1
"""The version of the files. A newer package opens a file, an older one refuses it."""

_COLUMNS = """
    name TEXT, arguments TEXT, options TEXT, context TEXT, due REAL, attempts INTEGER,
    crashes INTEGER, id TEXT, added REAL
"""
SCHEMA: list[Statement] = [
    (f"CREATE TABLE tasks ({_COLUMNS}, key INTEGER PRIMARY KEY, request INTEGER)", ()),
    ("CREATE INDEX tasks_due ON tasks (due) WHERE due > 0", ()),
    ("CREATE INDEX tasks_late ON tasks (request) WHERE request < 0", ()),
    (
        f"""CREATE TABLE kept ({_COLUMNS}, key INTEGER, request INTEGER, state TEXT,
        begun REAL, ended REAL, error TEXT, traceback TEXT)""",
        (),
    ),
    ("CREATE UNIQUE INDEX kept_id ON kept (id)", ()),
    (
        """CREATE TABLE done (seq INTEGER PRIMARY KEY, id TEXT, name TEXT, added REAL,
        begun REAL, ended REAL)""",
        (),
    ),
    ("CREATE TABLE meta (epoch INTEGER)", ()),
    ("INSERT INTO meta VALUES (0)", ()),
    (f"PRAGMA user_version={VERSION}", ()),
]

SELECT_ONE = [f"SELECT 1 FROM {table} LIMIT 1" for table in ("tasks", "kept", "done")]
READ_DUE = "SELECT * FROM tasks WHERE due > 0 AND due <= ? ORDER BY due, key"
READ_AT_ONCE = "SELECT * FROM tasks WHERE key > ? AND due <= 0 ORDER BY key"
READ_LATE = """
    SELECT * FROM tasks WHERE request < 0 AND due <= 0
    AND request IN (SELECT -value FROM json_each(?))
"""
READ_FROM = "SELECT * FROM tasks WHERE key >= ? ORDER BY key"
READ_ADDED = "SELECT * FROM tasks WHERE request < 0 AND request = -?"
# A forged row may have a text as due, which is greater than all numbers.
NEXT_DUE = "SELECT due, key FROM tasks WHERE due > 0 AND due < 9e999 ORDER BY due, key"
COUNT_WAITING = """
    SELECT count(*) FROM tasks
    WHERE due > 0 AND due > :now AND key NOT IN (SELECT value FROM json_each(:held))
"""
# Does not look into each row: SQLite counts the rows of a table by its pages.
COUNT_LEFT = """
    SELECT (SELECT count(*) FROM tasks)
        - (SELECT count(*) FROM tasks WHERE due > 0 AND due > :now)
        - (SELECT count(*) FROM tasks
           WHERE due <= :now AND key IN (SELECT value FROM json_each(:held)))
"""
READ_DONE = "SELECT id, name, added, begun, ended FROM done ORDER BY seq"

_KEYS = "key IN (SELECT value FROM json_each(?))"
_KEEP = f"INSERT OR REPLACE INTO kept VALUES ({', '.join('?' * 16)})"
_RECORD = """
    INSERT INTO done (id, name, added, begun, ended)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
    json_extract(value, '$[2]'), json_extract(value, '$[3]'), json_extract(value, '$[4]')
    FROM json_each(?)
"""
_POSTPONE = "UPDATE tasks SET due = ?, attempts = ?, crashes = ?, options = ? WHERE key = ?"


@lru_cache
def _insert(rows: int) -> str:
    values = f"({', '.join('?' * len(Row._fields))})"
    # Or replace: a group is stored again if a signal handler raises right after the commit.
    return f"INSERT OR REPLACE INTO tasks VALUES {', '.join([values] * rows)}"


_INSERT_ONE = _insert(1)


def insert(rows: Sequence[Row]) -> list[Statement]:
    """Store rows."""
    if len(rows) == 1:
        return [(_INSERT_ONE, rows[0])]
    chunks = [rows[start : start + 50] for start in range(0, len(rows), 50)]
    return [
        (_insert(len(chunk)), [value for row in chunk for value in row]) for chunk in chunks
    ]


def together(statements: Iterable[Statement]) -> list[Statement]:
    """Store the single rows of several requests by as few statements as possible."""
    rows: Any = [values for text, values in statements if text is _INSERT_ONE]
    others = [each for each in statements if each[0] is not _INSERT_ONE]
    return [*insert(rows), *others]


def delete(keys: Iterable[int]) -> Statement:
    """Delete rows."""
    return f"DELETE FROM tasks WHERE {_KEYS}", (json.dumps(list(keys)),)


def postpone(rows: Sequence[Row]) -> list[Statement]:
    """Change rows that are to run later."""
    return [
        (_POSTPONE, (row.due, row.attempts, row.crashes, row.options, row.key)) for row in rows
    ]


def hold_back(row: Row, keys: Iterable[int]) -> list[Statement]:
    """Change a row that is to run later, and let the rows of ``keys`` wait as long."""
    wait = f"UPDATE tasks SET due = max(due, ?) WHERE {_KEYS}"
    return [*postpone([row]), (wait, (row.due, json.dumps(list(keys))))]


def end(outcomes: Sequence[Outcome], settings: Settings) -> list[Statement]:
    """Delete the rows of tasks that have ended, and keep of them what is to be kept."""
    done = [
        (row.id, row.name, row.added, begun, ended)
        for row, state, begun, ended, _, _ in outcomes
        if state == "done"
    ]
    kept = [outcome for outcome in outcomes if outcome.state in ("failed", "aside")]
    statements = [delete(outcome.row.key for outcome in outcomes)]
    if kept:
        statements += keep([(*row, *rest) for row, *rest in kept])
        statements.append(_prune_kept(settings))
    if done and settings.keep_done[0]:
        statements.append(record(done))
        statements.append(_prune_done(settings))
    return statements


def keep(values: Sequence[Sequence[Any]]) -> list[Statement]:
    """Keep failed tasks."""
    return [(_KEEP, [*most, _encodable(traceback)]) for *most, traceback in values]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a message may have surrogates


def record(done: Sequence[Sequence[Any]]) -> Statement:
    """Keep done tasks."""
    return _RECORD, (json.dumps(done),)


def prune(settings: Settings) -> list[Statement]:
    """Forget tasks that have been kept for long enough."""
    done_by_age = (
        "DELETE FROM done WHERE ended < ?",
        (time.time() - settings.keep_done[1],),
    )
    return [done_by_age, _prune_done(settings), _prune_kept(settings)]


def _prune_done(settings: Settings) -> Statement:
    number = settings.keep_done[0]
    return "DELETE FROM done WHERE seq <= (SELECT max(seq) FROM done) - ?", (number,)


def _prune_kept(settings: Settings) -> Statement:
    number, age = settings.keep_failed
    by_age = "DELETE FROM kept WHERE ended < ?"
    if number == NO_LIMIT:  # there may be many, and the rest would sort all of them
        return by_age, (time.time() - age,)
    return (
        f"{by_age} OR id IN (SELECT id FROM kept ORDER BY ended DESC LIMIT -1 OFFSET ?)",
        (time.time() - age, number),
    )


def take_over(begun: list[int], ended: dict[str, list[int]], epoch: int) -> list[Statement]:
    """Apply the notes of a process that has died.

    :param ended: keys by state.
    """
    now = time.time()
    recorded = f"""INSERT INTO done (id, name, added, begun, ended)
        SELECT id, name, added, 0, ? FROM tasks WHERE {_KEYS}"""
    kept = f"""INSERT OR REPLACE INTO kept
        SELECT *, ?, 0, ?, '', '' FROM tasks WHERE {_KEYS}"""
    return [
        (f"UPDATE tasks SET crashes = crashes + 1 WHERE {_KEYS}", (json.dumps(begun),)),
        (
            f"UPDATE tasks SET attempts = attempts + 1 WHERE {_KEYS}",
            (json.dumps(ended["failed"]),),
        ),
        (recorded, (now, json.dumps(ended["done"]))),
        *((kept, (state, now, json.dumps(ended[state]))) for state in ("failed", "aside")),
        *(delete(keys) for keys in ended.values()),
        ("UPDATE meta SET epoch = ?", (epoch,)),
    ]


def retry(id: str, key: int) -> list[Statement]:  # noqa: A002
    """Make a failed task wait again."""
    sql = """INSERT INTO tasks
        SELECT name, arguments, options, context, ?, 0, 0, id, added, ?, ?
        FROM kept WHERE id = ?"""
    return [(sql, (time.time(), key, key, id)), forget(id)]


def discard(key: int, settings: Settings) -> list[Statement]:
    """Delete the row of a task that has not begun, and keep the id."""
    return [_record_discarded("tasks", "key = ?", key), delete([key]), _prune_done(settings)]


def discard_kept(id: str, settings: Settings) -> list[Statement]:  # noqa: A002
    """Forget a failed task; keep the id of a task that was put aside, which has no end."""
    recorded = _record_discarded("kept", "id = ? AND state = 'aside'", id)
    return [recorded, forget(id), _prune_done(settings)]


def _record_discarded(table: str, where: str, value: object) -> Statement:
    sql = f"""INSERT INTO done (id, name, added, begun, ended)
        SELECT id, name, added, {DISCARDED}, ? FROM {table} WHERE {where}"""
    return sql, (time.time(), value)


def forget(id: str) -> Statement:  # noqa: A002
    """Forget a failed task."""
    return "DELETE FROM kept WHERE id = ?", (id,)
