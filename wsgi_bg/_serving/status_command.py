"""``wsgi-bg status PATH``: print what the tasks of all processes do.

Names and errors come from files, so that characters that are not printable are escaped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence

from wsgi_bg._process.printable import printable
from wsgi_bg._serving.output import local_time, say, table
from wsgi_bg._serving.usage import Parser, UsageError
from wsgi_bg._status.model import NameCounts, ProcessStatus, Snapshot, Times
from wsgi_bg._status.snapshots import take_snapshot
from wsgi_bg.exceptions import OptionError, StoreError

_DESCRIPTION = """\
Print what runs, waits and failed in all processes that write their status into the folder PATH,
and the numbers of the tasks that have ended. The exit status is 0, or 2 for a wrong command or
folder.
"""

_COUNTS = (
    "running",
    "waiting",
    "succeeded",
    "failed",
    "retried",
    "discarded",
    "sent",
    "aside",
    "lost",
)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status.

    :param arguments: those behind ``wsgi-bg status``.
    """
    parser = Parser(prog="wsgi-bg status", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "path", metavar="PATH", help="the folder that the middleware has as its status_path"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        given = parser.parse_args(arguments)
        snapshot = take_snapshot(given.path)
    except OptionError:
        if os.path.isdir(given.path) and not os.access(given.path, os.R_OK | os.X_OK):
            return _complain(f"{given.path!r} cannot be read by this user")
        return _complain(
            f"no process has written its status into {given.path!r}: give the folder that the "
            "middleware has as its status_path, or the folder of a DurableRunner"
        )
    except (UsageError, OSError, StoreError) as exc:
        return _complain(str(exc))
    try:
        say(json.dumps(snapshot.as_dict()) if given.json else _text(snapshot))
    except OSError as exc:
        return _complain(f"the status cannot be printed: {exc}")
    return 0


def _complain(message: str) -> int:
    print(f"wsgi-bg status: {printable(message)}", file=sys.stderr)
    return 2


def _text(snapshot: Snapshot) -> str:
    counts = snapshot.counts
    parts = [
        ", ".join(f"{getattr(counts, name)} {name}" for name in _COUNTS),
        _section(
            "processes",
            ("PID", "STATE", "SINCE", "THREADS", "BATCHES", "HERE", "LAG", "OUTBOX", "COMMAND"),
            map(_process, snapshot.processes),
        ),
        _section(
            "running",
            ("ID", "NAME", "REQUEST", "SINCE", "ATTEMPT", "PID", "THREAD"),
            (
                (
                    task.id or "",
                    task.name,
                    task.request or "",
                    local_time(task.since or 0.0),
                    str(task.attempt),
                    str(task.pid),
                    task.thread or "",
                )
                for task in snapshot.running
            ),
        ),
        _functions(snapshot.names),
        _section(
            "failed",
            ("ID", "NAME", "REQUEST", "ENDED", "ATTEMPT", "PID", "ERROR"),
            (
                (
                    task.id or "",
                    task.name,
                    task.request or "",
                    local_time(task.ended),
                    str(task.attempt),
                    str(task.pid),
                    task.error,
                )
                for task in snapshot.failures
            ),
        ),
        _section(
            "lost",
            ("ID", "NAME", "REQUEST", "SINCE", "PID"),
            (
                (
                    task.id or "",
                    task.name,
                    task.request or "",
                    local_time(task.since or 0.0),
                    str(task.pid),
                )
                for task in snapshot.lost
            ),
        ),
        _section(
            "durable",
            ("ID", "NAME", "STATE", "ADDED", "DUE", "ATTEMPT", "ERROR"),
            (
                (
                    task.id,
                    task.name,
                    task.state,
                    local_time(task.since),
                    local_time(task.due or 0.0),
                    str(task.attempt),
                    task.error,
                )
                for task in snapshot.durable
            ),
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    found = list(rows)
    return f"{title}\n{table(columns, found)}" if found else ""


def _process(process: ProcessStatus) -> Sequence[str]:
    limit = "no limit" if process.max_pending is None else str(process.max_pending)
    return (
        str(process.pid),
        "lives" if process.is_alive else "killed",
        local_time(process.started),
        f"{process.threads_busy} of {process.threads} busy, {process.threads_idle} idle",
        f"{process.pending} of {limit}",
        str(process.run_here),
        "" if process.loop_lag is None else _length(process.loop_lag),
        str(process.outbox),
        process.command,
    )


def _functions(names: Sequence[NameCounts]) -> str:
    shown = [name for name in _COUNTS if any(getattr(each, name) for each in names)]
    titles = ["NAME", *(name.upper() for name in shown)]
    return _section(
        "functions",
        (*titles, "WAIT p50 / p95 / max", "RUN p50 / p95 / max"),
        (
            (
                each.name,
                *(str(getattr(each, name)) for name in shown),
                _times(each.wait),
                _times(each.run),
            )
            for each in names
        ),
    )


def _times(times: Times) -> str:
    if not times.count:
        return ""
    return " / ".join(map(_length, (times.p50, times.p95, times.max)))


def _length(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
